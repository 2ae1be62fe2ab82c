"""Noise on a sum of rows, made in registers in the pass that adds them and writes the mean.

Each thread owns four neighbouring numbers at a time: of each row one load of four, two counter
blocks, one 16-byte store. The last program begins early enough to end with the array: what it
shares with the one before is computed twice, to the same bits.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels import manual_axes
from dpfa_jax.kernels.mosaic_gpu import axes
from dpfa_jax.kernels.mosaic_gpu.noise import PairLayout, interleaved
from dpfa_jax.noise.counters import long_radius_counter, parameter_counter
from dpfa_jax.noise.grid import snap
from dpfa_jax.noise.normals import normal_pair
from dpfa_jax.noise.threefry import threefry2x32

VECTOR = 4  # float32 numbers of one 16-byte access
BLOCK = 2048  # numbers of one program: four accesses a thread and row
TOGETHER = 4  # rows whose loads are in flight together


def released_mean(
    rows: jax.Array,
    scales: jax.Array,
    leaf_keys: jax.Array,
    leaf_index: jax.Array,
    numbers: jax.Array,
    start: jax.Array | None = None,
    *,
    block: int = BLOCK,
    together: int = TOGETHER,
    interpret: Any = None,
) -> jax.Array:
    """snap(sum of scales * rows + stddev * noise, grid) / divisor.

    The noise is that of `noise.fields.parameter_noise`.

    Args:
      rows: (B, n) float32 or 16-bit floats, n a multiple of 4 and at least `block`. Added in
        float32, in order.
      scales: (B,) float32; a row of scale zero is left out, whatever it holds. A sum that exists
        already is one row of scale 1.
      leaf_keys: (leaves, 2) uint32, row i bound to leaf i; the table is read here, so that no
        other kernel has to cut out a row for each leaf.
      leaf_index: (1,) int32, the leaf's row.
      numbers: (3,) float32: stddev, grid, divisor.
      start: (1,) uint32, even: index in the leaf of the first number of a row; None: 0.
      block: numbers of one program, a multiple of 512.
      together: rows that are loaded before the first of them is added.
      interpret: parameters of the Mosaic GPU simulator, None on a GPU.
    """
    count, size = rows.shape
    if start is None:
        start = manual_axes.vary_over(jnp.zeros((1,), jnp.uint32), manual_axes.varying_axes(rows))
    simulate = interpret is not None

    def kernel(rows_ref, scales_ref, keys_ref, leaf_ref, numbers_ref, start_ref, out_ref):
        begin = jnp.minimum(lax.axis_index(axes.BLOCKS) * block, size - block)
        own = pl.ds(begin, block)
        half = (block // 2,)
        layout = PairLayout(
            plgpu.Layout.WG_STRIDED((block,), VECTOR), plgpu.Layout.WG_STRIDED(half, VECTOR // 2)
        )

        def added(total, first, members):
            places = [first + member for member in range(members)]
            held = [
                plgpu.load(rows_ref.at[place, own], layout=layout.whole, optimized=False)
                for place in places
            ]
            for place, row in zip(places, held, strict=True):
                row = row.astype(jnp.float32)
                scale = jnp.full_like(row, scales_ref[place])
                # A select, not a product: 0 * NaN is NaN.
                total = total + jnp.where(scale > 0.0, row, 0.0) * scale
            return total

        turns, rest = divmod(count, together)
        total = plgpu.layout_cast(jnp.zeros((block,), jnp.float32), layout.whole)
        if turns:
            total = lax.fori_loop(
                0, turns, lambda turn, total: added(total, turn * together, together), total
            )
        total = added(total, turns * together, rest)
        offset = plgpu.broadcasted_iota(jnp.uint32, half, 0, layout=layout.pairs)
        first = lax.convert_element_type(begin >> 1, jnp.uint32) + (start_ref[0] >> jnp.uint32(1))
        pair = first + offset
        leaf = leaf_ref[0]
        key = keys_ref[leaf, 0], keys_ref[leaf, 1]
        words = threefry2x32(*key, *parameter_counter(pair))
        # A radius is continued once in 2^32 pairs: hardly ever a program makes the blocks for it.
        more = lax.cond(
            jnp.min(words[0]) == 0,
            lambda: threefry2x32(*key, *long_radius_counter(pair))[0],
            lambda: words[0],
        )
        noise = interleaved(*normal_pair(*words, more), layout, simulate=simulate)
        stddev, grid, divisor = (numbers_ref[i] for i in range(3))
        out_ref[own] = snap(total + stddev * noise, grid) / divisor

    return plgpu.kernel(
        kernel,
        out_type=manual_axes.result((size,), jnp.float32, rows),
        grid=(pl.cdiv(size, block),),
        grid_names=(axes.BLOCKS,),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="dpfa_parameter_noise",
        interpret=interpret,
    )(rows, scales, leaf_keys, leaf_index, numbers, start)
