"""Backward kernels: gradients of queries, of keys and values, and of a bias. No atomics.

Each program owns what it writes and sums over the rest in a fixed order, so that a call gives the
same bits every time. Source: Dao, "FlashAttention-2" (2023).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.triton import logits, tiles
from dpfa_jax.kernels.triton.launch import launch
from dpfa_jax.kernels.triton.logits import Arrays, Place
from dpfa_jax.kernels.triton.tiles import KernelTiles, Scalar, Tiles


class BackwardArrays(NamedTuple):
    """What the kernels read beside the inputs.

    `cotangent` is zero in rows that saw no key. The others are (B, N, T): weights are
    power(logit - shift) * factor in the base of the call, and `shift` is +inf in such rows;
    `factor` is None where it is 1; `delta` is the row-wise product of output and cotangent, less
    the cotangent of the log-sum-exp.
    """

    cotangent: Any
    shift: Any
    delta: Any
    factor: Any = None


class _Rows(NamedTuple):
    """Query rows of one head, as loaded."""

    query: jax.Array
    cotangent: jax.Array
    shift: jax.Array
    delta: jax.Array
    factor: jax.Array | None


def _load_rows(
    arrays: Arrays, given: BackwardArrays, batch: Scalar, head: Scalar, rows: jax.Array, block: int
) -> _Rows:
    length = arrays.query.shape[1]
    is_row = None
    if arrays.query_lengths is not None:  # the bytes of rows that do not exist must not be seen
        is_row = rows < jnp.minimum(arrays.query_lengths[batch], length)
    elif length % block:
        is_row = rows < length
    return _Rows(
        logits.load_rows(arrays.query, batch, rows, head, is_row),
        logits.load_rows(given.cotangent, batch, rows, head, is_row),
        logits.load_vector(given.shift, batch, head, rows, jnp.inf),
        logits.load_vector(given.delta, batch, head, rows, 0.0),
        None if given.factor is None else logits.load_vector(given.factor, batch, head, rows, 0.0),
    )


class _Keys(NamedTuple):
    """Keys and values of one key head, as loaded."""

    key: jax.Array
    value: jax.Array


def _load_keys(
    arrays: Arrays, batch: Scalar, head: Scalar, columns: jax.Array, limit: Scalar | None
) -> _Keys:
    is_key = None if limit is None else columns < limit
    return _Keys(
        logits.load_rows(arrays.key, batch, columns, head, is_key),
        logits.load_rows(arrays.value, batch, columns, head, is_key),
    )


def _weights(
    spec: AttentionSpec,
    arrays: Arrays,
    place: Place,
    row: _Rows,
    key: _Keys,
    key_length: Scalar | None,
    *,
    is_edge: bool,
    is_keys_first: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One tile: softmax weights, gradient of the biased logits, gradient of scale q.k."""
    along_rows = (None, slice(None)) if is_keys_first else (slice(None), None)
    s, slope = logits.tile_logits(
        spec, arrays, place, row.query, key.key, is_keys_first=is_keys_first
    )
    p = logits.Base.of(row.query.dtype).power(s - row.shift[along_rows])
    if row.factor is not None:
        p = p * row.factor[along_rows]
    first, second = (key.value, row.cotangent) if is_keys_first else (row.cotangent, key.value)
    d_biased = p * (logits.row_products(first, second) - row.delta[along_rows])
    if is_edge:
        seen = logits.visible(spec, arrays, place, key_length, is_keys_first=is_keys_first)
        p, d_biased = (jnp.where(seen, x, 0.0) for x in (p, d_biased))
    d_logits = d_biased
    if slope is not None:
        # A hidden entry may hold any bytes, hence a NaN slope, and has no derivative.
        d_logits = jnp.where(d_biased == 0.0, 0.0, d_biased * slope)
    return p, d_biased, d_logits


def _clean(arrays: tuple[Any, ...]) -> Any:
    """The same tuple without NaN and infinities: a weight of 0 must remove any bytes."""
    is_tile = [x is not None and x.ndim == 2 for x in arrays]
    cleaned = (
        logits.finite_or_zero(x) if tile else x for x, tile in zip(arrays, is_tile, strict=True)
    )
    return type(arrays)(*cleaned)


