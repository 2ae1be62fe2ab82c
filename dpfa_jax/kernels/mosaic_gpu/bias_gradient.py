"""Gradient of an additive bias: a kernel of its own, so that a bias nobody derives costs nothing.

A program owns one tile of the gradient, sums it in registers over examples, heads and rows along
which the bias was broadcast, and writes it once: no (B, N, T, S) array, no atomics.
"""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.mosaic_gpu import axes
from dpfa_jax.kernels.mosaic_gpu import pairs as pair_tiles
from dpfa_jax.kernels.mosaic_gpu.backward_steps import (
    Ring,
    logit_gradient,
    read,
    ring_barriers,
    weights_of,
)
from dpfa_jax.kernels.mosaic_gpu.layouts import (
    COLUMN,
    LOG2_E,
    ROW,
    WGMMA,
    pad_sequence,
    tiled_shared,
    visible,
)
from dpfa_jax.kernels.mosaic_gpu.pairs import PROGRAM_ROWS, Form, PairReader, place
from dpfa_jax.kernels.mosaic_gpu.steps import cdiv, key_steps, left_reach, right_reach
from dpfa_jax.kernels.mosaic_gpu.tiles import COMPUTE_WARPGROUPS, WARPGROUP_ROWS

KEYS = 64  # of one tile
STAGES = 2


class BiasArrays(NamedTuple):
    """Operands, as `BackwardArrays`; bias as `_held`, lse2 and delta as (B, N, rows / 64, 64)."""

    query: Any
    key: Any
    value: Any
    cotangent: Any
    lse2: Any
    delta: Any
    bias: Any
    key_lengths: Any = None
    mask: Any = None


class Loop(NamedTuple):
    """What one program sums over: numbers of examples, heads and blocks of rows."""

    batch: int
    heads: int
    rows: int


def _held(bias: jax.Array, rows: int) -> tuple[jax.Array, Form]:
    """The bias as its programs read it, once; the only axes that they loop over have length 1."""
    if bias.shape[2] == 1:
        pairs = pair_tiles.arranged(None, bias, rows=rows)
        assert pairs.bias_form is not None
        return pairs.bias, pairs.bias_form
    more = ((0, 0), (0, 0), (0, -bias.shape[2] % PROGRAM_ROWS), (0, -bias.shape[3] % KEYS))
    return jnp.pad(bias, more), Form.TILES


