"""The backward pass, and its two kernels up to head size 128: each run gives the same bits.

One makes dK and dV (`backward_keys.py`), the other dQ.

Weights are recomputed from the log-sum-exp (Dao et al., 2022). A tile owns rows of some operands in
shared memory and steps along the rows of the others; each program walks over some of the tiles
(`walk.py`). Two compute warpgroups; of a third one, one warp streams what tiles step along, and two
load what they own and store what comes of it (`backward_walk.py`).
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels import manual_axes
from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.mosaic_gpu import axes, device
from dpfa_jax.kernels.mosaic_gpu import pairs as pair_tiles
from dpfa_jax.kernels.mosaic_gpu.backward_fused import fused_backward
from dpfa_jax.kernels.mosaic_gpu.backward_keys import key_tiling, keys_and_values
from dpfa_jax.kernels.mosaic_gpu.backward_launch import walked
from dpfa_jax.kernels.mosaic_gpu.backward_steps import (
    BackwardArrays,
    Ring,
    multiply,
    read,
    ring_barriers,
    weights_of,
)
from dpfa_jax.kernels.mosaic_gpu.backward_walk import (
    Owned,
    own_steps,
    run_own_steps,
    serve,
)
from dpfa_jax.kernels.mosaic_gpu.backward_wide import wide_backward
from dpfa_jax.kernels.mosaic_gpu.layouts import (
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
from dpfa_jax.kernels.mosaic_gpu.walk import (
    Lengths,
    Size,
    Tile,
    Tiling,
    Walk,
    constant,
)

ROW_MULTIPLE = 128  # rows of lse and delta are padded to whole tiles of every kernel


def _query_body(
    arrays, dq_out, shared, barriers, pairs, *, spec, tile, tiling, loops, slots, group, simulate
) -> None:
    warpgroup = lax.axis_index(axes.WARPGROUP)
    block_q, block_kv = tile.block_q_dq, tile.block_kv_dq
    head_size, dtype = arrays.query.shape[3], arrays.query.dtype
    walk = Walk(tiling, Lengths(key=arrays.key_lengths), arrays.schedule)
    ring, owned = Ring(barriers, tile.stages), Owned(shared, barriers, slots)

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def compute():
        if not simulate:
            plgpu.set_max_registers(240, action="increase")
        spare = shared["spare"].at[warpgroup] if simulate else None

        def tile_body(here: Tile, following, has_next, index):
            row_begin = here.row_begin + warpgroup * block_q
            own = own_steps(tiling, here.steps, row_begin, here.key_length)
            place = owned.place(index, warpgroup)
            q_shared, do_shared = shared["query"].at[place], shared["cotangent"].at[place]
            fixed = None
            if pairs is not None:
                fixed = pairs.fixed(here.batch, here.head, pl.ds(row_begin, block_q))
            owned.await_loaded(place)
            lse2 = plgpu.load(shared["lse2"].at[place], layout=ROW)
            minus_delta = plgpu.load(shared["delta"].at[place], layout=ROW)

            def accumulate(dq_acc):
                def body(step, masked):
                    done = here.before(step)
                    slot = ring.slot(done)
                    k_shared, v_shared = shared["key"].at[slot], shared["value"].at[slot]
                    shape = (block_q, block_kv)
                    ring.await_full("key", done)

                    def gradient(s_acc, dp_acc):
                        start = lax.broadcast_in_dim(minus_delta, shape, [0])
                        if not simulate:  # the sums begin there
                            dp_acc[...] = start
                        plgpu.wgmma(s_acc, q_shared, k_shared.T)
                        ring.await_full("value", done)
                        plgpu.wgmma(dp_acc, do_shared, v_shared.T)
                        seen = None
                        if masked:
                            seen = visible(
                                spec, shape, row_begin, step * block_kv, here.key_length, None
                            )
                        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                        shown, bias = read(pairs, done, warpgroup, fixed)
                        p, slope = weights_of(spec, s, lse2, 0, seen, shown, bias)
                        if pairs is not None:
                            pairs.free(done)
                        dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                        ring.free("value", done)
                        if simulate:  # where no accumulator can be set
                            dp += start
                        return p * dp if slope is None else p * dp * slope

                    acc = plgpu.ACC(shape, jnp.float32)
                    ds = pl.run_scoped(gradient, acc, acc)
                    multiply(dq_acc, ds.astype(dtype), k_shared, spare)
                    plgpu.wgmma_wait(0)
                    ring.free("key", done)

                def skip(step):
                    done = here.before(step)
                    ring.skip(("key", "value"), done)
                    if pairs is not None:
                        pairs.skip(done)

                run_own_steps(loops, here.steps, own, body, skip)
                return dq_acc[...]

            dq = pl.run_scoped(accumulate, plgpu.ACC((block_q, head_size), jnp.float32))
            q_shared[...] = (dq * spec.scale).astype(dtype)
            owned.hand_over(place)
            return index + 1

        walk.each(tile_body, jnp.int32(0))

    def load():
        def tile_body(here: Tile, following, has_next, carry):
            kv_head = lax.div(here.head, jnp.int32(group))

            @pl.loop(here.steps.begin, here.steps.end)
            def _(step):
                done = here.before(step)
                slot = ring.slot(done)
                source = (here.batch, pl.ds(step * block_kv, block_kv), kv_head)
                for name, array in (("key", arrays.key), ("value", arrays.value)):
                    ring.await_free(name, done)
                    plgpu.copy_gmem_to_smem(
                        array.at[source], shared[name].at[slot], barriers[name].at[slot]
                    )
                if pairs is not None:
                    pairs.load(done, here.batch, here.head, here.block, step)

            return carry

        total, _ = walk.each(tile_body, ())
        ring.drain(("key", "value"), total)
        if pairs is not None:
            pairs.drain(total)

    def operands(here: Tile, part):
        rows = pl.ds(here.row_begin + part * block_q, block_q)
        by_row = {"query": arrays.query, "cotangent": arrays.cotangent}
        by_head = {"lse2": arrays.lse2, "delta": arrays.delta}
        return {name: x.at[here.batch, rows, here.head] for name, x in by_row.items()} | {
            name: x.at[here.batch, here.head, rows] for name, x in by_head.items()
        }

    def results(here: Tile, part):
        rows = pl.ds(here.row_begin + part * block_q, block_q)
        return {"query": dq_out.at[here.batch, rows, here.head]}

    serve(warpgroup, load, lambda part: owned.serve(walk, part, operands, results), simulate)


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
    group = heads // kv_heads
    arrays = arrays._replace(delta=-arrays.delta)
    like_query = jax.ShapeDtypeStruct(arrays.query.shape, dtype)

    def by_tile(slots: int, block: int) -> Any:
        return tiled_shared((slots * COMPUTE_WARPGROUPS, block, head_size), dtype)

    def streamed(block: int) -> Any:
        return tiled_shared((tile.stages, block, head_size), dtype)

    def by_row(slots: int, block: int) -> Any:
        return plgpu.SMEM((slots, block), jnp.float32)

    def run(tiling, pairs, kernel):
        """What `kernel(tiling, operands, pairs)` makes."""
        tiling = dataclasses.replace(tiling, heads_first=pair_tiles.is_shared_by_batch(pairs))
        schedule = tiling.schedule(device.processors())
        given = arrays._replace(mask=pairs.mask, bias=pairs.bias)._asdict()
        names = [name for name, x in given.items() if x is not None]

        def call(*operands):
            taken = BackwardArrays(**dict(zip(names, operands, strict=True)))
            own = pairs._replace(mask=taken.mask, bias=taken.bias)
            return kernel(tiling, taken._replace(schedule=constant(schedule)), own)

        return manual_axes.unaware(call)(*(given[name] for name in names))

    dk, dv = run(
        key_tiling(spec, arrays, tile, keys),
        pair_tiles.arranged(mask, bias, rows=keys, is_turned=True),
        lambda tiling, arrays, pairs: keys_and_values(
            spec, arrays, pairs, tile, tiling, interpret=interpret
        ),
    )
    block, step = tile.block_q_dq, tile.block_kv_dq
    (dq,) = run(
        Tiling(
            spec, Size(COMPUTE_WARPGROUPS * block, step), batch, heads, num_queries, keys,
            head_bytes=4 * keys * head_size // group, heads_first=False,
            has_lengths=arrays.key_lengths is not None,
        ),
        pair_tiles.arranged(mask, bias, rows=rows),
        lambda tiling, arrays, pairs: walked(
            _query_body, spec, arrays, pairs, tile, tiling,
            lambda slots: {
                "query": by_tile(slots, block),
                "cotangent": by_tile(slots, block),
                "lse2": by_row(slots * COMPUTE_WARPGROUPS, block),
                "delta": by_row(slots * COMPUTE_WARPGROUPS, block),
            },
            {"key": streamed(step), "value": streamed(step)},
            ring_barriers({"key": 1, "value": 1}, tile.stages),
            (like_query,),
            "dpfa_attention_backward_q",
            interpret,
            group=group,
        ),
    )  # fmt: skip
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
