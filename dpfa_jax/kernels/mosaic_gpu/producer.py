"""The warpgroup that loads what the tiles of a walk read: a ring of key tiles and one of values."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.mosaic_gpu.layouts import tiled_shared
from dpfa_jax.kernels.mosaic_gpu.tiles import COMPUTE_WARPGROUPS, ForwardTiles
from dpfa_jax.kernels.mosaic_gpu.walk import Tile, Walk


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

    def run(
        self,
        walk: Walk,
        arrays: Any,
        load_values: Callable[[Tile, Any, Any], None],
        *,
        pairs: Any = None,
        crosses: bool,
        values_cross: bool = False,
    ) -> None:
        """Loads all that the tiles of a walk read, and sees every slot freed.

        Args:
          walk: the program's tiles.
          arrays: has `query` and `key`.
          load_values: of a tile, a step and its count: loads the step's values.
          pairs: reader of masks and biases, None without them.
          crosses: the last step of a tile begins the logits of the next, of the walk's last tile
            logits that nobody reads: each tile's last step is the same program.
          values_cross: it reads values then, too.
        """

        def tile_body(here: Tile, following: Any, has_next: Any, carry: Any) -> Any:
            del following, has_next

            @pl.loop(here.steps.begin, here.steps.end)
            def _(step):
                count = here.before(step)
                self.load("key", arrays.key, here, step, count)
                # Behind the keys, which need not wait for the tile before.
                pl.when(step == here.steps.begin)(lambda: self.load_query(arrays.query, here))
                if pairs is not None:
                    pairs.load(count, here.batch, here.head, here.block, step)
                load_values(here, step, count)

            return carry

        total, _ = walk.each(tile_body, ())
        keys = values = total
        if crosses:
            again = walk.beyond(total)
            self.load("key", arrays.key, again, again.steps.begin, total)
            self.load_query(arrays.query, again)
            if values_cross:
                load_values(again, again.steps.begin, total)
                values = total + 1
            keys = total + 1
        for part in range(0 if crosses else COMPUTE_WARPGROUPS):
            plgpu.barrier_wait(self.barriers["query_free"].at[part])

        self.drain("key", keys, keys)
        self.drain("value", values, total)
        if pairs is not None:
            pairs.drain(total)

    def drain(self, name: str, loaded: Any, freed: Any) -> None:
        """Leaves no arrival of a ring unseen: of so many tiles loaded, the first `freed` are."""

        @pl.loop(jnp.maximum(loaded - self.tile.stages, 0), freed)
        def _(count):
            plgpu.barrier_wait(self.barriers[name + "_free"].at[self.slot(count)])
