"""The few operations of the Mosaic GPU dialect that Pallas has no name for.

The only file that imports what JAX and jaxlib document nowhere. Each function is called in a body
under `plgpu.inline_mgpu`, on the arrays of registers (`Registers`) and references that it is given.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

Registers = mgpu.FragmentedArray
DEPTH = 16  # what one product of the tensor cores contracts, in 16-bit numbers


def issue(code: str) -> None:
    """One instruction without operands, which stays where it is."""
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [], code, "", has_side_effects=True)


def repeated_columns(first: Registers, layout: Any, shape: tuple[int, int]) -> Registers:
    """Numbers of 8 columns, and of each next 8 the same plus 8, as additions to these registers."""
    registers = np.empty(layout.to_mgpu().registers_shape(shape), dtype=object)
    for index in np.ndindex(registers.shape):
        register = first.registers[(0, 0, *index[2:])]
        step: Any = ir.DenseElementsAttr.get_splat(
            register.type, ir.IntegerAttr.get(register.type.element_type, 8 * index[1])
        )
        step = arith.constant(register.type, step)  # type: ignore[call-arg]
        registers[index] = arith.addi(register, step)
    return Registers(_registers=registers, _layout=first.layout, _is_signed=True)


def interleaved(even: Registers, odd: Registers, layout: Any, shape: tuple[int, ...]) -> Registers:
    """Numbers of the two in turn, an array of `shape`: no instruction, names of registers move."""
    registers = np.empty(even.registers.shape, dtype=object)
    for index, first in np.ndenumerate(even.registers):
        pair: Any = (first, odd.registers[index])
        (size,) = first.type.shape
        registers[index] = mgpu.utils.vector_concat(
            [mgpu.utils.vector_slice(x, slice(i, i + 1)) for i in range(size) for x in pair]
        )
    target = layout.to_mgpu()
    registers = registers.reshape(target.registers_shape(shape))
    return Registers(_registers=registers, _layout=target, _is_signed=None)


def saturated(x: Registers) -> Registers:
    """Float32 numbers moved into [0, 1], NaN to 0, by one multiplication each."""
    f32 = ir.F32Type.get()
    code = "mul.ftz.sat.f32 $0, $1, 0f3F800000;"
    registers = np.empty(x.registers.shape, dtype=object)
    for index, pair in np.ndenumerate(x.registers):
        for i in range(2):
            one = vector.extract(pair, [], [i])
            one = llvm.inline_asm(f32, [one], code, "=f,f")
            pair = vector.insert(one, pair, [], [i])
        registers[index] = pair
    return Registers(_registers=registers, _layout=x.layout, _is_signed=None)


def cut(x: Registers, dtype: Any) -> Registers:
    """Float32 rounded toward zero to 16 bits: one instruction for two numbers."""
    i32 = ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(dtype))
    kind = "bf16x2" if dtype == jnp.bfloat16 else "f16x2"
    code = f"cvt.rz.{kind}.f32 $0, $1, $2;"
    registers = np.empty(x.registers.shape, dtype=object)
    for index, register in np.ndenumerate(x.registers):
        numbers = [vector.extract(register, [], [i]) for i in range(register.type.shape[0])]
        words = [
            llvm.inline_asm(i32, [high, low], code, "=r,f,f")
            for low, high in zip(numbers[::2], numbers[1::2], strict=True)
        ]
        pairs = [mgpu.utils.bitcast(word, pair) for word in words]
        registers[index] = mgpu.utils.vector_concat(pairs)
    return Registers(_registers=registers, _layout=x.layout, _is_signed=None)


def any_sign(x: Registers) -> Registers:
    """1 if some number of the warp has its sign bit set, else 0: a vote, which is not moved."""
    bits = [mgpu.utils.bitcast(register, _i32()) for register in x.registers.flat]
    signs = functools.reduce(arith.ori, bits)
    code = (
        "{ .reg .pred p; setp.lt.s32 p, $1, 0; vote.sync.any.pred p, p, 0xffffffff; "
        "selp.b32 $0, 1, 0, p; }"
    )
    bit = llvm.inline_asm(_i32(), [signs], code, "=r,r", has_side_effects=True)
    return Registers.splat(bit, (), mgpu.WGSplatFragLayout(()), is_signed=True)


def any_above(x: Registers, limit: float) -> Registers:
    """1 if some float32 number of the warp exceeds `limit` or is NaN, else 0: a vote."""
    pairs = list(x.registers.flat)
    numbers = [vector.extract(pair, [], [i]) for pair in pairs for i in range(2)]
    bits = f"0f{np.float32(limit).view(np.uint32):08X}"
    first, *more = [f"setp.gtu{{}}.f32 p, ${i + 1}, {bits}{{}};" for i in range(len(numbers))]
    code = " ".join([first.format("", ""), *(x.format(".or", ", p") for x in more)])
    code = f"{{ .reg .pred p; {code} vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }}"
    constraints = ",".join(["=r"] + ["f"] * len(numbers))
    bit = llvm.inline_asm(_i32(), numbers, code, constraints, has_side_effects=True)
    return Registers.splat(bit, (), mgpu.WGSplatFragLayout(()), is_signed=True)


def begin_tile_product(
    lhs: Registers, tile: Any, over: Registers, adds: Registers | None
) -> Registers:
    """lhs (64, S) @ tile (S, 64), left in flight, in the registers of `over`.

    `tile` lies in shared memory by 128 bytes. `adds`: an int32; only if it is not 0 does the
    product add to `over`. None: it never does.
    """
    (base, (_, (stride,))), (_, group), _ = mma_utils.create_descriptor(
        tile, swizzle=128, large_tile=(64, 64), group_size=(64, 64), logical_k_major=True
    )
    each = 64 // DEPTH
    offsets = [i // each * group + i % each * stride for i in range(lhs.shape[1] // DEPTH)]
    asked = None if adds is None else adds.registers.item()
    return _begin_product(lhs, base, offsets, over, asked, 64, True)


def begin_column_product(
    lhs: Registers, column: Any, over: Registers, adds: Registers
) -> Registers:
    """lhs (64, S) @ column (S,), left in flight, in column 0 of `over` (64, 8).

    Column i of the right operand begins at number 8 i of `column`, which lies in shared memory as
    it is: the tensor core asks for 8, and those that run past the end hold whatever lies there.
    """
    base = mma_utils.encode_descriptor(
        column, leading_byte_offset=16, stride_byte_offset=16, swizzle=None
    )
    offsets = [i * 2 * DEPTH for i in range(lhs.shape[1] // DEPTH)]
    return _begin_product(lhs, base, offsets, over, adds.registers.item(), 8, False)


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _begin_product(
    lhs: Registers,
    base: Any,
    offsets: list[int],
    over: Registers,
    adds_first: Any,
    columns: int,
    transposed: bool,
) -> Registers:
    """Products of `DEPTH` each; only if `adds_first` (None: no) does the first add to `over`."""
    f32, i64 = ir.F32Type.get(), ir.IntegerType.get_signless(64)
    kind = str(lhs.mlir_dtype)
    over = mgpu.fragmented_array.optimization_barrier(over)
    nvvm.wgmma_fence_aligned()
    pairs = [mgpu.utils.bitcast(x, _i32()) for x in lhs.registers.flat]
    acc = [vector.extract(x, [], [j]) for x in over.registers.flat for j in range(2)]
    count = len(acc)
    place = ",".join(f"${i}" for i in range(count))
    left = ",".join(f"${2 * count + i}" for i in range(4))
    product = (
        f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} "
        f"{{{place}}}, {{{left}}}, ${2 * count + 4}, p, 1, 1, {int(transposed)};"
    )
    constraints = ["=f"] * count + [str(i) for i in range(count)] + ["r"] * 4 + ["l"]
    result = llvm.StructType.get_literal([f32] * count)
    for i, offset in enumerate(offsets):
        step = llvm.ConstantOp(i64, ir.IntegerAttr.get(i64, mma_utils.encode_addr(offset))).result
        there = llvm.add(base, step, overflow_flags=llvm.IntegerOverflowFlags.none)
        # Known ones as literals: ptxas may take a 0 in a register for any number.
        if i:
            adds = "0, 1"
        elif adds_first is None:
            adds = "0, 0"
        else:
            adds = f"${2 * count + 5}, 0"
        asked = [adds_first] if i == 0 and adds_first is not None else []
        done = llvm.inline_asm(
            result,
            [*acc, *pairs[4 * i : 4 * i + 4], there, *asked],
            f"{{ .reg .pred p; setp.ne.b32 p, {adds}; {product} }}",
            ",".join([*constraints, *["r"] * len(asked)]),
            has_side_effects=True,
        )
        acc = [llvm.extractvalue(f32, done, [j]) for j in range(count)]
    issue("wgmma.commit_group.sync.aligned;")
    registers = np.empty(over.registers.shape, dtype=object)
    two = ir.VectorType.get((2,), f32)
    for index, j in zip(np.ndindex(registers.shape), range(0, count, 2), strict=True):
        pair = llvm.mlir_undef(two)
        for k in range(2):
            pair = vector.insert(acc[j + k], pair, [], [k])
        registers[index] = pair
    return Registers(_registers=registers, _layout=over.layout, _is_signed=None)
