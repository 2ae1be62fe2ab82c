"""Clip norms that move with released counts: all of it is post-processing of what was released.

Source: Andrew, Thakkar, McMahan and Ramaswamy, "Differentially private learning with adaptive
clipping" (2021).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from dpfa_jax.core import ArgumentError
from dpfa_jax.noise import fields, grid
from dpfa_jax.release import TrainingRelease

# A clip norm stays within these factors of its first value, and where float32 squares are normal.
_MOST, _LEAST = 2.0**20, 2.0**-20
_LARGEST, _SMALLEST = 1e18, 1e-18
# Deviations are computed in float32 from the clip norms at hand: rounded up by more than they err.
_ROUNDING = 1.0 + 2.0**-18


def check_norms(l2_clip_norms: object) -> None:
    """Refuses clip norms that no step keeps, where they are known: not inside a jitted program.

    Nor while a step still computes them, so as not to wait for it: `noise_for` sees all.

    Errors: ArgumentError.
    """
    if isinstance(l2_clip_norms, jax.core.Tracer):
        return
    if not getattr(l2_clip_norms, "is_ready", lambda: True)():
        return
    norms = np.asarray(l2_clip_norms)
    if norms.dtype.kind != "f" or not np.all(_in_range(norms)):
        raise ArgumentError(
            "state.l2_clip_norms",
            norms.tolist(),
            f"not all finite numbers in {_SMALLEST:g} .. {_LARGEST:g}",
            "Pass the state that this plan's init, or its last step, gave.",
        )


def _in_range(norms: Array | np.ndarray) -> Array | np.ndarray:
    return (norms >= 0.99 * _SMALLEST) & (norms <= 1.01 * _LARGEST)  # float32 rounds the ends


def noise_for(
    release: TrainingRelease, l2_clip_norms: Float32[Array, " groups"]
) -> tuple[Float32[Array, " groups"], Float32[Array, " groups"]]:
    """(standard deviations, grids) of the groups' sums at these clip norms.

    They keep the ratios of the release: sum_l (C_l / s_l)^2 is that of its first step. Norms that
    no step keeps (NaN, infinite, not positive) give NaN for all: then nothing is released but NaN.
    """
    l2_clip_norms = jnp.where(_in_range(l2_clip_norms), l2_clip_norms, jnp.nan)
    first = np.asarray(release.noise_stddevs[: len(release.l2_clip_norms)])
    ratios = l2_clip_norms * jnp.asarray(1.0 / first, jnp.float32)
    largest = jnp.max(ratios)  # taken out before squaring, which may over- or underflow
    length = largest * jnp.sqrt(jnp.sum(jnp.square(ratios / largest)))
    scale = jnp.float32(release.gradient_noise_multiplier * _ROUNDING) * length
    stddevs = scale * jnp.asarray(first, jnp.float32)
    return stddevs, power_of_two_near(stddevs / 16.0)


def released_counts(
    release: TrainingRelease,
    centred_counts: Float32[Array, " groups"],
    noise_key: Array,
    leaf_index: int,
) -> Float32[Array, " groups"]:
    """The counts with their own noise, on their public grid; `leaf_index` is no parameter's."""
    groups = len(release.l2_clip_norms)
    stddev, cell = release.noise_stddevs[groups], release.grids[groups]
    noise = stddev * fields.parameter_noise(noise_key, leaf_index, (groups,))
    return grid.snap_once(centred_counts.astype(jnp.float32) + noise, cell)


def moved(
    release: TrainingRelease,
    l2_clip_norms: Float32[Array, " groups"],
    counts: Float32[Array, " groups"],
) -> Float32[Array, " groups"]:
    """The next clip norms: C exp(-learning_rate (share unclipped - quantile)), kept in range."""
    adaptive = release.adaptive_clipping
    assert adaptive is not None
    share = jnp.clip(counts / release.expected_batch_size + 0.5, 0.0, 1.0)
    moved = l2_clip_norms * jnp.exp(-adaptive.learning_rate * (share - adaptive.quantile))
    first = np.asarray(release.l2_clip_norms)
    least = np.maximum(first * _LEAST, _SMALLEST).astype(np.float32)
    most = np.minimum(first * _MOST, _LARGEST).astype(np.float32)
    return jnp.clip(moved, least, most)


def power_of_two_near(numbers: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The power of two nearest each positive normal number, in the logarithm. Exact."""
    bits = jax.lax.bitcast_convert_type(numbers, jnp.uint32)
    exponent, mantissa = bits & jnp.uint32(0xFF800000), bits & jnp.uint32(0x007FFFFF)
    above = mantissa > jnp.uint32(0x003504F3)  # of sqrt(2)
    exponent = exponent + jnp.where(above, jnp.uint32(0x00800000), jnp.uint32(0))
    return jax.lax.bitcast_convert_type(exponent, jnp.float32)
