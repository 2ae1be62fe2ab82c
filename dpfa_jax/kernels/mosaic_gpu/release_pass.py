"""Clip, noise and grid of an example release in a pass of its own, over the plain kernel's answer.

Reads each 16-bit number once and writes it once. A program owns some rows of one head; a row lies
in the registers of a few neighbouring lanes, which make the pairs of normals that they hold. No
shared memory and few registers: many programs share a processor and hide each other's loads. The
last program of a head begins early enough to end with it: what it shares with the one before is
computed twice, to the same bits.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.base import ExampleReadout
from dpfa_jax.kernels.mosaic_gpu import axes
from dpfa_jax.kernels.mosaic_gpu.noise import (
    PairLayout,
    clip_rows,
    snap_noised,
    stream_of,
    tile_normals,
)

ACCESS = 16  # bytes of one load or store of a lane
VECTOR = ACCESS // 2  # numbers of it
LANES = 16  # that hold a row, at most
WARPS = 4  # of a program
NUMBERS = 4096  # of a program, about: few, for short last waves, and what begins it is done once


class NoiseArrays(NamedTuple):
    """Where the noise comes from, as in `forward.ForwardArrays`."""

    key_words: Any
    batch_index: Any
    head_start: Any
    stddevs: Any
    grids: Any
    ones: Any


def lanes_of(head_size: int) -> int:
    """Lanes that hold a row of so many numbers, a multiple of 64."""
    return math.gcd(head_size // VECTOR, LANES)


def tile_rows(head_size: int) -> int:
    """Rows that a program holds at a time."""
    return WARPS * 32 // lanes_of(head_size)


def layout_of(head_size: int) -> PairLayout:
    """Of a tile: neighbouring lanes take neighbouring accesses of a row."""
    lanes = lanes_of(head_size)
    rows = 32 // lanes

    def tiled(vector: int) -> Any:
        program, warp = (WARPS * rows, lanes * vector), (rows, lanes * vector)
        return plgpu.Layout.TILED(
            plgpu.Tiling((program, warp, (vector,))),
            warp_dims=(-5,),
            lane_dims=(-3, -2),
            vector_dim=-1,
        )

    return PairLayout(tiled(VECTOR), tiled(VECTOR // 2))


def released(
    readout: ExampleReadout, answer: jax.Array, noise: NoiseArrays, *, interpret: Any = None
) -> jax.Array:
    """snap(clip(answer) + stddev * noise, grid), rows clipped as they are stored.

    Args:
      readout: `clip="row"`; its standard deviations and grids bound what is added, those of
        `noise` are used.
      answer: (B, T, N, H) bfloat16 or float16, H a multiple of 64.
      noise: arrays of the batch rows and heads of `answer`.
      interpret: parameters of the Mosaic GPU simulator, None on a GPU.

    The noise of a number is a function of its key and its global batch row, head, row and column
    (`noise.fields.attention_noise`).
    """
    batches, length, heads, head_size = answer.shape
    height = tile_rows(head_size)
    answer = jnp.pad(answer, ((0, 0), (0, max(0, height - length)), (0, 0), (0, 0)))
    rows = answer.shape[1]
    steps = min(max(1, NUMBERS // (height * head_size)), rows // height)
    blocks = pl.cdiv(rows, steps * height)
    layout = layout_of(head_size)
    simulate = interpret is not None

    def kernel(answer_ref, *refs):
        arrays, out_ref = NoiseArrays(*refs[:-1]), refs[-1]
        # Heads change fastest: programs side by side read whole rows of memory.
        index = lax.axis_index(axes.BLOCKS)
        block_and_batch, head = lax.div(index, heads), lax.rem(index, heads)
        batch, block = lax.div(block_and_batch, blocks), lax.rem(block_and_batch, blocks)
        begin = jnp.minimum(block * (steps * height), rows - steps * height)
        stream = stream_of(arrays, batch, head)
        scale = arrays.stddevs[batch, head], arrays.grids[batch, head]

        @pl.loop(0, steps)
        def _(step):
            row_begin = begin + step * height
            own = (batch, pl.ds(row_begin, height), head)
            loaded = plgpu.load(answer_ref.at[own], layout=layout.whole, optimized=False)
            clipped = clip_rows(loaded.astype(jnp.float32), readout.l2_clip_norm)
            shape = (height, head_size)
            normals = tile_normals(
                stream, row_begin, jnp.int32(0), shape, simulate=simulate, layout=layout
            )
            noised = snap_noised(readout, clipped, normals, scale, simulate=simulate)
            out_ref[own] = noised.astype(answer.dtype)

    found = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(answer.shape, answer.dtype),
        grid=(batches * blocks * heads,),
        grid_names=(axes.BLOCKS,),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="dpfa_example_release",
        interpret=interpret,
    )(answer, *noise)
    return found[:, :length]
