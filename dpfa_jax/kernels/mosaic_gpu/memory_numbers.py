"""The public numbers of the memory kernel: unit of its sums, margins, shifts. Host arithmetic.

Bound (docs/decisions/0005). One key belongs to one block of at most b = `SUM_BLOCK` keys; all other
blocks and all integer additions are the same in two neighbours. Within the block:

- The tensor core adds 16 products and the accumulator at a time. PTX promises at least single
  precision and neither order nor rounding: each of the 17 numbers may lose one unit in the last
  place, 2^-23, of the sum of their magnitudes, which is at most 16 g R after g groups for rows
  (v, kappa) of norm <= R. Both neighbours together: 2 * 17 * 2^-23 * 16 (1 + .. + b / 16) R.
- Rounding to the unit moves the difference by at most one unit in each of H + 1 columns.

`value_clip_norm` and `weight_scale` are the readout's, less what the two terms exceed
ACCUMULATION_SLACK by.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from dpfa_jax.core.generators import BOX_MULLER_TAIL
from dpfa_jax.kernels.base import MemoryReadout

# What a release's sensitivity holds for rounding: `release.sensitivity.ACCUMULATION_SLACK`, which
# kernels do not see; a test compares the two.
ACCUMULATION_SLACK = 1e-3

SUM_BLOCK = 128
# 512 blocks of sums below 2^22 units each stay inside 32 bits; as do 1024 of half the keys.
MAX_KEYS = 512 * SUM_BLOCK
# x + 1.5 2^23 has x, rounded to whole, in its last bits, for |x| <= 2^22.
MAGIC = 1.5 * 2.0**23
MAGIC_BITS = 0x4B400000
# One instruction of the tensor core adds this many products, and the accumulator.
_DEPTH = 16
# A whole number of grid steps must keep room for the noise beside MAGIC.
_MOST_STEPS = 2.0**21
# Second-order terms of the products' bound: its sums err too, by 1.2e-3 of themselves.
_SECOND_ORDER = 1.01


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What the kernel knows of a readout; hashable.

    Attributes:
      logit_bound: B.
      value_clip_norm: C of the stored values, a little below the readout's.
      weight_scale: kappa, a number of the values' dtype, at most the readout's.
      floor: least normaliser that divides, in units of one key.
      unit: power of two that one unit of the integer sums is worth.
      shifts: log2(grid / unit) of each head.
      drops_bits: whether some grid is so coarse that a sum loses bits below 2^-23 of a step.
      fits_float32: whether every released multiple is below 2^22.
    """

    logit_bound: float
    value_clip_norm: float
    weight_scale: float
    floor: float
    unit: float
    shifts: tuple[int, ...]
    drops_bits: bool
    fits_float32: bool


def product_slack(block: int = SUM_BLOCK) -> float:
    """What the tensor core's additions may move two neighbours by, in units of |(v, kappa)|."""
    groups = block // _DEPTH
    largest_sums = _DEPTH * groups * (groups + 1) / 2
    return 2.0 * (_DEPTH + 1) * 2.0**-23 * largest_sums * _SECOND_ORDER


def memory_numbers(
    readout: MemoryReadout, head_size: int, keys: int, dtype: jnp.dtype
) -> Numbers | str:
    """The kernel's numbers, or why it cannot keep its bound for this readout."""
    clip, kappa = readout.value_clip_norm, readout.weight_scale
    if keys > MAX_KEYS:
        return f"{keys} keys are above {MAX_KEYS}, whose sums fit 32 bits"
    unit = 2.0 ** math.ceil(math.log2(SUM_BLOCK * max(clip, kappa) / 2.0**22))
    rounding = unit * math.sqrt(head_size + 1) / math.hypot(clip, kappa)
    shrink = (1.0 + ACCUMULATION_SLACK - rounding) / (1.0 + product_slack())
    stored_kappa = _stored_below(kappa * shrink, dtype)
    if not stored_kappa > 0.0:
        return f"weight_scale={kappa} vanishes in {dtype}"
    shifts = tuple(round(math.log2(grid / unit)) for grid in readout.grids)
    if any(unit * 2.0**shift != grid for shift, grid in zip(shifts, readout.grids, strict=True)):
        return f"grids={readout.grids} are not powers of two"
    if min(shifts) < 0:
        return f"a grid of {min(readout.grids)} is finer than the sums' unit of {unit}"
    noise_steps = max(
        BOX_MULLER_TAIL * stddev / grid
        for stddev, grid in zip(readout.noise_stddevs, readout.grids, strict=True)
    )
    if noise_steps >= _MOST_STEPS:
        return f"the noise spans {noise_steps:.0f} grid steps, above {_MOST_STEPS:.0f}"
    sums = max(keys, 1) * max(clip, kappa) / min(readout.grids)
    return Numbers(
        logit_bound=readout.logit_bound,
        value_clip_norm=clip * shrink,
        weight_scale=stored_kappa,
        floor=readout.floor,
        unit=unit,
        shifts=shifts,
        drops_bits=max(shifts) > 23,
        fits_float32=sums + noise_steps < _MOST_STEPS,
    )


def _stored_below(x: float, dtype: jnp.dtype) -> float:
    """The largest number of a 16-bit `dtype` that is at most x > 0."""
    stored = np.asarray(x, dtype)
    if float(stored) > x:
        # One less in the bits of a positive float is the next one down.
        stored = (stored.view(np.uint16) - np.uint16(1)).view(dtype)
    return float(stored)
