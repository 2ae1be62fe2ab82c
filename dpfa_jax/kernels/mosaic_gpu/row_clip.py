"""Rows clipped to a norm in one pass over memory: each number is read once and written once.

A row lies in the registers of a few neighbouring lanes, 16 bytes of it in one access; the lanes
exchange its largest entry and its square by shuffles. No shared memory: programs are small, and the
loads of those that share a processor hide each other. The last program begins early enough to end
with the array: what it shares with the one before is computed twice, to the same bits.
"""

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.clipping.float_rows import toward_zero
from dpfa_jax.clipping.rows import STORAGE_TYPES
from dpfa_jax.kernels import manual_axes
from dpfa_jax.kernels.mosaic_gpu import axes, dialect
from dpfa_jax.kernels.mosaic_gpu.noise import clip_rows

MOST = 2**31 - 2**16  # numbers that int32 positions reach
ACCESS = 16  # bytes of one load or store of a lane
LANES = 8  # of a row: 128 bytes, a whole line of the cache, in one access
MOST_LANES = 16
MOST_ACCESSES = 16  # of a lane to one row: its float32 numbers stay in registers
ACCESSES = 4  # in flight a lane, where a row needs no more


def lanes_of(columns: int, dtype: jnp.dtype) -> int:
    """Lanes that hold a row, a power of two; 0 where the kernel does not serve such rows."""
    accesses, rest = divmod(columns * dtype.itemsize, ACCESS)
    if rest or not accesses or accesses % 2:  # a row of whole sectors, 32 bytes
        return 0
    most = math.gcd(accesses, MOST_LANES)
    lanes = min(most, LANES)
    while lanes < most and accesses > ACCESSES * lanes:
        lanes *= 2
    return lanes if accesses <= MOST_ACCESSES * lanes else 0


def rows_of(columns: int, dtype: jnp.dtype) -> int:
    """Rows of one program, for columns that `lanes_of` serves."""
    lanes = lanes_of(columns, dtype)
    accesses = columns * dtype.itemsize // ACCESS // lanes
    return 128 // lanes * max(1, ACCESSES // accesses)


def cannot(count: int, columns: int, dtype: jnp.dtype) -> str | None:
    """None if the kernel serves `count` rows, else why not."""
    if dtype not in STORAGE_TYPES or not lanes_of(columns, dtype):
        return f"rows of {columns} {dtype} numbers do not fit the registers of a few lanes evenly"
    least = rows_of(columns, dtype)
    if count < least or count * columns > MOST:
        return f"{count} rows are fewer than {least}, or hold more than {MOST} numbers"
    return None


def _layout(columns: int, dtype: jnp.dtype) -> Any:
    lanes = lanes_of(columns, dtype)
    vector = ACCESS // dtype.itemsize
    rows, width = 32 // lanes, lanes * vector
    tiled = functools.partial(plgpu.Layout.TILED, vector_dim=-1)
    program = (4 * rows, width)
    tiling = plgpu.Tiling((program, (rows, width), (vector,)))
    return tiled(tiling, warp_dims=(-5,), lane_dims=(-3, -2))


def _stored(x: jax.Array, dtype: jnp.dtype, layout: Any, *, simulate: bool) -> jax.Array:
    """Float32 rounded toward zero to `dtype`: one instruction for two numbers."""
    if dtype == jnp.float32:
        return x
    if simulate:
        return toward_zero(x, dtype)

    @plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, dtype, layout=layout),
    )
    def cut(_, x):
        return dialect.cut(x, dtype)

    return cut(x)


def clip_rows_stored(x: jax.Array, l2_clip_norm: float, *, interpret: Any = None) -> jax.Array:
    """Each row scaled down to a stored norm of at most `l2_clip_norm`; not finite: zero.

    Args:
      x: (rows, columns) bfloat16, float16 or float32; `lanes_of` serves its columns, and there are
        at least `rows_of` rows.
      interpret: parameters of the Mosaic GPU simulator, None on a GPU.
    """
    count, columns = x.shape
    rows = rows_of(columns, x.dtype)
    layout = _layout(columns, x.dtype)

    def kernel(x_ref, out_ref):
        begin = jnp.minimum(lax.axis_index(axes.BLOCKS) * rows, count - rows)
        own = pl.ds(begin, rows)
        loaded = plgpu.load(x_ref.at[own], layout=layout, optimized=False)
        clipped = clip_rows(loaded.astype(jnp.float32), l2_clip_norm)
        out_ref[own] = _stored(clipped, x.dtype, layout, simulate=interpret is not None)

    return plgpu.kernel(
        kernel,
        out_type=manual_axes.result(x.shape, x.dtype, x),
        grid=(pl.cdiv(count, rows),),
        grid_names=(axes.BLOCKS,),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="dpfa_row_clip",
        interpret=interpret,
    )(x)
