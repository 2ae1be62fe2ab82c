"""The warpgroup that makes the next tile's noise under this one's products, and stores answers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from dpfa_jax.kernels.mosaic_gpu.layouts import WGMMA, tiled_shared
from dpfa_jax.kernels.mosaic_gpu.noise import Stream, stream_of, tile_normals
from dpfa_jax.kernels.mosaic_gpu.tiles import COMPUTE_WARPGROUPS, ForwardTiles
from dpfa_jax.kernels.mosaic_gpu.walk import Tile, Walk


@dataclasses.dataclass(frozen=True)
class NoiseStage:
    """Noise of one tile in shared memory, and with `tile.overlaps` its answer in the same place.

    Attributes:
      tile: sizes, with a noise warpgroup.
      columns: of a tile.
    """

    tile: ForwardTiles
    columns: int

    @property
    def _chunks(self) -> int:
        """Arrays of so many columns that make one warpgroup's noise."""
        return self.columns // self.tile.noise_columns

    def scratch(self, dtype: Any) -> tuple[Any, dict[str, Any]]:
        """Shared memory, for `split`, and barriers; `dtype`: of the answer."""
        tile = self.tile
        chunks = COMPUTE_WARPGROUPS * self._chunks
        noise = tiled_shared((chunks, tile.block_q, tile.noise_columns), jnp.float32)
        place = (2 * COMPUTE_WARPGROUPS, tile.block_q, self.columns)
        both = plgpu.RefUnion(noise, tiled_shared(place, dtype)) if tile.overlaps else noise
        return both, {
            name: plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS) for name in ("noise", "noise_used")
        }

    def split(self, both: Any) -> dict[str, Any]:
        """References to what lies in the shared memory."""
        return dict(zip(("noise", "output"), both if self.tile.overlaps else [both], strict=False))

    def output(self, shared: dict[str, Any], warpgroup: Any) -> Any:
        """Where a warpgroup's answer waits to be stored, with `tile.overlaps`."""
        # Every other block, so that it lies in what its own noise has left.
        return shared["output"].at[warpgroup * 2]

    def noise(self, shared: dict[str, Any], warpgroup: Any) -> jax.Array:
        """One warpgroup's noise."""
        chunks = self._chunks
        some = [
            plgpu.load(shared["noise"].at[warpgroup * chunks + chunk], layout=WGMMA)
            for chunk in range(chunks)
        ]
        return jnp.concatenate(some, axis=1)

    def run(
        self,
        walk: Walk,
        arrays: Any,
        output: Any,
        shared: dict[str, Any],
        barriers: dict[str, Any],
        *,
        simulate: bool,
        beside: Callable[[Stream, Any, Any], None] | None = None,
    ) -> None:
        """All noise of a walk.

        Args:
          walk: the program's.
          arrays: references that `stream_of` reads.
          output: where answers go, with `tile.overlaps`.
          shared: of the program.
          barriers: "noise", at which noise is there, and "noise_used", at which it is read and the
            answer has its place.
          simulate: whether in the simulator.
          beside: makes more of the same stream, from a row on, for a warpgroup.
        """
        tile, chunks, columns = self.tile, self._chunks, self.tile.noise_columns

        def fill(here: Tile, warpgroup: Any) -> None:
            stream = stream_of(arrays, here.batch, here.head)
            first = here.part * self.columns

            # Few columns at a time: this warpgroup owns few registers.
            @pl.loop(0, chunks)
            def _(chunk):
                shared["noise"].at[warpgroup * chunks + chunk][...] = tile_normals(
                    stream, here.row_begin + warpgroup * tile.block_q, first + chunk * columns,
                    (tile.block_q, columns), simulate=simulate,
                )  # fmt: skip

            if beside is not None:
                beside(stream, here.row_begin + warpgroup * tile.block_q, warpgroup)
            plgpu.commit_smem()
            plgpu.barrier_arrive(barriers["noise"].at[warpgroup])

        def store(here: Tile, warpgroup: Any) -> None:
            """Sends one warpgroup's answer off, and waits until its place is free."""
            rows = pl.ds(here.row_begin + warpgroup * tile.block_q, tile.block_q)
            target = output.at[here.batch, rows, here.head, here.value_columns(self.columns)]
            plgpu.copy_smem_to_gmem(self.output(shared, warpgroup), target)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        # Loops, not copies for each warpgroup: a generator takes a second to lower.
        def tile_body(here: Tile, following: Callable[[], Tile], has_next: Any, carry: Any) -> Any:
            @pl.loop(0, COMPUTE_WARPGROUPS)
            def _(warpgroup):
                plgpu.barrier_wait(barriers["noise_used"].at[warpgroup])
                if tile.overlaps:
                    store(here, warpgroup)
                pl.when(has_next)(functools.partial(fill, following(), warpgroup))

            return carry

        pl.loop(0, COMPUTE_WARPGROUPS)(functools.partial(fill, walk.first()))
        walk.each(tile_body, ())