def _queries_body(
    operands: tuple[Arrays, BackwardArrays], d_query: Any, *, spec: AttentionSpec, tile: Tiles
) -> None:
    arrays, given = operands
    block = pl.num_programs(0) - 1 - pl.program_id(0)
    head, batch = pl.program_id(1), pl.program_id(2)
    length, keys = arrays.query.shape[1], arrays.key.shape[1]
    kv_head = lax.div(head, jnp.int32(arrays.group))
    row_begin = block * tile.block_q
    rows = logits.indices(row_begin, tile.block_q)
    key_length, query_length = arrays.key_length(batch), arrays.query_length(batch)
    row = _load_rows(arrays, given, batch, head, rows, tile.block_q)

    def step(j: jax.Array, acc: jax.Array, *, is_edge: bool) -> jax.Array:
        columns = logits.indices(j * tile.block_kv, tile.block_kv)
        place = Place(batch, head, rows, columns)
        limit = (keys if key_length is None else key_length) if is_edge else None
        key = _load_keys(arrays, batch, kv_head, columns, limit)
        if is_edge:
            key = _clean(key)
        _, _, d_logits = _weights(spec, arrays, place, row, key, key_length, is_edge=is_edge)
        return acc + logits.dot((d_logits * spec.scale).astype(key.key.dtype), key.key)

    acc = jnp.zeros((tile.block_q, row.query.shape[1]), jnp.float32)
    loops = tiles.key_loops(
        spec, row_begin, tile.block_q, tile.block_kv, keys, key_length, query_length,
        is_masked=arrays.mask is not None,
    )  # fmt: skip
    for begin, end, is_edge in loops:
        acc = lax.fori_loop(begin, end, functools.partial(step, is_edge=is_edge), acc)
    if arrays.query_lengths is not None:
        # In a tile that some rows see whole, the others multiply 0 by what may be NaN.
        acc = jnp.where((row.shift == jnp.inf)[:, None], 0.0, acc)
    logits.store_rows(d_query, batch, rows, head, acc, length)


