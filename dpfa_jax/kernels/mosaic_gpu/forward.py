"""Forward kernel: FA3's schedule (Shah et al., 2024) in Pallas Mosaic GPU.

A tile is `2 * block_q` query rows of one head; each program walks over some of them (`walk.py`). A
producer warpgroup streams key and value tiles by TMA; two compute warpgroups take turns on the
tensor cores (one multiplies while the other does its softmax); under `ExampleReadout` the epilogue
clips each row, adds the noise that a fourth warpgroup made, and snaps, or a pass over the plain
answer does all that (`release_pass.py`).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.base import AttentionSpec, ExampleReadout, Plain
from dpfa_jax.kernels.mosaic_gpu import axes, device
from dpfa_jax.kernels.mosaic_gpu import pairs as pair_tiles
from dpfa_jax.kernels.mosaic_gpu import producer as loads
from dpfa_jax.kernels.mosaic_gpu.layouts import (
    LOG2_E,
    WGMMA,
    pad_sequence,
    tiled_shared,
    visible,
)
from dpfa_jax.kernels.mosaic_gpu.noise import clip_rows, snap_noised
from dpfa_jax.kernels.mosaic_gpu.noise_stage import NoiseStage
from dpfa_jax.kernels.mosaic_gpu.pairs import Fixed, PairReader
from dpfa_jax.kernels.mosaic_gpu.producer import Producer
from dpfa_jax.kernels.mosaic_gpu.release_pass import NoiseArrays
from dpfa_jax.kernels.mosaic_gpu.release_pass import released as release_rows
from dpfa_jax.kernels.mosaic_gpu.softmax import KeptMaximum, PublicMaximum, RunningMaximum, Softmax
from dpfa_jax.kernels.mosaic_gpu.tiles import COMPUTE_WARPGROUPS, ForwardTiles
from dpfa_jax.kernels.mosaic_gpu.walk import Lengths, Tile, Tiling, Walk, constant
from dpfa_jax.kernels.public_maximum import SHIFT

KEPT_COLUMNS = 128  # of a step whose logits are kept until its weights are found to be right
KEPT_STEPS = 8  # of a tile, from which on steps without a maximum pay for a first one made twice


class ForwardArrays(NamedTuple):
    """Operands of the kernel; absent ones are None.

    `stddevs`, `grids`: (B, N) float32. `key_words`: (B, 2), `batch_index`, `head_start`, `ones`
    (all 1, see `noise.stream_of`): (B,) uint32. Every operand has the batch axis, so that a
    vmapped axis can be folded into it; that of `mask` (bool) and `bias`, (b, n, t, s), may be 1.
    """

    query: Any
    key: Any
    value: Any
    query_lengths: Any = None
    key_lengths: Any = None
    key_words: Any = None
    batch_index: Any = None
    head_start: Any = None
    stddevs: Any = None
    grids: Any = None
    ones: Any = None
    mask: Any = None
    bias: Any = None


class ForwardResults(NamedTuple):
    """`output` and `unclipped` like query; `lse` (B, N, T) float32."""

    output: Any
    unclipped: Any
    lse: Any


def _capped(spec: AttentionSpec, s: jax.Array) -> tuple[jax.Array, float]:
    """Products q.k, capped, and the factor that makes logits of them."""
    cap = spec.logits_soft_cap
    return (s, spec.scale) if cap is None else (jnp.tanh(s * (spec.scale / cap)), cap)


def _softmax(tiling: Tiling, dtype: Any, has_public_maximum: bool, *, simulate: bool) -> Softmax:
    if has_public_maximum:
        return PublicMaximum(SHIFT[dtype.name])
    # Beside the weights of wider steps their logits find no registers.
    is_narrow = tiling.tile.block_kv <= KEPT_COLUMNS
    counts = tiling.step_counts
    is_long = sum(counts) >= KEPT_STEPS * len(counts)
    return KeptMaximum(simulate) if is_narrow and is_long else RunningMaximum()


def _body(
    arrays: ForwardArrays,
    results: ForwardResults,
    shared: dict[str, Any],
    barriers: dict[str, Any],
    pairs: PairReader | None,
    walk: Walk,
    *,
    spec: AttentionSpec,
    tile: ForwardTiles,
    softmax: Softmax,
    group: int,
    simulate: bool,
) -> None:
    warpgroup = lax.axis_index(axes.WARPGROUP)
    block_q, block_kv = tile.block_q, tile.block_kv
    head_size = arrays.query.shape[-1]
    dtype = arrays.query.dtype
    readout = spec.readout
    # The next tile's first logits are begun beside a tile's last weighted values.
    crosses = tile.overlaps and tile.ahead
    producer = Producer(tile, group, shared, barriers)
    slot_of = producer.slot

    def take_turns():
        plgpu.barrier_arrive(barriers["turn"])
        plgpu.barrier_wait(barriers["turn"])

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def compute():
        if not simulate:
            plgpu.set_max_registers(216 if tile.noise_warpgroup else 232, action="increase")
        q_shared = shared["query"].at[warpgroup]
        await_query = functools.partial(plgpu.barrier_wait, barriers["query"].at[warpgroup])

        def await_keys(count):
            # Before the accumulator exists: only then are its zeros left out.
            plgpu.barrier_wait(barriers["key"].at[slot_of(count)])

        def query_times_keys(count, acc_ref):
            plgpu.wgmma(acc_ref, q_shared, shared["key"].at[slot_of(count)].T)

        def logits_of(count, _):
            def product(acc_ref):
                query_times_keys(count, acc_ref)
                take_turns()
                return acc_ref[...]

            await_keys(count)
            s = pl.run_scoped(product, plgpu.ACC((block_q, block_kv), jnp.float32))
            plgpu.barrier_arrive(barriers["key_free"].at[slot_of(count)])
            return s

        def tile_body(here: Tile, following, has_next, s):
            batch, head = here.batch, here.head
            row_begin = here.row_begin + warpgroup * block_q
            rows = pl.ds(row_begin, block_q)
            sums = softmax.start(block_q)
            acc = plgpu.layout_cast(jnp.zeros((block_q, head_size), jnp.float32), WGMMA)
            fixed = Fixed() if pairs is None else pairs.fixed(batch, head, rows)
            noise_scale: Any = None
            if isinstance(readout, ExampleReadout):  # read early: nothing waits for it at the end
                noise_scale = arrays.stddevs[batch, head], arrays.grids[batch, head]
            if not crosses:
                await_query()

            def step_body(step, carry, masked: bool, is_last: bool):
                s, acc, sums = carry
                count = here.before(step)
                if not tile.ahead:
                    s = logits_of(count, None)
                if is_last and tile.overlaps:
                    plgpu.barrier_arrive(barriers["query_free"].at[warpgroup])
                slot = slot_of(count)
                v_shared = shared["value"].at[slot]
                s, factor = _capped(spec, s)
                if pairs is not None:
                    shown, bias = pairs.read(count, warpgroup, fixed)
                    if bias is not None:
                        s, factor = s * factor + bias, 1.0
                    if shown is not None:
                        s = jnp.where(shown, s, -jnp.inf)
                    pairs.free(count)
                if masked:
                    seen = visible(
                        spec, (block_q, block_kv), row_begin, step * block_kv,
                        here.key_length, here.query_length,
                    )  # fmt: skip
                    s = jnp.where(seen, s, -jnp.inf)
                p_stored, acc, sums = softmax.step(s, factor * LOG2_E, acc, sums, dtype)
                acc, sums, p_stored = lax.optimization_barrier((acc, sums, p_stored))
                plgpu.barrier_arrive(barriers["turn"])
                plgpu.barrier_wait(barriers["value"].at[slot])
                plgpu.barrier_wait(barriers["turn"])

                is_alone = not tile.ahead or (is_last and not crosses)
                if is_last and crosses:
                    await_query()
                if simulate:  # the simulator has no wgmma with an operand in registers
                    acc += jnp.dot(
                        p_stored.astype(jnp.float32),
                        v_shared[...].astype(jnp.float32),
                        preferred_element_type=jnp.float32,
                    )
                    if not is_alone:
                        s = logits_of(count + 1, None)
                    elif is_last:
                        plgpu.barrier_arrive(barriers["turn"])
                elif is_alone:

                    def weighted_values_alone(acc_ref):
                        plgpu.wgmma(acc_ref, p_stored, v_shared)
                        if is_last:
                            plgpu.barrier_arrive(barriers["turn"])

                    acc = pl.run_state(weighted_values_alone)(plgpu.ACC.init(acc))
                else:  # begun together: no wait between, and the rescaling hides behind the first
                    await_keys(count + 1)

                    def both(s_ref):
                        query_times_keys(count + 1, s_ref)

                        def weighted_values(acc_ref):
                            plgpu.wgmma(acc_ref, p_stored, v_shared)
                            plgpu.barrier_arrive(barriers["turn"])
                            if not is_last:
                                plgpu.barrier_wait(barriers["turn"])

                        acc_done = pl.run_state(weighted_values)(plgpu.ACC.init(acc))
                        return s_ref[...], acc_done

                    s, acc = pl.run_scoped(both, plgpu.ACC((block_q, block_kv), jnp.float32))
                    plgpu.barrier_arrive(barriers["key_free"].at[slot_of(count + 1)])
                plgpu.barrier_arrive(barriers["value_free"].at[slot])
                return s, acc, sums

            if tile.ahead and not crosses:
                s = logits_of(here.count, None)
            body = functools.partial(step_body, is_last=False)
            carry = walk.tiling.before_last(here, body, (s, acc, sums))
            is_masked = not walk.tiling.is_whole
            s, acc, sums = step_body(here.last, carry, masked=is_masked, is_last=True)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the answer before has long left

            largest, total = softmax.finish(sums)
            unseen = total == 0.0
            inverse = jnp.where(unseen, 0.0, 1.0 / jnp.where(unseen, 1.0, total))
            acc *= lax.broadcast_in_dim(inverse, acc.shape, [0])
            lse = (largest + jnp.log2(jnp.where(unseen, 1.0, total))) * (1.0 / LOG2_E)
            lse_shared = shared["lse"].at[warpgroup]
            lse_shared[...] = jnp.where(unseen, -jnp.inf, lse)
            out_shared = _output_of(shared, tile, warpgroup)
            if results.unclipped is not None:
                out_shared[...] = acc.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_shared, results.unclipped.at[batch, rows, head])
            if isinstance(readout, ExampleReadout):
                acc = clip_rows(acc, readout.l2_clip_norm)
                plgpu.barrier_wait(barriers["noise"].at[warpgroup])
                noise = NoiseStage(tile, head_size).noise(shared, warpgroup)
                acc = snap_noised(readout, acc, noise, noise_scale, simulate=simulate)
                if results.unclipped is not None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_shared[...] = acc.astype(dtype)
            plgpu.commit_smem()
            if tile.noise_warpgroup:
                plgpu.barrier_arrive(barriers["noise_used"].at[warpgroup])
            if not (tile.noise_warpgroup and tile.overlaps):  # else that warpgroup stores it
                plgpu.copy_smem_to_gmem(out_shared, results.output.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(lse_shared, results.lse.at[batch, head, rows])
            if not tile.overlaps:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(barriers["query_free"].at[warpgroup])
            if not (crosses and simulate):
                plgpu.barrier_wait(barriers["turn"])
            return s

        s = plgpu.layout_cast(jnp.zeros((block_q, block_kv), jnp.float32), WGMMA)
        if crosses:
            await_query()
        pl.when(warpgroup == 1)(take_turns)
        if crosses:
            s = logits_of(jnp.int32(0), None)
        walk.each(tile_body, s)
        pl.when(warpgroup == 0)(take_turns)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the writes end with the kernel

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def produce():
        if not simulate:
            plgpu.set_max_registers(24 if tile.noise_warpgroup else 40, action="decrease")

        def load_values(here: Tile, step, count):
            producer.load("value", arrays.value, here, step, count)

        producer.run(walk, arrays, load_values, pairs=pairs, crosses=crosses)

    if tile.noise_warpgroup:

        @pl.when(warpgroup == COMPUTE_WARPGROUPS + 1)
        def make_noise():
            if not simulate:
                plgpu.set_max_registers(56, action="decrease")

            NoiseStage(tile, head_size).run(
                walk, arrays, results.output, shared, barriers, simulate=simulate
            )


def _output_of(shared: dict[str, Any], tile: ForwardTiles, warpgroup: Any) -> Any:
    """Where a warpgroup's answer waits to be stored."""
    if not tile.overlaps:
        return shared["query"].at[warpgroup]  # its query is spent
    if tile.noise_warpgroup:
        return NoiseStage(tile, shared["query"].shape[-1]).output(shared, warpgroup)
    return shared["output"].at[warpgroup]


