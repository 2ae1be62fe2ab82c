"""Noise, number of answers or epsilon, from the other two."""

import dataclasses
import math
from collections.abc import Callable

from dpfa_jax.accounting.budget import Budget, largest_count
from dpfa_jax.accounting.guarantee import answers_epsilon, epsilon
from dpfa_jax.accounting.ledger import Ledger, record
from dpfa_jax.accounting.losses import COARSE
from dpfa_jax.accounting.search import SLACK, largest_within
from dpfa_jax.core import ArgumentError, BudgetExceededError, checks
from dpfa_jax.release import Release

# Noise multipliers that the search considers; below the least, epsilon promises nothing.
_LEAST_NOISE, _MOST_NOISE = 0.2, 1e6


@dataclasses.dataclass(frozen=True)
class Calibration[AnyRelease: Release]:
    """`count` answers of `release` satisfy (`epsilon`, `delta`)."""

    release: AnyRelease
    count: int
    epsilon: float
    delta: float


def calibrate[AnyRelease: Release](
    release: AnyRelease,
    *,
    delta: float,
    epsilon: float | None = None,
    count: int | None = None,
    accountant: str = "pld",
) -> Calibration[AnyRelease]:
    """Solve for what is left out.

    * `epsilon` and `count` given: the least noise multiplier whose epsilon keeps the budget (and
      is within 0.1 % of it), though never below 0.2: a larger epsilon is not spent. The one in
      `release` is not used.
    * `epsilon` only: the most answers that fit at the release's noise.
    * `count` only: the epsilon they cost.

    A release marked `insecure_test_noise` is planned as if its noise were secret.

    Returns: the calibration; its epsilon is recomputed and never above the one asked for.
    Errors: ArgumentError where both or neither are left out, or a number is out of range;
      BudgetExceededError where no noise, or not one answer, fits.
    """
    if epsilon is None and count is None:
        raise ArgumentError(
            "epsilon", None, "count is None too", "Pass epsilon, count, or both (for the noise)."
        )
    if count is not None:
        checks.count("count", count)
    if epsilon is None:
        assert count is not None
        return _solved(release, count, delta, accountant)
    budget = Budget(epsilon, delta, accountant)
    if count is None:
        most = largest_count(budget, Ledger(), release.record())
        if most == 0:
            raise BudgetExceededError(
                f"noise_multiplier = {release.noise_multiplier:g}: one answer alone passes "
                f"epsilon = {epsilon:g} at delta = {delta:g}. Use more noise."
            )
        return _solved(release, most, delta, accountant)
    return _least_noise(release, budget, count)


def _solved[AnyRelease: Release](
    release: AnyRelease, count: int, delta: float, accountant: str
) -> Calibration[AnyRelease]:
    spent = epsilon(record(Ledger(), release, count), delta, accountant=accountant, nominal=True)
    return Calibration(release, count, spent, delta)


def _least_noise[AnyRelease: Release](
    release: AnyRelease, budget: Budget, count: int
) -> Calibration[AnyRelease]:
    def cost(accountant: str) -> Callable[[float], float]:
        def spent(inverse_noise: float) -> float:
            answer = dataclasses.replace(release, noise_multiplier=1.0 / inverse_noise).record()
            try:
                return answers_epsilon(((answer, count),), budget.delta, accountant, COARSE)
            except ArgumentError:  # so little noise that the generator's tail shows
                return math.inf

        return spent

    # Says what is wrong with delta before any search.
    sampling = release.record().sampling
    checks.delta("delta", budget.delta, units=sampling.dataset_size if sampling else None)
    if cost("rdp")(1.0 / _MOST_NOISE) > budget.epsilon:
        raise BudgetExceededError(
            f"epsilon = {budget.epsilon:g}, count = {count}: not even noise_multiplier = "
            f"{_MOST_NOISE:g} fits at delta = {budget.delta:g}. Release fewer numbers or answers, "
            "or raise epsilon or delta."
        )
    most = 1.0 / _LEAST_NOISE
    found = largest_within(cost("rdp"), budget.epsilon, 1.0 / _MOST_NOISE, most)
    if budget.accountant == "pld" and cost("pld")(found) <= budget.epsilon:
        found = largest_within(cost("pld"), budget.epsilon, found, most, growth=1.1)
    while True:
        noisy = dataclasses.replace(release, noise_multiplier=1.0 / found)
        solved = _solved(noisy, count, budget.delta, budget.accountant)
        if solved.epsilon <= budget.epsilon:
            return solved
        found /= 1.0 + SLACK  # the finer grid of `epsilon` rounded the other way