def _keys_body(
    operands: tuple[Arrays, BackwardArrays],
    d_key: Any,
    d_value: Any,
    *,
    spec: AttentionSpec,
    tile: Tiles,
) -> None:
    arrays, given = operands
    block, kv_head, batch = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    length, keys = arrays.query.shape[1], arrays.key.shape[1]
    key_begin = block * tile.block_kv
    columns = logits.indices(key_begin, tile.block_kv)
    key_length = arrays.key_length(batch)
    limit = key_length
    if limit is None and keys % tile.block_kv:
        limit = keys
    key = _load_keys(arrays, batch, kv_head, columns, limit)
    loops = tiles.query_loops(
        spec, key_begin, tile.block_kv, tile.block_q, length, arrays.query_length(batch),
        is_masked=arrays.mask is not None,
    )  # fmt: skip

    def step(
        i: jax.Array, carry: tuple[jax.Array, jax.Array], *, head: Scalar, is_edge: bool
    ) -> tuple[jax.Array, jax.Array]:
        sum_key, sum_value = carry
        rows = logits.indices(i * tile.block_q, tile.block_q)
        place = Place(batch, head, rows, columns)
        row = _load_rows(arrays, given, batch, head, rows, tile.block_q)
        edge_key = key
        if is_edge:
            row, edge_key = _clean(row), _clean(key)
        p, _, d_logits = _weights(
            spec, arrays, place, row, edge_key, key_length, is_edge=is_edge, is_keys_first=True
        )
        dtype = row.query.dtype
        sum_value = sum_value + logits.dot(p.astype(dtype), row.cotangent)
        sum_key = sum_key + logits.dot((d_logits * spec.scale).astype(dtype), row.query)
        return sum_key, sum_value

    def of_head(
        member: jax.Array, carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        head = kv_head * arrays.group + member
        for begin, end, is_edge in loops:
            body = functools.partial(step, head=head, is_edge=is_edge)
            carry = lax.fori_loop(begin, end, body, carry)
        return carry

    zeros = jnp.zeros(key.key.shape, jnp.float32)
    carry = (zeros, zeros)
    if arrays.group == 1:
        sum_key, sum_value = of_head(jnp.int32(0), carry)
    else:
        sum_key, sum_value = lax.fori_loop(0, arrays.group, of_head, carry)
    if key_length is not None:
        is_key = (columns < key_length)[:, None]
        sum_key, sum_value = (jnp.where(is_key, x, 0.0) for x in (sum_key, sum_value))
    logits.store_rows(d_key, batch, columns, kv_head, sum_key, keys)
    logits.store_rows(d_value, batch, columns, kv_head, sum_value, keys)


def _bias_body(
    operands: tuple[Arrays, BackwardArrays], d_bias: Any, *, spec: AttentionSpec, tile: Tiles
) -> None:
    """One tile of the bias; sums over the axes along which it was broadcast, in a fixed order."""
    arrays, given = operands
    all_batch, length, all_heads, _ = arrays.query.shape
    keys = arrays.key.shape[1]
    sizes = (all_batch, all_heads, pl.cdiv(length, tile.block_q), pl.cdiv(keys, tile.block_kv))
    bias_shape = d_bias.shape
    mine = lax.div(pl.program_id(2), jnp.int32(bias_shape[1]))
    own = (
        mine,
        pl.program_id(2) - mine * bias_shape[1],
        pl.program_id(0),
        pl.program_id(1),
    )
    counts = [size if bias_shape[axis] == 1 else 1 for axis, size in enumerate(sizes)]

    def step(index: jax.Array, acc: jax.Array) -> jax.Array:
        at = []
        for axis in (3, 2, 1, 0):
            rest = lax.div(index, jnp.int32(counts[axis]))
            summed = index - rest * counts[axis]
            at.append(summed if bias_shape[axis] == 1 else own[axis])
            index = rest
        column_block, row_block, head, batch = at
        rows = logits.indices(row_block * tile.block_q, tile.block_q)
        columns = logits.indices(column_block * tile.block_kv, tile.block_kv)
        key_length = arrays.key_length(batch)
        limit = keys if key_length is None else key_length
        kv_head = lax.div(head, jnp.int32(arrays.group))
        row = _clean(_load_rows(arrays, given, batch, head, rows, tile.block_q))
        key = _clean(_load_keys(arrays, batch, kv_head, columns, limit))
        place = Place(batch, head, rows, columns)
        _, d_biased, _ = _weights(spec, arrays, place, row, key, key_length, is_edge=True)
        return acc + d_biased

    acc = jnp.zeros((tile.block_q, tile.block_kv), jnp.float32)
    acc = lax.fori_loop(0, counts[0] * counts[1] * counts[2] * counts[3], step, acc)
    at = own[:2]
    rows = logits.indices(own[2] * tile.block_q, tile.block_q)
    columns = logits.indices(own[3] * tile.block_kv, tile.block_kv)
    is_row, is_column = rows < bias_shape[2], columns < bias_shape[3]
    dtype = d_bias.dtype
    if bias_shape[2] == 1 and bias_shape[3] == 1:
        # Every lane holds the same sum; lane 0 alone is in bounds.
        total = jnp.sum(jnp.sum(acc, axis=1), axis=0)
        line = jnp.full((tile.block_kv,), total, jnp.float32).astype(dtype)
        plt.store(d_bias.at[(*at, 0, columns)], line, mask=is_column)
    elif bias_shape[2] == 1:
        plt.store(d_bias.at[(*at, 0, columns)], jnp.sum(acc, axis=0).astype(dtype), mask=is_column)
    elif bias_shape[3] == 1:
        plt.store(d_bias.at[(*at, rows, 0)], jnp.sum(acc, axis=1).astype(dtype), mask=is_row)
    else:
        view = d_bias.at[(*at, rows[:, None], columns[None, :])]
        plt.store(view, acc.astype(dtype), mask=is_row[:, None] & is_column[None, :])


def input_gradients(
    spec: AttentionSpec,
    arrays: Arrays,
    given: BackwardArrays,
    tile: KernelTiles,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value, in their dtypes."""
    batch, length, heads, _ = arrays.query.shape
    keys, kv_heads = arrays.key.shape[1:3]

    def like(x: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    def run(body: Any, *shapes: Any, grid: tuple[int, ...], tile: Tiles, name: str) -> Any:
        return launch(
            body, (arrays, given), list(shapes), grid, tile, name=name, interpret=interpret,
            spec=spec,
        )  # fmt: skip

    by_queries, by_keys = tile.queries, tile.keys
    (d_query,) = run(
        _queries_body, like(arrays.query), tile=by_queries, name="backward_queries",
        grid=(pl.cdiv(length, by_queries.block_q), heads, batch),
    )  # fmt: skip
    d_key, d_value = run(
        _keys_body, like(arrays.key), like(arrays.value), tile=by_keys, name="backward_keys",
        grid=(pl.cdiv(keys, by_keys.block_kv), kv_heads, batch),
    )  # fmt: skip
    return d_query, d_key, d_value


def bias_gradient(
    spec: AttentionSpec,
    arrays: Arrays,
    given: BackwardArrays,
    tile: KernelTiles,
    *,
    interpret: bool,
) -> jax.Array:
    """Gradient of the bias, in float32: it may be one of several addends."""
    b, n, t, s = arrays.bias.shape
    block = tile.queries
    (d_bias,) = launch(
        _bias_body, (arrays, given), [jax.ShapeDtypeStruct(arrays.bias.shape, jnp.float32)],
        (pl.cdiv(t, block.block_q), pl.cdiv(s, block.block_kv), b * n), block,
        name="backward_bias", interpret=interpret, spec=spec,
    )  # fmt: skip
    return d_bias
