"""Released values lie on a public grid, which hides how floating point rounded them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32


def snap(x: Float32[Array, "..."], grid: float | Float32[Array, "..."]) -> Float32[Array, "..."]:
    """`x` rounded to the nearest multiple of `grid`, ties to even.

    Args:
      x: noised values.
      grid: a power of two (or an array of them that broadcasts), in the units of x; then both the
        division and the product are exact. Runs inside Pallas kernels.

    Blunts attacks on floating-point noise; it does not make the mechanism exact.
    Source: Mironov, "On significance of the least significant bits for differential privacy"
    (2012).
    """
    grid = jnp.asarray(grid, jnp.float32)
    multiples = x * (1.0 / grid)
    # Beyond 2^23 a float32 is a whole number; below, adding 2^23 leaves no bit for a fraction.
    # (lax.round has no lowering in Triton kernels.) XLA cancels (x + c) - c where c is a constant
    # of the compilation; the select, whose value depends on x, keeps it from doing so.
    shift = jnp.where(multiples < 0.0, jnp.float32(-(2.0**23)), jnp.float32(2.0**23))
    rounded = (multiples + shift) - shift
    return jnp.where(jnp.abs(multiples) < jnp.float32(2.0**23), rounded, multiples) * grid


def snap_once(x: Float32[Array, "..."], grid: float | Float32[Array, "..."]) -> Array:
    """`snap` for what XLA makes and releases: one value, whoever reads it.

    XLA may compute a fused value anew for each reader, contracted and hence rounded another way:
    next to a border of the grid two readers would see two values. Not inside kernels.
    """
    return jax.lax.optimization_barrier(snap(x, grid))
