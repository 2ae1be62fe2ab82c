"""How the programs of a kernel walk over its tiles: 128 rows of one head each.

Rows are queries, and a tile steps along their keys; or keys, along the queries that see them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax

from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.mosaic_gpu import axes
from dpfa_jax.kernels.mosaic_gpu.schedule import balanced
from dpfa_jax.kernels.mosaic_gpu.steps import (
    Scalar,
    Sizes,
    StepRange,
    at_least_one,
    cdiv,
    key_steps,
    least,
    left_reach,
    loop,
    masks_only_last,
    query_steps,
    right_reach,
    within_key_length,
)

# What heads that start together step along stays in half of the second-level cache.
_CACHE_BYTES = 24 * 2**20
# What a tile costs beside its steps, in steps.
_TILE_COST = 0.7
_MANY = 2**30


class Lengths(NamedTuple):
    """References to query and key lengths (B,) that cut steps off; None: none do."""

    query: Any = None
    key: Any = None


class Size(NamedTuple):
    """`Sizes` and nothing else."""

    rows: int
    block_kv: int


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows of one head, and the steps along their columns.

    `count`: steps of the tiles that the program did before, which says where its rings stand.
    `turns`: query heads of a key head, along each of which its keys step in turn.
    `part`: which of the tiles that share all this it is: each has a part of the values' columns.
    """

    batch: Any
    head: Any
    block: Any
    row_begin: Any
    steps: StepRange
    key_length: Scalar
    query_length: Any
    count: Any
    turns: int = 1
    part: Any = 0

    def value_columns(self, count: int) -> Any:
        """Its part of the values' columns, and of the results': so many of them."""
        return pl.ds(self.part * count, count)

    def before(self, step: Any, turn: Any = 0) -> Any:
        """Steps of the program before `step` of this tile, of its `turn`-th turn."""
        if not (isinstance(turn, int) and turn == 0):
            step = step + turn * (self.steps.end - self.steps.begin)
        return self.count + (step - self.steps.begin)

    @property
    def after(self) -> Any:
        """Steps of the program when this tile is done."""
        return self.before(self.steps.end, self.turns - 1)

    @property
    def last(self) -> Any:
        """The last step, which there always is."""
        return self.steps.end - 1


