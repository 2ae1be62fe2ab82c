"""Plain softmax attention in O(T + S) memory: loops over blocks of queries and of keys.

Rows that two blocks have in common get the same values from both (`rectangles`).
Source: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory" (2021); Dao (2023).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpfa_jax.kernels import manual_axes, masks, rectangles, tiles
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, SoftmaxRows
from dpfa_jax.kernels.rectangles import Blocks, Problem, cut, put

# Up to this many logits the weights are kept for the backward pass: making them anew costs more.
KEPT_WEIGHTS = 128 * 128


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
    return size <= min(KEPT_WEIGHTS, rectangles.ONE_BLOCK) and spec.logits_soft_cap is None


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
