"""Which tiles a kernel walks: plain integer arithmetic, on ints and on traced scalars alike."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, overload

import jax
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.base import AttentionSpec, ExampleReadout

Scalar = int | jax.Array

# Shared memory that one block of a Hopper GPU can own, less room for barriers.
SHARED_MEMORY_BYTES = 227 * 1024 - 1024
SHARED_MEMORY_ALIGNMENT = 1024  # of each array in it
WARPGROUP_ROWS = 64
COMPUTE_WARPGROUPS = 2
MAX_HEAD_SIZE = 256
# Past this the accumulators of dK and dV, 64 keys each, do not fit the registers of a warpgroup.
MAX_HEAD_SIZE_ONE_WARPGROUP = 128


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


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """Tile sizes of the forward kernel.

    Attributes:
      block_q: query rows of one compute warpgroup; a program owns two such blocks.
      block_kv: keys of one step.
      stages: key and value tiles in flight.
      ahead: the next step's logits are begun together with a step's weighted values. Needs
        registers for the weights of one step beside the logits of the next.
      noise_warpgroup: a spare warpgroup makes the noise of a release during the key loop,
      noise_columns: so many columns at a time (else: no noise in this kernel; a pass over its plain
        answer releases it).
      pair_stages: tiles of mask and bias in flight.
      overlaps: a tile's end runs under the next one's first products. Else its answer waits in the
        place of its queries, and the next tile's queries are loaded when it has left.
    """

    block_q: int = 64
    block_kv: int = 128
    stages: int = 2
    ahead: bool = True
    noise_warpgroup: bool = False
    noise_columns: int = 16
    pair_stages: int = 2
    overlaps: bool = True

    def __post_init__(self) -> None:
        if self.block_q % WARPGROUP_ROWS or self.block_kv % 64 or self.stages < 2:
            raise ValueError(f"{self} is no tiling: block_q % 64, block_kv % 64, stages >= 2")

    @property
    def rows(self) -> int:
        """Query rows of one program."""
        return COMPUTE_WARPGROUPS * self.block_q

    def shared_bytes(self, head_size: int, pair_bytes: int = 0, *, columns: int = 0) -> int:
        """Shared memory of one program, for 16-bit inputs.

        `pair_bytes`: mask and bias of a key. `columns`: a tile's part of the values; 0: all.
        """
        columns = columns or head_size
        q = self.rows * head_size * 2
        kv = self.stages * self.block_kv * (head_size + columns) * 2
        noise = self.rows * columns * 4 if self.noise_warpgroup else 0
        pairs = self.pair_stages * self.block_kv * pair_bytes
        # With a noise warpgroup the answer takes the noise's place.
        output = self.rows * columns * 2 if self.overlaps and not self.noise_warpgroup else 0
        return q + kv + noise + pairs + output + self.rows * 4


NOISE_BESIDE_KEYS = 1024


def makes_noise_beside(
    spec: AttentionSpec, head_size: int, keys: int, *, has_public_maximum: bool = False
) -> bool:
    """Whether an example release's noise is made beside the products, or else in a pass after them.

    As measured on an H200. Of the call alone, not of what a gradient needs: one noise must not hide
    two roundings of one answer. Above head size 128 no place for it is left.
    """
    if not isinstance(spec.readout, ExampleReadout) or head_size > MAX_HEAD_SIZE_ONE_WARPGROUP:
        return False
    if head_size == 64:
        return has_public_maximum
    return is_dense(spec) and keys >= NOISE_BESIDE_KEYS


def forward_tiles(
    spec: AttentionSpec,
    head_size: int,
    keys: int,
    *,
    has_public_maximum: bool = False,
    pair_bytes: int | None = None,
    noise_pass: bool | None = None,
) -> ForwardTiles:
    """Tiles for a padded head size and a number of keys, as measured on an H100 and an H200.

    `pair_bytes`: shared memory that mask and bias of one key need; None without them.
    `noise_pass`: whether a pass of its own makes the noise of an example release; False: only where
    it has no place beside the products; None: `makes_noise_beside` decides.
    """
    is_beside = isinstance(spec.readout, ExampleReadout) and not noise_pass
    if noise_pass is None:
        is_beside = makes_noise_beside(spec, head_size, keys, has_public_maximum=has_public_maximum)
    columns = 8 if has_public_maximum and is_dense(spec) else 16
    beside = ForwardTiles(noise_warpgroup=True, noise_columns=columns)
    # Without a maximum the logits of a step end with its weights, which leaves room for wider ones.
    is_wide = has_public_maximum and is_dense(spec) and keys >= 1024
    alone = ForwardTiles(block_kv=256 if is_wide else 128, ahead=False)
    is_alone = head_size == 64 and pair_bytes is None and (is_wide or not has_public_maximum)
    for candidate in (
        *((beside,) if is_beside else ()),
        *((alone,) if is_alone else ()),
        ForwardTiles(),
        ForwardTiles(pair_stages=1),
        ForwardTiles(block_kv=64),
        ForwardTiles(block_kv=64, pair_stages=1),
    ):
        for overlaps in (True, False):
            found = dataclasses.replace(candidate, overlaps=overlaps)
            if found.shared_bytes(head_size, pair_bytes or 0) <= SHARED_MEMORY_BYTES:
                return found
    raise ValueError(f"head_size={head_size}: no tile of the forward kernel fits")


def value_columns(head_size: int) -> int:
    """Columns of the values that one tile of the memory kernel sums, of a padded head size.

    Its sums, one block of products and 128 keys of logits fill the registers of 64 rows.
    """
    return min(head_size, 128)


def memory_tiles(head_size: int) -> ForwardTiles:
    """Tiles of the memory kernel for a padded head size."""
    for block_kv in (128, 64):
        tile = ForwardTiles(block_kv=block_kv, noise_warpgroup=True, noise_columns=8)
        bytes_used = tile.shared_bytes(head_size, columns=value_columns(head_size))
        if bytes_used <= SHARED_MEMORY_BYTES:
            return tile
    raise ValueError(f"head_size={head_size}: no tile of the memory kernel fits")


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Tile sizes of the two backward kernels (rows are those of one warpgroup)."""

    block_q_dq: int = 64
    block_kv_dq: int = 64
    block_q_dkv: int = 64
    block_kv_dkv: int = 64
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class FusedTiles:
    """Of the one kernel that makes all three gradients; its tiles are 64 by 64.

    Attributes:
      heads: key heads, of all examples, whose programs start side by side. More of them are fewer
        programs of one head at a time, which wait less for each other and share fewer loads.
    """

    heads: int = 16


