"""Sums of a private memory under a public maximum: (sum_j e_j v_j, sum_j e_j kappa) in two floats.

Every weight is a function of its own key alone and is rounded once; numerator and normaliser use
the same rounded weight. Keys are summed in float32 inside blocks of `SUM_BLOCK`, whose sums are
combined in two-float arithmetic: replacing one key changes the rounding of its own block only.
In float32 a block of b terms errs by at most b u sum |e_j (v_j, kappa)|, u = 2^-24, in any order
of its additions, hence two neighbours by 2 b^2 u of one key's largest share: 4.9e-4 for b = 64.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dpfa_jax.clipping.rows import clip_rows_stored
from dpfa_jax.kernels import compensated, manual_axes, tiles
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, MemoryReadout
from dpfa_jax.kernels.compensated import TwoFloat
from dpfa_jax.kernels.rectangles import Blocks, Problem, put

SUM_BLOCK = 64


def weights(
    readout: MemoryReadout,
    logits: Float[Array, "B K G t s"],
    bias: Float[Array, "b k g t s"] | None,
    seen: Bool[Array, "b k g t s"] | None,
    dtype: jnp.dtype,
) -> Float[Array, "B K G t s"]:
    """e in [0, 1], rounded once to `dtype` (that of the values), returned in float32.

    A NaN logit counts as the smallest one. Hidden keys have weight exactly 0.
    """
    bound = readout.logit_bound
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    lowest, least = -jnp.inf, 0.0
    if readout.form == "ratio":
        lowest, least = -bound, least_weight(bound, dtype)
    logits = jnp.where(jnp.isnan(logits), lowest, logits)
    clamped = jnp.clip(logits, lowest, bound)
    rounded = jnp.exp(clamped - bound).astype(dtype).astype(jnp.float32)
    rounded = jnp.clip(rounded, least, 1.0)
    return rounded if seen is None else jnp.where(seen, rounded, 0.0)


def least_weight(logit_bound: float, dtype: jnp.dtype) -> float:
    """The smallest number of `dtype` that is at least exp(-2 B).

    Rounding to nearest could fall below it by 2^-9 (bfloat16), and the ratio form's bound with it.
    """
    exact = math.exp(-2.0 * logit_bound)
    stored = np.asarray(exact, dtype)
    if float(stored) < exact:
        # One unit more in the bits of a positive float is the next one up.
        bits = stored.view(np.uint32 if stored.dtype.itemsize == 4 else np.uint16)
        stored = (bits + 1).astype(bits.dtype).view(dtype)
    return float(stored)


def stored_values(
    readout: MemoryReadout, value: Float[Array, "B S K H"]
) -> Float[Array, "B S K h"]:
    """Value rows clipped as stored, in float32, with kappa as the last column.

    kappa stays in float32: bfloat16 could overshoot it by 0.4 %. The ratio needs no kappa.
    """
    clipped = clip_rows_stored(value, readout.value_clip_norm).astype(jnp.float32)
    kappa = 1.0 if readout.form == "ratio" else readout.weight_scale
    column = jnp.full_like(clipped[..., :1], kappa)
    return jnp.concatenate([clipped, column], axis=-1)


def block_sums(
    weights_BKGTS: Float[Array, "B K G t s"], values: Float[Array, "B s K h"]
) -> Float[Array, "C B t K G h"]:
    """Weighted sums of each `SUM_BLOCK` keys; a ragged tail is filled with weight 0."""
    batch, key_heads, groups, rows, keys = weights_BKGTS.shape
    filler = -keys % SUM_BLOCK
    weights_BKGTS = jnp.pad(weights_BKGTS, ((0, 0),) * 4 + ((0, filler),))
    values = jnp.pad(values, ((0, 0), (0, filler), (0, 0), (0, 0)))
    count = (keys + filler) // SUM_BLOCK
    weights_BKGTCS = weights_BKGTS.reshape(batch, key_heads, groups, rows, count, SUM_BLOCK)
    values_BCSKH = values.reshape(batch, count, SUM_BLOCK, key_heads, values.shape[-1])
    return jnp.einsum(
        "bkgtcs,bcskh->cbtkgh",
        weights_BKGTCS,
        values_BCSKH,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def total_of(
    readout: MemoryReadout,
    spec: AttentionSpec,
    tile: tiles.Tile,
    dtype: jnp.dtype,
    so_far: TwoFloat,
) -> TwoFloat:
    """`so_far` plus the sums of one rectangle, whose values are `stored_values`."""
    logits_BKGTS = tiles.raw_logits(spec, tile)
    weights_BKGTS = weights(readout, logits_BKGTS, tile.bias, tile.visible, dtype)
    parts = block_sums(weights_BKGTS, tile.value)
    total, _ = jax.lax.scan(lambda two, part: (compensated.add(two, part), None), so_far, parts)
    return total


def sums(spec: AttentionSpec, readout: MemoryReadout, inputs: AttentionInputs) -> TwoFloat:
    """Un-noised (N, Z) of every row and head, (B, T, N, H + 1). Private: no user gets them."""
    problem = Problem(spec, inputs)
    values = stored_values(readout, inputs.value)
    blocks = Blocks.of(problem.query_length, problem.key_length)
    batch, _, key_heads, groups, _ = problem.query.shape
    axes = problem.axes

    def add_tile(i: Int[Array, ""] | int, j: Int[Array, ""] | int, so_far: TwoFloat) -> TwoFloat:
        tile = problem.tile(blocks, problem.query, inputs.key, values, i, j, count_rows_once=False)
        return total_of(readout, spec, tile, inputs.value.dtype, so_far)

    def empty(rows: int) -> TwoFloat:
        shape = (batch, rows, key_heads, groups, values.shape[-1])
        zero = manual_axes.zeros(shape, jnp.float32, axes)
        return TwoFloat(zero, zero)

    def query_block(i: Int[Array, ""] | int) -> TwoFloat:
        return jax.lax.fori_loop(
            0, blocks.num_keys, lambda j, so_far: add_tile(i, j, so_far), empty(blocks.rows)
        )

    def store(i: Int[Array, ""], done: TwoFloat) -> TwoFloat:
        row, _ = problem.starts(blocks, i, 0)
        part = query_block(i)
        return TwoFloat(put(done.high, part.high, row), put(done.low, part.low, row))

    if blocks.is_single:
        total = add_tile(0, 0, empty(blocks.rows))
    else:
        total = jax.lax.fori_loop(0, blocks.num_rows, store, empty(problem.query_length))
    return TwoFloat(problem.by_head(total.high), problem.by_head(total.low))
