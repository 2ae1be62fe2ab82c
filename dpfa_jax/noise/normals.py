"""64 random bits -> two standard normals, in float32, inside or outside a kernel."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, UInt32

_ANGLE_BITS = 24


def normal_pair(
    w0: UInt32[Array, "..."],
    w1: UInt32[Array, "..."],
    more: UInt32[Array, "..."] | None = None,
) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
    """(cosine, sine) normals of Box and Muller from two uniform words.

    With n the 40-bit integer of w0 and the top 8 bits of w1, and k the low 24 bits of w1:
    u = (n + 1/2) 2^-40, angle = 2 pi (k + 1/2 - 2^23) 2^-24, radius = sqrt(-2 log u). So u lies in
    [2^-41, 1 - 2^-41] and |z| ends at `core.generators.BOX_MULLER_TAIL` = 7.54.

    `more`, a third word, continues u where w0 = 0, which happens once in 2^32 pairs: with m its top
    24 bits, u = (n + (m + 1/2) 2^-24) 2^-40 there. So u >= 2^-65 and |z| ends at
    `core.generators.LONG_TAIL` = 9.49; every other pair is as without it.

    float32 has 24 bits, so the half of the unit interval that holds u decides which of u and
    1 - u is formed (its relative error is 2^-24 at both ends). Plain float32 and int32 operations.

    Source: Box and Muller, "A note on the generation of random normal deviates" (1958).
    """
    upper = lax.shift_right_logical(w0, jnp.full_like(w0, 31))  # 1 where u > 1/2
    flip = jnp.full_like(w0, 0) - upper  # all ones where u > 1/2: n becomes its complement
    head = _to_float(w0 ^ flip)
    rest = _to_float(lax.shift_right_logical(w1 ^ flip, jnp.full_like(w1, _ANGLE_BITS)))
    within = jnp.float32(0.5)
    if more is not None:
        fine = _to_float(lax.shift_right_logical(more, jnp.full_like(more, 8)))
        fine = (fine + within) * jnp.float32(2.0**-24)
        within = jnp.where(w0 == jnp.full_like(w0, 0), fine, within)
    near = head * jnp.float32(2.0**-32) + (rest + within) * jnp.float32(2.0**-40)

    is_upper = upper != jnp.full_like(upper, 0)
    far = jnp.float32(1.0) - near
    # log(1 - t) = log(x) + ((1 - x) - t) + O(t 2^-24) for x = float32(1 - t): 1 - x is exact.
    lost = jnp.where(is_upper, (jnp.float32(1.0) - far) - near, jnp.float32(0.0))
    log_u = jnp.log(jnp.where(is_upper, far, near)) + lost
    # An approximate logarithm may come out above 0 next to u = 1.
    radius = jnp.sqrt(jnp.maximum(jnp.float32(-2.0) * log_u, jnp.float32(0.0)))

    steps = _to_float(w1 & jnp.uint32(2**_ANGLE_BITS - 1)) - jnp.float32(2.0**23 - 0.5)
    angle = steps * jnp.float32(2.0 * math.pi / 2**_ANGLE_BITS)
    return radius * jnp.cos(angle), radius * jnp.sin(angle)


def _to_float(x: UInt32[Array, "..."]) -> Float32[Array, "..."]:
    # Every word here is below 2^31; the signed conversion is the one that every lowering knows.
    return x.astype(jnp.int32).astype(jnp.float32)