def _body(
    arrays, out, shared, barriers, reader, *, spec, form, loop, keys, group, out_heads, is_masked
) -> None:
    warpgroup = lax.axis_index(axes.WARPGROUP)
    owner = lax.axis_index(axes.OWNER)
    out_batch = lax.div(owner, jnp.int32(out_heads))
    out_head = owner - out_batch * out_heads
    own_rows, own_columns = lax.axis_index(axes.ROWS), lax.axis_index(axes.COLUMNS)
    ring = Ring(barriers, STAGES)
    total: Any = loop.batch * loop.heads * loop.rows
    if loop.rows == 1:
        # A tile that no row sees keeps its zeros.
        steps = key_steps(spec, own_rows * PROGRAM_ROWS, PROGRAM_ROWS, KEYS, keys, None)
        is_seen = (own_columns >= steps.begin) & (own_columns < steps.end)
        total = jnp.where(is_seen, jnp.int32(total), jnp.int32(0))

    def at(turn: Any) -> tuple[Any, ...]:
        """(batch, head, block of rows) of one turn of the loop."""
        found = []
        for size, own in zip(reversed(loop), (own_rows, out_head, out_batch), strict=True):
            if size == 1:
                found.append(own)
                continue
            rest = lax.div(turn, jnp.int32(size))
            found.append(turn - rest * size)
            turn = rest
        return tuple(reversed(found))

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def compute():
        if reader.is_compiled:
            plgpu.set_max_registers(232, action="increase")
        shape = (WARPGROUP_ROWS, KEYS)
        held_at = place(arrays.bias, out_batch, out_head)
        held_rows = pl.ds(own_rows * PROGRAM_ROWS + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        held_columns = pl.ds(own_columns * KEYS, KEYS)
        if form is Form.TILES:
            source = arrays.bias.at[(*held_at, held_rows, held_columns)]
            held = plgpu.load(source, layout=WGMMA, optimized=False).astype(jnp.float32)
        else:
            source = arrays.bias.at[(*held_at, held_columns)]
            held = plgpu.load(source, layout=COLUMN, optimized=False)

        def add_turn(turn, acc):
            batch, head, row_block = at(turn)
            slot = ring.slot(turn)
            row_begin = row_block * PROGRAM_ROWS + warpgroup * WARPGROUP_ROWS
            fixed = None
            if reader.pairs is not None:
                rows = pl.ds(row_begin, WARPGROUP_ROWS)
                fixed = reader.pairs.fixed(batch, head, rows)
            part = slot * COMPUTE_WARPGROUPS + warpgroup
            ring.await_full("query", turn)

            def gradient(s_acc, dp_acc):
                plgpu.wgmma(s_acc, shared["query"].at[part], shared["key"].at[slot].T)
                ring.await_full("cotangent", turn)
                plgpu.wgmma(dp_acc, shared["cotangent"].at[part], shared["value"].at[slot].T)
                lse2, delta = (
                    plgpu.load(shared[name].at[slot, warpgroup], layout=ROW)
                    for name in ("lse2", "delta")
                )
                seen = None
                if is_masked:
                    length = keys
                    if arrays.key_lengths is not None:
                        length = jnp.clip(arrays.key_lengths[batch], 0, keys)
                    seen = visible(spec, shape, row_begin, own_columns * KEYS, length, None)
                s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                shown, _ = read(reader.pairs, turn, warpgroup, fixed)
                bias = held
                if form is not Form.TILES:
                    bias = lax.broadcast_in_dim(held, shape, [1])
                p, _ = weights_of(spec, s, lse2, 0, seen, shown, bias)
                dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                return logit_gradient(p, None, dp, delta, 0)

            zeros = plgpu.ACC(shape, jnp.float32)
            ds = pl.run_scoped(gradient, zeros, zeros)
            ring.free("query", turn)
            ring.free("cotangent", turn)
            if reader.pairs is not None:
                reader.pairs.free(turn)
            return acc + ds

        start = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)
        acc = lax.fori_loop(0, total, add_turn, start)
        out[out_batch, out_head, held_rows, held_columns] = acc

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def produce():
        if reader.is_compiled:
            plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, total)
        def _(turn):
            batch, head, row_block = at(turn)
            kv_head = lax.div(head, jnp.int32(group))
            slot = ring.slot(turn)

            def load(name, source, barrier, index=slot):
                plgpu.copy_gmem_to_smem(source, shared[name].at[index], barriers[barrier].at[slot])

            def load_rows(name, array):
                for part in range(COMPUTE_WARPGROUPS):
                    begin = row_block * PROGRAM_ROWS + part * WARPGROUP_ROWS
                    source = array.at[batch, pl.ds(begin, WARPGROUP_ROWS), head]
                    load(name, source, name, slot * COMPUTE_WARPGROUPS + part)

            columns = pl.ds(own_columns * KEYS, KEYS)
            vector = (batch, head, pl.ds(row_block * COMPUTE_WARPGROUPS, COMPUTE_WARPGROUPS))
            ring.await_free("query", turn)
            load_rows("query", arrays.query)
            load("key", arrays.key.at[batch, columns, kv_head], "query")
            load("lse2", arrays.lse2.at[vector], "query")
            load("delta", arrays.delta.at[vector], "query")
            if reader.pairs is not None:
                reader.pairs.load(turn, batch, head, row_block, own_columns)
            ring.await_free("cotangent", turn)
            load_rows("cotangent", arrays.cotangent)
            load("value", arrays.value.at[batch, columns, kv_head], "cotangent")

        ring.drain(("query", "cotangent"), total)
        if reader.pairs is not None:
            reader.pairs.drain(total)


class _Reader(NamedTuple):
    """The mask's ring, and whether the kernel is compiled (else: simulated)."""

    pairs: PairReader | None
    is_compiled: bool


