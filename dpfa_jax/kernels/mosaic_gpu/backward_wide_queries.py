"""dQ from logit gradients in memory, which another kernel has left there, chunk after chunk.

That kernel makes dK and dV of some of the work, a chunk (`gradient_chunks.py`), and stores its
logit gradients, keys first. A plain product makes dQ of them: five products in all, no atomics, the
same bits on each run.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.mosaic_gpu import axes
from dpfa_jax.kernels.mosaic_gpu.backward_steps import (
    BackwardArrays,
    Ring,
    key_length_of,
    late_zeros,
    launch,
    ring_barriers,
)
from dpfa_jax.kernels.mosaic_gpu.gradient_chunks import Chunks
from dpfa_jax.kernels.mosaic_gpu.layouts import WGMMA, tiled_shared
from dpfa_jax.kernels.mosaic_gpu.steps import StepRange, cdiv, key_steps, within
from dpfa_jax.kernels.mosaic_gpu.tiles import COMPUTE_WARPGROUPS, WARPGROUP_ROWS

BLOCK = WARPGROUP_ROWS
PROGRAM_ROWS = COMPUTE_WARPGROUPS * BLOCK


def padded_rows(queries: int) -> int:
    """Rows of logit gradients in memory."""
    return cdiv(queries, PROGRAM_ROWS) * PROGRAM_ROWS


def first_of(arrays: BackwardArrays) -> tuple[Any, Any, Any]:
    """First batch row, key head and block of 64 keys of this chunk."""
    if arrays.chunk is None:
        return 0, 0, 0
    return arrays.chunk[0], arrays.chunk[1], arrays.chunk[2]


def _within_chunk(steps: StepRange, first_block: Any, blocks: int) -> tuple[Any, Any]:
    """[begin, end) of those steps over blocks of keys that lie in the chunk, from its begin."""
    begin = jnp.clip(steps.begin - first_block, 0, blocks)
    return begin, jnp.clip(steps.end - first_block, begin, blocks)


def _own_range(own: tuple[Any, Any], program: tuple[Any, Any]) -> tuple[Any, Any]:
    """A warpgroup's [begin, end), moved into its program's, in which it takes each step.

    Where it has no step its begin may lie past the program's end: a window that begins behind the
    last key that exists.
    """
    begin = within(own[0], *program)
    return begin, within(own[1], begin, program[1])


def _query_body(
    arrays, dq_out, shared, barriers, *, spec, stages, keys, group, blocks, is_partial, simulate
) -> None:
    first_batch, first_head, first_block = first_of(arrays)
    chunk_batch, chunk_head = lax.axis_index(axes.BATCH), lax.axis_index(axes.HEADS)
    batch, head = first_batch + chunk_batch, first_head * group + chunk_head
    warpgroup = lax.axis_index(axes.WARPGROUP)
    program_begin = (lax.axis_size(axes.ROWS) - 1 - lax.axis_index(axes.ROWS)) * PROGRAM_ROWS
    num_queries, head_size = arrays.query.shape[1], arrays.query.shape[3]
    key_length = key_length_of(arrays, batch, keys)

    def steps_of(row_begin, rows):
        steps = key_steps(spec, row_begin, rows, BLOCK, key_length, None)
        return _within_chunk(steps, first_block, blocks)

    begin, end = steps_of(program_begin, PROGRAM_ROWS)
    ring = Ring(barriers, stages)
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


def through_memory(
    spec: AttentionSpec,
    arrays: BackwardArrays,
    chunks: Chunks,
    keys_and_values: Callable[[BackwardArrays], list[jax.Array]],
    *,
    keys: int,
    stages: int,
    interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dQ (B, T, N, H), dK and dV (B, S, K, H), padded as the operands.

    Args:
      spec: the forward's.
      arrays: operands, padded.
      chunks: parts of the work, in blocks of 64 keys.
      keys_and_values: of operands with their `chunk`, makes its logit gradients (b, n, s, rows),
        and dK and dV unless the operands have references to them.
      keys: S before padding.
      stages: of the ring of keys and logit gradients.
      interpret: parameters of the Mosaic GPU simulator, None on a GPU.
    """
    heads, head_size = arrays.query.shape[2:]
    group, dtype = heads // arrays.key.shape[2], arrays.query.dtype
    row_programs = padded_rows(arrays.query.shape[1]) // PROGRAM_ROWS
    like_query = jax.ShapeDtypeStruct(arrays.query.shape, dtype)

    def queries(arrays: BackwardArrays) -> list[jax.Array]:
        """dQ of a chunk, unless `arrays` has a reference to it."""
        has_refs = arrays.dq_sum is not None
        shared = {
            "ds": tiled_shared((stages, COMPUTE_WARPGROUPS, BLOCK, BLOCK), dtype),
            "key": tiled_shared((stages, BLOCK, head_size), dtype),
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
            ring_barriers({"key": 1, "ds": COMPUTE_WARPGROUPS}, stages),
            (chunks.heads * group, row_programs, chunks.batch),
            (axes.HEADS, axes.ROWS, axes.BATCH),
            "dpfa_attention_backward_wide_q",
            interpret,
            blocks=chunks.key_blocks,
            is_partial=chunks.cuts_keys,
            spec=spec,
            stages=stages,
            keys=keys,
            group=group,
        )

    if chunks.total == 1:
        logit_gradients, dk, dv = keys_and_values(arrays)
        (dq,) = queries(arrays._replace(logit_gradients=logit_gradients))
        return dq, dk, dv
    return _in_chunks(spec, arrays, chunks, keys_and_values, queries)


def _in_chunks(
    spec: AttentionSpec,
    arrays: BackwardArrays,
    chunks: Chunks,
    keys_and_values: Any,
    queries: Any,
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

    rows = padded_rows(num_queries)
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
