"""Released values lie on a public grid, which hides how floating point rounded them."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32


def snap(x: Float[Array, "..."], grid: float | Float32[Array, "..."]) -> Float[Array, "..."]:
    """`x` rounded to the nearest multiple of `grid`, ties to even.

    Args:
      x: noised values, float32.
      grid: a power of two (or an array of them that broadcasts), in the units of x; then both the
        division and the product are exact. Runs inside Pallas kernels.

    Blunts attacks on floating-point noise; it does not make the mechanism exact.
    Source: Mironov, "On significance of the least significant bits for differential privacy"
    (2012).
    """
    grid = jnp.asarray(grid, x.dtype)
    return lax.round(x * (1.0 / grid), lax.RoundingMethod.TO_NEAREST_EVEN) * grid
