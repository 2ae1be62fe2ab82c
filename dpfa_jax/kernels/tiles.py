"""The mathematics of one rectangle of the attention matrix, plain softmax, forward and backward.

Query heads are grouped by the key head that they share: shape suffixes B T K G H (queries) and
B S K H (keys), so that grouped and multi-query attention never repeat a key.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpfa_jax.kernels.base import AttentionSpec


class Tile(NamedTuple):
    """One rectangle: its queries, keys, values, and its part of bias and visibility.

    `bias` and `visible` are grouped: (b, k, g, t, s), each axis full or 1.
    """

    query: Float[Array, "B t K G H"]
    key: Float[Array, "B s K H"]
    value: Float[Array, "B s K H"]
    bias: Float[Array, "b k g t s"] | None
    visible: Bool[Array, "b k g t s"] | None


class Softmax(NamedTuple):
    """A softmax-weighted sum under way: running maximum, sum of weights, weighted values."""

    maximum: Float[Array, "B K G t"]
    total: Float[Array, "B K G t"]
    values: Float[Array, "B t K G h"]


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Type of logits and sums: float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def grouped(
    per_head: Float[Array, "b n t s"] | Bool[Array, "b n t s"] | None, heads: int, groups: int
) -> jax.Array | None:
    """(b, n, t, s) -> (b, k, g, t, s) for n = 1 or n = `heads` = k * `groups`."""
    if per_head is None:
        return None
    batch, n, t, s = per_head.shape
    shape = (1, 1) if n == 1 else (heads // groups, groups)
    return per_head.reshape(batch, *shape, t, s)


def finite_or_zero(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` with NaN and infinities replaced by 0, so that a weight of 0 really removes them."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))


def raw_logits(spec: AttentionSpec, tile: Tile) -> Float[Array, "B K G t s"]:
    """scale q.k, capped, in the accumulator's type; neither bias nor mask yet."""
    dtype = accumulator(tile.query.dtype)
    logits_BKGTS = jnp.einsum(
        "btkgh,bskh->bkgts", tile.query, tile.key, preferred_element_type=dtype
    )
    logits_BKGTS = logits_BKGTS * jnp.asarray(spec.scale, dtype)
    if spec.logits_soft_cap is not None:
        cap = jnp.asarray(spec.logits_soft_cap, dtype)
        logits_BKGTS = cap * jnp.tanh(logits_BKGTS / cap)
    return logits_BKGTS


def biased(logits: Float[Array, "B K G t s"], tile: Tile) -> Float[Array, "B K G t s"]:
    """Logits plus bias; hidden entries are -inf, whatever bytes stood there."""
    if tile.bias is not None:
        logits = logits + tile.bias.astype(logits.dtype)
    if tile.visible is not None:
        logits = jnp.where(tile.visible, logits, -jnp.inf)
    return logits


def shielded_values(value: Float[Array, "B s K H"]) -> Float[Array, "B s K h"]:
    """Values with non-finite entries zeroed, and a last column that marks their keys.

    A key hidden from a row has weight 0 there, and 0 * NaN would reach the row all the same. The
    marker's weighted sum is positive exactly in the rows that do see a non-finite value.
    """
    marks = jnp.any(~jnp.isfinite(value), axis=-1, keepdims=True).astype(value.dtype)
    return jnp.concatenate([finite_or_zero(value), marks], axis=-1)


def unshielded(values: Float[Array, "B t K G h"]) -> Float[Array, "B t K G H"]:
    """Sums of `shielded_values` without the marker; rows that saw a mark become NaN."""
    return jnp.where(values[..., -1:] > 0, jnp.nan, values[..., :-1])


def relative_weights(
    spec: AttentionSpec, tile: Tile
) -> tuple[Float[Array, "B K G t"], Float[Array, "B K G t s"]]:
    """Each row's largest logit, and exp(logits - largest)."""
    logits_BKGTS = biased(raw_logits(spec, tile), tile)
    maximum = jnp.max(logits_BKGTS, axis=-1, initial=-jnp.inf)
    # A row without keys has maximum -inf; exp(-inf - 0) = 0 gives it weight 0 instead of NaN.
    safe = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    return maximum, jnp.exp(logits_BKGTS - safe[..., None])


def attend(spec: AttentionSpec, tile: Tile) -> Softmax:
    """Softmax of one rectangle alone, not yet normalised."""
    maximum, weights_BKGTS = relative_weights(spec, tile)
    total = jnp.sum(weights_BKGTS, axis=-1)
    return Softmax(maximum, total, weighted_values(weights_BKGTS, tile.value))


