"""The kernel of dK and dV up to head size 128.

A tile owns 128 keys and values and steps along queries and cotangents. Two compute warpgroups; of a
third one, one warp streams what tiles step along, and two load what they own and store what comes
of it (`backward_walk.py`).
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.mosaic_gpu import axes
from dpfa_jax.kernels.mosaic_gpu.backward_launch import walked
from dpfa_jax.kernels.mosaic_gpu.backward_steps import (
    BackwardArrays,
    Ring,
    add_key_gradients,
    load_queries,
    ring_barriers,
)
from dpfa_jax.kernels.mosaic_gpu.backward_walk import Owned, own_steps, run_own_steps, serve
from dpfa_jax.kernels.mosaic_gpu.layouts import tiled_shared
from dpfa_jax.kernels.mosaic_gpu.pairs import PairArrays
from dpfa_jax.kernels.mosaic_gpu.tiles import COMPUTE_WARPGROUPS, BackwardTiles
from dpfa_jax.kernels.mosaic_gpu.walk import KeyTiling, Lengths, Size, Tile, Walk


def _body(
    arrays, dk_out, dv_out, shared, barriers, pairs, *, spec, tile, tiling, loops, slots, simulate
) -> None:
    warpgroup = lax.axis_index(axes.WARPGROUP)
    block_q, block_kv, group = tile.block_q_dkv, tile.block_kv_dkv, tiling.turns
    head_size, dtype = arrays.query.shape[3], arrays.query.dtype
    walk = Walk(tiling, Lengths(key=arrays.key_lengths), arrays.schedule)
    ring, owned = Ring(barriers, tile.stages), Owned(shared, barriers, slots)

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def compute():
        if not simulate:
            plgpu.set_max_registers(240, action="increase")
        spare = shared["spare"].at[warpgroup] if simulate else None

        def tile_body(here: Tile, following, has_next, index):
            key_begin = here.row_begin + warpgroup * block_kv
            own = own_steps(tiling, here.steps, key_begin, here.key_length)
            place = owned.place(index, warpgroup)
            k_shared, v_shared = shared["key"].at[place], shared["value"].at[place]
            owned.await_loaded(place)

            def accumulate(dk_acc, dv_acc):
                def one_head(member):
                    fixed = None
                    if pairs is not None:
                        head = here.head * group + member
                        fixed = pairs.fixed(here.batch, head, pl.ds(key_begin, block_kv))

                    def body(step, masked):
                        done = here.before(step, member)
                        add_key_gradients(
                            spec, shared, ring, done, place, dk_acc, dv_acc,
                            step, key_begin, here.key_length, spare,
                            masked=masked, pairs=pairs, warpgroup=warpgroup, fixed=fixed,
                        )  # fmt: skip
                        plgpu.wgmma_wait(1)
                        ring.free("cotangent", done)
                        plgpu.wgmma_wait(0)
                        ring.free("query", done)

                    def skip(step):
                        done = here.before(step, member)
                        ring.skip(("query", "cotangent"), done)
                        if pairs is not None:
                            pairs.skip(done)

                    run_own_steps(loops, here.steps, own, body, skip)

                if group == 1:
                    one_head(0)
                else:
                    pl.loop(0, group)(one_head)
                return dk_acc[...], dv_acc[...]

            acc = plgpu.ACC((block_kv, head_size), jnp.float32)
            dk, dv = pl.run_scoped(accumulate, acc, acc)
            k_shared[...] = (dk * spec.scale).astype(dtype)
            v_shared[...] = dv.astype(dtype)
            owned.hand_over(place)
            return index + 1

        walk.each(tile_body, jnp.int32(0))

    def load():
        def tile_body(here: Tile, following, has_next, carry):
            @pl.loop(0, group)
            def _(member):
                head = here.head * group + member

                @pl.loop(here.steps.begin, here.steps.end)
                def _(step):
                    done = here.before(step, member)

                    def load_pairs():
                        if pairs is not None:
                            pairs.load(done, here.batch, head, here.block, step)

                    load_queries(
                        arrays, shared, barriers, ring, done, here.batch, head, step, block_q,
                        load_pairs,
                    )  # fmt: skip

            return carry

        total, _ = walk.each(tile_body, ())
        ring.drain(("query", "cotangent"), total)
        if pairs is not None:
            pairs.drain(total)

    def rows_of(here: Tile, part):
        return (here.batch, pl.ds(here.row_begin + part * block_kv, block_kv), here.head)

    def operands(here: Tile, part):
        rows = rows_of(here, part)
        return {"key": arrays.key.at[rows], "value": arrays.value.at[rows]}

    def results(here: Tile, part):
        rows = rows_of(here, part)
        return {"key": dk_out.at[rows], "value": dv_out.at[rows]}

    serve(warpgroup, load, lambda part: owned.serve(walk, part, operands, results), simulate)


def key_tiling(
    spec: AttentionSpec, arrays: BackwardArrays, tile: BackwardTiles, keys: int
) -> KeyTiling:
    """All tiles of a call; `keys`: S before padding."""
    batch, num_queries, heads, head_size = arrays.query.shape
    kv_heads = arrays.key.shape[2]
    group = heads // kv_heads
    return KeyTiling(
        spec, Size(COMPUTE_WARPGROUPS * tile.block_kv_dkv, tile.block_q_dkv), batch, kv_heads,
        num_queries, keys, head_bytes=4 * num_queries * head_size * group, heads_first=False,
        has_lengths=arrays.key_lengths is not None, turns=group,
    )  # fmt: skip


def keys_and_values(
    spec: AttentionSpec,
    arrays: BackwardArrays,
    pairs: PairArrays,
    tile: BackwardTiles,
    tiling: KeyTiling,
    *,
    interpret: Any = None,
) -> list[jax.Array]:
    """dK and dV (B, S, K, H), padded as the operands.

    Args:
      spec: the forward's.
      arrays: operands, padded, with the `schedule` of the tiles to walk over.
      pairs: mask and bias, turned.
      tile, tiling: sizes of a tile, and all tiles.
      interpret: parameters of the Mosaic GPU simulator, None on a GPU.
    """
    dtype = arrays.query.dtype
    step, block = tile.block_q_dkv, tile.block_kv_dkv
    like_key = jax.ShapeDtypeStruct(arrays.key.shape, dtype)

    def owned(slots: int) -> Any:
        return tiled_shared((slots * COMPUTE_WARPGROUPS, block, arrays.key.shape[3]), dtype)

    streamed = tiled_shared((tile.stages, step, arrays.key.shape[3]), dtype)
    by_row = plgpu.SMEM((tile.stages, step), jnp.float32)
    others = {"query": streamed, "cotangent": streamed, "lse2": by_row, "delta": by_row}
    return walked(
        _body, spec, arrays, pairs, tile, tiling,
        lambda slots: {"key": owned(slots), "value": owned(slots)},
        others,
        ring_barriers({"query": 3, "cotangent": 1}, tile.stages),
        (like_key, like_key),
        "dpfa_attention_backward_kv",
        interpret,
    )  # fmt: skip
