"""Arithmetic on two-float numbers: an unevaluated sum high + low, about 48 bits wide.

A record's readout sums tens of thousands of weights; rounded to float32, the sum of all others
would move by more than one record may. XLA keeps the order of float32 additions as written.
Source: Dekker (1971); Knuth, TAOCP 2, 4.2.2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Bits of a float32 kept by the upper half of a split: 12 of 24, so that products are exact.
_UPPER_HALF = 0xFFFFF000


class TwoFloat(NamedTuple):
    """high + low, |low| at most half a unit in the last place of high."""

    high: Float[Array, "*shape"]
    low: Float[Array, "*shape"]


def two_sum(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> TwoFloat:
    """a + b exactly."""
    total = a + b
    b_seen = total - a
    return TwoFloat(total, (a - (total - b_seen)) + (b - b_seen))


def two_product(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> TwoFloat:
    """a * b exactly (no overflow or underflow)."""
    product = a * b
    a_high, b_high = _upper_half(a), _upper_half(b)
    a_low, b_low = a - a_high, b - b_high
    low = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return TwoFloat(product, low)


def add(x: TwoFloat, y: Float[Array, "*shape"]) -> TwoFloat:
    """x + y, renormalised."""
    high, low = two_sum(x.high, y)
    return two_sum(high, low + x.low)


def divide(x: TwoFloat, y: TwoFloat) -> TwoFloat:
    """x / y with the remainder of the first quotient divided once more."""
    first = x.high / y.high
    product = two_product(first, y.high)
    remainder = ((x.high - product.high) - product.low) + (x.low - first * y.low)
    return two_sum(first, remainder / y.high)


def snap_once(x: TwoFloat, grid: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The multiple of `grid` (a power of two) nearest x, as float32: one value for all readers.

    As `noise.grid.snap_once`; not inside kernels.
    """
    scaled = x.high / grid
    near = jnp.round(scaled)
    rest = (scaled - near) + x.low / grid
    return jax.lax.optimization_barrier((near + jnp.round(rest)) * grid)


def _upper_half(a: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    bits = jax.lax.bitcast_convert_type(a, jnp.uint32)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(_UPPER_HALF), jnp.float32)
