"""Forward kernel: one program owns `block_q` query rows of one head and walks over the keys.

Source: Dao, "FlashAttention-2" (2023). Under `ExampleReadout` the epilogue clips, noises and snaps.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from dpfa_jax.kernels.base import AttentionSpec, ExampleReadout
from dpfa_jax.kernels.triton import logits, tiles
from dpfa_jax.kernels.triton.launch import launch
from dpfa_jax.kernels.triton.logits import Arrays, Place
from dpfa_jax.kernels.triton.noise import Stream, clip_rows, snapped
from dpfa_jax.kernels.triton.tiles import Scalar, Tiles


class NoiseArrays(NamedTuple):
    """Where the noise comes from, and how large it is; a row of each array serves one batch row.

    `key_words` and `batch_index` as in `NoiseInputs`; `head_index` (B, N) is the global index of
    each head; `per_head` (B, N, 3) float32: noise standard deviation, 1 / grid, grid.
    """

    key_words: Any
    batch_index: Any
    head_index: Any
    per_head: Any

    def stream(self, batch: Scalar, head: jax.Array) -> Stream:
        """The noise of one head."""
        words = (self.key_words[batch, 0], self.key_words[batch, 1])
        return Stream(words, self.batch_index[batch], self.head_index[batch, head])


class ForwardResults(NamedTuple):
    """`output` like query; `unclipped` too, in float32; the others (B, N, T) float32.

    A row's weights are exp(logit - maximum) / total; both are finite, and a row that sees no key
    has total 0.
    """

    output: jax.Array
    maximum: jax.Array
    total: jax.Array
    unclipped: jax.Array | None = None


def _body(
    operands: tuple[Arrays, NoiseArrays | None],
    output: Any,
    maximum: Any,
    total_weight: Any,
    unclipped: Any = None,
    *,
    spec: AttentionSpec,
    tile: Tiles,
) -> None:
    arrays, noise = operands
    # The last rows first: under a causal mask they are the longest.
    block = pl.num_programs(0) - 1 - pl.program_id(0)
    head, batch = pl.program_id(1), pl.program_id(2)
    length, keys = arrays.query.shape[1], arrays.key.shape[1]
    kv_head = lax.div(head, jnp.int32(arrays.group))
    row_begin = block * tile.block_q
    rows = logits.indices(row_begin, tile.block_q)
    key_length, query_length = arrays.key_length(batch), arrays.query_length(batch)
    is_row = rows < length if length % tile.block_q else None
    query = logits.load_rows(arrays.query, batch, rows, head, is_row)
    base = logits.Base.of(query.dtype)

    def step(j: jax.Array, carry: tuple[jax.Array, ...], *, is_edge: bool) -> tuple[jax.Array, ...]:
        acc, largest, total = carry
        columns = logits.indices(j * tile.block_kv, tile.block_kv)
        place = Place(batch, head, rows, columns)
        limit = keys if key_length is None else key_length
        is_key = columns < limit if is_edge else None
        key = logits.load_rows(arrays.key, batch, columns, kv_head, is_key)
        s, _ = logits.tile_logits(spec, arrays, place, query, key)
        value = logits.load_rows(arrays.value, batch, columns, kv_head, is_key)
        if is_edge:
            # Bytes of a key that a row does not see must not reach it, not even as 0 * NaN. A row
            # that does see a NaN becomes NaN.
            s = s + logits.marks(value)[None, :]
            value = logits.finite_or_zero(value)
            s = jnp.where(logits.visible(spec, arrays, place, key_length), s, -jnp.inf)
        previous = largest
        largest = jnp.maximum(previous, jnp.max(s, axis=1))
        decay = base.power(previous - largest)
        p = base.power(s - largest[:, None])
        total = total * decay + jnp.sum(p, axis=1)
        acc = acc * decay[:, None] + logits.dot(p.astype(value.dtype), value)
        return acc, largest, total

    carry = (
        jnp.zeros((tile.block_q, query.shape[1]), jnp.float32),
        jnp.full((tile.block_q,), base.lowest, jnp.float32),
        jnp.zeros((tile.block_q,), jnp.float32),
    )
    loops = tiles.key_loops(
        spec, row_begin, tile.block_q, tile.block_kv, keys, key_length, query_length,
        is_masked=arrays.mask is not None,
    )  # fmt: skip
    for begin, end, is_edge in loops:
        carry = lax.fori_loop(begin, end, functools.partial(step, is_edge=is_edge), carry)
    acc, largest, total = carry
    is_empty = total == 0.0
    if query_length is not None:
        is_empty = is_empty | (rows >= query_length)
    safe = jnp.where(is_empty, 1.0, total)
    normalised = jnp.where(is_empty[:, None], 0.0, acc / safe[:, None])
    total = jnp.where(is_empty, 0.0, total)
    plt.store(maximum.at[batch, head, rows], largest * (1.0 / base.unit), mask=rows < length)
    plt.store(total_weight.at[batch, head, rows], total, mask=rows < length)
    if unclipped is not None:
        logits.store_rows(unclipped, batch, rows, head, normalised, length)
    if noise is not None:
        assert isinstance(spec.readout, ExampleReadout)
        stddev, inverse_grid, grid = (noise.per_head[batch, head, part] for part in range(3))
        drawn = noise.stream(batch, head).columns(rows, normalised.shape[1])
        clipped = clip_rows(normalised, spec.readout.l2_clip_norm)
        normalised = snapped(clipped + drawn * stddev, inverse_grid, grid)
    logits.store_rows(output, batch, rows, head, normalised, length)


def attention_forward(
    spec: AttentionSpec,
    arrays: Arrays,
    noise: NoiseArrays | None,
    tile: Tiles,
    *,
    dtype: Any,
    keep_unclipped: bool,
    interpret: bool,
) -> ForwardResults:
    """The kernel's results; `output` in `dtype`. With `noise` the output is the example readout."""
    batch, length, heads, _ = arrays.query.shape
    shapes = [
        jax.ShapeDtypeStruct(arrays.query.shape, dtype),
        *(jax.ShapeDtypeStruct((batch, heads, length), jnp.float32) for _ in range(2)),
    ]
    if keep_unclipped:
        shapes.append(jax.ShapeDtypeStruct(arrays.query.shape, jnp.float32))
    grid = (pl.cdiv(length, tile.block_q), heads, batch)
    results = launch(
        _body, (arrays, noise), shapes, grid, tile, name="forward", interpret=interpret, spec=spec
    )
    unclipped = results[3] if keep_unclipped else None
    return ForwardResults(results[0], results[1], results[2], unclipped)
