"""How often a Poisson batch is cut to its capacity, seen from one example.

n is the number of examples that the step may draw. Whether the n - 1 others fill the batch does not
depend on the example. Where they do, the example, if drawn, stays with probability
cap / (others + 1) and pushes out a uniformly drawn other. The subset of others, given that it has
cap members, is uniform whatever their number was, so the step is a Poisson-sampled one with
probability q' and a shift of up to twice the clip norm.
dp_accounting's TruncatedSubsampledGaussianDpEvent splits in the same way (arXiv 2508.15089, 2025).
"""

import dataclasses
import functools

from dpfa_jax.release import Sampling


@dataclasses.dataclass(frozen=True)
class BatchTruncation:
    """Truncation of one step.

    Attributes:
      probability: chance p that the other examples alone fill the batch.
      joint_probability: chance that they do and the example is in the cut batch all the same,
        in the place of another one.
    """

    probability: float
    joint_probability: float

    @property
    def conditional_probability(self) -> float:
        """Chance q' that the example is in the batch, given that the others fill it."""
        return self.joint_probability / self.probability if self.probability > 0.0 else 0.0


@functools.lru_cache(maxsize=1024)
def batch_truncation(sampling: Sampling) -> BatchTruncation:
    """Exact binomial tails: p = P(Bin(n-1, q) >= cap), joint = (cap / n) P(Bin(n, q) > cap)."""
    from scipy import special

    size, capacity = sampling.group_size, sampling.truncated_batch_size
    if capacity >= size:
        return BatchTruncation(0.0, 0.0)
    chance = sampling.probability
    return BatchTruncation(
        float(special.bdtrc(capacity - 1, size - 1, chance)),
        float(special.bdtrc(capacity, size, chance)) * capacity / size,
    )
