"""The released mean of one parameter from the gradients of single examples: sum, noise, division.

One pass over memory where a Hopper kernel can serve: the sum never gets there without its noise.
XLA elsewhere, as a sum and `parameter_noise.released_mean` of it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key, UInt32

from dpfa_jax.clipping import trees
from dpfa_jax.core import ArgumentError
from dpfa_jax.kernels import implementations, parameter_noise
from dpfa_jax.kernels.mosaic_gpu import device
from dpfa_jax.kernels.parameter_noise import Number


def released_mean_of_rows(
    rows: Float[Array, "B ..."],
    scales: Float32[Array, " B"],
    noise_key: Key[Array, ""],
    leaf_index: int | UInt32[Array, ""],
    *,
    stddev: Number,
    grid: Number,
    divisor: Number,
    leaf_keys: UInt32[Array, "leaves 2"] | None = None,
    implementation: str | None = None,
) -> Float32[Array, "..."]:
    """snap(sum over examples of scale * row + stddev * noise, grid) / divisor.

    Args:
      rows: gradients of single examples, in the parameter's shape.
      scales: of each example; one of scale zero is left out, whatever it holds.
      The rest as `parameter_noise.released_mean`.

    The whole batch must be in `rows`: noise is due once, on the sum of all. Added in float32.
    Errors: ArgumentError for scales that do not fit, an unknown implementation and a leaf of more
    than 2^32 numbers; UnsupportedBackendError with the reason where a forced implementation cannot.
    Source: Abadi et al. (2016), algorithm 1.
    """
    if scales.shape != rows.shape[:1]:
        raise ArgumentError(
            "scales", scales.shape, f"not {rows.shape[:1]}", "Pass one scale an example."
        )
    scales, numbers = scales.astype(jnp.float32), (stddev, grid, divisor)
    if not implementations.uses_kernel(implementation, lambda: cannot(rows, stddev)):
        return _by_xla(rows, scales, noise_key, leaf_index, *numbers)
    return parameter_noise.or_by_xla(
        _by_kernel, _by_xla, (rows, scales), noise_key, leaf_index, numbers, leaf_keys
    )


def cannot(rows: Float[Array, "B ..."], stddev: Number = 1.0) -> str | None:
    """None if the Hopper kernel serves these rows, else why not, in one sentence."""
    if jax.sharding.get_abstract_mesh().manual_axes:
        return "inside shard_map the sum over shards is due before the noise"
    reason = device.cannot(rows)
    if reason is not None:
        return reason
    if rows.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it adds bfloat16, float16 or float32, got {rows.dtype}"
    if rows.shape[0] == 0:
        return "there is no example"
    if rows.size > parameter_noise.MOST:
        return f"{rows.size} numbers are more than the {parameter_noise.MOST} that were tried"
    return parameter_noise.cannot_leaf(rows.size // rows.shape[0], stddev)


def chosen(rows: Float[Array, "B ..."], stddev: Number = 1.0) -> bool:
    """Whether a call that names no implementation runs the Hopper kernel."""
    return cannot(rows, stddev) is None


def _by_xla(
    rows: Float[Array, "B ..."],
    scales: Float32[Array, " B"],
    noise_key: Key[Array, ""],
    leaf_index: int | UInt32[Array, ""],
    *numbers: Number,
) -> Float32[Array, "..."]:
    total = trees.weighted_sum(rows, scales)
    return parameter_noise.by_xla(total, noise_key, leaf_index, *numbers)


def _by_kernel(
    rows: Array,
    scales: Array,
    leaf_keys: Array,
    row: Array,
    numbers: Array,
    _key_words: Array,
    _leaf: Array,
    *,
    kind: Any,
) -> Float32[Array, "..."]:
    from dpfa_jax.kernels.mosaic_gpu import parameter_noise as kernel

    del kind  # the generator, which the kernel knows
    flat = rows.reshape(rows.shape[0], -1)
    mean = kernel.released_mean(flat, scales, leaf_keys, row, numbers)
    return mean.reshape(rows.shape[1:])
