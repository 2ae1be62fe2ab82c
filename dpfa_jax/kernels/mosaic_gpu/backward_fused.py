"""Backward in one kernel: dK and dV in registers, dQ added up in float32 (Shah et al., 2024).

A program owns 128 keys, 64 for each compute warpgroup, and streams queries and cotangents. Five
products where the two kernels of `backward` need seven. One warp of the third warpgroup loads, two
or three others add dQ, tiles in turn, to its sum in global memory.

Where the same bits are asked for, programs add to a tile of dQ in the order of their keys. Each
tile has a counter: a program adds when as many have added as come before it there, waits until its
addition is done, and counts it. So no gradient depends on when a program runs, nor on the number of
processors, and those of one example not on the others.

Programs walk their tiles from the last to the first. The last tile of a program is none before that
of the program before it, with causality, a window or neither. So a program that starts no earlier
than that one reaches no tile earlier: at its first tile it waits for one addition of each that
started with it, and then follows.

No program waits for ever. It waits only for programs of its head with a lower number, so with a
lower linear index in the grid. Take the unfinished one of least index among those that were
started: all that it waits for have a lower index, so were started and are finished, with their
additions counted. Hence it waits for none and ends; by induction each one does. This assumes that
the hardware starts programs in the order of their linear index and lets run what it has started, as
FlashAttention-3 does, and nothing of how many run at the same time, nor of how many heads start
side by side: the heads of a chunk are the fastest axis of the grid, its programs of 128 keys the
next one, so those of one head stay in their order, be heads few, many or the last chunk short. All
heads of a group are one program's, and a counter of each head and tile counts that program once.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels import manual_axes
from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.mosaic_gpu import axes, dialect, tiles
from dpfa_jax.kernels.mosaic_gpu.backward_steps import (
    BackwardArrays,
    Ring,
    add_key_gradients,
    key_length_of,
    late_zeros,
    launch,
    load_queries,
    ring_barriers,
    run_steps,
)
from dpfa_jax.kernels.mosaic_gpu.layouts import tiled_shared
from dpfa_jax.kernels.mosaic_gpu.steps import cdiv, first_program, query_steps, within_key_length
from dpfa_jax.kernels.mosaic_gpu.tiles import (
    COMPUTE_WARPGROUPS,
    FUSED_STAGES,
    WARPGROUP_ROWS,
    FusedTiles,
)

BLOCK = WARPGROUP_ROWS
PROGRAM_KEYS = COMPUTE_WARPGROUPS * BLOCK
# Slots of logit gradients: an even number, so that those of a slot all belong to one warpgroup.
SLOTS = COMPUTE_WARPGROUPS
# Of the slowest axis of a grid.
MAX_CHUNKS = 65535


def _side_by_side(pairs: int, heads: int) -> int:
    """Of so many pairs of example and key head, those of one chunk: `heads`, or evenly fewer."""
    heads = max(heads, cdiv(pairs, MAX_CHUNKS))
    return cdiv(pairs, cdiv(pairs, heads))


@plgpu.inline_mgpu()
def _order_copies(_: Any) -> None:
    """Copies that this warp starts come after what it has waited for, which is another proxy."""
    dialect.issue("fence.proxy.async.global;")


def _body(arrays, dk_out, dv_out, shared, barriers, *, heads, **static) -> None:
    batch, kv_heads = arrays.key.shape[0], arrays.key.shape[2]
    pairs = batch * kv_heads
    side_by_side = _side_by_side(pairs, heads)
    pair = lax.axis_index(axes.CHUNKS) * side_by_side + lax.axis_index(axes.HEADS)
    pair = jnp.int32(pair)
    # The last chunk may be short.
    is_there = True if pairs % side_by_side == 0 else pair < pairs

    @pl.when(is_there)
    def _():
        example, kv_head = lax.div(pair, jnp.int32(kv_heads)), lax.rem(pair, jnp.int32(kv_heads))
        _program(arrays, dk_out, dv_out, shared, barriers, example, kv_head, **static)


def _program(
    arrays, dk_out, dv_out, shared, barriers, batch, kv_head, *, spec, keys, group, simulate
) -> None:
    warpgroup = lax.axis_index(axes.WARPGROUP)
    program = lax.axis_index(axes.KEYS)
    program_begin = program * PROGRAM_KEYS
    num_queries, head_size = arrays.query.shape[1], arrays.query.shape[3]
    key_length = key_length_of(arrays, batch, keys)
    steps = query_steps(spec, program_begin, PROGRAM_KEYS, BLOCK, num_queries)
    steps = within_key_length(steps, program_begin, PROGRAM_KEYS, key_length)
    total = group * (steps.end - steps.begin)
    ring = Ring(barriers, FUSED_STAGES)
    adders, places = tiles.adders_and_places(head_size)
    dtype = arrays.query.dtype
    # The simulator cannot add: there each program has a sum of its own.
    dq_sum = arrays.dq_sum.at[program] if simulate else arrays.dq_sum
    turns = None
    if spec.deterministic and not simulate:
        shape = (*arrays.lse2.shape[:2], cdiv(num_queries, BLOCK))
        turns = pl.get_global(plgpu.SemaphoreType.REGULAR(shape))

    def slot_of(done):
        return lax.rem(jnp.int32(done), jnp.int32(SLOTS))

    def place_of(done):
        return lax.rem(jnp.int32(done), jnp.int32(places))

    def done_before(step, member):
        """Tiles of a program before this one: steps descend, a step has one for each head."""
        return (steps.end - 1 - step) * group + member

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def compute():
        if not simulate:
            plgpu.set_max_registers(240, action="increase")
        key_begin = program_begin + warpgroup * BLOCK
        rows = (batch, pl.ds(key_begin, BLOCK), kv_head)
        k_shared, v_shared = shared["key"].at[warpgroup], shared["value"].at[warpgroup]
        own = barriers["own"].at[warpgroup]
        plgpu.copy_gmem_to_smem(arrays.key.at[rows], k_shared, own)
        plgpu.copy_gmem_to_smem(arrays.value.at[rows], v_shared, own)
        plgpu.barrier_arrive(barriers["ds_free"].at[warpgroup])
        plgpu.barrier_wait(own)
        spare = shared["spare"].at[warpgroup] if simulate else None

        def one_tile(dk_acc, dv_acc, step, done, masked):
            ds = add_key_gradients(
                spec, shared, ring, done, warpgroup, dk_acc, dv_acc,
                step, key_begin, key_length, spare,
                masked=masked, lse2_waits=True,
            )  # fmt: skip
            plgpu.barrier_wait(barriers["ds_free"].at[slot_of(done)])
            shared["ds"].at[slot_of(done), warpgroup][...] = ds
            plgpu.commit_smem()
            plgpu.barrier_arrive(barriers["ds"].at[slot_of(done)])
            plgpu.wgmma_wait(1)
            ring.free("cotangent", done)
            plgpu.wgmma_wait(0)
            ring.free("query", done)

        def query_gradient(done):
            """dQ of one whole tile, by the warpgroup whose turn it is."""
            slot, place = slot_of(done), place_of(done)
            plgpu.barrier_wait(barriers["ds"].at[slot])

            def product(acc):
                for other in range(COMPUTE_WARPGROUPS):
                    plgpu.wgmma(acc, shared["ds"].at[slot, other].T, shared["key"].at[other])
                return acc[...]

            dq = pl.run_scoped(product, plgpu.ACC((BLOCK, head_size), jnp.float32))
            plgpu.barrier_arrive(barriers["ds_free"].at[slot])
            plgpu.barrier_wait(barriers["dq_free"].at[place])
            shared["dq"].at[place][...] = dq
            plgpu.commit_smem()
            plgpu.barrier_arrive(barriers["dq"].at[place])

        def accumulate(dk_acc, dv_acc):
            def body(step, masked):
                def one_head(member):
                    done = done_before(step, member)
                    one_tile(dk_acc, dv_acc, step, done, masked)

                    # dQ of the tile before: the other warpgroup has made its part by now.
                    @pl.when((done > 0) & (slot_of(done + 1) == warpgroup))
                    def _():
                        query_gradient(done - 1)

                pl.loop(0, group)(one_head)

            run_steps(steps, spec, body, descending=True)
            return dk_acc[...], dv_acc[...]

        acc = plgpu.ACC((BLOCK, head_size), jnp.float32)
        dk, dv = pl.run_scoped(accumulate, acc, acc)

        @pl.when((total > 0) & (slot_of(total + 1) == warpgroup))
        def _():
            query_gradient(total - 1)

        for slot in range(SLOTS):  # the other warpgroup reads these keys no more
            plgpu.barrier_wait(barriers["ds_free"].at[slot])
        k_shared[...] = (dk * spec.scale).astype(dtype)
        v_shared[...] = dv.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_shared, dk_out.at[rows])
        plgpu.copy_smem_to_gmem(v_shared, dv_out.at[rows])
        for place in range(0, places, SLOTS):
            plgpu.barrier_wait(barriers["dq_free"].at[place + warpgroup])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the writes end with the kernel

    def tile_of(done):
        """(step, head) of a tile, in the order of the compute warpgroups."""
        if group == 1:
            return steps.end - 1 - done, kv_head
        back = lax.div(done, jnp.int32(group))
        return steps.end - 1 - back, kv_head * group + (done - back * group)

    def load():
        @pl.loop(0, total)
        def _(done):
            step, head = tile_of(done)
            load_queries(arrays, shared, barriers, ring, done, batch, head, step, BLOCK)

        ring.drain(("query", "cotangent"), total)

    def add(adder):
        """dQ of every `adders`-th tile to its sum, in turn where the same bits are asked for."""
        for place in range(0, places, adders):
            plgpu.barrier_arrive(barriers["dq_free"].at[place + adder])

        @pl.loop(0, cdiv(total - adder, adders))
        def _(index):
            done = index * adders + adder
            step, head = tile_of(done)
            turn = None
            if turns is not None:
                earlier = program - first_program(spec, step * BLOCK, PROGRAM_KEYS)
                turn = turns.at[batch, head, step]
                plgpu.semaphore_wait(turn, earlier, decrement=False, memory_scope="gpu")
                _order_copies()
            place = place_of(done)
            plgpu.barrier_wait(barriers["dq"].at[place])
            plgpu.copy_smem_to_gmem(
                shared["dq"].at[place],
                dq_sum.at[batch, pl.ds(step * BLOCK, BLOCK), head],
                reduction_op=None if simulate else "add",
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(barriers["dq_free"].at[place])
            if turn is not None:
                plgpu.wait_smem_to_gmem(0)
                plgpu.semaphore_signal(turn, memory_scope="gpu")

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def serve():
        if not simulate:
            plgpu.set_max_registers(24, action="decrease")

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(load)
            pl.when((warp > 0) & (warp <= adders))(lambda: add(warp - 1))


def fused_backward(
    spec: AttentionSpec,
    arrays: BackwardArrays,
    tile: FusedTiles,
    *,
    keys: int,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dQ (B, T, N, H), dK and dV (B, S, K, H), padded as the operands, H at most 128.

    Args:
      spec: the forward's.
      arrays: operands, padded; `lse2` and `delta` to whole tiles.
      tile: order of launch.
      keys: S before padding.
      interpret: parameters of the Mosaic GPU simulator, None on a GPU.
    """
    batch, _, heads, head_size = arrays.query.shape
    kv_heads, dtype = arrays.key.shape[2], arrays.query.dtype
    programs = cdiv(keys, PROGRAM_KEYS)
    side_by_side = _side_by_side(batch * kv_heads, tile.heads)
    _, places = tiles.adders_and_places(head_size)
    own_sums = () if interpret is None else (programs,)
    resident = tiled_shared((COMPUTE_WARPGROUPS, BLOCK, head_size), dtype)
    streamed = tiled_shared((FUSED_STAGES, BLOCK, head_size), dtype)
    per_row = plgpu.SMEM((FUSED_STAGES, BLOCK), jnp.float32)
    shared = {
        "key": resident,
        "value": resident,
        "query": streamed,
        "cotangent": streamed,
        "lse2": per_row,
        "delta": per_row,
        "ds": tiled_shared((SLOTS, COMPUTE_WARPGROUPS, BLOCK, BLOCK), dtype),
        "dq": tiled_shared((places, BLOCK, head_size), jnp.float32),
    }
    if interpret is not None:
        shared["spare"] = tiled_shared((COMPUTE_WARPGROUPS, BLOCK, BLOCK), dtype)
    like_key = jax.ShapeDtypeStruct(arrays.key.shape, dtype)
    arrays = arrays._replace(delta=-arrays.delta)
    names = [name for name, x in arrays._asdict().items() if x is not None]

    def run(operands: dict[str, jax.Array], refs: Any) -> None:
        dq_sum, dk_ref, dv_ref = refs
        dk, dv = launch(
            _body,
            BackwardArrays(**operands, dq_sum=dq_sum),
            (like_key, like_key),
            shared,
            {
                "own": plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE_WARPGROUPS),
                "ds": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=SLOTS),
                "ds_free": plgpu.Barrier(num_barriers=SLOTS),
                "dq": plgpu.Barrier(num_barriers=places),
                "dq_free": plgpu.Barrier(num_barriers=places),
                **ring_barriers({"query": 3, "cotangent": 1}, FUSED_STAGES),
            },
            (cdiv(batch * kv_heads, side_by_side), programs, side_by_side),
            (axes.CHUNKS, axes.KEYS, axes.HEADS),
            "dpfa_attention_backward",
            interpret,
            spec=spec,
            heads=tile.heads,
            keys=keys,
            group=heads // kv_heads,
        )
        dk_ref[...], dv_ref[...] = dk, dv

    def gradients(*operands: jax.Array) -> tuple[jax.Array, ...]:
        given = dict(zip(names, operands, strict=True))
        sums = jax.ShapeDtypeStruct((*own_sums, *arrays.query.shape), jnp.float32)
        given["cotangent"], (dq, like) = late_zeros(given["cotangent"], sums, like_key)
        # A state that begins and ends here: `jax.new_ref` has an effect that the partitioner
        # refuses.
        return pl.run_state(functools.partial(run, given))((dq, like, like))

    dq, dk, dv = manual_axes.unaware(gradients)(*(getattr(arrays, name) for name in names))
    if own_sums:
        dq = dq.sum(axis=0)
    return (dq * spec.scale).astype(dtype), dk, dv