def attention_forward(
    spec: AttentionSpec,
    arrays: ForwardArrays,
    tile: ForwardTiles,
    *,
    has_public_maximum: bool = False,
    keep_unclipped: bool = True,
    interpret: Any = None,
) -> ForwardResults:
    """Runs the kernel.

    Args:
      spec: `readout` is `Plain` or `ExampleReadout` with `clip="row"`; `scale` > 0.
      arrays: query (B, T, N, H), key and value (B, S, K, H), bfloat16 or float16; the noise
        operands where the readout asks for noise.
      tile: tile sizes that fit shared memory for H rounded up to a multiple of 64.
      has_public_maximum: whether weights fit without a running one, by `kernels.public_maximum`.
      keep_unclipped: whether a backward pass will want `unclipped`.
      interpret: parameters of the Mosaic GPU simulator, None on a GPU.

    Returns:
      ForwardResults; `unclipped` is None under `Plain`.
    """
    shape = arrays.query.shape
    options: dict[str, Any] = {"has_public_maximum": has_public_maximum, "interpret": interpret}
    if isinstance(spec.readout, ExampleReadout) and not tile.noise_warpgroup:
        noise = NoiseArrays(*(getattr(arrays, name) for name in NoiseArrays._fields))
        plain = dataclasses.replace(spec, readout=Plain())
        bare = arrays._replace(**dict.fromkeys(NoiseArrays._fields))
        found = _attend(plain, bare, tile, keep_unclipped=False, **options)
        released = release_rows(spec.readout, found.output, noise, interpret=interpret)
        found = ForwardResults(released, found.output if keep_unclipped else None, found.lse)
    else:
        found = _attend(spec, arrays, tile, keep_unclipped=keep_unclipped, **options)
    cut = tuple(slice(size) for size in shape)
    unclipped = None if found.unclipped is None else found.unclipped[cut]
    return ForwardResults(found.output[cut], unclipped, found.lse[..., : shape[1]])


