"""How much noise a run's steps add up to, where past noise is partly taken back."""

import math
from typing import NamedTuple

import numpy as np


class SummedNoise(NamedTuple):
    """Noise of sums of steps, in units of (noise multiplier) x (clip norm).

    Attributes:
      last: standard deviation of the sum of all steps.
      mean: root mean square of those of the sums of the first 1, 2, ... steps, where the
        parameters stand under plain gradient descent.
    """

    last: float
    mean: float


def summed_noise(strategy: tuple[float, ...], steps: int) -> SummedNoise:
    """For a band c_0 .. c_{b-1} (`dpsgd.banded_strategy`); (1.0,) is independent noise.

    Step t adds x_t with c_0 x_t + .. + c_{b-1} x_{t-b+1} = z_t, and z_t has the deviation
    (noise multiplier) x (clip norm) x |c|. A sum of steps holds z_u with the running sums of the
    inverse of the series c.
    """
    if len(strategy) == 1:
        return SummedNoise(math.sqrt(steps), math.sqrt((steps + 1) / 2))
    inverse = np.zeros(steps)
    for place in range(steps):
        past = sum(c * inverse[place - lag] for lag, c in enumerate(strategy) if 0 < lag <= place)
        inverse[place] = ((place == 0) - past) / strategy[0]
    variances = np.cumsum(np.square(np.cumsum(inverse)))
    norm = math.hypot(*strategy)
    return SummedNoise(norm * math.sqrt(variances[-1]), norm * math.sqrt(variances.mean()))
