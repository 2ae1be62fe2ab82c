"""Two backward kernels, one for dK and dV, one for dQ: each run gives the same bits.

Weights are recomputed from the log-sum-exp (Dao et al., 2022). Each program owns rows of one
operand in shared memory and streams the other through a producer warpgroup.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.mosaic_gpu import axes, tiles
from dpfa_jax.kernels.mosaic_gpu import pairs as pair_tiles
from dpfa_jax.kernels.mosaic_gpu.backward_fused import fused_backward
from dpfa_jax.kernels.mosaic_gpu.backward_steps import (
    BackwardArrays,
    Ring,
    key_length_of,
    launch,
    load_queries,
    logit_gradient,
    multiply,
    read,
    ring_barriers,
    run_steps,
    weights_of,
)
from dpfa_jax.kernels.mosaic_gpu.backward_wide import wide_backward
from dpfa_jax.kernels.mosaic_gpu.layouts import (
    COLUMN,
    LOG2_E,
    ROW,
    pad_sequence,
    tiled_shared,
    visible,
)
from dpfa_jax.kernels.mosaic_gpu.tiles import (
    COMPUTE_WARPGROUPS,
    BackwardTiles,
    FusedTiles,
    WideTiles,
)

ROW_MULTIPLE = 128  # rows of lse and delta are padded to whole tiles of every kernel


def _key_value_body(
    arrays, dk_out, dv_out, shared, barriers, pairs, *, spec, tile, keys, group, simulate
) -> None:
    batch, kv_head = lax.axis_index(axes.BATCH), lax.axis_index(axes.HEADS)
    warpgroup = lax.axis_index(axes.WARPGROUP)
    block_q, block_kv, stages = tile.block_q_dkv, tile.block_kv_dkv, tile.stages
    program_keys = COMPUTE_WARPGROUPS * block_kv
    program_begin = lax.axis_index(axes.KEYS) * program_keys
    num_queries, head_size = arrays.query.shape[1], arrays.query.shape[3]
    key_length = key_length_of(arrays, batch, keys)
    steps = tiles.query_steps(spec, program_begin, program_keys, block_q, num_queries)
    steps = tiles.within_key_length(steps, program_begin, program_keys, key_length)
    count = steps.end - steps.begin
    ring = Ring(barriers, stages)
    dtype = arrays.query.dtype

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def compute():
        if not simulate:
            plgpu.set_max_registers(232, action="increase")
        key_begin = program_begin + warpgroup * block_kv
        rows = (batch, pl.ds(key_begin, block_kv), kv_head)
        k_shared, v_shared = shared["key"].at[warpgroup], shared["value"].at[warpgroup]
        own = barriers["own"].at[warpgroup]
        plgpu.copy_gmem_to_smem(arrays.key.at[rows], k_shared, own)
        plgpu.copy_gmem_to_smem(arrays.value.at[rows], v_shared, own)
        plgpu.barrier_wait(own)
        spare = shared["spare"].at[warpgroup] if simulate else None

        def accumulate(dk_acc, dv_acc):
            def one_head(member):
                head = kv_head * group + member
                fixed = None if pairs is None else pairs.fixed(batch, head, rows[1])

                def body(step, masked):
                    done = member * count + step - steps.begin
                    slot = ring.slot(done)
                    q_shared, do_shared = shared["query"].at[slot], shared["cotangent"].at[slot]
                    shape = (block_kv, block_q)
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
                                spec, shape, step * block_q, key_begin, key_length, None,
                                transposed=True,
                            )  # fmt: skip
                        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                        shown, bias = read(pairs, done, warpgroup, fixed)
                        p, slope = weights_of(spec, s, lse2, 1, seen, shown, bias)
                        if pairs is not None:
                            pairs.free(done)
                        multiply(dv_acc, p.astype(dtype), do_shared, spare)
                        dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)
                        return logit_gradient(p, slope, dp, delta, 1)

                    acc = plgpu.ACC(shape, jnp.float32)
                    ds = pl.run_scoped(weights_and_products, acc, acc)
                    multiply(dk_acc, ds.astype(dtype), q_shared, spare)
                    plgpu.wgmma_wait(1)
                    ring.free("cotangent", done)
                    plgpu.wgmma_wait(0)
                    ring.free("query", done)

                run_steps(steps, spec, body)

            pl.loop(0, group)(one_head)
            return dk_acc[...], dv_acc[...]

        acc = plgpu.ACC((block_kv, head_size), jnp.float32)
        dk, dv = pl.run_scoped(accumulate, acc, acc)
        k_shared[...] = (dk * spec.scale).astype(dtype)
        v_shared[...] = dv.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_shared, dk_out.at[rows])
        plgpu.copy_smem_to_gmem(v_shared, dv_out.at[rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def produce():
        if not simulate:
            plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, group)
        def _(member):
            head = kv_head * group + member

            @pl.loop(steps.begin, steps.end)
            def _(step):
                done = member * count + step - steps.begin

                def load_pairs():
                    if pairs is not None:
                        pairs.load(done, batch, head, lax.axis_index(axes.KEYS), step)

                load_queries(
                    arrays, shared, barriers, ring, done, batch, head, step, block_q, load_pairs
                )

        ring.drain(("query", "cotangent"), group * count)
        if pairs is not None:
            pairs.drain(group * count)


def _query_body(
    arrays, dq_out, shared, barriers, pairs, *, spec, tile, keys, group, simulate
) -> None:
    batch, head = lax.axis_index(axes.BATCH), lax.axis_index(axes.HEADS)
    warpgroup = lax.axis_index(axes.WARPGROUP)
    block = lax.axis_size(axes.ROWS) - 1 - lax.axis_index(axes.ROWS)
    block_q, block_kv, stages = tile.block_q_dq, tile.block_kv_dq, tile.stages
    program_rows = COMPUTE_WARPGROUPS * block_q
    program_begin = block * program_rows
    head_size = arrays.query.shape[3]
    key_length = key_length_of(arrays, batch, keys)
    steps = tiles.key_steps(spec, program_begin, program_rows, block_kv, key_length, None)
    ring = Ring(barriers, stages)
    dtype = arrays.query.dtype

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def compute():
        if not simulate:
            plgpu.set_max_registers(232, action="increase")
        row_begin = program_begin + warpgroup * block_q
        rows = pl.ds(row_begin, block_q)
        q_shared, do_shared = shared["query"].at[warpgroup], shared["cotangent"].at[warpgroup]
        own = barriers["own"].at[warpgroup]
        plgpu.copy_gmem_to_smem(arrays.query.at[batch, rows, head], q_shared, own)
        plgpu.copy_gmem_to_smem(arrays.cotangent.at[batch, rows, head], do_shared, own)
        vector = (batch, head, rows)
        lse2 = plgpu.load(arrays.lse2.at[vector], layout=ROW, optimized=False)
        delta = plgpu.load(arrays.delta.at[vector], layout=ROW, optimized=False)
        fixed = None if pairs is None else pairs.fixed(batch, head, rows)
        plgpu.barrier_wait(own)
        spare = shared["spare"].at[warpgroup] if simulate else None

        def accumulate(dq_acc):
            def body(step, masked):
                done = step - steps.begin
                slot = ring.slot(done)
                k_shared, v_shared = shared["key"].at[slot], shared["value"].at[slot]
                shape = (block_q, block_kv)
                ring.await_full("key", done)

                def gradient(s_acc, dp_acc):
                    plgpu.wgmma(s_acc, q_shared, k_shared.T)
                    ring.await_full("value", done)
                    plgpu.wgmma(dp_acc, do_shared, v_shared.T)
                    seen = None
                    if masked:
                        seen = visible(spec, shape, row_begin, step * block_kv, key_length, None)
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                    shown, bias = read(pairs, done, warpgroup, fixed)
                    p, slope = weights_of(spec, s, lse2, 0, seen, shown, bias)
                    if pairs is not None:
                        pairs.free(done)
                    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                    ring.free("value", done)
                    return logit_gradient(p, slope, dp, delta, 0)

                acc = plgpu.ACC(shape, jnp.float32)
                ds = pl.run_scoped(gradient, acc, acc)
                multiply(dq_acc, ds.astype(dtype), k_shared, spare)
                plgpu.wgmma_wait(0)
                ring.free("key", done)

            run_steps(steps, spec, body)
            return dq_acc[...]

        dq = pl.run_scoped(accumulate, plgpu.ACC((block_q, head_size), jnp.float32))
        q_shared[...] = (dq * spec.scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_shared, dq_out.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def produce():
        if not simulate:
            plgpu.set_max_registers(40, action="decrease")
        kv_head = lax.div(head, jnp.int32(group))

        @pl.loop(steps.begin, steps.end)
        def _(step):
            done = step - steps.begin
            slot = ring.slot(done)
            source = (batch, pl.ds(step * block_kv, block_kv), kv_head)
            for name, array in (("key", arrays.key), ("value", arrays.value)):
                ring.await_free(name, done)
                plgpu.copy_gmem_to_smem(
                    array.at[source], shared[name].at[slot], barriers[name].at[slot]
                )
            if pairs is not None:
                pairs.load(done, batch, head, block, step)

        ring.drain(("key", "value"), steps.end - steps.begin)
        if pairs is not None:
            pairs.drain(steps.end - steps.begin)


def _two_kernels(
    spec: AttentionSpec,
    arrays: BackwardArrays,
    tile: BackwardTiles,
    *,
    rows: int,
    keys: int,
    mask: jax.Array | None,
    bias: jax.Array | None,
    interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    batch, num_queries, heads, head_size = arrays.query.shape
    kv_heads, dtype = arrays.key.shape[2], arrays.query.dtype
    static = {"spec": spec, "tile": tile, "keys": keys, "group": heads // kv_heads}
    like_query = jax.ShapeDtypeStruct(arrays.query.shape, dtype)
    like_key = jax.ShapeDtypeStruct(arrays.key.shape, dtype)

    def resident(block: int) -> Any:
        return tiled_shared((COMPUTE_WARPGROUPS, block, head_size), dtype)

    def streamed(block: int) -> Any:
        return tiled_shared((tile.stages, block, head_size), dtype)

    def spare(block: int, columns: int) -> dict[str, Any]:
        if interpret is None:
            return {}
        return {"spare": tiled_shared((COMPUTE_WARPGROUPS, block, columns), dtype)}

    turned = pair_tiles.arranged(mask, bias, rows=keys, is_turned=True)
    pairs = pair_tiles.arranged(mask, bias, rows=rows)
    own = {"own": plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE_WARPGROUPS)}
    per_row = plgpu.SMEM((tile.stages, tile.block_q_dkv), jnp.float32)
    dk, dv = launch(
        _key_value_body,
        arrays,
        (like_key, like_key),
        {
            "key": resident(tile.block_kv_dkv),
            "value": resident(tile.block_kv_dkv),
            "query": streamed(tile.block_q_dkv),
            "cotangent": streamed(tile.block_q_dkv),
            "lse2": per_row,
            "delta": per_row,
            **spare(tile.block_kv_dkv, tile.block_q_dkv),
        },
        own | ring_barriers({"query": 3, "cotangent": 1}, tile.stages),
        (kv_heads, tiles.cdiv(keys, COMPUTE_WARPGROUPS * tile.block_kv_dkv), batch),
        (axes.HEADS, axes.KEYS, axes.BATCH),
        "dpfa_attention_backward_kv",
        interpret,
        pairs=turned,
        step=tile.block_q_dkv,
        **static,
    )
    (dq,) = launch(
        _query_body,
        arrays,
        (like_query,),
        {
            "query": resident(tile.block_q_dq),
            "cotangent": resident(tile.block_q_dq),
            "key": streamed(tile.block_kv_dq),
            "value": streamed(tile.block_kv_dq),
            **spare(tile.block_q_dq, tile.block_kv_dq),
        },
        own | ring_barriers({"key": 1, "value": 1}, tile.stages),
        (heads, tiles.cdiv(num_queries, COMPUTE_WARPGROUPS * tile.block_q_dq), batch),
        (axes.HEADS, axes.ROWS, axes.BATCH),
        "dpfa_attention_backward_q",
        interpret,
        pairs=pairs,
        step=tile.block_kv_dq,
        **static,
    )
    return dq, dk, dv


def attention_backward(
    spec: AttentionSpec,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cotangent: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    key_lengths: jax.Array | None,
    tile: BackwardTiles | FusedTiles | WideTiles,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of plain attention with respect to query, key and value.

    Args:
      spec: the forward's.
      query, cotangent: (B, T, N, H), bfloat16 or float16; H <= 128, or <= 256 with `WideTiles`.
      key, value: (B, S, K, H); what lies past a key length must be finite.
      lse: (B, N, T) float32, natural; -inf for rows that see no key.
      delta: (B, N, T) float32, row sums of output times cotangent less the cotangent of lse.
      key_lengths: (B,) int32 or None. Rows past a query length are told by their lse.
      tile: tile sizes; their type says which kernels run.
      mask, bias: (b, n, t, s), each axis full or 1; bool and floating. Not with `FusedTiles`.
      interpret: parameters of the Mosaic GPU simulator, None on a GPU.
    """
    q_shape, k_shape = query.shape, key.shape
    keys = k_shape[1]
    rows = ((0, 0), (0, 0), (0, -q_shape[1] % ROW_MULTIPLE))
    lse2 = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2_E)
    arrays = BackwardArrays(
        pad_sequence(query),
        pad_sequence(key),
        pad_sequence(value),
        pad_sequence(cotangent),
        jnp.pad(lse2, rows, constant_values=jnp.inf),
        jnp.pad(delta, rows),
        key_lengths,
    )
    if isinstance(tile, FusedTiles):
        assert mask is None and bias is None
        dq, dk, dv = fused_backward(spec, arrays, tile, keys=keys, interpret=interpret)
    elif isinstance(tile, WideTiles):
        dq, dk, dv = wide_backward(
            spec, arrays, tile, keys=keys, mask=mask, bias=bias, interpret=interpret
        )
    else:
        dq, dk, dv = _two_kernels(
            spec, arrays, tile, rows=q_shape[1], keys=keys, mask=mask, bias=bias,
            interpret=interpret,
        )  # fmt: skip

    def cut(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return x[tuple(slice(size) for size in shape)]

    return cut(dq, q_shape), cut(dk, k_shape), cut(dv, k_shape)