# Tiles of queries and cotangents in flight in the one kernel.
FUSED_STAGES = 2


def adders_and_places(head_size: int) -> tuple[int, int]:
    """Warps that add dQ in the one kernel, each every so many-th tile, and tiles of dQ they share.

    A round of counter, addition and fence may take as long as there are warps, in tiles. Places are
    dealt in turn to the warps and to the two compute warpgroups: three warps where there is room
    for six, that is at head size 64, else two.
    """
    rows = WARPGROUP_ROWS * head_size * 2  # bytes of a tile in 16 bits
    numbers = 2 * cdiv(FUSED_STAGES * WARPGROUP_ROWS * 4, SHARED_MEMORY_ALIGNMENT)
    pairs = COMPUTE_WARPGROUPS**2 * WARPGROUP_ROWS * WARPGROUP_ROWS * 2
    owned_and_streamed = 2 * (COMPUTE_WARPGROUPS + FUSED_STAGES) * rows
    left = SHARED_MEMORY_BYTES - owned_and_streamed - pairs - numbers * SHARED_MEMORY_ALIGNMENT
    for adders in (3, 2):
        places = math.lcm(adders, COMPUTE_WARPGROUPS)
        if places * 2 * rows <= left:  # in float32
            return adders, places
    raise ValueError(f"head_size={head_size}: no tile of the one backward kernel fits")