def attend_keeping_weights(
    spec: AttentionSpec, tile: Tile
) -> tuple[Softmax, Float[Array, "B K G t s"]]:
    """Softmax of one rectangle that is the whole matrix, and its normalised weights."""
    maximum, weights_BKGTS = relative_weights(spec, tile)
    total = jnp.sum(weights_BKGTS, axis=-1)
    is_empty = total == 0
    weights_BKGTS = weights_BKGTS / jnp.where(is_empty, 1.0, total)[..., None]
    safe = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    lse = jnp.where(is_empty, -jnp.inf, safe + jnp.log(jnp.where(is_empty, 1.0, total)))
    one = jnp.where(is_empty, 0.0, 1.0).astype(total.dtype)
    return Softmax(lse, one, weighted_values(weights_BKGTS, tile.value)), weights_BKGTS


def weighted_values(
    weights: Float[Array, "B K G t s"], value: Float[Array, "B s K h"]
) -> Float[Array, "B t K G h"]:
    """sum_s weights v, products in the values' dtype, sums in the weights'."""
    return jnp.einsum(
        "bkgts,bskh->btkgh",
        weights.astype(value.dtype),
        value,
        preferred_element_type=weights.dtype,
    )


def merge(one: Softmax, other: Softmax) -> Softmax:
    """The softmax over both key sets (Milakov and Gimelshein, 2018)."""
    maximum = jnp.maximum(one.maximum, other.maximum)
    safe = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    left, right = jnp.exp(one.maximum - safe), jnp.exp(other.maximum - safe)
    values = one.values * _by_row(left) + other.values * _by_row(right)
    return Softmax(maximum, one.total * left + other.total * right, values)


def normalised(
    softmax: Softmax,
) -> tuple[Float[Array, "B t K G h"], Float[Array, "B t K G"]]:
    """Output and log-sum-exp; a row without keys gives 0 and -inf."""
    is_empty = softmax.total == 0
    total = jnp.where(is_empty, 1.0, softmax.total)
    safe = jnp.where(jnp.isneginf(softmax.maximum), 0.0, softmax.maximum)
    lse = jnp.where(is_empty, -jnp.inf, safe + jnp.log(total))
    return softmax.values / _by_row(total), jnp.moveaxis(lse, 3, 1)


def recomputed_weights(
    spec: AttentionSpec, tile: Tile, lse: Float[Array, "B t K G"]
) -> tuple[Float[Array, "B K G t s"], Float[Array, "B K G t s"] | None]:
    """Softmax weights of one rectangle from `lse`, and the cap's derivative where there is one."""
    raw_BKGTS = raw_logits(spec, tile)
    lse_BKGT = jnp.moveaxis(lse, 1, 3)
    # An empty row has lse = -inf; against +inf every weight is exp(-inf) = 0.
    safe = jnp.where(jnp.isneginf(lse_BKGT), jnp.inf, lse_BKGT)
    weights_BKGTS = jnp.exp(biased(raw_BKGTS, tile) - safe[..., None])
    if spec.logits_soft_cap is None:
        return weights_BKGTS, None
    ratio = raw_BKGTS / jnp.asarray(spec.logits_soft_cap, raw_BKGTS.dtype)
    return weights_BKGTS, 1.0 - ratio * ratio


def attend_backward(
    spec: AttentionSpec,
    tile: Tile,
    weights: Float[Array, "B K G t s"],
    slope: Float[Array, "B K G t s"] | None,
    cotangent: Float[Array, "B t K G H"],
    output_dot: Float[Array, "B t K G"],
) -> tuple[jax.Array, jax.Array, jax.Array, Float[Array, "B K G t s"]]:
    """Gradients of one rectangle with respect to query, key, value and biased logits.

    `weights` are the softmax weights, `slope` the derivative of the cap. `output_dot` is the
    row-wise product of output and cotangent, less the cotangent of the log-sum-exp (Dao et al.,
    2022). Results are in the accumulator's type.
    """
    dtype, stored = accumulator(tile.query.dtype), tile.query.dtype
    cotangent = cotangent.astype(stored)
    d_value = jnp.einsum(
        "bkgts,btkgh->bskh", weights.astype(stored), cotangent, preferred_element_type=dtype
    )
    d_weights = jnp.einsum("btkgh,bskh->bkgts", cotangent, tile.value, preferred_element_type=dtype)
    d_biased = weights * (d_weights - jnp.moveaxis(output_dot, 1, 3)[..., None])
    d_logits = d_biased
    if slope is not None:
        # A hidden entry may have any bytes, hence a NaN slope, and has no derivative.
        d_logits = jnp.where(d_biased == 0, 0.0, d_biased * slope)
    d_logits = (d_logits * jnp.asarray(spec.scale, dtype)).astype(stored)
    d_query = jnp.einsum("bkgts,bskh->btkgh", d_logits, tile.key, preferred_element_type=dtype)
    d_key = jnp.einsum("bkgts,btkgh->bskh", d_logits, tile.query, preferred_element_type=dtype)
    return d_query, d_key, d_value, d_biased


def _by_row(per_row: Float[Array, "B K G t"]) -> Float[Array, "B t K G 1"]:
    return jnp.moveaxis(per_row, 3, 1)[..., None]