def bias_gradient(
    spec: AttentionSpec,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cotangent: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    bias: jax.Array,
    key_lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Gradient of plain attention with respect to `bias` (b, n, t, S), in its shape, float32.

    The other arguments are those of `attention_backward`. A bias that is the same for all keys of a
    row needs no kernel: it changes no weight.
    """
    examples, rows, heads, _ = query.shape
    keys, kv_heads = key.shape[1:3]
    out_batch, out_heads, t, _ = bias.shape
    row_blocks, column_blocks = cdiv(rows, PROGRAM_ROWS), cdiv(keys, KEYS)
    loop = Loop(
        examples if out_batch == 1 else 1,
        heads if out_heads == 1 else 1,
        row_blocks if t == 1 else 1,
    )
    grid_rows = row_blocks // loop.rows
    held, form = _held(bias, rows)
    pairs = pair_tiles.arranged(mask, None, rows=rows)
    more = ((0, 0), (0, 0), (0, -rows % PROGRAM_ROWS))
    lse2 = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2_E)
    vector = (examples, heads, -1, WARPGROUP_ROWS)
    arrays = BiasArrays(
        pad_sequence(query),
        pad_sequence(key),
        pad_sequence(value),
        pad_sequence(cotangent),
        jnp.pad(lse2, more, constant_values=jnp.inf).reshape(vector),
        jnp.pad(delta, more).reshape(vector),
        held,
        key_lengths,
        pairs.mask,
    )
    head_size, dtype = arrays.query.shape[3], query.dtype
    reach = (right_reach(spec), left_reach(spec))
    is_masked = reach != (None, None) or key_lengths is not None or keys % KEYS != 0
    of_rows = tiled_shared((STAGES * COMPUTE_WARPGROUPS, WARPGROUP_ROWS, head_size), dtype)
    of_keys = tiled_shared((STAGES, KEYS, head_size), dtype)
    per_row = plgpu.SMEM((STAGES, COMPUTE_WARPGROUPS, WARPGROUP_ROWS), jnp.float32)
    shared = {
        "query": of_rows, "cotangent": of_rows, "key": of_keys, "value": of_keys,
        "lse2": per_row, "delta": per_row,
    }  # fmt: skip
    counts = {"query": COMPUTE_WARPGROUPS + 3, "cotangent": COMPUTE_WARPGROUPS + 1}
    barriers = ring_barriers(counts, STAGES)
    pair_shared, pair_barriers = pair_tiles.scratch(pairs, STAGES, KEYS)
    present = [x is not None for x in arrays]

    def kernel(*refs):
        operands = iter(refs[: sum(present)])
        in_refs = BiasArrays(*(next(operands) if there else None for there in present))
        out, shared_refs, barrier_refs = refs[sum(present) :]
        mask_reader = None
        if pairs.is_there:
            shown = pairs._replace(mask=in_refs.mask)
            mask_reader = PairReader(shown, shared_refs, barrier_refs, STAGES, KEYS)
        reader = _Reader(mask_reader, interpret is None)
        _body(
            in_refs, out, shared_refs, barrier_refs, reader, spec=spec, form=form, loop=loop,
            keys=keys, group=heads // kv_heads, out_heads=out_heads, is_masked=is_masked,
        )  # fmt: skip

    (found,) = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct(
                (out_batch, out_heads, grid_rows * PROGRAM_ROWS, column_blocks * KEYS), jnp.float32
            ),
        ),
        scratch_types=(shared | pair_shared, barriers | pair_barriers),
        grid=(column_blocks, grid_rows, out_batch * out_heads),
        grid_names=(axes.COLUMNS, axes.ROWS, axes.OWNER),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name=axes.WARPGROUP,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="dpfa_attention_backward_bias",
        interpret=interpret,
    )(*(x for x in arrays if x is not None))
    # Of a row axis of length 1 one block is left, to which all were added.
    found = found.sum(2, keepdims=True) if t == 1 else found[:, :, :rows]
    return found[..., :keys]