@dataclasses.dataclass(frozen=True)
class WideTiles:
    """Of the two kernels above head size 128; their tiles are 64 by 64.

    Attributes:
      stages: tiles of queries in flight.
      cotangent_stages: tiles of cotangents in flight.
      pair_stages: tiles of mask and bias in flight.
      key_stages: tiles of keys and logit gradients in flight, in the kernel of dQ.
    """

    stages: int = 2
    cotangent_stages: int = 2
    pair_stages: int = 2
    key_stages: int = 3

    def shared_bytes(self, head_size: int, pair_bytes: int | None = None) -> tuple[int, int]:
        """Shared memory of one program of each kernel.

        `pair_bytes`: of mask and bias, as `ForwardTiles`, None without them. Keys are the rows
        here: what is the same for each key, another 4 bytes a column, may count as none there.
        """
        rows = WARPGROUP_ROWS * head_size * 2
        pairs = COMPUTE_WARPGROUPS * WARPGROUP_ROWS * WARPGROUP_ROWS * 2

        def whole(size: int) -> int:
            return -(-size // SHARED_MEMORY_ALIGNMENT) * SHARED_MEMORY_ALIGNMENT

        streamed = (self.stages + self.cotangent_stages) * rows
        numbers = 2 * whole(self.stages * WARPGROUP_ROWS * 4)
        arrays = 0
        if pair_bytes is not None:  # of half the rows for which they count
            columns = self.pair_stages * WARPGROUP_ROWS
            arrays = whole(columns * (pair_bytes // 2 + 2 * 4)) + SHARED_MEMORY_ALIGNMENT
        return (
            2 * rows + streamed + numbers + 2 * pairs + arrays,
            COMPUTE_WARPGROUPS * rows + self.key_stages * (rows + pairs),
        )


# With fewer queries, that is fewer tiles of a program, waiting for turns costs more than two
# products, and with fewer keys passes over the sum of dQ do. With causality programs have half as
# many tiles, and their lengths differ.
LONG_BACKWARD = 2048
LONG_CAUSAL_BACKWARD = 16384


def backward_tiles(
    spec: AttentionSpec, head_size: int, length: int, *, pair_bytes: int | None = None
) -> BackwardTiles | FusedTiles | WideTiles:
    """Tiles for a padded head size and a length, as measured on an H100 and an H200 where T = S.

    `length`: the lesser of T and S. Programs of many keys and few queries would spend their time
    waiting for each other, one addition to a tile of dQ after the other.

    The same for any order of additions as for one, which leaves only the waiting out. A window
    leaves a program few tiles, whatever the number of keys: two kernels.

    `pair_bytes`: as `forward_tiles`.
    """
    if head_size > MAX_HEAD_SIZE_ONE_WARPGROUP:
        for wide in (
            WideTiles(stages=3, cotangent_stages=3, key_stages=4),
            WideTiles(),
            WideTiles(cotangent_stages=1),
            WideTiles(cotangent_stages=1, pair_stages=1),
        ):
            if max(wide.shared_bytes(head_size, pair_bytes)) <= SHARED_MEMORY_BYTES:
                return wide
        raise ValueError(f"head_size={head_size}: no tile of the backward kernels fits")
    if pair_bytes is None and spec.local_window is None:
        if not spec.is_causal and length >= LONG_BACKWARD:
            return FusedTiles(heads=8)
        if spec.is_causal and length >= LONG_CAUSAL_BACKWARD:
            return FusedTiles(heads=32 if head_size == 64 else 16)
    longer = BackwardTiles(block_kv_dq=128)
    rows = COMPUTE_WARPGROUPS * longer.block_q_dq + longer.stages * longer.block_kv_dq
    bytes_used = rows * head_size * 4 + longer.stages * longer.block_kv_dq * (pair_bytes or 0)
    return longer if head_size == 64 and bytes_used <= SHARED_MEMORY_BYTES else BackwardTiles()


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
