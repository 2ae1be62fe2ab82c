"""Clip and noise of one tile, in the registers of one warpgroup."""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.clipping.float_rows import norm_limit, unit_scale
from dpfa_jax.core.generators import BOX_MULLER_TAIL
from dpfa_jax.kernels.base import ExampleReadout
from dpfa_jax.kernels.mosaic_gpu import dialect
from dpfa_jax.noise.grid import snap
from dpfa_jax.noise.normals import normal_pair
from dpfa_jax.noise.threefry import threefry2x32


class PairLayout(NamedTuple):
    """How columns lie in registers where each lane makes the pairs (2j, 2j + 1) that it holds.

    Attributes:
      whole: of an array of normals.
      pairs: the same tiles with half the columns: of what there is one of for each pair.
    """

    whole: Any
    pairs: Any


# Of the tensor cores: one register per lane holds one pair.
ACCUMULATOR = PairLayout(
    plgpu.Layout.WGMMA,
    plgpu.Layout.TILED(
        plgpu.Tiling(((64, 4), (16, 4), (8, 4), (1,))),
        warp_dims=(-7,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    ),
)


def clip_rows(x: jax.Array, l2_clip_norm: float) -> jax.Array:
    """Rows (R, C) in float32 of norm <= l2_clip_norm; a row that is not finite becomes zero.

    A row is scaled by the power of two of its largest entry first, so that its square is 1 or more
    and overflows for no finite row. Nothing subnormal is formed that is then used: the two factors
    of a clipped row are applied one after the other.
    """

    def along_rows(row: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(row, x.shape, [0])

    scale = unit_scale(jnp.abs(x).max(axis=1))
    scaled = x * along_rows(scale)
    square = (scaled * scaled).sum(axis=1)
    # Length that the scaled row may have, over the one that it has. Rows of zeros: infinite.
    limit = norm_limit(l2_clip_norm, x.shape[1], is_approximate=True)
    ratio = limit * lax.rsqrt(square)
    keeps = ratio * scale >= 1.0
    first, second = (along_rows(jnp.where(keeps, 1.0, factor)) for factor in (scale, ratio))
    # NaN and infinity make `square` NaN or infinite. A select, not a product: 0 * NaN is NaN.
    is_finite = along_rows(jnp.where(square < jnp.inf, 1.0, 0.0))
    return jnp.where(is_finite > 0.0, x * first * second, 0.0)


def snap_tile(
    x: jax.Array, grid: jax.Array, largest_multiple: float, *, simulate: bool
) -> jax.Array:
    """`noise.grid.snap`, in two additions where every |x| / grid is publicly known to be small."""
    if simulate or largest_multiple >= 2.0**21:  # XLA would cancel the two additions
        return snap(x, grid)
    # At 1.5 2^23 the last bit of a float32 counts 1, so the sum is rounded to whole, ties to even.
    shift = jnp.float32(1.5 * 2.0**23)
    return ((x * (1.0 / grid) + shift) - shift) * grid


def snap_noised(
    readout: ExampleReadout,
    clipped: jax.Array,
    noise: jax.Array,
    scale: tuple[jax.Array, jax.Array],
    *,
    simulate: bool,
) -> jax.Array:
    """A tile of one head as it is released, from its clipped rows and standard normals.

    `scale`: the head's standard deviation and grid, scalars in float32.
    """
    largest = max(
        (readout.l2_clip_norm + 2.0 * BOX_MULLER_TAIL * stddev) / grid
        for stddev, grid in zip(readout.noise_stddevs, readout.grids, strict=True)
    )
    stddev, grid = scale
    return snap_tile(clipped + stddev * noise, grid, largest, simulate=simulate)


def interleaved(
    even: jax.Array, odd: jax.Array, layout: PairLayout, *, simulate: bool
) -> jax.Array:
    """(.., C / 2) twice -> (.., C), pairs next to each other: a move between names of registers."""
    shape = (*even.shape[:-1], 2 * even.shape[-1])
    if simulate:
        return jnp.stack([even, odd], axis=-1).reshape(shape)

    @plgpu.inline_mgpu(
        arg_types=(layout.pairs, layout.pairs),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout.whole),
    )
    def join(_, even, odd):
        return dialect.interleaved(even, odd, layout.whole, shape)

    return join(even, odd)


Stream = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def stream_of(arrays: Any, batch: Any, head: Any) -> Stream:
    """What the noise of one batch row and head shares, read once.

    Two key words, the upper counter word, batch << 12 | head, and a one that the compiler cannot
    know, which turns the additions of threefry into multiply-adds.
    """
    key_words = (arrays.key_words[batch, 0], arrays.key_words[batch, 1])
    global_head = arrays.head_start[batch] + lax.convert_element_type(head, jnp.uint32)
    high = (arrays.batch_index[batch] << 12) | global_head
    return (*key_words, high, arrays.ones[batch])


def tile_normals(
    stream: Stream,
    row_begin: Any,
    column_begin: Any,
    shape: tuple[int, int],
    *,
    simulate: bool,
    layout: PairLayout = ACCUMULATOR,
) -> jax.Array:
    """Standard normals of R rows and C columns of one head; `column_begin` is even.

    The counters are those of `noise.counters.attention_counter`.
    """
    row_begin, column_begin = (
        lax.convert_element_type(x, jnp.uint32) for x in (row_begin, column_begin)
    )
    rows, columns = shape
    half = (rows, columns // 2)
    row = row_begin + plgpu.broadcasted_iota(jnp.uint32, half, 0, layout=layout.pairs)
    pair = (column_begin >> 1) + plgpu.broadcasted_iota(jnp.uint32, half, 1, layout=layout.pairs)
    low = (row << 9) | pair
    key0, key1, high, one = stream

    def add(x: jax.Array, y: jax.Array) -> jax.Array:
        # One multiply-add: rotations and exclusive ors fill the integer pipe already, and the
        # multiplier's has room. Plain additions would all go to the integer pipe.
        return y * one + x

    words = threefry2x32(key0, key1, jnp.full_like(low, high), low, add=add)
    cosine, sine = normal_pair(*words)
    return interleaved(cosine, sine, layout, simulate=simulate)
