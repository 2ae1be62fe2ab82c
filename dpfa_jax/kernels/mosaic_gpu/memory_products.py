"""Products of a step's weights that are left in flight: e V by 64 columns, and e kappa."""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from dpfa_jax.kernels.mosaic_gpu import dialect
from dpfa_jax.kernels.mosaic_gpu.layouts import WGMMA, tile_transforms

PART = 64


def begin_block(
    e: jax.Array, values: Any, over: jax.Array | None, never: jax.Array, *, simulate: bool
) -> jax.Array:
    """e (64, S) @ values (S, 64) in float32 from zero, left in flight.

    Args:
      e: 16-bit weights.
      values: 64 columns of a tile in shared memory.
      over: float32 array whose registers take the product once all that is to be made of it is:
        without it the compiler may keep both, for which there are no registers. None: fresh ones.
      never: 0 that the compiler does not know, as `settled` makes it.
      simulate: for the simulator, which has no such product.
    """
    if simulate:
        return _product(e, values[...])
    is_fresh = over is None
    if over is None:
        over = _zeros((e.shape[0], PART))
    transforms = tile_transforms(PART, e.dtype)

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, plgpu.RefType(transforms), WGMMA, plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct((e.shape[0], PART), jnp.float32, layout=WGMMA),
    )
    def begin(_, e, values, over, never):
        return dialect.begin_tile_product(e, values, over, None if is_fresh else never)

    return begin(e, values, over, never)


def settled(e: jax.Array, *, simulate: bool) -> jax.Array:
    """Whether some weight's sign bit is set, by a vote: 0, which the compiler cannot know.

    For weights as `clamped` gives them, in [0, 1] and no NaN: there no sign bit is set.
    A vote stays where it is, so that all weights are made before the barrier that follows.
    """
    if simulate:
        return jnp.int32(0)

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT),
    )
    def vote(_, e):
        return dialect.any_sign(e)

    return vote(e)


def begin_row_sums(e: jax.Array, column: Any, never: jax.Array, *, simulate: bool) -> jax.Array:
    """e @ column in float32, left in flight: (64, 8), of which column 0 is the sums.

    `column`: (S,) in shared memory, of e's dtype.
    """
    if simulate:
        sums = _product(e, column[...][:, None])
        return jnp.broadcast_to(sums, (e.shape[0], 8))

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, plgpu.RefType(), WGMMA, plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct((e.shape[0], 8), jnp.float32, layout=WGMMA),
    )
    def begin(_, e, column, over, never):
        return dialect.begin_column_product(e, column, over, never)

    return begin(e, column, _zeros((e.shape[0], 8)), never)


def _product(e: jax.Array, values: jax.Array) -> jax.Array:
    e, values = e.astype(jnp.float32), values.astype(jnp.float32)
    return jnp.dot(e, values, preferred_element_type=jnp.float32)


def _zeros(shape: tuple[int, int]) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)
