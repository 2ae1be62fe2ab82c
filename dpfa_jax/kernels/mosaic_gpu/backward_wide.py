"""Backward above head size 128: dK and dV with logit gradients to memory, then dQ from those.

A program of the first kernel owns 64 keys. The accumulators of dK and dV would not fit one
warpgroup: two warpgroups make one half of the columns each, from weights and logit gradients that a
third one makes and leaves in shared memory. The logit gradients of a chunk of the work also go to
memory, from where a plain product makes dQ: five products, no atomics, the same bits on each run.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.mosaic_gpu import axes, device
from dpfa_jax.kernels.mosaic_gpu import pairs as pair_tiles
from dpfa_jax.kernels.mosaic_gpu.backward_steps import (
    BackwardArrays,
    Ring,
    key_length_of,
    launch,
    load_queries,
    logit_gradient,
    read,
    ring_barriers,
    run_steps,
    weights_of,
)
from dpfa_jax.kernels.mosaic_gpu.backward_wide_queries import (
    BLOCK,
    first_of,
    padded_rows,
    through_memory,
)
from dpfa_jax.kernels.mosaic_gpu.gradient_chunks import chunks_of
from dpfa_jax.kernels.mosaic_gpu.layouts import COLUMN, tiled_shared, visible
from dpfa_jax.kernels.mosaic_gpu.steps import cdiv, is_dense, query_steps, within_key_length
from dpfa_jax.kernels.mosaic_gpu.tiles import COMPUTE_WARPGROUPS, WideTiles

# Of the kernel of dK and dV: warpgroups that own a half of the columns each, the one that makes the
# weights, the one that loads. What they hold is all of a processor's registers.
HALVES = COMPUTE_WARPGROUPS
SCORES, PRODUCER = HALVES, HALVES + 1
GRADIENT_REGISTERS, SCORE_REGISTERS, PRODUCER_REGISTERS = 160, 168, 24
# Weights and logit gradients of a tile are read while those of the next one are written.
SLOTS = 2


def _key_value_body(
    arrays,
    logit_gradients,
    dk_out,
    dv_out,
    shared,
    barriers,
    pairs,
    *,
    spec,
    tile,
    keys,
    group,
    simulate,
) -> None:
    first_batch, first_head, first_block = first_of(arrays)
    chunk_batch, chunk_head = lax.axis_index(axes.BATCH), lax.axis_index(axes.HEADS)
    chunk_begin = lax.axis_index(axes.KEYS) * BLOCK
    batch, kv_head = first_batch + chunk_batch, first_head + chunk_head
    warpgroup = lax.axis_index(axes.WARPGROUP)
    key_begin = first_block * BLOCK + chunk_begin
    num_queries, head_size = arrays.query.shape[1], arrays.query.shape[3]
    half = head_size // HALVES
    key_length = key_length_of(arrays, batch, keys)
    steps = query_steps(spec, key_begin, BLOCK, BLOCK, num_queries)
    steps = within_key_length(steps, key_begin, BLOCK, key_length)
    count = steps.end - steps.begin
    total = group * count
    ring, cotangents = Ring(barriers, tile.stages), Ring(barriers, tile.cotangent_stages)
    weights = Ring(barriers, SLOTS)
    dtype = arrays.query.dtype
    rows = (batch, pl.ds(key_begin, BLOCK), kv_head)
    k_shared, v_shared = shared["key"], shared["value"]

    @pl.when(warpgroup < HALVES)
    def make_gradients():
        if not simulate:
            plgpu.set_max_registers(GRADIENT_REGISTERS, action="increase")
        columns = pl.ds(warpgroup * half, half)

        def accumulate(dk_acc, dv_acc):
            @pl.loop(0, total)
            def _(done):
                slot = weights.slot(done)
                cotangents.await_full("cotangent", done)
                weights.await_full("p", done)
                do_shared = shared["cotangent"].at[cotangents.slot(done), warpgroup]
                plgpu.wgmma(dv_acc, shared["p"].at[slot], do_shared)

                ring.await_full("query", done)
                weights.await_full("ds", done)
                q_shared = shared["query"].at[ring.slot(done), warpgroup]
                plgpu.wgmma(dk_acc, shared["ds"].at[slot], q_shared)
                plgpu.wgmma_wait(1)
                cotangents.free("cotangent", done)
                weights.free("p", done)
                plgpu.wgmma_wait(0)  # the next load of queries waits for this slot
                ring.free("query", done)
                weights.free("ds", done)

            return dk_acc[...], dv_acc[...]

        acc = plgpu.ACC((BLOCK, half), jnp.float32)
        dk, dv = pl.run_scoped(accumulate, acc, acc)
        plgpu.barrier_wait(barriers["own"])
        # The last logit gradients are there: keys and values have been read for the last time.
        for staged, gradient, out in ((k_shared, dk * spec.scale, dk_out), (v_shared, dv, dv_out)):
            staged.at[warpgroup][...] = gradient.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged.at[warpgroup], out.at[(*rows, columns)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the writes end with the kernel

    @pl.when(warpgroup == SCORES)
    def make_scores():
        if not simulate:
            plgpu.set_max_registers(SCORE_REGISTERS, action="increase")
        shape = (BLOCK, BLOCK)
        plgpu.barrier_wait(barriers["own"])

        def product(acc, own, streamed):
            for index in range(HALVES):
                plgpu.wgmma(acc, own.at[index], streamed.at[index].T)

        @pl.loop(0, group)
        def _(member):
            fixed = None
            if pairs is not None:
                fixed = pairs.fixed(batch, kv_head * group + member, rows[1])

            def body(step, masked):
                done = member * count + step - steps.begin
                slot, row_slot = weights.slot(done), ring.slot(done)

                def products(s_acc, dp_acc):
                    product(s_acc, k_shared, shared["query"].at[row_slot])
                    cotangents.await_full("cotangent", done)
                    product(dp_acc, v_shared, shared["cotangent"].at[cotangents.slot(done)])
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=HALVES)
                    lse2 = plgpu.load(shared["lse2"].at[row_slot], layout=COLUMN)
                    seen = None
                    if masked:
                        seen = visible(
                            spec, shape, step * BLOCK, key_begin, key_length, None, transposed=True
                        )
                    shown, bias = read(pairs, done, 0, fixed)
                    p, slope = weights_of(spec, s, lse2, 1, seen, shown, bias)
                    if pairs is not None:
                        pairs.free(done)
                    weights.await_free("p", done)
                    shared["p"].at[slot][...] = p.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(barriers["p"].at[slot])
                    return p, slope, plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)

                ring.await_full("query", done)
                acc = plgpu.ACC(shape, jnp.float32)
                p, slope, dp = pl.run_scoped(products, acc, acc)
                delta = plgpu.load(shared["delta"].at[row_slot], layout=COLUMN)
                ds = logit_gradient(p, slope, dp, delta, 1)
                weights.await_free("ds", done)
                # What was sent `SLOTS` tiles ago.
                plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
                ds_shared = shared["ds"].at[slot]
                ds_shared[...] = ds.astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(barriers["ds"].at[slot])
                head = chunk_head * group + member
                to = (chunk_batch, head, pl.ds(chunk_begin, BLOCK), pl.ds(step * BLOCK, BLOCK))
                plgpu.copy_smem_to_gmem(ds_shared, logit_gradients.at[to])

            run_steps(steps, spec, body)

        weights.drain(("p", "ds"), total)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(warpgroup == PRODUCER)
    def produce():
        if not simulate:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        for name, array in (("key", arrays.key), ("value", arrays.value)):
            for index in range(HALVES):
                plgpu.copy_gmem_to_smem(
                    array.at[(*rows, pl.ds(index * half, half))],
                    shared[name].at[index],
                    barriers["own"],
                )

        @pl.loop(0, group)
        def _(member):
            head = kv_head * group + member

            @pl.loop(steps.begin, steps.end)
            def _(step):
                done = member * count + step - steps.begin

                def load_pairs():
                    if pairs is not None:
                        pairs.load(done, batch, head, first_block + lax.axis_index(axes.KEYS), step)

                load_queries(
                    arrays, shared, barriers, ring, done, batch, head, step, BLOCK, load_pairs,
                    parts=HALVES, cotangents=cotangents,
                )  # fmt: skip

        ring.drain(("query",), total)
        cotangents.drain(("cotangent",), total)
        if pairs is not None:
            pairs.drain(total)


def wide_backward(
    spec: AttentionSpec,
    arrays: BackwardArrays,
    tile: WideTiles,
    *,
    keys: int,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dQ (B, T, N, H), dK and dV (B, S, K, H), padded as the operands, H at most 256.

    Args:
      spec: the forward's.
      arrays: operands, padded; `lse2` and `delta` to whole tiles.
      tile: stages of the rings.
      keys: S before padding.
      mask, bias: (b, n, t, s), each axis full or 1.
      interpret: parameters of the Mosaic GPU simulator, None on a GPU.
    """
    batch, num_queries, heads, head_size = arrays.query.shape
    kv_heads, dtype = arrays.key.shape[2], arrays.query.dtype
    group = heads // kv_heads
    rows = padded_rows(num_queries)
    chunks = chunks_of(
        batch, kv_heads, cdiv(keys, BLOCK), rows=rows, group=group, block=BLOCK,
        processors=device.processors(), is_even=is_dense(spec),
    )  # fmt: skip
    static = {"spec": spec, "tile": tile, "keys": keys, "group": group}
    like_key = jax.ShapeDtypeStruct(arrays.key.shape, dtype)
    like_gradients = jax.ShapeDtypeStruct(
        (chunks.batch, chunks.heads * group, chunks.key_blocks * BLOCK, rows), dtype
    )

    # The columns of one half lie in whole rows of shared memory.
    swizzle = 128 if head_size % (64 * HALVES) == 0 else 64

    def halves(*leading: int) -> Any:
        return tiled_shared((*leading, HALVES, BLOCK, head_size // HALVES), dtype, swizzle=swizzle)

    square = tiled_shared((SLOTS, BLOCK, BLOCK), dtype, swizzle=swizzle)
    grid = {axes.HEADS: chunks.heads, axes.KEYS: chunks.key_blocks, axes.BATCH: chunks.batch}
    if not is_dense(spec):
        # The last axis runs fastest. Of uneven programs, the longest of all heads go first; even
        # ones of a head run together, whose queries they share in the second-level cache.
        grid = {name: grid[name] for name in (axes.KEYS, axes.HEADS, axes.BATCH)}
    turned = pair_tiles.arranged(mask, bias, rows=keys, is_turned=True)
    per_row = plgpu.SMEM((tile.stages, BLOCK), jnp.float32)

    def keys_and_values(arrays: BackwardArrays) -> list[jax.Array]:
        """Logit gradients of a chunk, then dK and dV unless `arrays` has references to them."""
        has_refs = arrays.dk_sum is not None

        def body(arrays, logit_gradients, *rest, **options):
            outs = (arrays.dk_sum, arrays.dv_sum) if has_refs else ()
            _key_value_body(arrays, logit_gradients, *outs, *rest, **options)

        return launch(
            body,
            arrays,
            (like_gradients, *(() if has_refs else (like_key, like_key))),
            {
                "key": halves(),
                "value": halves(),
                "query": halves(tile.stages),
                "cotangent": halves(tile.cotangent_stages),
                "lse2": per_row,
                "delta": per_row,
                "p": square,
                "ds": square,
            },
            {
                "own": plgpu.Barrier(num_arrivals=2 * HALVES),
                **ring_barriers({"p": 1, "ds": 1}, SLOTS),
                **ring_barriers({"query": HALVES + 2}, tile.stages),
                **ring_barriers({"cotangent": HALVES}, tile.cotangent_stages),
            },
            tuple(grid.values()),
            tuple(grid),
            "dpfa_attention_backward_wide_kv",
            interpret,
            pairs=turned,
            step=BLOCK,
            pair_stages=tile.pair_stages,
            readers=1,
            warpgroups=PRODUCER + 1,
            **static,
        )

    return through_memory(
        spec, arrays, chunks, keys_and_values, keys=keys, stages=tile.key_stages,
        interpret=interpret,
    )  # fmt: skip
