"""Memory readout, sum form: (N, Z) under a public maximum on Hopper, noised, snapped and divided.

Schedule and walk are the forward kernel's. Above head size 128 a tile owns a part of the values'
columns: each tile of a row makes the same weights and normaliser from whole queries and keys.
There is no running maximum: a step, one block of at most `SUM_BLOCK` keys, makes the weights
e = round(min(exp(s - B), 1)), their products with the values start at zero, and the finished block
is rounded once to a whole multiple of a public unit and added to a 32-bit integer. Sums, logits,
weights and half a block fit the registers: the other half of the columns is begun behind the next
logits, when the first half is summed.
Integers add exactly in any order, so replacing one key changes its own block's number and no other:
`memory_numbers` has the bound. Hidden keys have zero value rows and weight no normaliser either.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.base import AttentionSpec, MemoryReadout
from dpfa_jax.kernels.mosaic_gpu import axes, device, tiles
from dpfa_jax.kernels.mosaic_gpu import producer as loads
from dpfa_jax.kernels.mosaic_gpu.layouts import (
    LOG2_E,
    ROW,
    WGMMA,
    pad_sequence,
    visible,
)
from dpfa_jax.kernels.mosaic_gpu.memory_numbers import MAGIC, MAGIC_BITS, SUM_BLOCK, Numbers
from dpfa_jax.kernels.mosaic_gpu.memory_products import PART, begin_block, begin_row_sums, settled
from dpfa_jax.kernels.mosaic_gpu.memory_weights import clamped
from dpfa_jax.kernels.mosaic_gpu.noise import tile_normals
from dpfa_jax.kernels.mosaic_gpu.noise_stage import NoiseStage
from dpfa_jax.kernels.mosaic_gpu.producer import Producer
from dpfa_jax.kernels.mosaic_gpu.steps import cdiv
from dpfa_jax.kernels.mosaic_gpu.tiles import COMPUTE_WARPGROUPS, ForwardTiles
from dpfa_jax.kernels.mosaic_gpu.walk import Lengths, Tile, Tiling, Walk, constant


class MemoryArrays(NamedTuple):
    """Operands of the kernel; absent ones are None.

    `value`: rows clipped to `Numbers.value_clip_norm` as stored, zero where hidden. `normaliser`:
    (B, S), `Numbers.weight_scale` or zero where hidden. `noise_steps`, `grids`: (B, N) float32,
    noise standard deviation in grid steps, and grid. `shifts` (B, N) int32: `Numbers.shifts`, and
    `rest_steps` float32: 2^-shift, or 2^-23 where that is larger. The others as in `ForwardArrays`.
    """

    query: Any
    key: Any
    value: Any
    normaliser: Any
    key_words: Any
    batch_index: Any
    head_start: Any
    ones: Any
    noise_steps: Any
    grids: Any
    shifts: Any
    rest_steps: Any
    query_lengths: Any = None


class MemoryResults(NamedTuple):
    """`output` like query. `numerators` (B, T, N, H), `normalisers` (B, N, T): int32 sums in units.

    The sums are private: they are there for tests only.
    """

    output: Any
    numerators: Any = None
    normalisers: Any = None


class _Scales(NamedTuple):
    """What `MemoryArrays` has for one head."""

    noise_steps: jax.Array
    grid: jax.Array
    shift: jax.Array
    rest_steps: jax.Array


def _body(
    arrays: MemoryArrays,
    results: MemoryResults,
    shared: dict[str, Any],
    barriers: dict[str, Any],
    walk: Walk,
    stage: NoiseStage,
    *,
    spec: AttentionSpec,
    tile: ForwardTiles,
    numbers: Numbers,
    size: int,
    group: int,
    simulate: bool,
) -> None:
    warpgroup = lax.axis_index(axes.WARPGROUP)
    block_q, block_kv = tile.block_q, tile.block_kv
    dtype = arrays.query.dtype
    producer = Producer(tile, group, shared, barriers)
    slot_of = producer.slot

    def take_turns():
        plgpu.barrier_arrive(barriers["turn"])
        plgpu.barrier_wait(barriers["turn"])

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def compute():
        if not simulate:
            plgpu.set_max_registers(216, action="increase")
        q_shared = shared["query"].at[warpgroup]

        def add(sums, blocks):
            return tuple(_add_block(*pair, numbers) for pair in zip(sums, blocks, strict=True))

        def await_keys(count):
            plgpu.barrier_wait(barriers["key"].at[slot_of(count)])

        def await_query():
            plgpu.barrier_wait(barriers["query"].at[warpgroup])

        def await_values(count):
            plgpu.barrier_wait(barriers["value"].at[slot_of(count)])

        def first_logits():
            def product(acc_ref):
                plgpu.wgmma(acc_ref, q_shared, shared["key"].at[slot_of(0)].T)
                await_values(0)
                take_turns()
                return acc_ref[...]

            await_keys(0)
            s = pl.run_scoped(product, plgpu.ACC((block_q, block_kv), jnp.float32))
            plgpu.barrier_arrive(barriers["key_free"].at[slot_of(0)])
            return s

        def tile_body(here: Tile, following, has_next, s):
            batch, head = here.batch, here.head
            row_begin = here.row_begin + warpgroup * block_q
            rows = pl.ds(row_begin, block_q)
            numerator: Any = tuple(  # columns by the part
                plgpu.layout_cast(jnp.zeros((block_q, PART), jnp.int32), WGMMA)
                for _ in range(stage.columns // PART)
            )
            normaliser: Any = plgpu.layout_cast(jnp.zeros((block_q, 8), jnp.int32), WGMMA)

            def step_body(step, carry, masked: bool, is_last: bool):
                s, numerator, normaliser = carry
                count = here.before(step)
                slot, next_slot = slot_of(count), slot_of(count + 1)
                v_shared, column = shared["value"].at[slot], shared["normaliser"].at[slot]
                factor = spec.scale
                if spec.logits_soft_cap is not None:
                    s = jnp.tanh(s * (factor / spec.logits_soft_cap))
                    factor = spec.logits_soft_cap
                e = jnp.exp2(s * (factor * LOG2_E) - numbers.logit_bound * LOG2_E)
                if masked:
                    seen = visible(
                        spec, s.shape, row_begin, step * block_kv, here.key_length, None,
                        is_fresh=not simulate,
                    )  # fmt: skip
                    e = jnp.where(seen, e, 0.0)
                # Rounded once; numerator and normaliser use the same number.
                e = clamped(e, simulate=simulate).astype(dtype)
                never = settled(e, simulate=simulate)
                e, never = lax.optimization_barrier((e, never))
                take_turns()
                if is_last:
                    await_query()
                # Here, before the accumulators exist: only then are their zeros left out.
                await_keys(count + 1)

                def begin(part, over=None):
                    columns = v_shared.at[:, pl.ds(part * PART, PART)]
                    return begin_block(e, columns, over, never, simulate=simulate)

                def products(s_ref):
                    first = begin(0), begin_row_sums(e, column, never, simulate=simulate)
                    plgpu.wgmma(s_ref, q_shared, shared["key"].at[next_slot].T)
                    plgpu.wgmma_wait(1)
                    # The addition hides behind the logits.
                    first = lax.optimization_barrier(first)
                    sums = add((numerator[0], normaliser), first)
                    over = lax.bitcast_convert_type(sums[0], jnp.float32)
                    rest = tuple(begin(part, over) for part in range(1, len(numerator)))
                    if is_last:
                        plgpu.barrier_arrive(barriers["turn"])
                    else:
                        await_values(count + 1)
                        take_turns()
                    s = s_ref[...]
                    s, rest = lax.optimization_barrier((s, rest))
                    return s, (sums[0], *add(numerator[1:], rest)), sums[1]

                carry = pl.run_scoped(products, plgpu.ACC((block_q, block_kv), jnp.float32))
                plgpu.barrier_arrive(barriers["key_free"].at[next_slot])
                plgpu.barrier_arrive(barriers["value_free"].at[slot])
                return carry

            body = functools.partial(step_body, is_last=False)
            carry = walk.tiling.before_last(here, body, (s, numerator, normaliser))
            plgpu.barrier_arrive(barriers["query_free"].at[warpgroup])
            # Read early: nothing waits for them at the end. Behind the arrival, which would wait.
            scales = _Scales(
                *(
                    x[batch, head]
                    for x in (arrays.noise_steps, arrays.grids, arrays.shifts, arrays.rest_steps)
                )
            )
            s, numerator, normaliser = step_body(
                here.last, carry, masked=not walk.tiling.is_whole, is_last=True
            )
            numerator = jnp.concatenate(numerator, axis=1)
            lane = plgpu.broadcasted_iota(jnp.int32, normaliser.shape, 1, layout=WGMMA)
            normaliser = jnp.where(lane == 0, normaliser, 0).sum(axis=1)

            if arrays.query_lengths is not None:
                query_length = arrays.query_lengths[batch]
                shape = (block_q, stage.columns)
                row = row_begin + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA)
                numerator = jnp.where(row < query_length, numerator, 0)
                row = row_begin + plgpu.broadcasted_iota(jnp.int32, (block_q,), 0, layout=ROW)
                normaliser = jnp.where(row < query_length, normaliser, 0)
            if results.numerators is not None:
                columns = here.value_columns(stage.columns)
                results.numerators.at[batch, rows, head, columns][...] = numerator
                results.normalisers.at[batch, head, rows][...] = normaliser
            plgpu.barrier_wait(barriers["noise"].at[warpgroup])
            total_noise = plgpu.load(shared["normaliser_noise"].at[warpgroup], layout=ROW)
            total = _multiples(normaliser, total_noise, scales, numbers) * scales.grid
            divisor = jnp.maximum(total * (1.0 / numbers.weight_scale), numbers.floor)
            answer = _multiples(numerator, stage.noise(shared, warpgroup), scales, numbers)
            # The grid is a power of two.
            answer *= lax.broadcast_in_dim((1.0 / divisor) * scales.grid, answer.shape, [0])
            # The warpgroup of the noise stores it.
            stage.output(shared, warpgroup)[...] = answer.astype(dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(barriers["noise_used"].at[warpgroup])
            await_values(here.after)
            plgpu.barrier_wait(barriers["turn"])
            return s

        await_query()
        pl.when(warpgroup == 1)(take_turns)
        walk.each(tile_body, first_logits())
        pl.when(warpgroup == 0)(take_turns)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def produce():
        if not simulate:
            plgpu.set_max_registers(24, action="decrease")

        def load_values(here: Tile, step, count):
            columns = here.value_columns(stage.columns)
            slot = producer.load("value", arrays.value, here, step, count, columns)
            some = arrays.normaliser.at[here.batch, producer.keys(step)]
            plgpu.copy_gmem_to_smem(some, shared["normaliser"].at[slot], barriers["value"].at[slot])

        producer.run(walk, arrays, load_values, crosses=True, values_cross=True)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS + 1)
    def make_noise():
        if not simulate:
            plgpu.set_max_registers(56, action="decrease")

        def beside(stream, row_begin, part):
            # The normaliser's noise has the counter of column `size`.
            drawn = tile_normals(
                stream, row_begin, jnp.int32(size - size % 2), (block_q, 8), simulate=simulate
            )
            lane = plgpu.broadcasted_iota(jnp.int32, drawn.shape, 1, layout=WGMMA)
            chosen = jnp.where(lane == size % 2, drawn, 0.0).sum(axis=1)
            shared["normaliser_noise"].at[part][...] = chosen

        stage.run(walk, arrays, results.output, shared, barriers, simulate=simulate, beside=beside)


def _add_block(sums: jax.Array, block: jax.Array, numbers: Numbers) -> jax.Array:
    """`sums` plus `block` in units, rounded to nearest: the sum's last bit is worth one unit."""
    bits = lax.bitcast_convert_type(block * (1.0 / numbers.unit) + MAGIC, jnp.int32)
    return sums + (bits - MAGIC_BITS)


