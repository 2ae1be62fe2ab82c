"""Tile sizes, and which tiles a program walks. Integers and traced scalars alike."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.base import AttentionSpec

Scalar = int | jax.Array

# Shared memory that one block can own on compute capability 8.6 and 8.9; 8.0 has 163 KiB.
SHARED_MEMORY_BYTES = 99 * 1024
LEAST_SIZE = 16  # a side of a tensor core's tile


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes of one kernel.

    Attributes:
      block_q, block_kv: query rows and keys of one tile, powers of two from 16 on.
      warps: warps of one program.
      stages: tiles in flight.
    """

    block_q: int
    block_kv: int
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        for name, size in (("block_q", self.block_q), ("block_kv", self.block_kv)):
            if size < LEAST_SIZE or size & (size - 1):
                raise ValueError(f"{name}={size}: a power of two from {LEAST_SIZE} on is due")


class KernelTiles(NamedTuple):
    """The tiles of every kernel for one padded head size and dtype."""

    forward: Tiles
    queries: Tiles  # gradient of the queries, and of the bias
    keys: Tiles  # gradient of keys and values
    memory: Tiles


def padded_size(head_size: int) -> int:
    """The power of two, from 16 on, that holds `head_size` columns."""
    return max(LEAST_SIZE, 1 << (head_size - 1).bit_length())


def kernel_tiles(head_size: int, itemsize: int) -> KernelTiles:
    """Tiles for a padded head size; float32 multiplies without tensor cores, in smaller tiles."""
    if itemsize == 4:
        if head_size <= 64:
            return KernelTiles(
                Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)
            )
        if head_size <= 128:
            return KernelTiles(
                Tiles(32, 32, 8, 1), Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1)
            )
        return KernelTiles(
            Tiles(32, 16, 8, 1), Tiles(16, 32, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 32, 8, 1)
        )
    if head_size <= 64:
        return KernelTiles(
            Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2)
        )
    if head_size <= 128:
        return KernelTiles(
            Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 2), Tiles(64, 32, 8, 2)
        )
    return KernelTiles(
        Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 2)
    )


class Steps(NamedTuple):
    """Tiles [begin, end) of a loop; `is_edge`: some row may not see some key there."""

    begin: Scalar
    end: Scalar
    is_edge: bool


def right_reach(spec: AttentionSpec) -> int | None:
    """Keys s <= t + right_reach are seen by row t; None: no bound."""
    right = None if spec.local_window is None else spec.local_window[1]
    if not spec.is_causal:
        return right
    return 0 if right is None else min(0, right)


def left_reach(spec: AttentionSpec) -> int | None:
    """Keys s >= t - left_reach are seen by row t; None: no bound."""
    return None if spec.local_window is None else spec.local_window[0]


def key_loops(
    spec: AttentionSpec,
    row_begin: Scalar,
    rows: int,
    block_kv: int,
    keys: int,
    key_length: Scalar | None,
    query_length: Scalar | None,
    *,
    is_masked: bool,
) -> list[Steps]:
    """Loops over key tiles for rows [row_begin, row_begin + rows), in ascending order.

    `keys` exist; those from `key_length` on are hidden. No row from `query_length` on sees any.
    `is_masked`: an array hides keys too, so that every tile is an edge.
    """
    right, left = right_reach(spec), left_reach(spec)
    length: Scalar = keys if key_length is None else key_length
    last, every = length, length  # ends of the keys that some row, that each row sees
    if right is not None:
        last = _most(0, _least(last, row_begin + rows + right))
        every = _most(0, _least(every, row_begin + 1 + right))
    first: Scalar = 0
    late: Scalar = 0  # begins of the same
    if left is not None:
        first = _most(0, row_begin - left)
        late = _most(0, row_begin + rows - 1 - left)
    if query_length is not None:
        last = jnp.where(row_begin < query_length, last, 0)
    has_ragged_end = right is not None or key_length is not None or keys % block_kv != 0
    return _loops(first, late, every, last, block_kv, left is not None, has_ragged_end, is_masked)


def query_loops(
    spec: AttentionSpec,
    key_begin: Scalar,
    keys: int,
    block_q: int,
    rows: int,
    query_length: Scalar | None,
    *,
    is_masked: bool,
) -> list[Steps]:
    """Loops over query tiles that see keys [key_begin, key_begin + keys).

    Rows that do not exist are no edge: they have weight 0. A tile of such rows only is left out,
    since its keys may be seen by nobody, and hold any bytes.
    """
    right, left = right_reach(spec), left_reach(spec)
    first: Scalar = 0
    late: Scalar = 0
    if right is not None:
        first = _least(_most(0, key_begin - right), rows)
        late = _most(0, key_begin + keys - 1 - right)
    last: Scalar = rows if query_length is None else _least(rows, query_length)
    every: Scalar = _cdiv(rows, block_q) * block_q
    if left is not None:
        last = _least(last, key_begin + keys + left)
        every = _least(every, key_begin + 1 + left)
    return _loops(first, late, every, last, block_q, right is not None, left is not None, is_masked)


def _loops(
    first: Scalar,
    late: Scalar,
    every: Scalar,
    last: Scalar,
    block: int,
    has_edge_first: bool,
    has_edge_last: bool,
    is_masked: bool,
) -> list[Steps]:
    """Loops over what [first, last) touches; [late, every) holds no edge."""
    begin = _div(first, block)
    end = _most(begin, _cdiv(last, block))
    if is_masked:
        return [Steps(begin, end, True)]
    inner_begin = _least(_most(_cdiv(late, block), begin), end)
    inner_end = _most(_least(_div(every, block), end), inner_begin)
    loops = []
    if has_edge_first:
        loops.append(Steps(begin, inner_begin, True))
    loops.append(Steps(inner_begin, inner_end, False))
    if has_edge_last:
        loops.append(Steps(inner_end, end, True))
    return loops


def _div(a: Scalar, b: int) -> Scalar:
    """Floor of a / b, for a >= 0."""
    return a // b if isinstance(a, int) else lax.div(a, jnp.int32(b))


def _cdiv(a: Scalar, b: int) -> Scalar:
    """Ceiling of a / b, for a >= 0."""
    return _div(a + (b - 1), b)


def _least(a: Scalar, b: Scalar) -> Scalar:
    both = isinstance(a, int) and isinstance(b, int)
    return min(a, b) if both else jnp.minimum(jnp.int32(a), jnp.int32(b))


def _most(a: Scalar, b: Scalar) -> Scalar:
    both = isinstance(a, int) and isinstance(b, int)
    return max(a, b) if both else jnp.maximum(jnp.int32(a), jnp.int32(b))
