"""How arrays lie in shared memory and registers, and which keys of a tile each row sees."""

import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.mosaic_gpu import dialect
from dpfa_jax.kernels.mosaic_gpu.steps import Scalar, left_reach, right_reach

LOG2_E = math.log2(math.e)
WGMMA = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)


def tile_transforms(columns: int, dtype: Any, *, swizzle: int | None = None) -> tuple[Any, ...]:
    """How rows of so many numbers lie in shared memory for the tensor cores.

    `swizzle`: bytes of a tile's rows, None: as many as fit. Both operands of a product have the
    same, and what is contracted is a multiple of it.
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = swizzle or plgpu.find_swizzle(columns * itemsize * 8)
    return (
        plgpu.TilingTransform((8, swizzle // itemsize)),  # type: ignore[abstract]
        plgpu.SwizzleTransform(swizzle),  # type: ignore[abstract]
    )


def tiled_shared(shape: tuple[int, ...], dtype: Any, *, swizzle: int | None = None) -> Any:
    """Shared memory laid out for the tensor cores; `swizzle` as in `tile_transforms`."""
    transforms = tile_transforms(shape[-1], dtype, swizzle=swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def pad_sequence(x: jax.Array) -> jax.Array:
    """(B, T, N, H) with zeros up to multiples of 8 in T and of 64 in H, as TMA tiles need."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, -x.shape[3] % 64)))


def visible(
    spec: AttentionSpec,
    shape: tuple[int, int],
    row_begin: Scalar,
    column_begin: Scalar,
    key_length: Scalar,
    query_length: Scalar | None,
    *,
    transposed: bool = False,
    is_fresh: bool = False,
) -> jax.Array:
    """Which keys (columns) of one tile each query (row) sees; `transposed`: keys are the rows.

    `is_fresh`: for the registers of an outer loop, which is to hold no index of a column.
    """
    q_axis, k_axis = (1, 0) if transposed else (0, 1)
    row = row_begin + plgpu.broadcasted_iota(jnp.int32, shape, q_axis, layout=WGMMA)
    if is_fresh:
        column = _fresh_columns(column_begin, shape)
    else:
        column = column_begin + plgpu.broadcasted_iota(jnp.int32, shape, k_axis, layout=WGMMA)
    seen = column < key_length
    right, left = right_reach(spec), left_reach(spec)
    if right is not None:
        seen &= column <= row + right
    if left is not None:
        seen &= column >= row - left
    if query_length is not None:
        seen &= row < query_length
    return seen


def _fresh_columns(column_begin: Scalar, shape: tuple[int, int]) -> jax.Array:
    """`column_begin` and on, as sums that the compiler cannot split into what loops leave alone."""
    first = column_begin + plgpu.broadcasted_iota(jnp.int32, (shape[0], 8), 1, layout=WGMMA)
    first = lax.optimization_barrier(first)

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=WGMMA),
    )
    def repeat(_, first):
        return dialect.repeated_columns(first, WGMMA, shape)

    return repeat(first)
