"""The mathematics of one rectangle of the attention matrix, plain softmax, forward and backward.

Query heads are grouped by the key head that they share: shape suffixes B T K G H (queries) and
B S K H (keys), so that grouped and multi-query attention never repeat a key.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpfa_jax.kernels.base import AttentionSpec, SoftmaxRows


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


def contracted(
    subscripts: str, left: Float[Array, "..."], right: Float[Array, "..."], dtype: jnp.dtype
) -> Float[Array, "..."]:
    """einsum of two arrays with sums in `dtype`; `subscripts` name the axes b, k, g, t, s, h.

    A group axis of 1 is left out and the product made in the matmul's own order (batch, left,
    right): XLA's CPU backend copies the matrix for either, up to 1.5 times the whole time. Not so
    where a single row or key would make it a matrix-vector product: there that order is summed one
    term at a time, with 4 times the error. A longer group axis is summed last: one sum over groups
    and rows would err more, by the square root of the number of groups.
    """
    # By default a GPU rounds float32 operands to 10 bits.
    exact = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    terms, result = subscripts.split("->")
    one, other = terms.split(",")
    sizes = dict(zip(one, left.shape, strict=True)) | dict(zip(other, right.shape, strict=True))
    if sizes["g"] > 1 and "g" not in result:
        by_group = contracted(f"{terms}->g{result}", left, right, dtype)
        # Without the barrier XLA makes it that one sum again.
        return jnp.sum(jax.lax.optimization_barrier(by_group), axis=0)
    if any(sizes.get(name) == 1 for name in "ts") or sizes["g"] > 1:
        return jnp.einsum(subscripts, left, right, precision=exact, preferred_element_type=dtype)
    shared = [n for n in one if n in other and n in result and n != "g"]
    free = [n for n in one + other if n in result and n not in (*shared, "g")]
    natural = "".join(shared + free)
    left, right = (
        jnp.squeeze(x, names.index("g")) if "g" in names else x
        for names, x in ((one, left), (other, right))
    )
    product = jnp.einsum(
        f"{terms.replace('g', '')}->{natural}",
        left,
        right,
        precision=exact,
        preferred_element_type=dtype,
    )
    product = product.transpose([natural.index(n) for n in result if n != "g"])
    return jnp.expand_dims(product, result.index("g")) if "g" in result else product


def finite_or_zero(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` with NaN and infinities replaced by 0, so that a weight of 0 really removes them."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))


def raw_logits(spec: AttentionSpec, tile: Tile) -> Float[Array, "B K G t s"]:
    """scale q.k, capped, in the accumulator's type; neither bias nor mask yet."""
    dtype = accumulator(tile.query.dtype)
    logits_BKGTS = contracted("btkgh,bskh->bkgts", tile.query, tile.key, dtype)
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
    # A row without keys has the least finite number as maximum; exp(-inf - it) = 0, not NaN. A
    # select here instead would keep XLA from fusing the exponential, at twice the whole time.
    lowest = float(jnp.finfo(logits_BKGTS.dtype).min)
    maximum = jnp.max(logits_BKGTS, axis=-1, initial=lowest)
    return maximum, jnp.exp(logits_BKGTS - maximum[..., None])


def attend(spec: AttentionSpec, tile: Tile) -> Softmax:
    """Softmax of one rectangle alone, not yet normalised."""
    maximum, weights_BKGTS = relative_weights(spec, tile)
    total = jnp.sum(weights_BKGTS, axis=-1)
    return Softmax(maximum, total, weighted_values(weights_BKGTS, tile.value))


def attend_keeping_weights(
    spec: AttentionSpec, tile: Tile
) -> tuple[Float[Array, "B t K G h"], Float[Array, "B t K G"], Float[Array, "B K G t s"]]:
    """Output, log-sum-exp and weights of one rectangle that is the whole matrix."""
    maximum, weights_BKGTS = relative_weights(spec, tile)
    total = jnp.sum(weights_BKGTS, axis=-1)
    is_empty = total == 0
    divisor = jnp.where(is_empty, 1.0, total)
    weights_BKGTS = weights_BKGTS / divisor[..., None]
    lse = jnp.where(is_empty, -jnp.inf, maximum + jnp.log(divisor))
    values = weighted_values(weights_BKGTS, tile.value)
    return values, jnp.moveaxis(lse, 3, 1), weights_BKGTS


