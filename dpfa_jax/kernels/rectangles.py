"""Blocks of queries and of keys, and the arrays of a call cut to the rectangle of two of them.

The last block of a ragged length starts early enough to be full and overlaps the one before it.
Keys and rows already counted are hidden. So nothing is padded and every block has one static shape.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from dpfa_jax.kernels import manual_axes, masks, tiles
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, group_size

# One block serves up to this many logits of a head: there a loop costs more than it saves.
ONE_BLOCK = 512 * 512
BLOCK_Q = 256
BLOCK_KV = 512


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of one call, chosen by shape alone."""

    rows: int
    keys: int
    num_rows: int
    num_keys: int

    @classmethod
    def of(cls, query_length: int, key_length: int) -> "Blocks":
        """Blocks for `query_length` x `key_length` logits."""
        if query_length * key_length <= ONE_BLOCK:
            rows, keys = query_length, key_length
        else:
            rows, keys = min(query_length, BLOCK_Q), min(key_length, BLOCK_KV)
        num_rows, num_keys = (
            max(1, math.ceil(length / max(1, size)))
            for length, size in ((query_length, rows), (key_length, keys))
        )
        return cls(rows, keys, num_rows, num_keys)

    @property
    def is_single(self) -> bool:
        """Whether the whole matrix is one block."""
        return self.num_rows == 1 and self.num_keys == 1


class Problem:
    """Grouped views of one call's arrays, from which any rectangle can be cut."""

    def __init__(self, spec: AttentionSpec, inputs: AttentionInputs):
        _, self.query_length, self.heads, self.head_dim = inputs.query.shape
        self.spec, self.inputs = spec, inputs
        self.groups = group_size(inputs)
        self.key_length = inputs.key.shape[1]
        self.query = self.by_group(inputs.query)
        self.axes = manual_axes.varying_axes(*inputs[:7])

    def by_group(self, x: Float[Array, "B T N *h"]) -> Float[Array, "B T K G *h"]:
        """Heads split into (key head, member of its group)."""
        batch, length, heads = x.shape[:3]
        return x.reshape(batch, length, heads // self.groups, self.groups, *x.shape[3:])

    def by_head(self, x: Float[Array, "B T K G *h"]) -> Float[Array, "B T N *h"]:
        """Inverse of `by_group`."""
        return x.reshape(x.shape[0], x.shape[1], self.heads, *x.shape[4:])

    def tile(
        self,
        blocks: Blocks,
        query: Float[Array, "B T K G H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K h"],
        block_q: Int[Array, ""] | int,
        block_kv: Int[Array, ""] | int,
        *,
        count_rows_once: bool,
    ) -> tiles.Tile:
        """Rectangle (block_q, block_kv). Keys (and rows, if so asked) counted before are hidden."""
        inputs = self.inputs
        if blocks.is_single:
            rows, columns = jnp.arange(blocks.rows), jnp.arange(blocks.keys)
            seen = masks.visible(self.spec, inputs, inputs.mask, rows, columns)
            return self._tile(query, key, value, inputs.bias, seen)
        row, column = self.starts(blocks, block_q, block_kv)
        rows, columns = row + jnp.arange(blocks.rows), column + jnp.arange(blocks.keys)
        mask = self._cut(inputs.mask, row, blocks.rows, column, blocks.keys)
        bias = self._cut(inputs.bias, row, blocks.rows, column, blocks.keys)
        seen = masks.visible(self.spec, inputs, mask, rows, columns)
        if self.key_length % blocks.keys:
            fresh = (columns >= block_kv * blocks.keys)[None, None, None, :]
            seen = fresh if seen is None else seen & fresh
        if count_rows_once and self.query_length % blocks.rows:
            fresh = (rows >= block_q * blocks.rows)[None, None, :, None]
            seen = fresh if seen is None else seen & fresh
        return self._tile(
            cut(query, row, blocks.rows),
            cut(key, column, blocks.keys),
            cut(value, column, blocks.keys),
            bias,
            seen,
        )

    def starts(
        self, blocks: Blocks, block_q: Int[Array, ""] | int, block_kv: Int[Array, ""] | int
    ) -> tuple[jax.Array, jax.Array]:
        """First row and first key of a rectangle."""
        return (
            jnp.minimum(block_q * blocks.rows, self.query_length - blocks.rows),
            jnp.minimum(block_kv * blocks.keys, self.key_length - blocks.keys),
        )

    def _tile(
        self,
        query: Float[Array, "B t K G H"],
        key: Float[Array, "B s K H"],
        value: Float[Array, "B s K h"],
        bias: Float[Array, "b n t s"] | None,
        seen: Bool[Array, "b n t s"] | None,
    ) -> tiles.Tile:
        return tiles.Tile(
            query,
            key,
            value,
            tiles.grouped(bias, self.heads, self.groups),
            tiles.grouped(seen, self.heads, self.groups),
        )

    def _cut(
        self,
        per_head: Shaped[Array, "b n T S"] | None,
        row: Int[Array, ""],
        rows: int,
        column: Int[Array, ""],
        keys: int,
    ) -> Shaped[Array, "b n t s"] | None:
        if per_head is not None and per_head.shape[2] > 1:
            per_head = jax.lax.dynamic_slice_in_dim(per_head, row, rows, axis=2)
        if per_head is not None and per_head.shape[3] > 1:
            per_head = jax.lax.dynamic_slice_in_dim(per_head, column, keys, axis=3)
        return per_head


def cut(
    x: Float[Array, "B T *rest"], start: Int[Array, ""], size: int
) -> Float[Array, "B t *rest"]:
    """`size` rows of axis 1 from `start`."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)


def put(
    whole: Float[Array, "B T *rest"], part: Float[Array, "B t *rest"], start: Int[Array, ""]
) -> Float[Array, "B T *rest"]:
    """`whole` with `part` written over axis 1 from `start`."""
    return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)