def _multiples(sums: jax.Array, noise: jax.Array, scales: _Scales, numbers: Numbers) -> jax.Array:
    """sums * unit + noise, rounded to the nearest multiple of the grid, in grid steps in float32.

    The whole steps of the sum stay integers; only what is left of one meets the noise as float32.
    """
    shift = scales.shift
    if numbers.drops_bits:
        dropped = jnp.maximum(shift - 23, 0)
        sums, shift = sums >> dropped, shift - dropped
    rest = sums & ((jnp.int32(1) << shift) - 1)
    # 2^23 + rest as a float32: its bits are those of 2^23, and `rest`.
    rest = lax.bitcast_convert_type(rest | jnp.int32(0x4B000000), jnp.float32)
    # Exact: `rest_steps` is a power of two.
    rest = rest * scales.rest_steps - 2.0**23 * scales.rest_steps
    near = noise * scales.noise_steps + rest
    bits = lax.bitcast_convert_type(near + MAGIC, jnp.int32)
    whole = sums >> shift
    if numbers.fits_float32:
        return lax.bitcast_convert_type(bits + whole, jnp.float32) - MAGIC
    return (bits - MAGIC_BITS + whole).astype(jnp.float32)


def memory_forward(
    spec: AttentionSpec,
    arrays: MemoryArrays,
    numbers: Numbers,
    *,
    keep_sums: bool = False,
    interpret: Any = None,
) -> MemoryResults:
    """Runs the kernel.

    Args:
      spec: `readout` is a `MemoryReadout` of the sum form.
      arrays: query (B, T, N, H), key and value (B, S, K, H), bfloat16 or float16.
      numbers: what `memory_numbers` derives of the readout.
      keep_sums: also return the un-noised sums; private, for tests.
      interpret: parameters of the Mosaic GPU simulator, None on a GPU.
    """
    assert isinstance(spec.readout, MemoryReadout)
    shape = arrays.query.shape
    arrays = arrays._replace(
        query=pad_sequence(arrays.query),
        key=pad_sequence(arrays.key),
        value=pad_sequence(arrays.value),
        normaliser=jnp.pad(arrays.normaliser, ((0, 0), (0, -arrays.normaliser.shape[1] % 8))),
    )
    batch, num_queries, heads, head_size = arrays.query.shape
    dtype = arrays.query.dtype
    kv_heads = arrays.key.shape[2]
    tile = tiles.memory_tiles(head_size)
    assert tile.block_kv <= SUM_BLOCK
    # Keys past the end are zero rows, and every key is visited, hidden or not: which keys are
    # hidden is private, the order of the sums is not.
    keys = cdiv(arrays.key.shape[1], tile.block_kv) * tile.block_kv
    columns = tiles.value_columns(head_size)
    parts = cdiv(head_size, columns)
    tiling = Tiling(
        spec, tile, batch, heads, num_queries, keys,
        head_bytes=4 * keys * head_size * kv_heads // heads, heads_first=False, has_lengths=False,
        parts=parts,
    )  # fmt: skip
    schedule = tiling.schedule(device.processors())
    struct = jax.ShapeDtypeStruct
    out_type = [struct(arrays.query.shape, dtype)]
    if keep_sums:
        padded = tiling.blocks * tile.rows
        out_type.append(struct((batch, padded, heads, parts * columns), jnp.int32))
        out_type.append(struct((batch, heads, padded), jnp.int32))
    stage = NoiseStage(tile, columns)
    noise_then_output, noise_barriers = stage.scratch(dtype)
    # A step's values come with its part of `normaliser`.
    shared, barriers = loads.scratch(tile, head_size, dtype, columns=columns, value_copies=2)
    shared |= {
        "normaliser": plgpu.SMEM((tile.stages, tile.block_kv), dtype),
        "noise_then_output": noise_then_output,
        "normaliser_noise": plgpu.SMEM((COMPUTE_WARPGROUPS, tile.block_q), jnp.float32),
    }
    barriers |= noise_barriers
    present = [x is not None for x in arrays]

    def kernel(schedule_ref, *refs):
        operands = iter(refs[: sum(present)])
        refs = refs[sum(present) :]
        shared_refs, barrier_refs = refs[len(out_type) :]
        shared_refs |= stage.split(shared_refs.pop("noise_then_output"))
        _body(
            MemoryArrays(*(next(operands) if there else None for there in present)),
            MemoryResults(*refs[: len(out_type)]),
            shared_refs,
            barrier_refs,
            Walk(tiling, Lengths(), schedule_ref),
            stage,
            spec=spec,
            tile=tile,
            numbers=numbers,
            size=shape[3],
            group=heads // kv_heads,
            simulate=interpret is not None,
        )

    output, *sums = plgpu.kernel(
        kernel,
        out_type=tuple(out_type),
        scratch_types=(shared, barriers),
        grid=(len(schedule),),
        grid_names=(axes.PROGRAM,),
        num_threads=COMPUTE_WARPGROUPS + 2,
        thread_name=axes.WARPGROUP,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="dpfa_memory_forward",
        interpret=interpret,
    )(constant(schedule), *(x for x in arrays if x is not None))
    cut = tuple(slice(size) for size in shape)
    if not keep_sums:
        return MemoryResults(output[cut])
    return MemoryResults(output[cut], sums[0][cut], sums[1][..., : shape[1]])
