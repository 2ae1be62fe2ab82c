"""Products of a step's weights that are left in flight: e V by 64 columns, and e kappa."""

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from dpfa_jax.kernels.mosaic_gpu.layouts import WGMMA, tile_transforms

PART = 64
_DEPTH = 16
_SWIZZLE = 128


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
        (base, (_, (stride,))), (_, group), _ = mma_utils.create_descriptor(
            values,
            swizzle=_SWIZZLE,
            large_tile=(PART, PART),
            group_size=(PART, PART),
            logical_k_major=True,
        )
        each = PART // _DEPTH
        offsets = [i // each * group + i % each * stride for i in range(e.shape[1] // _DEPTH)]
        adds = None if is_fresh else never.registers.item()
        return _issue(e, base, offsets, over, adds, PART, True)

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
        bits = [mgpu.utils.bitcast(x, _i32()) for x in e.registers.flat]
        signs = functools.reduce(arith.ori, bits)
        code = (
            "{ .reg .pred p; setp.lt.s32 p, $1, 0; vote.sync.any.pred p, p, 0xffffffff; "
            "selp.b32 $0, 1, 0, p; }"
        )
        bit = llvm.inline_asm(_i32(), [signs], code, "=r,r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(bit, (), mgpu.WGSplatFragLayout(()), is_signed=True)

    return vote(e)


def begin_row_sums(e: jax.Array, column: Any, never: jax.Array, *, simulate: bool) -> jax.Array:
    """e @ column in float32, left in flight: (64, 8), of which column 0 is the sums.

    `column`: (S,) in shared memory, of e's dtype. Column i of the right
    operand begins at key 8 i of it: the tensor core asks for 8 columns, and those that run past
    the end hold whatever lies there, which column 0 does not see.
    """
    if simulate:
        sums = _product(e, column[...][:, None])
        return jnp.broadcast_to(sums, (e.shape[0], 8))

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, plgpu.RefType(), WGMMA, plgpu.Layout.WG_SPLAT),
        return_type=plgpu.ShapeDtypeStruct((e.shape[0], 8), jnp.float32, layout=WGMMA),
    )
    def begin(_, e, column, over, never):
        base = mma_utils.encode_descriptor(
            column, leading_byte_offset=16, stride_byte_offset=16, swizzle=None
        )
        offsets = [i * 2 * _DEPTH for i in range(e.shape[1] // _DEPTH)]
        return _issue(e, base, offsets, over, never.registers.item(), 8, False)

    return begin(e, column, _zeros((e.shape[0], 8)), never)


def _product(e: jax.Array, values: jax.Array) -> jax.Array:
    e, values = e.astype(jnp.float32), values.astype(jnp.float32)
    return jnp.dot(e, values, preferred_element_type=jnp.float32)


def _zeros(shape: tuple[int, int]) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _issue(
    e: Any, base: Any, offsets: list[int], over: Any, never: Any, columns: int, transposed: bool
) -> Any:
    """Products of 16 keys each; only if `never` (None: no) does the first one add to `over`."""
    f32, i64 = ir.F32Type.get(), ir.IntegerType.get_signless(64)
    kind = str(e.mlir_dtype)
    over = mgpu.fragmented_array.optimization_barrier(over)
    nvvm.wgmma_fence_aligned()
    pairs = [mgpu.utils.bitcast(x, _i32()) for x in e.registers.flat]
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
        elif never is None:
            adds = "0, 0"
        else:
            adds = f"${2 * count + 5}, 0"
        asked = [never] if i == 0 and never is not None else []
        done = llvm.inline_asm(
            result,
            [*acc, *pairs[4 * i : 4 * i + 4], there, *asked],
            f"{{ .reg .pred p; setp.ne.b32 p, {adds}; {product} }}",
            ",".join([*constraints, *["r"] * len(asked)]),
            has_side_effects=True,
        )
        acc = [llvm.extractvalue(f32, done, [j]) for j in range(count)]
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, [], "wgmma.commit_group.sync.aligned;", "", has_side_effects=True)
    registers = np.empty(over.registers.shape, dtype=object)
    two = ir.VectorType.get((2,), f32)
    for index, j in zip(np.ndindex(registers.shape), range(0, count, 2), strict=True):
        pair = llvm.mlir_undef(two)
        for k in range(2):
            pair = vector.insert(acc[j + k], pair, [], [k])
        registers[index] = pair
    return mgpu.FragmentedArray(_registers=registers, _layout=over.layout, _is_signed=None)
