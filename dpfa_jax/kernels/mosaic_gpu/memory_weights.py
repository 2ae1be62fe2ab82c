"""The weights of one tile as the tensor cores take them."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

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
        f32 = ir.F32Type.get()
        code = "mul.ftz.sat.f32 $0, $1, 0f3F800000;"
        registers = np.empty(e.registers.shape, dtype=object)
        for index, pair in np.ndenumerate(e.registers):
            for i in range(2):
                one = vector.extract(pair, [], [i])
                one = llvm.inline_asm(f32, [one], code, "=f,f")
                pair = vector.insert(one, pair, [], [i])
            registers[index] = pair
        return mgpu.FragmentedArray(_registers=registers, _layout=e.layout, _is_signed=None)

    return clamp(e)
