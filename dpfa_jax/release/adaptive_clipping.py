"""Clip norms that follow a quantile of the gradients' norms, estimated privately."""

import dataclasses

from dpfa_jax.core import ArgumentError, checks


@dataclasses.dataclass(frozen=True)
class AdaptiveClipping:
    """How each group's clip norm moves, and what of the budget the estimate takes.

    Each step releases, beside the noised gradients, the noised number of examples that were not
    clipped, centred (+1/2 for each, -1/2 for a clipped one), for each clip group, and then moves
    log C by -learning_rate * (their share - quantile).

    Attributes:
      quantile: share of the examples that C should leave unclipped, in (0, 1).
      learning_rate: of log C. 0.2 halves or doubles C in 7 steps at the extremes.
      budget_share: share f of the precision 1 / sigma^2 that all counts together take. Gradients
        get noise sigma / sqrt(1 - f), 0.5 % more at 0.01; a count gets 0.5 sigma sqrt(L / f), 5
        examples at sigma = 1, one group and 0.01.

    Errors: ArgumentError for a number outside its range.
    Source: Andrew, Thakkar, McMahan and Ramaswamy, "Differentially private learning with adaptive
    clipping" (2021).
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    budget_share: float = 0.01

    def __post_init__(self) -> None:
        for name in ("quantile", "budget_share"):
            if checks.probability(name, getattr(self, name)) >= 1.0:
                raise ArgumentError(
                    name, getattr(self, name), "not below 1", "Pass a share between 0 and 1."
                )
        if checks.positive("learning_rate", self.learning_rate) > 2.0:
            raise ArgumentError(
                "learning_rate",
                self.learning_rate,
                "greater than 2; C would swing by a factor of e and more",
                "Pass 0.2, or at most 2.",
            )
