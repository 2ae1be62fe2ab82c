"""How the two backward kernels walk over their tiles: what a tile owns, and whose steps are whose.

A tile owns 128 rows: keys and values, or queries and cotangents. Each compute warpgroup has 64 of
them and a warp that serves it, which loads what the next tile owns while the warpgroup is at this
one's steps, and stores what it made of this one while it is at the next one's. The results wait in
the place of operands that are spent, so that both fit.

No warp waits for ever. With n slots, a place is loaded for tile i when the results of tile i - n
have left it, and those have been made when the compute warpgroup has done its steps. These wait for
rings, whose producer waits for nothing but steps before: of the tile or, as it runs on, of tiles
before. So, in the order of tiles and steps, each wait is for something earlier. Each program has a
tile (`Tiling.schedule`) and each tile a step (`steps.at_least_one`); the first n tiles of a
program, and with it a program's only one, wait for no place. Each barrier is waited on once an
arrival: `own` by the warpgroup, `made` by the warp, before the next load there, so none runs two
phases ahead.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.mosaic_gpu import tiles
from dpfa_jax.kernels.mosaic_gpu.steps import Scalar, StepRange, cdiv, within
from dpfa_jax.kernels.mosaic_gpu.tiles import COMPUTE_WARPGROUPS
from dpfa_jax.kernels.mosaic_gpu.walk import KeyTiling, Tile, Tiling, Walk

MOST_SLOTS = 2


def slots_that_fit(owned_of: Callable[[int], dict[str, Any]], others: dict[str, Any]) -> int:
    """Slots for what a tile owns: two where shared memory holds them beside the `others`."""
    whole = tiles.SHARED_MEMORY_ALIGNMENT
    used = 0
    for x in (*owned_of(MOST_SLOTS).values(), *others.values()):
        size = math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
        used += cdiv(size, whole) * whole
    return MOST_SLOTS if used <= tiles.SHARED_MEMORY_BYTES else 1


@dataclasses.dataclass(frozen=True)
class Owned:
    """Places in shared memory of what the tiles of a program own, one a slot and warpgroup.

    Attributes:
      shared, barriers: of the kernel; the first axis of arrays that tiles own counts places.
      slots: tiles that have a place at a time.
    """

    shared: dict[str, Any]
    barriers: dict[str, Any]
    slots: int

    @staticmethod
    def barriers_of(slots: int, copies: int) -> dict[str, Any]:
        """`copies`: that fill one place."""
        places = slots * COMPUTE_WARPGROUPS
        return {
            "own": plgpu.Barrier(num_arrivals=copies, num_barriers=places),
            "made": plgpu.Barrier(num_barriers=places),
        }

    def place(self, index: Any, warpgroup: Any) -> Any:
        """Of the program's tile number `index`."""
        return lax.rem(jnp.int32(index), jnp.int32(self.slots)) * COMPUTE_WARPGROUPS + warpgroup

    def await_loaded(self, place: Any) -> None:
        """Compute warpgroup: its operands are there."""
        plgpu.barrier_wait(self.barriers["own"].at[place])

    def hand_over(self, place: Any) -> None:
        """Compute warpgroup: its results lie there."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.barriers["made"].at[place])

    def serve(
        self,
        walk: Walk,
        warpgroup: Any,
        operands: Callable[[Tile, Any], dict[str, Any]],
        results: Callable[[Tile, Any], dict[str, Any]],
    ) -> None:
        """One warp's part; `operands`, `results`: by name of a tile's and warpgroup's."""

        def load(here: Tile, index: Any) -> None:
            place = self.place(index, warpgroup)
            for name, source in operands(here, warpgroup).items():
                plgpu.copy_gmem_to_smem(
                    source, self.shared[name].at[place], self.barriers["own"].at[place]
                )

        def tile_body(here: Tile, following: Any, has_next: Any, index: Any) -> Any:
            def load_next() -> None:
                pl.when(has_next)(lambda: load(following(), index + 1))

            if self.slots > 1:
                load_next()
            place = self.place(index, warpgroup)
            plgpu.barrier_wait(self.barriers["made"].at[place])
            for name, target in results(here, warpgroup).items():
                plgpu.copy_smem_to_gmem(self.shared[name].at[place], target)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if self.slots == 1:
                load_next()
            return index + 1

        load(walk.first(), jnp.int32(0))
        walk.each(tile_body, jnp.int32(0))


class Loops(NamedTuple):
    """Which loops over the steps of a tile are there, in their order, for one of its warpgroups.

    Steps that show its rows nothing are another warpgroup's; then come some that need a mask, those
    that need none, more with a mask, and again another's.
    """

    skips_first: bool
    masks_first: bool
    masks_last: bool
    skips_last: bool


def own_steps(tiling: Tiling, steps: StepRange, row_begin: Scalar, key_length: Scalar) -> StepRange:
    """Of a tile's `steps`, those of the warpgroup whose rows begin there."""
    rows = tiling.tile.rows // COMPUTE_WARPGROUPS
    own = tiling.steps_of(row_begin, rows, key_length, None)
    return StepRange(*(within(step, steps.begin, steps.end) for step in own))


def loops_of(tiling: Tiling) -> Loops:
    """Host arithmetic: a loop that has a turn in no tile is not even compiled."""
    found = Loops(False, False, False, False)
    if tiling.has_lengths:  # all of a tile whose keys exist in part, or the last keys of a row's
        owns_keys = isinstance(tiling, KeyTiling)
        found = Loops(False, owns_keys, not owns_keys, True)
    for block in range(tiling.blocks):
        steps = tiling.steps(block, tiling.keys, None)
        for part in range(COMPUTE_WARPGROUPS):
            row_begin = block * tiling.tile.rows + part * tiling.tile.rows // COMPUTE_WARPGROUPS
            own = own_steps(tiling, steps, row_begin, tiling.keys)
            here = Loops(
                bool(steps.begin < own.begin),
                bool(own.begin < own.full_begin),
                bool(own.full_end < own.end),
                bool(own.end < steps.end),
            )
            found = Loops(*(x or y for x, y in zip(found, here, strict=True)))
    return found


def run_own_steps(
    loops: Loops,
    steps: StepRange,
    own: StepRange,
    body: Callable[[Any, bool], None],
    skip: Callable[[Any], None],
) -> None:
    """body(step, masked) over a warpgroup's own steps, skip(step) over the tile's others."""
    parts = (
        (loops.skips_first, steps.begin, own.begin, skip),
        (loops.masks_first, own.begin, own.full_begin, lambda step: body(step, True)),
        (True, own.full_begin, own.full_end, lambda step: body(step, False)),
        (loops.masks_last, own.full_end, own.end, lambda step: body(step, True)),
        (loops.skips_last, own.end, steps.end, skip),
    )
    for is_there, begin, end, run in parts:
        if is_there:
            pl.loop(begin, end)(run)


def serve(
    warpgroup: Any, load: Callable[[], None], serve_one: Callable[[Any], None], simulate: bool
) -> None:
    """The third warpgroup: one warp streams, one serves each compute warpgroup."""

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _() -> None:
        if not simulate:
            plgpu.set_max_registers(24, action="decrease")

        @plgpu.warp_map
        def _(warp: Any) -> None:
            pl.when(warp == 0)(load)
            pl.when((warp > 0) & (warp <= COMPUTE_WARPGROUPS))(lambda: serve_one(warp - 1))
