"""Which steps a tile takes: plain integer arithmetic, on ints and on traced scalars alike."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, overload

import jax
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.base import AttentionSpec

Scalar = int | jax.Array


class Sizes(Protocol):
    """Rows of a tile, and columns (keys, unless the rows are keys) of one step."""

    @property
    def rows(self) -> int:
        """Of a tile."""
        ...

    @property
    def block_kv(self) -> int:
        """Columns of one step."""
        ...


def loop(begin: Scalar, end: Scalar, body: Callable[..., Any], carry: Any) -> Any:
    """`lax.fori_loop`, and no loop at all where host numbers say that it has no or one turn."""
    if isinstance(begin, int) and isinstance(end, int) and end - begin <= 1:
        return body(begin, carry) if begin < end else carry
    return lax.fori_loop(begin, end, body, carry)


def masks_only_last(spec: AttentionSpec, tile: Sizes, *, has_query_lengths: bool) -> bool:
    """Whether no step but a program's last can hide a key from a row on its right."""
    if has_query_lengths:
        return False
    # The diagonal of a program whose rows divide a step stays inside that step.
    return right_reach(spec) in ((None, 0) if tile.block_kv % tile.rows == 0 else (None,))


class StepRange(NamedTuple):
    """Steps [begin, end) of a loop over tiles; those of [full_begin, full_end) need no mask."""

    begin: Scalar
    full_begin: Scalar
    full_end: Scalar
    end: Scalar


@overload
def cdiv(a: int, b: int) -> int: ...
@overload
def cdiv(a: jax.Array, b: int) -> jax.Array: ...
def cdiv(a: Scalar, b: int) -> Scalar:
    """Ceiling of a / b, for a >= 0."""
    return (a + b - 1) // b if isinstance(a, int) else lax.div(a + (b - 1), jnp.int32(b))


def _fdiv(a: Scalar, b: int) -> Scalar:
    return a // b if isinstance(a, int) else lax.div(a, jnp.int32(b))


def least(a: Scalar, b: Scalar) -> Scalar:
    """Smaller of the two; an int where both are."""
    both = isinstance(a, int) and isinstance(b, int)
    return min(a, b) if both else jnp.minimum(jnp.int32(a), jnp.int32(b))


def most(a: Scalar, b: Scalar) -> Scalar:
    """Larger of the two; an int where both are."""
    both = isinstance(a, int) and isinstance(b, int)
    return max(a, b) if both else jnp.maximum(jnp.int32(a), jnp.int32(b))


def within(step: Scalar, begin: Scalar, end: Scalar) -> Scalar:
    """`step`, moved into [begin, end]."""
    return least(most(step, begin), end)


def _when(condition: bool | jax.Array, value: Scalar) -> Scalar:
    if isinstance(condition, bool):
        return value if condition else 0
    return jnp.where(condition, jnp.int32(value), jnp.int32(0))


def right_reach(spec: AttentionSpec) -> int | None:
    """Keys s <= t + right_reach are seen by row t; None: no bound."""
    right = None if spec.local_window is None else spec.local_window[1]
    if not spec.is_causal:
        return right
    return 0 if right is None else min(0, right)


def left_reach(spec: AttentionSpec) -> int | None:
    """Keys s >= t - left_reach are seen by row t; None: no bound."""
    return None if spec.local_window is None else spec.local_window[0]


def is_dense(spec: AttentionSpec) -> bool:
    """Whether neither causality nor a window hides a key."""
    return right_reach(spec) is None and left_reach(spec) is None


def key_steps(
    spec: AttentionSpec,
    row_begin: Scalar,
    rows: int,
    block_kv: int,
    key_length: Scalar,
    query_length: Scalar | None,
) -> StepRange:
    """Key tiles that query rows [row_begin, row_begin + rows) of one program need.

    `key_length` is the number of keys that exist; a row at or past `query_length` sees none.
    """
    right, left = right_reach(spec), left_reach(spec)
    # End of the keys that some row, that each row sees.
    last, every = key_length, key_length
    if right is not None:
        last = most(0, least(last, row_begin + rows + right))
        every = most(0, least(every, row_begin + 1 + right))
    # Begin of the keys that some row, that each row sees.
    first: Scalar = 0
    late: Scalar = 0
    if left is not None:
        first = most(0, row_begin - left)
        late = most(0, row_begin + rows - 1 - left)
    if query_length is not None:
        last = _when(query_length > row_begin, last)
        every = _when(query_length >= row_begin + rows, every)
    begin = _fdiv(first, block_kv)
    end = most(begin, cdiv(last, block_kv))
    full_begin = least(most(cdiv(late, block_kv), begin), end)
    full_end = most(least(_fdiv(every, block_kv), end), full_begin)
    return StepRange(begin, full_begin, full_end, end)


def at_least_one(steps: StepRange, most_steps: int) -> StepRange:
    """`steps`, with a last one that hides every key where there was none."""
    begin = least(steps.begin, most_steps - 1)
    end = most(least(steps.end, most_steps), begin + 1)
    full_begin = least(most(steps.full_begin, begin), end)
    full_end = most(least(steps.full_end, end), full_begin)
    return StepRange(begin, full_begin, full_end, end)


def query_steps(
    spec: AttentionSpec, key_begin: Scalar, keys: int, block_q: int, num_queries: int
) -> StepRange:
    """Query tiles that see keys [key_begin, key_begin + keys); lengths are left to the mask."""
    right, left = right_reach(spec), left_reach(spec)
    first: Scalar = 0
    late: Scalar = 0
    if right is not None:
        first = least(most(0, key_begin - right), num_queries)
        late = most(0, key_begin + keys - 1 - right)
    last: Scalar = num_queries
    every: Scalar = num_queries
    if left is not None:
        last = least(last, key_begin + keys + left)
        every = least(every, key_begin + 1 + left)
    begin = _fdiv(first, block_q)
    end = most(begin, cdiv(last, block_q))
    full_begin = least(most(cdiv(late, block_q), begin), end)
    full_end = most(least(_fdiv(every, block_q), end), full_begin)
    return StepRange(begin, full_begin, full_end, end)


def first_program(spec: AttentionSpec, row_begin: Scalar, keys: int) -> Scalar:
    """First of the programs, of `keys` keys each, that need the query tile that begins there.

    Of those before a program that needs it, all from this one on do (`query_steps`).
    """
    left = left_reach(spec)
    return 0 if left is None else _fdiv(most(0, row_begin - left), keys)


def within_key_length(
    steps: StepRange, key_begin: Scalar, keys: int, key_length: Scalar
) -> StepRange:
    """`steps` of a program that owns keys [key_begin, key_begin + keys): none if they do not exist.

    Where only some exist, every step needs the mask.
    """
    if isinstance(key_begin, int) and isinstance(key_length, int):
        begin, full_begin, full_end, end = steps
        if key_begin >= key_length:
            return StepRange(begin, begin, begin, begin)
        return steps if key_begin + keys <= key_length else StepRange(begin, end, end, end)
    begin, full_begin, full_end, end = (jnp.int32(x) for x in steps)
    end = jnp.where(key_begin < key_length, end, begin)
    is_whole = key_begin + keys <= key_length
    full_begin = jnp.where(is_whole, full_begin, end)
    return StepRange(begin, full_begin, jnp.where(is_whole, full_end, end), end)
