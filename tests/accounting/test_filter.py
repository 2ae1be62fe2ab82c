"""V22: the filter for adaptively chosen releases."""

import dataclasses
import math

import numpy as np
import pytest

from dpfa_jax.accounting import Ledger, PrivacyFilter, epsilon, record
from dpfa_jax.accounting.losses import gaussian_epsilon
from dpfa_jax.core import ArgumentError, BudgetExceededError, UnsupportedEventError
from dpfa_jax.release import ExampleRelease, TrainingRelease

BASE = ExampleRelease(1.0, 1.0, 4, 2, 8)
POOL = [dataclasses.replace(BASE, noise_multiplier=s).record() for s in (0.7, 1, 2, 4, 9, 25)]


@pytest.mark.parametrize("schedules", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_v22_never_exceeds_the_budget_in_random_adaptive_schedules(schedules):
    """V22: schedules whose next noise depends on the (random) outcome so far. The exact epsilon
    of what was really spent stays within the budget; half of a step more would often not."""
    rng = np.random.default_rng(0)
    delta, refused, use = 1e-5, 0, []
    for _ in range(schedules):
        budget = float(rng.choice([0.5, 1.0, 3.0, 8.0]))
        keep, precision, state = PrivacyFilter(budget, delta), 0.0, rng.normal()
        for _ in range(5):
            release = POOL[int(abs(state) * 3) % len(POOL)]
            count = 1 + int(rng.integers(12))
            try:
                keep = keep.spend(release, count)
            except BudgetExceededError:
                refused += 1
                state = rng.normal()
                continue
            precision += count / release.noise_multiplier**2
            state += rng.normal() * release.noise_multiplier
        spent = gaussian_epsilon(math.sqrt(precision), delta)
        assert spent <= budget
        use.append(spent / budget)
    assert refused > schedules / 2  # it bites
    assert np.quantile(use, 0.9) > 0.5  # and it is not merely stingy


def test_v22_refusal_comes_before_the_launch():
    keep = PrivacyFilter(1.0, 1e-5)
    launched = 0
    with pytest.raises(BudgetExceededError, match="Nothing may be released"):
        while True:
            keep = keep.spend(POOL[5])
            launched += 1
    assert keep.ledger.total_count == launched >= 1
    assert not keep.admits(POOL[5])


def test_v22_alerts():
    """V22: 50, 80 and 95 %, in order, each once its share is spent."""
    keep, seen = PrivacyFilter(2.0, 1e-5), []
    release = dataclasses.replace(BASE, noise_multiplier=40.0)
    while keep.admits(release):
        keep = keep.spend(release)
        assert keep.alerts == tuple(a for a in (0.5, 0.8, 0.95) if keep.fraction >= a)
        if not seen or seen[-1] != keep.alerts:
            seen.append(keep.alerts)
    assert seen == [(), (0.5,), (0.5, 0.8), (0.5, 0.8, 0.95)]
    assert 0.99 <= keep.fraction <= 1.0


def test_filter_is_stricter_than_a_fixed_schedule():
    """Adaptivity is not free: the filter admits fewer steps than the Renyi bound, but not half."""
    step = TrainingRelease(1.0, 2.0, 5485, 512, 1000)
    keep = PrivacyFilter(3.0, 1e-5)
    while keep.admits(step, 10):
        keep = keep.spend(step, 10)
    count = keep.ledger.total_count
    spent = epsilon(record(Ledger(), step, count), 1e-5, accountant="rdp")
    assert 1.5 < spent <= 3.0


def test_filter_refuses_what_is_not_private_or_does_not_compose():
    keep = PrivacyFilter(3.0, 1e-5).spend(POOL[4])
    assert not keep.admits(dataclasses.replace(BASE, insecure_test_noise=True))
    step = TrainingRelease(1.0, 2.0, 5485, 512, 1000)
    with pytest.raises(UnsupportedEventError, match="unit"):
        keep.admits(step)
    with pytest.raises(ArgumentError, match="1/n"):
        PrivacyFilter(3.0, 1e-3).admits(step)
    with pytest.raises(ArgumentError, match="epsilon = 0"):
        PrivacyFilter(0.0, 1e-5)
    with pytest.raises(BudgetExceededError, match="ledger"):
        PrivacyFilter(0.1, 1e-5, record(Ledger(), BASE, 50))