def _attend(
    spec: AttentionSpec,
    arrays: ForwardArrays,
    tile: ForwardTiles,
    *,
    has_public_maximum: bool,
    keep_unclipped: bool,
    interpret: Any,
) -> ForwardResults:
    """One kernel's results as it writes them: T and H as `pad_sequence` leaves them."""
    rows = arrays.query.shape[1]
    keys, kv_heads = arrays.key.shape[1:3]
    pairs = pair_tiles.arranged(arrays.mask, arrays.bias, rows=rows)
    arrays = arrays._replace(
        query=pad_sequence(arrays.query),
        key=pad_sequence(arrays.key),
        value=pad_sequence(arrays.value),
        mask=pairs.mask,
        bias=pairs.bias,
    )
    batch, num_queries, heads, head_size = arrays.query.shape
    dtype = arrays.query.dtype
    keep_unclipped &= isinstance(spec.readout, ExampleReadout)
    if keep_unclipped:
        tile = dataclasses.replace(tile, overlaps=False)
    tiling = Tiling(
        spec, tile, batch, heads, num_queries, keys,
        head_bytes=4 * keys * head_size * kv_heads // heads,
        heads_first=pair_tiles.is_shared_by_batch(pairs),
        has_lengths=arrays.query_lengths is not None or arrays.key_lengths is not None,
    )  # fmt: skip
    schedule = tiling.schedule(device.processors())
    like_query = jax.ShapeDtypeStruct(arrays.query.shape, dtype)
    out_type = (
        like_query,
        jax.ShapeDtypeStruct((batch, heads, tiling.blocks * tile.rows), jnp.float32),
        *((like_query,) if keep_unclipped else ()),
    )
    shared, barriers = loads.scratch(tile, head_size, dtype)
    shared["lse"] = plgpu.SMEM((COMPUTE_WARPGROUPS, tile.block_q), jnp.float32)
    stage = NoiseStage(tile, head_size)
    if tile.noise_warpgroup:
        shared["noise_then_output"], noise_barriers = stage.scratch(dtype)
        barriers |= noise_barriers
    elif tile.overlaps:
        shared["output"] = tiled_shared((COMPUTE_WARPGROUPS, tile.block_q, head_size), dtype)
    pair_shared, pair_barriers = pair_tiles.scratch(pairs, tile.pair_stages, tile.block_kv)
    shared |= pair_shared
    barriers |= pair_barriers
    present = [x is not None for x in arrays]

    def kernel(schedule_ref, *refs):
        operands = iter(refs[: sum(present)])
        refs = refs[sum(present) :]
        in_refs = ForwardArrays(*(next(operands) if there else None for there in present))
        output, lse, *unclipped = refs[: len(out_type)]
        shared_refs, barrier_refs = refs[len(out_type) :]
        if tile.noise_warpgroup:
            shared_refs |= stage.split(shared_refs.pop("noise_then_output"))
        reader = None
        if pairs.is_there:
            shown = pairs._replace(mask=in_refs.mask, bias=in_refs.bias)
            stages, step = tile.pair_stages, tile.block_kv
            reader = PairReader(shown, shared_refs, barrier_refs, stages, step)
        _body(
            in_refs,
            ForwardResults(output, unclipped[0] if unclipped else None, lse),
            shared_refs,
            barrier_refs,
            reader,
            Walk(tiling, Lengths(in_refs.query_lengths, in_refs.key_lengths), schedule_ref),
            spec=spec,
            tile=tile,
            softmax=_softmax(tiling, dtype, has_public_maximum, simulate=interpret is not None),
            group=heads // kv_heads,
            simulate=interpret is not None,
        )

    output, lse, *unclipped = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=(shared, barriers),
        grid=(len(schedule),),
        grid_names=(axes.PROGRAM,),
        num_threads=COMPUTE_WARPGROUPS + 1 + tile.noise_warpgroup,
        thread_name=axes.WARPGROUP,
        # Reductions along a row stay inside a quad of lanes: they need no shared memory.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="dpfa_attention_forward",
        interpret=interpret,
    )(constant(schedule), *(x for x in arrays if x is not None))
    return ForwardResults(output, unclipped[0] if unclipped else None, lse)
