"""The weights of one tile as the tensor cores take them: clamped in pairs, summed along a row."""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from dpfa_jax.kernels.mosaic_gpu.layouts import COLUMN, ROW, WGMMA

# Two ones in one register.
_ONES = {"bf16": 0x3F803F80, "f16": 0x3C003C00}
# Keys that one warp-level product takes.
_DEPTH = 16


def clamped_weights(e: jax.Array, *, simulate: bool) -> jax.Array:
    """16-bit weights in [0, 1]; NaN becomes 0. Two numbers an instruction, after the rounding."""
    if simulate:
        return jnp.where(e >= 0.0, jnp.minimum(e, 1.0), 0.0).astype(e.dtype)

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,), return_type=plgpu.ShapeDtypeStruct(e.shape, e.dtype, layout=WGMMA)
    )
    def clamp(_, e):
        i32 = ir.IntegerType.get_signless(32)
        kind = str(e.mlir_dtype)
        # Of a NaN and a number, both take the number. The constants stay inside: a zero that others
        # share would be copied into the accumulators that start at it.
        code = (
            f"{{ .reg .b32 x, y; mov.b32 y, 0; max.{kind}x2 x, $1, y; "
            f"mov.b32 y, {_ONES[kind]}; min.{kind}x2 $0, x, y; }}"
        )
        registers = np.empty(e.registers.shape, dtype=object)
        for index, pair in np.ndenumerate(e.registers):
            bits = mgpu.utils.bitcast(pair, i32)
            bits = llvm.inline_asm(i32, [bits], code, "=r,r")
            registers[index] = mgpu.utils.bitcast(bits, pair.type)
        return mgpu.FragmentedArray(_registers=registers, _layout=e.layout, _is_signed=None)

    return clamp(e)


def fresh_zeros(shape: tuple[int, int]) -> jax.Array:
    """Zeros that share no register with other zeros.

    Where an accumulator starts at zeros made right before it, ptxas leaves them out; zeros that it
    has met before are copied into each of its registers.
    """

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=WGMMA))
    def make(_):
        f32 = ir.F32Type.get()
        zero = llvm.inline_asm(f32, [], "mov.f32 $0, 0f00000000;", "=f", has_side_effects=True)
        pair = vector.broadcast(ir.VectorType.get((2,), f32), zero)
        target = WGMMA.to_mgpu()
        registers = np.full(target.registers_shape(shape), pair, dtype=object)
        return mgpu.FragmentedArray(_registers=registers, _layout=target, _is_signed=None)

    return make()


def row_sums(e: jax.Array, column: Any, *, simulate: bool) -> jax.Array:
    """e @ column in float32; `column`: (S,) in shared memory, of e's dtype.

    A product of 8 equal columns by each warp: e already lies as that product's left operand. Two
    chains, so that one's latency hides the other's.
    """
    if simulate:
        wide = column[...].astype(jnp.float32)
        return (e.astype(jnp.float32) * wide[None, :]).sum(axis=1)
    column = plgpu.load(column, layout=COLUMN)

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, COLUMN),
        return_type=plgpu.ShapeDtypeStruct((e.shape[0],), jnp.float32, layout=ROW),
    )
    def multiply(_, e, column):
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        kind = str(e.mlir_dtype)
        bits = np.vectorize(lambda x: mgpu.utils.bitcast(x, i32), otypes=[object])
        # Of one warp's 16 rows: (8 keys, upper or lower 8 rows).
        lhs = bits(e.registers).reshape(-1, 2)
        rhs = bits(column.registers).reshape(-1)
        quad = llvm.StructType.get_literal([f32] * 4)
        code = (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            "{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{{acc}}};"
        )
        first = "{ .reg .f32 z; mov.f32 z, 0f00000000; " + code.format(acc="z,z,z,z") + " }"
        later = code.format(acc="$10,$11,$12,$13")
        slices = len(lhs) // 2
        chains = []
        for begin, end in ((0, slices // 2), (slices // 2, slices)):
            acc: list[Any] = []
            for i in range(begin, end):
                left, right = lhs[2 * i : 2 * i + 2].reshape(-1), rhs[2 * i : 2 * i + 2]
                done = llvm.inline_asm(
                    quad,
                    [*left, *right, *acc],
                    later if acc else first,
                    ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * len(acc)),
                )
                acc = [llvm.extractvalue(f32, done, [j]) for j in range(4)]
            chains.append(acc)
        target = ROW.to_mgpu()
        registers = np.empty(target.registers_shape((e.shape[0],)), dtype=object)
        single = ir.VectorType.get((1,), f32)
        # Numbers 0 and 1 of the result are two columns of the upper row, 2 and 3 of the lower.
        for place, j in zip(np.ndindex(registers.shape), (0, 2), strict=True):
            total = arith.addf(chains[0][j], chains[1][j])
            registers[place] = vector.broadcast(single, total)
        return mgpu.FragmentedArray(_registers=registers, _layout=target, _is_signed=None)

    return multiply(e, column)
