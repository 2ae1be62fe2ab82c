"""Plain softmax attention in O(T + S) memory: loops over blocks of queries and of keys.

The last block of a ragged length starts early enough to be full and overlaps the one before it.
Rows written twice get the same values; keys and rows already counted are hidden. So nothing is
padded and every block has one static shape.
Source: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory" (2021); Dao (2023).
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from dpfa_jax.kernels import manual_axes, masks, tiles
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, SoftmaxRows, group_size

# One block serves up to this many logits of a head: there a loop costs more than it saves.
ONE_BLOCK = 512 * 512
# Up to this many logits the weights are kept for the backward pass: making them anew costs more.
KEPT_WEIGHTS = 128 * 128
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


class SoftmaxResults(NamedTuple):
    """Normalised output, log-sum-exp, and what the backward pass takes; all as accumulated.

    `weights` where they are few enough to keep, else `rows`, of which they are made anew.
    """

    output: Float[Array, "B T N H"]
    lse: Float[Array, "B T N"]
    weights: Float[Array, "B N T S"] | None
    rows: SoftmaxRows | None


def keeps_weights(spec: AttentionSpec, query_length: int, key_length: int) -> bool:
    """Whether `forward` gives the weights themselves, and not the rows that they are made of."""
    size = query_length * key_length
    return size <= min(KEPT_WEIGHTS, ONE_BLOCK) and spec.logits_soft_cap is None


# Gradients under way: query, bias (None where there is none), key, value.
_Sums = tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]


def forward(spec: AttentionSpec, inputs: AttentionInputs) -> SoftmaxResults:
    """Attention of one call, normalised."""
    problem = Problem(spec, inputs)
    value, is_shielded = _shield(spec, inputs)
    blocks = Blocks.of(problem.query_length, problem.key_length)

    def tile_of(i: Int[Array, ""] | int, j: Int[Array, ""] | int) -> tiles.Tile:
        return problem.tile(blocks, problem.query, inputs.key, value, i, j, count_rows_once=False)

    def unshielded(values: Float[Array, "B t K G h"]) -> Float[Array, "B t K G H"]:
        return tiles.unshielded(values) if is_shielded else values

    def finish(softmax: tiles.Softmax) -> tuple[jax.Array, jax.Array, SoftmaxRows]:
        return tiles.normalised(softmax._replace(values=unshielded(softmax.values)))

    if blocks.is_single:
        weights = rows = None
        if keeps_weights(spec, blocks.rows, blocks.keys):
            values, lse, weights = tiles.attend_keeping_weights(spec, tile_of(0, 0))
            output = unshielded(values)
            weights = weights.reshape(weights.shape[0], problem.heads, *weights.shape[3:])
        else:
            output, lse, rows = finish(tiles.attend(spec, tile_of(0, 0)))
            rows = SoftmaxRows(*map(problem.by_head, rows))
        return SoftmaxResults(problem.by_head(output), problem.by_head(lse), weights, rows)

    dtype = tiles.accumulator(inputs.query.dtype)
    batch, _, key_heads, groups, _ = problem.query.shape
    per_row = (batch, key_heads, groups, blocks.rows)

    def query_block(i: Int[Array, ""], done: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start, _ = problem.starts(blocks, i, 0)
        first, stop = masks.key_blocks(spec, start, blocks.rows, problem.key_length, blocks.keys)
        empty = tiles.Softmax(
            manual_axes.zeros(per_row, dtype, problem.axes, -jnp.inf),
            manual_axes.zeros(per_row, dtype, problem.axes),
            manual_axes.zeros(
                (batch, blocks.rows, key_heads, groups, value.shape[-1]), dtype, problem.axes
            ),
        )
        softmax = jax.lax.fori_loop(
            first,
            stop,
            lambda j, so_far: tiles.merge(so_far, tiles.attend(spec, tile_of(i, j))),
            empty,
        )
        output, lse, rows = finish(softmax)
        return tuple(
            put(whole, part, start) for whole, part in zip(done, (output, lse, *rows), strict=True)
        )

    length = problem.query_length
    of_rows = (batch, length, key_heads, groups)
    nothing = tuple(
        manual_axes.zeros(shape, dtype, problem.axes)
        for shape in ((*of_rows, problem.head_dim), of_rows, of_rows, of_rows)
    )
    done = jax.lax.fori_loop(0, blocks.num_rows, query_block, nothing)
    output, lse, maximum, total = map(problem.by_head, done)
    return SoftmaxResults(output, lse, None, SoftmaxRows(maximum, total))


def backward(
    spec: AttentionSpec,
    inputs: AttentionInputs,
    known: Float[Array, "B N T S"] | SoftmaxRows,
    cotangent: Float[Array, "B T N H"],
    output_dot: Float[Array, "B T N"] | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of query, key, value and bias in the accumulator's type.

    `known`: the softmax weights, or the rows of which they are made anew. `output_dot`: row-wise
    product of output and cotangent; may be None where the whole matrix is one block.
    """
    problem = Problem(spec, inputs)
    query, key, value = problem.query, inputs.key, inputs.value
    if masks.hides(spec, inputs):
        # A hidden entry has weight 0, which removes a factor only if that factor is finite.
        key, value = tiles.finite_or_zero(key), tiles.finite_or_zero(value)
        if not spec.is_causal or inputs.query_lengths is not None or inputs.mask is not None:
            query = tiles.finite_or_zero(query)
    cotangent = problem.by_group(cotangent)
    if isinstance(known, SoftmaxRows):
        known = SoftmaxRows(*map(problem.by_group, known))
    else:
        known = known.reshape(known.shape[0], key.shape[2], problem.groups, *known.shape[2:])
    output_dot = None if output_dot is None else problem.by_group(output_dot)
    blocks = Blocks.of(problem.query_length, problem.key_length)

    def gradients_of(
        i: Int[Array, ""] | int, j: Int[Array, ""] | int
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        tile = problem.tile(blocks, query, key, value, i, j, count_rows_once=True)
        if not isinstance(known, SoftmaxRows):
            return tiles.attend_backward(spec, tile, known, None, cotangent, output_dot)
        if blocks.is_single:
            weights = tiles.recomputed_weights(spec, tile, known)
            return tiles.attend_backward(spec, tile, *weights, cotangent, output_dot)
        assert output_dot is not None
        row, _ = problem.starts(blocks, i, j)
        rows = SoftmaxRows(*(cut(x, row, blocks.rows) for x in known))
        weights = tiles.recomputed_weights(spec, tile, rows)
        of_rows = (cut(x, row, blocks.rows) for x in (cotangent, output_dot))
        return tiles.attend_backward(spec, tile, *weights, *of_rows)

    if blocks.is_single:
        d_query, d_key, d_value, d_biased = gradients_of(0, 0)
        d_bias = None if inputs.bias is None else _reduced(d_biased, inputs.bias.shape)
        return problem.by_head(d_query), d_key, d_value, d_bias

    dtype = tiles.accumulator(query.dtype)

    def key_block(j: Int[Array, ""], sums: _Sums) -> _Sums:
        _, column = problem.starts(blocks, 0, j)
        first, stop = masks.query_blocks(
            spec, column, blocks.keys, problem.query_length, blocks.rows
        )
        shape = (key.shape[0], blocks.keys, *key.shape[2:])

        def query_block(i: Int[Array, ""], inner: _Sums) -> _Sums:
            d_query, d_bias, d_key, d_value = inner
            row, _ = problem.starts(blocks, i, j)
            tile_query, tile_key, tile_value, d_biased = gradients_of(i, j)
            d_query = put(d_query, cut(d_query, row, blocks.rows) + tile_query, row)
            if d_bias is not None:
                d_bias = _add_bias(d_bias, d_biased, row, column)
            return d_query, d_bias, d_key + tile_key, d_value + tile_value

        d_query, d_bias, d_key, d_value = sums
        none = manual_axes.zeros(shape, dtype, problem.axes)
        d_query, d_bias, block_key, block_value = jax.lax.fori_loop(
            first, stop, query_block, (d_query, d_bias, none, none)
        )
        d_key = put(d_key, cut(d_key, column, blocks.keys) + block_key, column)
        d_value = put(d_value, cut(d_value, column, blocks.keys) + block_value, column)
        return d_query, d_bias, d_key, d_value

    def zeros(shape: tuple[int, ...]) -> jax.Array:
        return manual_axes.zeros(shape, dtype, problem.axes)

    start = (
        zeros(query.shape),
        None if inputs.bias is None else zeros(inputs.bias.shape),
        zeros(key.shape),
        zeros(value.shape),
    )
    d_query, d_bias, d_key, d_value = jax.lax.fori_loop(0, blocks.num_keys, key_block, start)
    return problem.by_head(d_query), d_key, d_value, d_bias


def _shield(spec: AttentionSpec, inputs: AttentionInputs) -> tuple[jax.Array, bool]:
    """Values whose hidden non-finite bytes reach no row; whether a marker column was added."""
    if masks.is_row_dependent(spec, inputs):
        return tiles.shielded_values(inputs.value), True
    seen = masks.visible_keys(inputs)
    if seen is None:
        return inputs.value, False
    zero = jnp.zeros((), inputs.value.dtype)
    return jnp.where(seen[:, :, None, None], inputs.value, zero), False


def _reduced(d_biased: Float[Array, "B K G t s"], shape: tuple[int, ...]) -> jax.Array:
    """Sum over the axes along which a bias of `shape` (b, n, t, s) was broadcast."""
    batch, key_heads, groups, t, s = d_biased.shape
    d_biased = d_biased.reshape(batch, key_heads * groups, t, s)
    axes = tuple(axis for axis in range(4) if shape[axis] == 1)
    return jnp.sum(d_biased, axis=axes, keepdims=True) if axes else d_biased


def _add_bias(
    d_bias: Float[Array, "b n T S"],
    d_biased: Float[Array, "B K G t s"],
    row: Int[Array, ""],
    column: Int[Array, ""],
) -> Float[Array, "b n T S"]:
    """`d_bias` plus the gradient of one rectangle, at its place."""
    part = _reduced(d_biased, d_bias.shape)
    start = (0, 0, row if d_bias.shape[2] > 1 else 0, column if d_bias.shape[3] > 1 else 0)
    there = jax.lax.dynamic_slice(d_bias, start, part.shape)
    return jax.lax.dynamic_update_slice(d_bias, there + part, start)
