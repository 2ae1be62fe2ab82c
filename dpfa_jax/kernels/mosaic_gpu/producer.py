"""The warpgroup that loads what the tiles of a walk read: a ring of key tiles and one of values."""

import dataclasses
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.mosaic_gpu.layouts import tiled_shared
from dpfa_jax.kernels.mosaic_gpu.tiles import COMPUTE_WARPGROUPS, ForwardTiles
from dpfa_jax.kernels.mosaic_gpu.walk import Tile


def scratch(
    tile: ForwardTiles,
    head_size: int,
    dtype: Any,
    *,
    columns: int | None = None,
    value_copies: int = 1,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shared memory of queries and of the rings of keys and values, and barriers.

    `columns`: of a tile's part of the values; None: all.
    `value_copies`: arrivals that make a slot of the values whole.
    """
    rows, stages = COMPUTE_WARPGROUPS, tile.stages
    ring = (stages, tile.block_kv)
    shared = {
        "query": tiled_shared((rows, tile.block_q, head_size), dtype),
        "key": tiled_shared((*ring, head_size), dtype),
        "value": tiled_shared((*ring, columns or head_size), dtype),
    }
    barriers = {
        "query": plgpu.Barrier(num_barriers=rows),
        "query_free": plgpu.Barrier(num_barriers=rows),
        "key": plgpu.Barrier(num_barriers=stages),
        "value": plgpu.Barrier(num_arrivals=value_copies, num_barriers=stages),
        "key_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
        "value_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
        "turn": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
    }
    return shared, barriers


@dataclasses.dataclass(frozen=True)
class Producer:
    """Loads into named arrays of shared memory.

    A ring `name` has a barrier of that name, at which its tiles arrive, and one `name`_free.

    Attributes:
      tile: sizes.
      group: query heads of one key head.
      shared, barriers: of the program, those of `scratch` among them.
    """

    tile: ForwardTiles
    group: int
    shared: dict[str, Any]
    barriers: dict[str, Any]

    def slot(self, count: Any) -> Any:
        """Of the rings, that of a program's step `count`."""
        return lax.rem(jnp.int32(count), jnp.int32(self.tile.stages))

    def free_slot(self, name: str, count: Any) -> Any:
        """The slot of step `count`, once all warpgroups are done with what lies there."""
        slot = self.slot(count)

        @pl.when(count >= self.tile.stages)
        def _():
            plgpu.barrier_wait(self.barriers[name + "_free"].at[slot])

        return slot

    def load(
        self, name: str, array: Any, here: Tile, step: Any, count: Any, columns: Any = slice(None)
    ) -> Any:
        """The rows of one step of a (B, S, K, H) array, into the slot of its ring returned.

        `columns`: those that the ring takes; zeros where they run past the end.
        """
        slot = self.free_slot(name, count)
        kv_head = lax.div(here.head, jnp.int32(self.group))
        source = array.at[here.batch, self.keys(step), kv_head, columns]
        plgpu.copy_gmem_to_smem(source, self.shared[name].at[slot], self.barriers[name].at[slot])
        return slot

    def keys(self, step: Any) -> Any:
        """Keys of one step."""
        return pl.ds(step * self.tile.block_kv, self.tile.block_kv)

    def load_query(self, query: Any, here: Tile) -> None:
        """The query rows of a tile, once those of the tile before are spent."""
        block_q = self.tile.block_q
        for part in range(COMPUTE_WARPGROUPS):

            @pl.when(here.count > 0)
            def _(part=part):
                plgpu.barrier_wait(self.barriers["query_free"].at[part])

            rows = pl.ds(here.row_begin + part * block_q, block_q)
            plgpu.copy_gmem_to_smem(
                query.at[here.batch, rows, here.head],
                self.shared["query"].at[part],
                self.barriers["query"].at[part],
            )

    def drain(self, name: str, loaded: Any, freed: Any) -> None:
        """Leaves no arrival of a ring unseen: of so many tiles loaded, the first `freed` are."""

        @pl.loop(jnp.maximum(loaded - self.tile.stages, 0), freed)
        def _(count):
            plgpu.barrier_wait(self.barriers[name + "_free"].at[self.slot(count)])
