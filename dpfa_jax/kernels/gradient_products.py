"""Weight gradients of single examples, lhs' rhs, with their squared norms.

Each is formed by a Hopper kernel where one can, else by XLA. The norm is that of the stored,
rounded numbers: whoever clips by it clips what is added.
"""

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from dpfa_jax.clipping import trees
from dpfa_jax.core import ArgumentError
from dpfa_jax.kernels import implementations, manual_axes
from dpfa_jax.kernels.mosaic_gpu import device

if TYPE_CHECKING:
    from dpfa_jax.kernels.mosaic_gpu.gradient_products import ProductTiles

# Partial sums are added in runs, level by level. With the kernel's rows of at most 192 numbers, up
# to 128^3 of them err by less than (192 + 3 * 128) 2^-24, so the norm by less than 2^-15.
_RUN = 128


def gradient_products(
    lhs: Float[Array, "B T I"],
    rhs: Float[Array, "B T O"],
    *,
    unit: float = 1.0,
    implementation: str | None = None,
) -> tuple[Float[Array, "B I O"], Float32[Array, " B"]]:
    """Products of each example, in the operands' dtype, and their squared norms.

    Args:
      lhs, rhs: a layer's inputs and the cotangents of its outputs, of one dtype.
      unit: the squares are those of the rounded products over `unit` (a clip norm), so that no
        scale makes them over- or underflow. Relative error of the norm: below 2^-15.
      implementation: "mosaic_gpu", "xla", or None for the first that can.

    Returns: (products, squares). Accumulated in float32 and rounded once. Where a product is NaN or
    infinite, so is its example's square. Same inputs, same bits. Not differentiable on a GPU.
    Errors: ArgumentError for shapes or dtypes that do not fit; UnsupportedBackendError with the
    reason where a forced implementation cannot.
    """
    if _uses_kernel(lhs, rhs, unit, implementation):
        products, squares = _squared(*_alike(lhs, rhs), store=True, **_launch(lhs, rhs, unit))
        return products, squares
    products = _product(lhs, rhs)
    return products, trees.squared_norms(products, unit)


def gradient_product_squares(
    lhs: Float[Array, "B T I"],
    rhs: Float[Array, "B T O"],
    *,
    unit: float = 1.0,
    implementation: str | None = None,
) -> Float32[Array, " B"]:
    """The squares of `gradient_products`, the same bits, with nothing per example stored.

    Where XLA forms them, one example's product is held at a time.
    """
    if _uses_kernel(lhs, rhs, unit, implementation):
        return _squared(*_alike(lhs, rhs), store=False, **_launch(lhs, rhs, unit))[0]

    def one(_: None, pair: tuple[Array, Array]) -> tuple[None, Float32[Array, ""]]:
        product = _product(pair[0][None], pair[1][None])
        return None, trees.squared_norms(product, unit)[0]

    return jax.lax.scan(one, None, (lhs, rhs))[1]


def weighted_product_sum(
    lhs: Float[Array, "B T I"],
    rhs: Float[Array, "B T O"],
    scales: Float32[Array, " B"],
    *,
    implementation: str | None = None,
) -> Float32[Array, "I O"]:
    """Sum over examples of scale times product, nothing per example stored.

    Each product is rounded to the operands' dtype first: on one implementation what is added is,
    bit for bit, what `gradient_product_squares` has measured. An example of scale zero is left out,
    whatever it holds. Arguments and errors as `gradient_products`.
    """
    uses_kernel = _uses_kernel(lhs, rhs, 1.0, implementation)
    if scales.shape != lhs.shape[:1]:
        raise ArgumentError(
            "scales", scales.shape, f"not {lhs.shape[:1]}", "Pass one scale an example."
        )
    lhs, rhs, scales = _alike(lhs, rhs, scales.astype(jnp.float32))
    if uses_kernel:
        return _summed(lhs, rhs, scales, processors=device.processors())

    def add(total: Array, one: tuple[Array, Array, Array]) -> tuple[Array, None]:
        left, right, scale = one
        product = _product(left[None], right[None])
        return total + trees.weighted_sum(product, scale[None]), None

    shape = (lhs.shape[2], rhs.shape[2])
    zeros = manual_axes.zeros(shape, jnp.float32, manual_axes.varying_axes(scales))
    return jax.lax.scan(add, zeros, (lhs, rhs, scales))[0]


