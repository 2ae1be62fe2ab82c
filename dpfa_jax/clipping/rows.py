"""Clip rows (query, key, value, one head's output) so that the STORED values keep the norm."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from dpfa_jax.clipping.float_rows import norm_limit, toward_zero
from dpfa_jax.core import ArgumentError, checks

STORAGE_TYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def clip_rows(x: Float[Array, "... D"], l2_clip_norm: float) -> Float32[Array, "... D"]:
    """`x` in float32 with each row (last axis) scaled down to an L2 norm of at most `l2_clip_norm`.

    The norm of the returned float32 values, summed exactly, is <= l2_clip_norm for every input: a
    row is left alone only if its norm is below it by the largest rounding error of a sum of D
    squares, (D + 16) 2^-24. A row that holds NaN or an infinity becomes zero. Differentiable; the
    gradient of a zeroed row is zero.

    Errors: as `check`.
    """
    check(x, l2_clip_norm)
    limit = norm_limit(l2_clip_norm, x.shape[-1])
    return _clipped(x.astype(jnp.float32), limit)


def check(x: Float[Array, "... D"], l2_clip_norm: float) -> None:
    """Errors: ArgumentError for a clip norm outside 1e-18 .. 1e18 or a row longer than 2^20."""
    checks.magnitude("l2_clip_norm", l2_clip_norm)
    if x.shape[-1] > 2**20:
        raise ArgumentError("x", x.shape, "rows longer than 2^20", "Clip shorter rows.")


class _Measured(NamedTuple):
    """Rows, zero where not finite; scaled rows, their length and scale; which are short enough."""

    x: Array
    scaled: Array
    length: Array
    scale: Array
    keeps: Array
    is_finite: Array


def _measured(x: Float32[Array, "... D"], limit: float) -> _Measured:
    squares, scale, is_finite = _squares(x)
    is_finite = is_finite > 0.0
    x, squares = jnp.where(is_finite, x, 0.0), jnp.where(is_finite, squares, 0.0)
    length = jnp.sqrt(jnp.where(squares > 0.0, squares, 1.0))
    keeps = (squares == 0.0) | (length <= limit * scale)
    return _Measured(x, x * scale, length, scale, keeps, is_finite)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _clipped(x: Float32[Array, "... D"], limit: float) -> Float32[Array, "... D"]:
    row = _measured(x, limit)
    return jnp.where(row.keeps, row.x, row.scaled * (limit / row.length))


@_clipped.defjvp
def _clipped_jvp(
    limit: float, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    """Along the row nothing moves; across it, as much as the row was shortened.

    From the unit vector, and not through the square: that would leave float32's range.
    """
    (x,), (dx,) = primals, tangents
    row = _measured(x, limit)
    unit = row.scaled / row.length
    across = dx - unit * jnp.sum(unit * dx, axis=-1, keepdims=True)
    moved = jnp.where(row.keeps, dx, across * row.scale * (limit / row.length))
    return _clipped(x, limit), jnp.where(row.is_finite, moved, 0.0)


def clip_rows_stored(x: Float[Array, "... D"], l2_clip_norm: float) -> Float[Array, "... D"]:
    """`clip_rows` in the dtype of `x`, rounded toward zero, so that rounding cannot add norm.

    A row within the norm is returned bit for bit. Errors: as `clip_rows`, and ArgumentError for a
    dtype other than float32, bfloat16 and float16.
    """
    if x.dtype not in STORAGE_TYPES:
        raise ArgumentError(
            "x", x.dtype, "not a storage type", "Pass float32, bfloat16 or float16."
        )
    return toward_zero(clip_rows(x, l2_clip_norm), x.dtype)


# Of a row whose largest entry is in [2^(k - 35), 2^(k + 35)) for one of these k, squares scaled by
# 2^-2k neither overflow, 2^20 of them, nor vanish above 2^-56 of the largest.
_CENTRES = (-100, -30, 40, 110)


@jax.custom_jvp
def _squares(x: Float32[Array, "... D"]) -> tuple[Array, Array, Array]:
    """(sum of (x 2^-k)^2, 2^-k, 1.0 where all are finite), each (..., 1), along the last axis.

    2^-k is exact. All sums and the largest entry come out of one pass: a scale that waited for the
    largest entry would make XLA read `x` once more.
    """
    magnitudes = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    largest = jnp.max(magnitudes, axis=-1, keepdims=True, initial=0)
    exponent = jnp.right_shift(largest, 23) - 127
    scale = jnp.float32(2.0 ** -_CENTRES[0])
    squares = _scaled_squares(x, scale)
    for k in _CENTRES[1:]:
        is_here = exponent >= k - 35
        squares = jnp.where(is_here, _scaled_squares(x, jnp.float32(2.0**-k)), squares)
        scale = jnp.where(is_here, jnp.float32(2.0**-k), scale)
    is_finite = jnp.where(largest < 0x7F800000, jnp.float32(1.0), jnp.float32(0.0))
    return squares, jnp.broadcast_to(scale, squares.shape), is_finite


def _scaled_squares(x: Array, scale: Array) -> Array:
    scaled = x * scale
    return jnp.sum(scaled * scaled, axis=-1, keepdims=True)


@_squares.defjvp
def _squares_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
    (x,), (dx,) = primals, tangents
    squares, scale, is_finite = _squares(x)
    # Of a row that becomes zero: no NaN times 0.
    scaled = jnp.where(is_finite > 0.0, x * scale, 0.0)
    change = 2.0 * jnp.sum(scaled * (dx * scale), axis=-1, keepdims=True)
    no_change = jnp.zeros_like(scale)
    return (squares, scale, is_finite), (change, no_change, no_change)
