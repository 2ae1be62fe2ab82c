"""The weights of one tile as the tensor cores take them."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from dpfa_jax.kernels.mosaic_gpu import dialect
from dpfa_jax.kernels.mosaic_gpu.layouts import WGMMA


def clamped(e: jax.Array, *, simulate: bool) -> jax.Array:
    """float32 weights in [0, 1]; NaN becomes 0. A multiplication that saturates."""
    if simulate:
        # Not a comparison with 0: XLA knows that no exponential is below.
        return jnp.where(jnp.isnan(e), 0.0, jnp.minimum(e, 1.0))

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,), return_type=plgpu.ShapeDtypeStruct(e.shape, e.dtype, layout=WGMMA)
    )
    def clamp(_, e):
        return dialect.saturated(e)

    return clamp(e)
