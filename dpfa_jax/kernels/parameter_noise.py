"""The released mean of one parameter: noise on its sum, the public grid, the division.

One pass over memory where a Hopper kernel can serve; XLA elsewhere, from the same counters. A leaf
in pieces stays so: each knows the global index of its elements.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Key, UInt32

from dpfa_jax.kernels import implementations, manual_axes
from dpfa_jax.kernels.mosaic_gpu import device
from dpfa_jax.kernels.partitioning import by_elements
from dpfa_jax.noise import counters, fields, keys
from dpfa_jax.noise import grid as grids

MOST = 2**31 - 2**16  # numbers that the kernel's int32 positions reach
FEWEST = 2**14  # below, a launch costs what the pass does, and XLA can fuse it with others


Number = float | Float32[Array, "..."]


def released_mean(
    total: Float[Array, "..."],
    noise_key: Key[Array, ""],
    leaf_index: int | UInt32[Array, ""],
    *,
    stddev: Number,
    grid: Number,
    divisor: Number,
    leaf_keys: UInt32[Array, "leaves 2"] | None = None,
    implementation: str | None = None,
) -> Float32[Array, "..."]:
    """snap(total + stddev * noise, grid) / divisor.

    Args:
      total: sum of clipped gradients.
      noise_key: of this step; element e of leaf `leaf_index` takes the standard normal that
        `noise.parameter_noise` gives it, on whatever device.
      stddev, grid: in the units of `total`, for all of it or broadcast against it; `grid` powers of
        two.
      divisor: the expected batch size.
      leaf_keys: `counters.bind_parameter` of this key for leaves 0, 1, ..: derived here where None.
        Each time they are derived is a kernel to compile.
      implementation: "mosaic_gpu", "xla", or None for the first that can.

    The kernel's logarithm, root, sine and cosine are the hardware's: next to a border between two
    cells of the grid a value may fall on the other side than with XLA. Not differentiable there.
    Errors: ArgumentError for an unknown implementation and for a leaf of more than 2^32 numbers;
    UnsupportedBackendError with the reason where a forced implementation cannot.
    Source: Abadi et al. (2016), algorithm 1; Box and Muller (1958).
    """
    total = jnp.asarray(total).astype(jnp.float32)
    if not implementations.uses_kernel(implementation, lambda: cannot(total, stddev)):
        return by_xla(total, noise_key, leaf_index, stddev, grid, divisor)
    numbers = (stddev, grid, divisor)
    return or_by_xla(_by_elements, by_xla, (total,), noise_key, leaf_index, numbers, leaf_keys)


def cannot(total: Float[Array, "..."], stddev: Number = 1.0) -> str | None:
    """None if the Hopper kernel serves this leaf, else why not, in one sentence."""
    return device.cannot_pieces(total) or cannot_leaf(total.size, stddev)


def cannot_leaf(size: int, stddev: Number) -> str | None:
    """None if the kernel serves leaves of so many numbers and such noise, else why not."""
    if np.ndim(stddev):
        return "its parts have standard deviations of their own"
    if size < FEWEST or size > MOST or size % 4:
        return f"{size} numbers are fewer than {FEWEST}, more than {MOST} or no multiple of 4"
    return None


def by_xla(
    total: Float32[Array, "..."],
    noise_key: Key[Array, ""],
    leaf_index: int | UInt32[Array, ""],
    stddev: Number,
    grid: Number,
    divisor: Number,
) -> Float32[Array, "..."]:
    """`released_mean` by XLA."""
    noise = stddev * fields.parameter_noise(noise_key, leaf_index, total.shape)
    return grids.snap_once(total + noise, grid) / divisor


def of_piece(
    shape: tuple[int, ...],
    kind: Any,
    piece: Float32[Array, "..."],
    *more: Array,
    interpret: Any = None,
) -> tuple[Float32[Array, "..."]]:
    """The released mean of a piece of a leaf of `shape`, as `by_elements` calls it.

    `more`: the global index along each dimension; keys bound to leaves (leaves, 2) and this leaf's
    row (1,) among them, (stddev, grid, divisor), key words and leaf index (1,). `kind` names the
    key's generator. A piece that is one run of the leaf goes to the kernel, any other to XLA.
    """
    *index, leaf_keys, row, numbers, key_words, leaf = more
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    is_run = piece.shape[1:] == shape[1:] and piece.size >= FEWEST and piece.size % 4 == 0
    if not is_run:
        places = jnp.ix_(*index)
        element = sum(x * jnp.uint32(n) for x, n in zip(places, strides, strict=True))
        noise_key = jax.random.wrap_key_data(key_words, impl=kind)
        noise = fields.parameter_noise_at(noise_key, leaf[0], jnp.asarray(element))
        return (grids.snap_once(piece + numbers[0] * noise, numbers[1]) / numbers[2],)
    from dpfa_jax.kernels.mosaic_gpu import parameter_noise as kernel

    start = index[0][:1] * jnp.uint32(strides[0])
    # The kernel adds rows: this is one row, as it is.
    operands = (piece.reshape(1, -1), jnp.ones(1), leaf_keys, row, numbers, start)
    axes = manual_axes.varying_axes(*operands)
    varying = (manual_axes.vary_over(x, axes) for x in operands)
    return (kernel.released_mean(*varying, interpret=interpret).reshape(piece.shape),)


def _by_elements(total: Float32[Array, "..."], *whole: Array, kind: Any) -> Float32[Array, "..."]:
    function = functools.partial(of_piece, total.shape, kind)
    return by_elements(function, total.ndim, len(whole))(total, *whole)[0]


def or_by_xla(
    by_kernel: Callable[..., Array],
    by_xla: Callable[..., Array],
    arrays: tuple[Array, ...],
    noise_key: Key[Array, ""],
    leaf_index: int | UInt32[Array, ""],
    numbers: tuple[Number, Number, Number],
    leaf_keys: UInt32[Array, "leaves 2"] | None,
) -> Float32[Array, "..."]:
    """`by_kernel`; under `vmap` `by_xla`, whatever of it is mapped.

    Args:
      by_kernel: (*arrays, keys bound to leaves, this leaf's row (1,) among them, (stddev, grid,
        divisor), key words, leaf index (1,), `kind` of the key) -> the released mean.
      by_xla: (*arrays, noise key, leaf index, stddev, grid, divisor) -> the same.
    """
    kind = jax.random.key_impl(noise_key)
    leaf = jnp.uint32(leaf_index)
    key_words, row = keys.key_words(noise_key), leaf.astype(jnp.int32)
    if leaf_keys is None:
        leaf_keys, row = counters.bind_parameter(key_words, leaf)[None], jnp.int32(0)
    run = jax.custom_batching.custom_vmap(functools.partial(by_kernel, kind=kind))

    @run.def_vmap
    def _(axis_size: int, in_batched: list[bool], *operands: Array) -> tuple[Array, bool]:
        def one(*operands: Array) -> Array:
            *arrays, _keys, _row, numbers, key_words, leaf = operands
            key = jax.random.wrap_key_data(key_words, impl=kind)
            return by_xla(*arrays, key, leaf[0], *numbers)

        axes = [0 if is_batched else None for is_batched in in_batched]
        return jax.vmap(one, in_axes=axes, axis_size=axis_size)(*operands), True

    stacked = jnp.stack([jnp.asarray(x, jnp.float32) for x in numbers])
    return run(*arrays, leaf_keys, row[None], stacked, key_words, leaf[None])
