"""What the finite tail of the noise generator costs in delta.

The generator draws pairs by Box-Muller, so each pair (z0, z1) lies in the disc of radius R
(`GaussianRecord.tail`). In the released coordinates divided by their noise, neighbours differ by a
shift of length mu = 1 / sigma, spread in any way over the pairs. Where both shifted discs reach,
the likelihood ratio is exactly the Gaussian one: both densities carry the same normalisation. So

  hockey-stick(truncated) <= P(some pair is out of the other disc's reach)
                             + c * hockey-stick(Gaussian),   c = (1 - e^(-R^2/2))^(-pairs).

A pair shifted by t is out of reach with probability

  h(t) = (R/pi) int_0^t e^(-(R^2+s^2)/2) int_0^{arccos(s/2R)} cos(w) e^(s R cos w) dw ds
      <= (R/pi) int_0^t e^(-(R-s)^2/2) ds =: b(t)

(the flux of the normal density through the moving circle, then cos w <= 1 in the exponent). As a
function of t^2, b is concave up to t* = (R - sqrt(R^2-4))/2 and convex from there to
(R + sqrt(R^2-4))/2, hence for every split of mu over J pairs

  sum_j b(t_j) <= J b(min(mu/sqrt(J), t*)) + max(0, b(mu) - b(t*)).

J = D is taken: a pair of which only one number is released is counted like any other. Under Poisson
sampling the shift happens with probability q: of the mass out of reach, only the part q drawn
together with the example is lost; on the rest the likelihood ratio stays below the Gaussian one
(where the example's noise cannot reach, the Gaussian ratio of example to none is below 1). Both
neighbouring directions and adaptive composition follow: ratios multiply and lost masses add.

The argument takes the radius as continuous up to R. That noise is drawn from finitely many words
and snapped to a grid is not covered by it, nor by any other number of this library.
"""

import dataclasses
import functools
import math

from dpfa_jax.accounting.truncation import batch_truncation
from dpfa_jax.core import ArgumentError
from dpfa_jax.release import GaussianRecord

# The claimed delta must be this many times the part of it that pays for the tail.
TAIL_FACTOR = 100.0


@dataclasses.dataclass(frozen=True)
class TailCost:
    """Delta lost beyond the tail, and log c, the factor on the Gaussian delta. Both add up."""

    delta: float
    log_factor: float


def unreachable_bound(shift: float, pairs: int, tail: float) -> float:
    """Largest probability that noise of `pairs` pairs in discs of radius `tail` is out of reach
    after a shift of length `shift` (in standard deviations), over all ways of spreading it.

    Returns 1 where the shift is so long, or the disc so small, that the bound says nothing.
    """
    if tail <= 2.0 or shift >= 0.5 * (tail + math.sqrt(tail**2 - 4.0)):
        return 1.0
    turn = 0.5 * (tail - math.sqrt(tail**2 - 4.0))
    spread = pairs * _pair_bound(min(shift / math.sqrt(pairs), turn), tail)
    together = max(0.0, _pair_bound(shift, tail) - _pair_bound(turn, tail))
    return min(1.0, spread + together)


def _pair_bound(shift: float, tail: float) -> float:
    """b(t) = (R/pi) sqrt(2 pi) (Phi(t - R) - Phi(-R)), without cancellation for small t."""
    if shift < 1e-3:
        # The integrand increases, so its last value bounds it.
        return tail / math.pi * shift * math.exp(-0.5 * (tail - shift) ** 2)
    upper = math.erfc((tail - shift) / math.sqrt(2.0))
    lower = math.erfc(tail / math.sqrt(2.0))
    return tail / math.pi * math.sqrt(math.pi / 2.0) * (upper - lower)


@functools.lru_cache(maxsize=1024)
def record_tail_cost(record: GaussianRecord) -> TailCost:
    """The tail cost of one answer under `record`."""
    shift, pairs = 1.0 / record.noise_multiplier, record.dimension
    cost = unreachable_bound(shift, pairs, record.tail)
    if record.sampling is not None and record.sampling.scheme == "poisson":
        # A truncated batch swaps the example for another: the shift is then up to twice as long.
        truncation = batch_truncation(record.sampling)
        swapped = unreachable_bound(2.0 * shift, pairs, record.tail)
        cost = (
            1.0 - truncation.probability
        ) * record.sampling.probability * cost + truncation.joint_probability * swapped
    return TailCost(cost, -pairs * math.log1p(-math.exp(-0.5 * record.tail**2)))


def gaussian_delta(delta: float, costs: tuple[tuple[TailCost, int], ...]) -> float:
    """The delta left for the Gaussian analysis, after the tails of all answers are paid.

    Errors: ArgumentError where `delta` is less than 100 times what the tails cost.
    """
    lost = sum(cost.delta * count for cost, count in costs)
    log_factor = sum(cost.log_factor * count for cost, count in costs)
    if delta < TAIL_FACTOR * lost:
        raise ArgumentError(
            "delta",
            delta,
            f"less than {TAIL_FACTOR:g} times the {lost:.3g} that the noise generator's tail costs",
            f"Claim delta >= {TAIL_FACTOR * lost:.2g}, or release fewer numbers, take fewer "
            "answers, or use more noise.",
        )
    return (delta - lost) * math.exp(-log_factor)
