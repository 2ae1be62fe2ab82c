"""Backward in one kernel: dK and dV in registers, dQ added up in float32 (Shah et al., 2024).

A program owns 128 keys, 64 for each compute warpgroup, and streams queries and cotangents. Five
products where the two kernels of `backward` need seven. Programs add to dQ in the order in which
they come: two runs may differ in its last bits.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.mosaic_gpu import tiles
from dpfa_jax.kernels.mosaic_gpu.backward_steps import (
    BackwardArrays,
    Ring,
    key_length_of,
    launch,
    load_queries,
    logit_gradient,
    multiply,
    ring_barriers,
    run_steps,
    weights_of,
)
from dpfa_jax.kernels.mosaic_gpu.layouts import COLUMN, tiled_shared, visible
from dpfa_jax.kernels.mosaic_gpu.tiles import COMPUTE_WARPGROUPS, WARPGROUP_ROWS, FusedTiles

# A step is one tile of queries for each compute warpgroup: it makes dQ of its own tile.
BLOCK = WARPGROUP_ROWS
STEP_ROWS = COMPUTE_WARPGROUPS * BLOCK
PROGRAM_KEYS = COMPUTE_WARPGROUPS * BLOCK


def _body(arrays, dk_out, dv_out, shared, barriers, *, spec, tile, keys, group, simulate) -> None:
    batch, kv_head = lax.axis_index("batch"), lax.axis_index("heads")
    warpgroup = lax.axis_index("warpgroup")
    program = lax.axis_index("keys")
    program_begin = program * PROGRAM_KEYS
    num_queries, head_size = arrays.query.shape[1], arrays.query.shape[3]
    key_length = key_length_of(arrays, batch, keys)
    steps = tiles.query_steps(spec, program_begin, PROGRAM_KEYS, STEP_ROWS, num_queries)
    steps = tiles.within_key_length(steps, program_begin, PROGRAM_KEYS, key_length)
    count = steps.end - steps.begin
    ring = Ring(barriers, tile.stages)
    dtype = arrays.query.dtype
    # The simulator cannot add: there each program has a sum of its own.
    dq_sum = arrays.dq_sum.at[program] if simulate else arrays.dq_sum

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
        plgpu.barrier_arrive(barriers["ds_free"])
        plgpu.barrier_wait(own)
        spare = shared["spare"].at[warpgroup] if simulate else None

        def one_tile(dk_acc, dv_acc, done, part, row_begin, masked):
            slot = ring.slot(done)
            q_shared, do_shared = shared["query"].at[slot], shared["cotangent"].at[slot]
            shape = (BLOCK, BLOCK)
            ring.await_full("query", done)

            def weights_and_products(s_acc, dp_acc):
                plgpu.wgmma(s_acc, k_shared, q_shared.T)
                ring.await_full("cotangent", done)
                plgpu.wgmma(dp_acc, v_shared, do_shared.T)
                lse2 = plgpu.load(shared["lse2"].at[slot], layout=COLUMN)
                delta = plgpu.load(shared["delta"].at[slot], layout=COLUMN)
                seen = None
                if masked:
                    seen = visible(
                        spec, shape, row_begin, key_begin, key_length, None, transposed=True
                    )
                s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                p, slope = weights_of(spec, s, lse2, 1, seen)
                multiply(dv_acc, p.astype(dtype), do_shared, spare)
                dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)
                return logit_gradient(p, slope, dp, delta, 1)

            acc = plgpu.ACC(shape, jnp.float32)
            ds = pl.run_scoped(weights_and_products, acc, acc).astype(dtype)
            multiply(dk_acc, ds, q_shared, spare)
            if part == 0:
                plgpu.barrier_wait(barriers["ds_free"])
            shared["ds"].at[part, warpgroup][...] = ds
            plgpu.wgmma_wait(1)
            ring.free("cotangent", done)
            plgpu.wgmma_wait(0)
            ring.free("query", done)

        def query_gradient(head, row_begin):
            """This warpgroup's tile of dQ from the logit gradients of both."""
            dq_shared = shared["dq"].at[warpgroup]
            row_begin = row_begin + warpgroup * BLOCK
            for begin in range(0, head_size, tile.dq_columns):
                columns = pl.ds(begin, tile.dq_columns)

                def product(acc, columns=columns):
                    for other in range(COMPUTE_WARPGROUPS):
                        plgpu.wgmma(
                            acc,
                            shared["ds"].at[warpgroup, other].T,
                            shared["key"].at[other, :, columns],
                        )
                    return acc[...]

                dq = pl.run_scoped(product, plgpu.ACC((BLOCK, tile.dq_columns), jnp.float32))
                if begin + tile.dq_columns == head_size:
                    plgpu.barrier_arrive(barriers["ds_free"])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dq_shared[...] = dq
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    dq_shared,
                    dq_sum.at[batch, pl.ds(row_begin, BLOCK), head, columns],
                    reduction_op=None if simulate else "add",
                )

        def accumulate(dk_acc, dv_acc):
            def one_head(member):
                def body(step, masked):
                    done = COMPUTE_WARPGROUPS * (member * count + step - steps.begin)
                    row_begin = step * STEP_ROWS
                    for part in range(COMPUTE_WARPGROUPS):
                        begin = row_begin + part * BLOCK
                        one_tile(dk_acc, dv_acc, done + part, part, begin, masked)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(barriers["ds"])
                    plgpu.barrier_wait(barriers["ds"])
                    query_gradient(kv_head * group + member, row_begin)

                run_steps(steps, spec, body)

            pl.loop(0, group)(one_head)
            return dk_acc[...], dv_acc[...]

        acc = plgpu.ACC((BLOCK, head_size), jnp.float32)
        dk, dv = pl.run_scoped(accumulate, acc, acc)
        plgpu.barrier_wait(barriers["ds_free"])  # the other warpgroup reads these keys no more
        k_shared[...] = (dk * spec.scale).astype(dtype)
        v_shared[...] = dv.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_shared, dk_out.at[rows])
        plgpu.copy_smem_to_gmem(v_shared, dv_out.at[rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def produce():
        if not simulate:
            plgpu.set_max_registers(24, action="decrease")

        @pl.loop(0, group)
        def _(member):
            head = kv_head * group + member

            @pl.loop(COMPUTE_WARPGROUPS * steps.begin, COMPUTE_WARPGROUPS * steps.end)
            def _(block):
                done = COMPUTE_WARPGROUPS * (member * count - steps.begin) + block
                load_queries(arrays, shared, barriers, ring, done, batch, head, block, BLOCK)

        ring.drain(("query", "cotangent"), COMPUTE_WARPGROUPS * group * count)


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
      arrays: operands, padded; `lse2` and `delta` to whole steps of 128 rows.
      tile: stages, and columns of dQ that are made at a time.
      keys: S before padding.
      interpret: parameters of the Mosaic GPU simulator, None on a GPU.
    """
    batch, _, heads, head_size = arrays.query.shape
    kv_heads, dtype = arrays.key.shape[2], arrays.query.dtype
    programs = tiles.cdiv(keys, PROGRAM_KEYS)
    own_sums = () if interpret is None else (programs,)
    dq_sum = jax.new_ref(jnp.zeros((*own_sums, *arrays.query.shape), jnp.float32))
    resident = tiled_shared((COMPUTE_WARPGROUPS, BLOCK, head_size), dtype)
    streamed = tiled_shared((tile.stages, BLOCK, head_size), dtype)
    per_row = plgpu.SMEM((tile.stages, BLOCK), jnp.float32)
    shared = {
        "key": resident,
        "value": resident,
        "query": streamed,
        "cotangent": streamed,
        "lse2": per_row,
        "delta": per_row,
        "ds": tiled_shared((COMPUTE_WARPGROUPS, COMPUTE_WARPGROUPS, BLOCK, BLOCK), dtype),
        "dq": tiled_shared((COMPUTE_WARPGROUPS, BLOCK, tile.dq_columns), jnp.float32),
    }
    if interpret is not None:
        shared["spare"] = tiled_shared((COMPUTE_WARPGROUPS, BLOCK, BLOCK), dtype)
    like_key = jax.ShapeDtypeStruct(arrays.key.shape, dtype)
    dk, dv = launch(
        _body,
        arrays._replace(dq_sum=dq_sum),
        (like_key, like_key),
        shared,
        {
            "own": plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE_WARPGROUPS),
            "ds": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            "ds_free": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            **ring_barriers({"query": 3, "cotangent": 1}, tile.stages),
        },
        (kv_heads, programs, batch),
        ("heads", "keys", "batch"),
        "dpfa_attention_backward",
        interpret,
        spec=spec,
        tile=tile,
        keys=keys,
        group=heads // kv_heads,
    )
    dq = jax.freeze(dq_sum)
    if own_sums:
        dq = dq.sum(axis=0)
    return (dq * spec.scale).astype(dtype), dk, dv
