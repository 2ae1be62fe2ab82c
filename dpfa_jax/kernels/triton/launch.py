"""The one place that calls Pallas Triton."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
from jax.experimental.pallas import triton as plt

from dpfa_jax.core import UnsupportedBackendError
from dpfa_jax.kernels import manual_axes
from dpfa_jax.kernels.triton.tiles import Tiles

# CUDA's limit on the second and third axis of a grid.
MAX_GRID = 65535


def launch(
    kernel: Callable[..., None],
    arrays: Any,
    out_shape: list[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    tile: Tiles,
    *,
    name: str,
    interpret: bool,
    **static: Any,
) -> list[jax.Array]:
    """`kernel(arrays, *results, tile=tile, **static)` for each program of `grid`.

    `arrays` is a tuple of references, None where it holds None; programs find their own part.
    Errors: UnsupportedBackendError for a grid that CUDA does not take, which a call that `cannot`
    has let pass may reach under `vmap`, whose axis joins the batch.
    """
    if max(grid[1:]) > MAX_GRID:
        raise UnsupportedBackendError(
            f"triton: a grid of {grid}, vmapped axes included, is above {MAX_GRID} programs along "
            'its second or third axis; pass implementation="blocked", or map over parts'
        )
    # JAX has announced the end of Pallas Triton since 0.11. This folder goes when it does; until
    # then the warning, given whenever a kernel is lowered, tells a user nothing that he can act on.
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    body = functools.partial(kernel, tile=tile, **static)
    functools.update_wrapper(body, kernel)
    body.__name__ = f"dpfa_triton_{name}"  # type: ignore[attr-defined]
    # All operands and results vary over the same mesh axes, as Pallas wants inside shard_map.
    axes = manual_axes.varying_axes(*jax.tree.leaves(arrays))
    arrays = jax.tree.map(lambda x: manual_axes.vary_over(x, axes), arrays)
    like = jax.tree.leaves(arrays)[0]
    return pl.pallas_call(
        body,
        out_shape=[manual_axes.result(x.shape, x.dtype, like) for x in out_shape],
        grid=grid,
        interpret=interpret,
        name=f"dpfa_triton_{name}",
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    )(arrays)