def cannot(lhs: Float[Array, "B T I"], rhs: Float[Array, "B T O"]) -> str | None:
    """None if the Hopper kernels serve these operands well, else why not, in one sentence."""
    reason = device.cannot(lhs)
    if reason is not None:
        return reason
    if lhs.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the tensor cores are fed bfloat16 or float16, got {lhs.dtype}"
    (batch, tokens, rows), columns = lhs.shape, rhs.shape[2]
    if tokens % 8 or rows % 64 or columns % 64:
        return f"T={tokens} must be a multiple of 8, I={rows} and O={columns} of 64"
    if 0 in (batch, tokens, rows, columns):
        return "an axis is empty"
    tile = _tile(batch, rows, columns)
    tiles = -(-rows // tile.program_rows) * -(-columns // tile.columns)
    if tiles * tile.program_rows * tile.columns > 1.5 * rows * columns:
        return f"a third or more of the tiles of a {rows} x {columns} product would be empty"
    if batch * tiles < device.processors():
        return f"{batch} products of {rows} x {columns} do not fill the GPU"
    return None


def chosen(lhs: Float[Array, "B T I"], rhs: Float[Array, "B T O"]) -> bool:
    """Whether a call that names no implementation runs the Hopper kernels."""
    return cannot(lhs, rhs) is None


def _uses_kernel(lhs: Array, rhs: Array, unit: float, implementation: str | None) -> bool:
    """Checks the arguments; whether the Hopper kernels are to be used."""
    if lhs.ndim != 3 or rhs.ndim != 3 or lhs.shape[:2] != rhs.shape[:2]:
        raise ArgumentError(
            "rhs",
            rhs.shape,
            f"does not go with lhs of shape {lhs.shape}",
            "Pass lhs of shape (B, T, I) and rhs of shape (B, T, O).",
        )
    if lhs.dtype != rhs.dtype:
        raise ArgumentError("rhs", rhs.dtype, f"lhs is {lhs.dtype}", "Pass operands of one dtype.")
    if not (math.isfinite(unit) and unit > 0):
        raise ArgumentError("unit", unit, "not a positive number", "Pass the clip norm, or 1.0.")
    return implementations.uses_kernel(implementation, lambda: cannot(lhs, rhs))


def _tile(batch: int, rows: int, columns: int) -> "ProductTiles":
    from dpfa_jax.kernels.mosaic_gpu.gradient_products import product_tiles

    return product_tiles(batch, rows, columns, device.processors())


def _launch(lhs: Array, rhs: Array, unit: float) -> dict[str, Any]:
    """How the kernel is launched, as static arguments."""
    tile = _tile(lhs.shape[0], lhs.shape[2], rhs.shape[2])
    return {"unit": unit, "tile": tile, "processors": device.processors()}


def _product(lhs: Array, rhs: Array) -> Array:
    """The barrier keeps what is measured the same numbers as what is stored."""
    return jax.lax.optimization_barrier(
        jnp.einsum("bti,bto->bio", lhs, rhs, preferred_element_type=lhs.dtype)
    )


def _alike(*arrays: Array) -> tuple[Array, ...]:
    """`arrays`, all varying over the same axes of a manual mesh."""
    axes = manual_axes.varying_axes(*arrays)
    return tuple(manual_axes.vary_over(array, axes) for array in arrays)


# Jitted, so that equal calls are one function of the program: each lowering takes half a second.
@functools.partial(jax.jit, static_argnames=("unit", "store", "tile", "processors"))
def _squared(
    lhs: Array, rhs: Array, *, unit: float, store: bool, tile: "ProductTiles", processors: int
) -> tuple[Array, ...]:
    """(products, squares) or (squares,) of the kernel; an axis of `vmap` is walked along."""
    from dpfa_jax.kernels.mosaic_gpu.gradient_products import product_squares

    @jax.custom_batching.sequential_vmap
    def run(lhs: Array, rhs: Array) -> tuple[Array, ...]:
        products, parts = product_squares(
            lhs, rhs, tile, unit=unit, store=store, processors=processors
        )
        squares = add_in_runs(parts.reshape(parts.shape[0], -1))
        return (squares,) if products is None else (products, squares)

    return run(lhs, rhs)


@functools.partial(jax.jit, static_argnames=("processors",))
def _summed(lhs: Array, rhs: Array, scales: Array, *, processors: int) -> Float32[Array, "I O"]:
    """The kernel's weighted sum; an axis of `vmap` is walked along."""
    from dpfa_jax.kernels.mosaic_gpu.gradient_products import SUM_TILE, weighted_sum

    @jax.custom_batching.sequential_vmap
    def run(lhs: Array, rhs: Array, scales: Array) -> Array:
        parts = weighted_sum(lhs, rhs, scales, SUM_TILE, processors=processors)
        return functools.reduce(jnp.add, parts)

    return run(lhs, rhs, scales)


def add_in_runs(parts: Float32[Array, "B numbers"]) -> Float32[Array, " B"]:
    """Sums of the rows in a fixed order; the barrier keeps the runs from being merged."""
    while parts.shape[1] > _RUN:
        parts = jnp.pad(parts, ((0, 0), (0, -parts.shape[1] % _RUN)))
        runs = jnp.sum(parts.reshape(parts.shape[0], -1, _RUN), axis=2)
        parts = jax.lax.optimization_barrier(runs)
    return jnp.sum(parts, axis=1)