def weighted_values(
    weights: Float[Array, "B K G t s"], value: Float[Array, "B s K h"]
) -> Float[Array, "B t K G h"]:
    """sum_s weights v, products in the values' dtype, sums in the weights'."""
    return contracted("bkgts,bskh->btkgh", weights.astype(value.dtype), value, weights.dtype)


def merge(one: Softmax, other: Softmax) -> Softmax:
    """The softmax over both key sets (Milakov and Gimelshein, 2018)."""
    maximum = jnp.maximum(one.maximum, other.maximum)
    safe = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    left, right = jnp.exp(one.maximum - safe), jnp.exp(other.maximum - safe)
    values = one.values * _by_row(left) + other.values * _by_row(right)
    return Softmax(maximum, one.total * left + other.total * right, values)


def normalised(
    softmax: Softmax,
) -> tuple[Float[Array, "B t K G h"], Float[Array, "B t K G"], SoftmaxRows]:
    """Output, log-sum-exp and (B, t, K, G) rows; a row without keys gives 0 and -inf."""
    is_empty = softmax.total == 0
    total = jnp.where(is_empty, 1.0, softmax.total)
    safe = jnp.where(jnp.isneginf(softmax.maximum), 0.0, softmax.maximum)
    lse = jnp.where(is_empty, -jnp.inf, safe + jnp.log(total))
    rows = SoftmaxRows(jnp.moveaxis(safe, 3, 1), jnp.moveaxis(total, 3, 1))
    return softmax.values / _by_row(total), jnp.moveaxis(lse, 3, 1), rows


def recomputed_weights(
    spec: AttentionSpec, tile: Tile, rows: SoftmaxRows
) -> tuple[Float[Array, "B K G t s"], Float[Array, "B K G t s"] | None]:
    """Softmax weights of one rectangle from `rows`, and the cap's derivative where there is one.

    `rows` are grouped, (B, t, K, G).
    """
    capped_BKGTS = raw_logits(spec, tile)
    maximum, total = (jnp.moveaxis(x, 1, 3)[..., None] for x in rows)
    weights_BKGTS = jnp.exp(biased(capped_BKGTS, tile) - maximum) / total
    slope = None
    if spec.logits_soft_cap is not None:
        ratio = capped_BKGTS / jnp.asarray(spec.logits_soft_cap, capped_BKGTS.dtype)
        slope = 1.0 - ratio * ratio
    return weights_BKGTS, slope


def attend_backward(
    spec: AttentionSpec,
    tile: Tile,
    weights: Float[Array, "B K G t s"],
    slope: Float[Array, "B K G t s"] | None,
    cotangent: Float[Array, "B t K G H"],
    output_dot: Float[Array, "B t K G"] | None,
) -> tuple[jax.Array, jax.Array, jax.Array, Float[Array, "B K G t s"]]:
    """Gradients of one rectangle with respect to query, key, value and biased logits.

    `weights` are the softmax weights, `slope` the derivative of the cap. `output_dot` is the
    row-wise product of output and cotangent (Dao et al., 2022); None where the rectangle is the
    whole matrix and shows it itself. Results are in the accumulator's type.
    """
    dtype, stored = accumulator(tile.query.dtype), tile.query.dtype
    cotangent = cotangent.astype(stored)
    d_value = contracted("bkgts,btkgh->bskh", weights.astype(stored), cotangent, dtype)
    d_weights = contracted("btkgh,bskh->bkgts", cotangent, tile.value, dtype)
    if output_dot is None:
        shift = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
    else:
        shift = jnp.moveaxis(output_dot, 1, 3)[..., None]
    d_biased = weights * (d_weights - shift)
    d_logits = d_biased
    if slope is not None:
        # A hidden entry may have any bytes, hence a NaN slope, and has no derivative.
        d_logits = jnp.where(d_biased == 0, 0.0, d_biased * slope)
    d_logits = (d_logits * jnp.asarray(spec.scale, dtype)).astype(stored)
    d_query = contracted("bkgts,bskh->btkgh", d_logits, tile.key, dtype)
    d_key = contracted("bkgts,btkgh->bskh", d_logits, tile.query, dtype)
    return d_query, d_key, d_value, d_biased


def _by_row(per_row: Float[Array, "B K G t"]) -> Float[Array, "B t K G 1"]:
    return jnp.moveaxis(per_row, 3, 1)[..., None]
