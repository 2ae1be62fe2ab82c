"""Rows of query, key or value clipped before a kernel reads them.

One pass over memory where a Hopper kernel can serve, `clipping.rows` elsewhere; its derivative
everywhere. An array in pieces stays so: rows are independent.
"""

import functools

import jax
from jaxtyping import Array, Float

from dpfa_jax.clipping import rows
from dpfa_jax.kernels import implementations
from dpfa_jax.kernels.mosaic_gpu import device
from dpfa_jax.kernels.partitioning import by_rows
from dpfa_jax.kernels.pieces import varying_as

FEWEST = 2**14  # below, a launch costs what the pass does, and XLA can fuse it with others


def clip_rows_stored(
    x: Float[Array, "... D"], l2_clip_norm: float, *, implementation: str | None = None
) -> Float[Array, "... D"]:
    """`clipping.rows.clip_rows_stored`: rows of `x` whose stored norm is <= l2_clip_norm.

    A row within the norm is returned bit for bit, but for one that is shorter by less than
    (D + 32) 2^-24 of it; one that holds NaN or an infinity becomes zero.

    Args:
      x: rows of float32, bfloat16 or float16.
      l2_clip_norm: 1e-18 .. 1e18.
      implementation: "mosaic_gpu", "xla", or None for the first that can.

    A longer row differs between the two by its rounding, 2^-7 of a number in bfloat16.
    Errors: as `clipping.rows.clip_rows_stored`; ArgumentError for an unknown implementation;
    UnsupportedBackendError with the reason where a forced implementation cannot.
    """
    rows.check(x, l2_clip_norm)
    if not implementations.uses_kernel(implementation, lambda: cannot(x)):
        return rows.clip_rows_stored(x, l2_clip_norm)
    return _by_kernel(x, float(l2_clip_norm))


def cannot(x: Float[Array, "... D"]) -> str | None:
    """None if the Hopper kernel serves these rows, else why not, in one sentence."""
    reason = device.cannot_pieces(x)
    if reason is not None:
        return reason
    if x.size < FEWEST:
        return f"{x.size} numbers are fewer than {FEWEST}"
    from dpfa_jax.kernels.mosaic_gpu import row_clip as kernel

    return kernel.cannot(x.size // x.shape[-1], x.shape[-1], x.dtype)


def of_piece(
    l2_clip_norm: float, piece: Float[Array, "... D"], interpret: object = None
) -> tuple[Float[Array, "... D"]]:
    """The clipped rows of a piece, as `by_rows` calls it; too few for the kernel go to XLA."""
    from dpfa_jax.kernels.mosaic_gpu import row_clip as kernel

    columns = piece.shape[-1]
    flat = piece.reshape(-1, columns)
    if kernel.cannot(len(flat), columns, piece.dtype) is not None:
        return (rows.clip_rows_stored(piece, l2_clip_norm),)
    clipped = kernel.clip_rows_stored(flat, l2_clip_norm, interpret=interpret)
    return (clipped.reshape(piece.shape),)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _by_kernel(x: Float[Array, "... D"], l2_clip_norm: float) -> Float[Array, "... D"]:
    @jax.custom_batching.custom_vmap
    def run(x: Array) -> Array:
        return by_rows(functools.partial(of_piece, l2_clip_norm), x.ndim)(x)[0]

    @run.def_vmap
    def _(axis_size: int, in_batched: list[bool], x: Array) -> tuple[Array, bool]:
        del axis_size, in_batched
        return _by_kernel(x, l2_clip_norm), True

    return varying_as(x, run(x))


@_by_kernel.defjvp
def _by_kernel_jvp(
    l2_clip_norm: float, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    def by_xla(x: Array) -> Array:
        return rows.clip_rows_stored(x, l2_clip_norm)

    return _by_kernel(*primals, l2_clip_norm), jax.jvp(by_xla, primals, tangents)[1]