@dataclasses.dataclass(frozen=True)
class Tiling:
    """All tiles of a call.

    Attributes:
      spec, tile: of the call.
      batch, heads, queries, keys: its sizes; `keys` as they are, `queries` with the padding.
      head_bytes: what one head more has of the arrays that tiles step along.
      heads_first: number the tiles of one head in all batch rows together.
      has_lengths: whether query or key lengths cut steps off.
      turns: as `Tile`.
      parts: tiles of the same rows of a head, one for each part of the values' columns.
    """

    spec: AttentionSpec
    tile: Sizes
    batch: int
    heads: int
    queries: int
    keys: int
    head_bytes: int
    heads_first: bool
    has_lengths: bool
    turns: int = 1
    parts: int = 1

    @property
    def _rows_and_columns(self) -> tuple[int, int]:
        return self.queries, self.keys

    def steps_of(
        self, row_begin: Scalar, rows: int, key_length: Scalar, query_length: Any
    ) -> StepRange:
        """Steps along what some of a tile's rows need."""
        step = self.tile.block_kv
        return key_steps(self.spec, row_begin, rows, step, key_length, query_length)

    @property
    def blocks(self) -> int:
        """Blocks of rows of one head, each of `parts` tiles."""
        return cdiv(self._rows_and_columns[0], self.tile.rows)

    @property
    def is_whole(self) -> bool:
        """Whether every step shows every key to every row, and all tiles have as many steps."""
        begin, full_begin, full_end, end = self.steps(0, self.keys, None)
        reaches = (left_reach(self.spec), right_reach(self.spec))
        return (
            reaches == (None, None)
            and not self.has_lengths
            and (begin, end) == (full_begin, full_end)
        )

    @functools.cached_property
    def step_counts(self) -> list[Any]:
        """Steps of each block of rows where no length cuts any off: host numbers."""
        ranges = [self.steps(block, self.keys, None) for block in range(self.blocks)]
        return [end - begin for begin, _, _, end in ranges]

    def schedule(self, processors: int) -> Any:
        """`schedule.balanced` of these tiles; one row a processor, none without a tile."""
        costs: list[Any] = []
        for count in self.step_counts:
            costs += [count * self.turns + _TILE_COST] * self.parts
        pairs = self.batch * self.heads
        together = max(1, _CACHE_BYTES // max(1, self.head_bytes))
        programs = min(processors, pairs * len(costs))
        return balanced(tuple(costs), pairs, programs, together)

    def before_last(self, here: Tile, body: Callable[..., Any], carry: Any) -> Any:
        """`carry` after `body(step, carry, masked=...)` of each step of a tile but its last."""
        steps, last = here.steps, here.last
        masked, plain = (functools.partial(body, masked=masked) for masked in (True, False))
        if left_reach(self.spec) is not None:
            carry = loop(steps.begin, least(steps.full_begin, last), masked, carry)
        carry = loop(steps.full_begin, least(steps.full_end, last), plain, carry)
        has_query_lengths = here.query_length is not None
        if not masks_only_last(self.spec, self.tile, has_query_lengths=has_query_lengths):
            carry = loop(steps.full_end, last, masked, carry)
        return carry

    def at(self, lengths: Lengths, number: Any, count: Any) -> Tile:
        """The tile of a number."""
        tiles_of_pair = self.blocks * self.parts
        pair = lax.div(number, jnp.int32(tiles_of_pair))
        block: Any = number - pair * tiles_of_pair
        part: Any = 0
        if self.parts > 1:
            part = lax.rem(block, jnp.int32(self.parts))
            block = lax.div(block, jnp.int32(self.parts))
        inner = self.batch if self.heads_first else self.heads
        outer = lax.div(pair, jnp.int32(inner))
        batch, head = outer, pair - outer * inner
        if self.heads_first:
            batch, head = head, batch
        key_length: Scalar = self.keys
        if lengths.key is not None:
            key_length = jnp.clip(lengths.key[batch], 0, self.keys)
        query_length = None if lengths.query is None else lengths.query[batch]
        steps = self.steps(block, key_length, query_length)
        rows = block * self.tile.rows
        return Tile(
            batch, head, block, rows, steps, key_length, query_length, count, self.turns, part
        )  # fmt: skip

    def steps(self, block: Any, key_length: Scalar, query_length: Any) -> StepRange:
        """Of one tile; one that hides every column where there would be none."""
        rows = self.tile.rows
        steps = self.steps_of(block * rows, rows, key_length, query_length)
        return at_least_one(steps, cdiv(self._rows_and_columns[1], self.tile.block_kv))


class KeyTiling(Tiling):
    """Of tiles whose rows are keys, and whose columns are the queries that see them.

    Heads are key heads; `turns`: query heads of each.
    """

    @property
    def _rows_and_columns(self) -> tuple[int, int]:
        return self.keys, self.queries

    def steps_of(
        self, row_begin: Scalar, rows: int, key_length: Scalar, query_length: Any
    ) -> StepRange:
        """As `Tiling.steps_of`, of keys along the queries that see them."""
        step = self.tile.block_kv
        steps = query_steps(self.spec, row_begin, rows, step, self.queries)
        return within_key_length(steps, row_begin, rows, key_length)


@dataclasses.dataclass(frozen=True)
class Walk:
    """One program's way over its tiles: those of its row of the schedule.

    Attributes:
      tiling: all tiles.
      lengths: those that cut steps off.
      schedule: reference to what `Tiling.schedule` gave.
    """

    tiling: Tiling
    lengths: Lengths
    schedule: Any

    def _number(self, index: Any) -> Any:
        return self.schedule[lax.axis_index(axes.PROGRAM), index + 1]

    def _at(self, number: Any, count: Any) -> Tile:
        tile = self.tiling.at(self.lengths, number, count)
        # Never smaller, which the compiler cannot know: it would unroll the loop over the steps of
        # each tile, and run out of registers.
        steps = StepRange(*(least(step, number + _MANY) for step in tile.steps))
        return dataclasses.replace(tile, steps=steps)

    def each(self, body: Callable[[Tile, Callable[[], Tile], Any, Any], Any], carry: Any) -> Any:
        """Steps done, and `carry` after `body(tile, next tile, whether there is one, carry)`."""
        total = self._number(-1)

        def turn(index: Any, state: Any) -> Any:
            number, count, carry = state
            following = self._number(index + 1)
            here = self._at(number, count)

            def next_tile() -> Tile:
                return self._at(following, here.after)

            carry = body(here, next_tile, index + 1 < total, carry)
            return following, here.after, carry

        state = (self._number(0), jnp.int32(0), carry)
        _, count, carry = lax.fori_loop(0, total, turn, state)
        return count, carry

    def first(self) -> Tile:
        """The first tile."""
        return self._at(self._number(0), jnp.int32(0))

    def beyond(self, total: Any) -> Tile:
        """The last tile once more, `total` steps later: what stands for the next one behind it."""
        return self._at(self._number(self._number(-1)), total)


def constant(table: np.ndarray) -> jax.Array:
    """`table` as a function's result: the partitioner takes no function that closes over arrays."""
    return jax.jit(lambda: jnp.asarray(table))()
