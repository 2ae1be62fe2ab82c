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
from dpfa_jax.kernels.mosaic_gpu import axes, device, tiles
from dpfa_jax.kernels.mosaic_gpu import pairs as pair_tiles
from dpfa_jax.kernels.mosaic_gpu.backward_steps import (
    BackwardArrays,
    Ring,
    key_length_of,
    late_zeros,
    launch,
    load_queries,
    logit_gradient,
    read,
    ring_barriers,
    run_steps,
    weights_of,
)
from dpfa_jax.kernels.mosaic_gpu.gradient_chunks import Chunks, chunks_of
from dpfa_jax.kernels.mosaic_gpu.layouts import COLUMN, WGMMA, tiled_shared, visible
from dpfa_jax.kernels.mosaic_gpu.tiles import (
    COMPUTE_WARPGROUPS,
    WARPGROUP_ROWS,
    StepRange,
    WideTiles,
)

BLOCK = WARPGROUP_ROWS
PROGRAM_ROWS = COMPUTE_WARPGROUPS * BLOCK  # of the kernel of dQ
# Of the kernel of dK and dV: warpgroups that own a half of the columns each, the one that makes the
# weights, the one that loads. What they hold is all of a processor's registers.
HALVES = COMPUTE_WARPGROUPS
SCORES, PRODUCER = HALVES, HALVES + 1
GRADIENT_REGISTERS, SCORE_REGISTERS, PRODUCER_REGISTERS = 160, 168, 24
# Weights and logit gradients of a tile are read while those of the next one are written.
SLOTS = 2


def _first_of(arrays: BackwardArrays) -> tuple[Any, Any, Any]:
    """First batch row, key head and key block of this chunk."""
    if arrays.chunk is None:
        return 0, 0, 0
    return arrays.chunk[0], arrays.chunk[1], arrays.chunk[2]


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
    first_batch, first_head, first_block = _first_of(arrays)
    chunk_batch, chunk_head = lax.axis_index(axes.BATCH), lax.axis_index(axes.HEADS)
    chunk_begin = lax.axis_index(axes.KEYS) * BLOCK
    batch, kv_head = first_batch + chunk_batch, first_head + chunk_head
    warpgroup = lax.axis_index(axes.WARPGROUP)
    key_begin = first_block * BLOCK + chunk_begin
    num_queries, head_size = arrays.query.shape[1], arrays.query.shape[3]
    half = head_size // HALVES
    key_length = key_length_of(arrays, batch, keys)
    steps = tiles.query_steps(spec, key_begin, BLOCK, BLOCK, num_queries)
    steps = tiles.within_key_length(steps, key_begin, BLOCK, key_length)
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


def _within_chunk(steps: StepRange, first_block: Any, blocks: int) -> tuple[Any, Any]:
    """[begin, end) of those steps over blocks of keys that lie in the chunk, from its begin."""
    begin = jnp.clip(steps.begin - first_block, 0, blocks)
    return begin, jnp.clip(steps.end - first_block, begin, blocks)


def _own_range(own: tuple[Any, Any], program: tuple[Any, Any]) -> tuple[Any, Any]:
    """A warpgroup's [begin, end), moved into its program's, in which it takes each step.

    Where it has no step its begin may lie past the program's end: a window that begins behind the
    last key that exists.
    """
    begin = tiles.within(own[0], *program)
    return begin, tiles.within(own[1], begin, program[1])


