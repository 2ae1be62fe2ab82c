"""What every clip of rows in float32 rests on: room for its rounding, a scale and a cast.

The scale loses nothing and the cast adds no norm.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def norm_limit(l2_clip_norm: float, columns: int, *, is_approximate: bool = False) -> float:
    """The length, as float32 finds it, up to which a row's norm is surely <= l2_clip_norm.

    A sum of D squares errs by D 2^-24 at most, relatively, in any order; 16 units more are for the
    root, the quotient and the products, and `is_approximate`, a GPU's own root and quotient, takes
    as many again.
    """
    units = columns + (32 if is_approximate else 16)
    return float(l2_clip_norm) * (1.0 - units * 2.0**-24)


def unit_scale(largest: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The power of two that brings `largest`, a row's largest magnitude, into [1, 2).

    Exact, so scaled squares neither overflow nor vanish beside the largest. Subnormal numbers stay
    below 1, and above 2^126 they come to less than 4.
    """
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    exponent = jnp.minimum(jnp.maximum(bits >> 23, 1), 253)
    return jax.lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)


@jax.custom_jvp
def _identity_gradient(
    x: Float32[Array, "..."], rounded: Float[Array, "..."]
) -> Float[Array, "..."]:
    del x
    return rounded


@_identity_gradient.defjvp
def _identity_gradient_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    return primals[1], tangents[0].astype(primals[1].dtype)


def toward_zero(x: Float32[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """`x` rounded toward zero to float32, bfloat16 or float16, by cutting bits off.

    Not by rounding and comparing: XLA may drop a cast to 16 bits and back (on a GPU it does, under
    jit), and the comparison with it.
    """
    if dtype == jnp.float32:
        return x
    value = jax.lax.stop_gradient(x)
    bits = jax.lax.bitcast_convert_type(value, jnp.uint32)
    if dtype == jnp.bfloat16:
        cut = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), dtype)
        return _identity_gradient(x, cut)
    # float16 has 13 bits less of mantissa; below 2^-14 its numbers are the multiples of 2^-24.
    normal = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFFE000), jnp.float32)
    small = jnp.trunc(value * jnp.float32(2.0**24)) * jnp.float32(2.0**-24)
    cut = jnp.where(jnp.abs(value) < jnp.float32(2.0**-14), small, normal)
    most = float(jnp.finfo(jnp.float16).max)
    return _identity_gradient(x, jnp.clip(cut, -most, most).astype(dtype))