def _query_body(
    arrays, dq_out, shared, barriers, *, spec, tile, keys, group, blocks, is_partial, simulate
) -> None:
    first_batch, first_head, first_block = _first_of(arrays)
    chunk_batch, chunk_head = lax.axis_index(axes.BATCH), lax.axis_index(axes.HEADS)
    batch, head = first_batch + chunk_batch, first_head * group + chunk_head
    warpgroup = lax.axis_index(axes.WARPGROUP)
    program_begin = (lax.axis_size(axes.ROWS) - 1 - lax.axis_index(axes.ROWS)) * PROGRAM_ROWS
    num_queries, head_size = arrays.query.shape[1], arrays.query.shape[3]
    key_length = key_length_of(arrays, batch, keys)

    def steps_of(row_begin, rows):
        steps = tiles.key_steps(spec, row_begin, rows, BLOCK, key_length, None)
        return _within_chunk(steps, first_block, blocks)

    begin, end = steps_of(program_begin, PROGRAM_ROWS)
    ring = Ring(barriers, tile.key_stages)
    dtype = arrays.query.dtype

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def compute():
        if not simulate:
            plgpu.set_max_registers(240, action="increase")
        row_begin = program_begin + warpgroup * BLOCK
        rows = pl.ds(row_begin, BLOCK)
        # Tiles outside this range were never written: nothing may read them.
        own_begin, own_end = _own_range(steps_of(row_begin, BLOCK), (begin, end))
        own_end = jnp.where(row_begin < num_queries, own_end, own_begin)

        def skip(step):
            for name in ("key", "ds"):
                ring.await_full(name, step - begin)
                ring.free(name, step - begin)

        def accumulate(dq_acc):
            def body(step):
                done = step - begin
                slot = ring.slot(done)
                for name in ("key", "ds"):
                    ring.await_full(name, done)
                plgpu.wgmma(dq_acc, shared["ds"].at[slot, warpgroup].T, shared["key"].at[slot])
                plgpu.wgmma_wait(0)
                for name in ("key", "ds"):
                    ring.free(name, done)

            pl.loop(begin, own_begin)(skip)
            pl.loop(own_begin, own_end)(body)
            pl.loop(own_end, end)(skip)
            return dq_acc[...]

        dq = pl.run_scoped(accumulate, plgpu.ACC((BLOCK, head_size), jnp.float32))
        if is_partial:  # one addition a chunk, in the order of the chunks
            out = dq_out.at[batch, rows, head]
            out[...] = plgpu.load(out, layout=WGMMA, optimized=False) + dq
        else:
            dq_shared = shared["dq"].at[warpgroup]
            dq_shared[...] = (dq * spec.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dq_shared, dq_out.at[batch, rows, head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the writes end with the kernel

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def produce():
        if not simulate:
            plgpu.set_max_registers(24, action="decrease")
        kv_head = lax.div(head, jnp.int32(group))

        @pl.loop(begin, end)
        def _(step):
            done = step - begin
            slot = ring.slot(done)
            of_keys = pl.ds(step * BLOCK, BLOCK)
            ring.await_free("ds", done)
            for part in range(COMPUTE_WARPGROUPS):
                queries = pl.ds(program_begin + part * BLOCK, BLOCK)
                plgpu.copy_gmem_to_smem(
                    arrays.logit_gradients.at[chunk_batch, chunk_head, of_keys, queries],
                    shared["ds"].at[slot, part],
                    barriers["ds"].at[slot],
                )
            ring.await_free("key", done)
            plgpu.copy_gmem_to_smem(
                arrays.key.at[batch, pl.ds((first_block + step) * BLOCK, BLOCK), kv_head],
                shared["key"].at[slot],
                barriers["key"].at[slot],
            )

        ring.drain(("key", "ds"), end - begin)


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
    row_programs = tiles.cdiv(num_queries, PROGRAM_ROWS)
    rows = row_programs * PROGRAM_ROWS
    chunks = chunks_of(
        batch, kv_heads, tiles.cdiv(keys, BLOCK), rows=rows, group=group, block=BLOCK,
        processors=device.processors(), is_even=tiles.is_dense(spec),
    )  # fmt: skip
    static = {"spec": spec, "tile": tile, "keys": keys, "group": group}
    like_query = jax.ShapeDtypeStruct(arrays.query.shape, dtype)
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
    if not tiles.is_dense(spec):
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

    def queries(arrays: BackwardArrays) -> list[jax.Array]:
        """dQ of a chunk, unless `arrays` has a reference to it."""
        has_refs = arrays.dq_sum is not None
        shared = {
            "ds": tiled_shared((tile.key_stages, COMPUTE_WARPGROUPS, BLOCK, BLOCK), dtype),
            "key": tiled_shared((tile.key_stages, BLOCK, head_size), dtype),
        }
        if not chunks.cuts_keys:
            shared["dq"] = tiled_shared((COMPUTE_WARPGROUPS, BLOCK, head_size), dtype)

        def body(arrays, *rest, **options):
            outs = (arrays.dq_sum,) if has_refs else ()
            _query_body(arrays, *outs, *rest, **options)

        return launch(
            body,
            arrays,
            () if has_refs else (like_query,),
            shared,
            ring_barriers({"key": 1, "ds": COMPUTE_WARPGROUPS}, tile.key_stages),
            (chunks.heads * group, row_programs, chunks.batch),
            (axes.HEADS, axes.ROWS, axes.BATCH),
            "dpfa_attention_backward_wide_q",
            interpret,
            blocks=chunks.key_blocks,
            is_partial=chunks.cuts_keys,
            **static,
        )

    if chunks.total == 1:
        logit_gradients, dk, dv = keys_and_values(arrays)
        (dq,) = queries(arrays._replace(logit_gradients=logit_gradients))
        return dq, dk, dv
    return _in_chunks(spec, arrays, chunks, keys_and_values, queries, rows=rows)


def _in_chunks(
    spec: AttentionSpec,
    arrays: BackwardArrays,
    chunks: Chunks,
    keys_and_values: Any,
    queries: Any,
    *,
    rows: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One chunk after the other, each into its place of the gradients."""
    batch, num_queries, heads, head_size = arrays.query.shape
    dtype = arrays.query.dtype

    def one(index: jax.Array, refs: Any) -> None:
        dq, dk, dv = refs
        _, head_count, block_count = chunks.counts
        block = lax.rem(index, block_count)
        head = lax.rem(lax.div(index, block_count), head_count)
        first = (lax.div(index, block_count * head_count), head, block)
        sizes = (chunks.batch, chunks.heads, chunks.key_blocks)
        chunk = jnp.stack([x * size for x, size in zip(first, sizes, strict=True)])
        found = arrays._replace(chunk=chunk)
        (logit_gradients,) = keys_and_values(found._replace(dk_sum=dk, dv_sum=dv))
        queries(found._replace(logit_gradients=logit_gradients, dq_sum=dq))

    def run(refs: Any) -> None:
        lax.fori_loop(0, chunks.total, lambda index, _: one(index, refs), None)

    dq_like = (batch, rows if chunks.cuts_keys else num_queries, heads, head_size)
    dq_dtype = jnp.float32 if chunks.cuts_keys else dtype
    like_query = jax.ShapeDtypeStruct(dq_like, dq_dtype)
    like_key = jax.ShapeDtypeStruct(arrays.key.shape, dtype)
    cotangent, zeros = late_zeros(arrays.cotangent, like_query, like_key, like_key)
    arrays = arrays._replace(cotangent=cotangent)
    dq, dk, dv = pl.run_state(run)(zeros)
    if chunks.cuts_keys:
        dq = (dq[:, :num_queries] * spec.scale).astype(dtype)
    return dq, dk, dv
