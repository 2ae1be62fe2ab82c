"""The cost of a private choice, against closed forms and against simulation of the number drawn."""

import math

import numpy as np
import pytest

from dpfa_jax.release import TrainingRelease
from dpfa_jax.train.choice_cost import best_of_trials, choice_cost, success_probability

GAUSSIAN = [(order, order * 0.5 / 4.0) for order in np.linspace(1.1, 200, 2000)]


def test_geometric_has_gamma_one_over_mean():
    assert success_probability(20.0, 1.0) == pytest.approx(1 / 20, rel=1e-9)
    mean = (1 / 0.1 - 1) / math.log(1 / 0.1)
    assert success_probability(mean, 0.0) == pytest.approx(0.1, rel=1e-9)


@pytest.mark.parametrize("eta", [-0.5, 0.5, 2.0])
def test_mean_of_the_truncated_negative_binomial(eta):
    """Summed from its probabilities: P(k) ~ (1 - g)^k prod_{l<k} (l + eta) / (l + 1)."""
    gamma = success_probability(7.0, eta)
    counts = np.arange(1, 20_000)
    steps = np.concatenate([[0.0], np.log((counts[:-1] + eta) / (counts[:-1] + 1))])
    weights = np.exp(np.cumsum(steps) + counts * math.log1p(-gamma))
    assert (weights * counts).sum() / weights.sum() == pytest.approx(7.0, rel=1e-6)


def test_cost_is_the_theorem_at_one_order():
    """Papernot and Steinke (2022), theorem 2, spelled out for a single pair of orders."""
    order, bound, delta, mean = 8.0, 0.4, 1e-5, 50.0
    renyi = bound + 2 * (1 - 1 / order) * bound + 2 * math.log(mean) / order
    renyi += math.log(mean) / (order - 1)
    expected = renyi + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
    cost = best_of_trials([(order, bound)], expected_trials=mean, delta=delta)
    assert cost.epsilon == pytest.approx(expected, rel=1e-12)


def test_more_trials_cost_more_and_one_costs_nothing():
    costs = [best_of_trials(GAUSSIAN, expected_trials=k, delta=1e-5) for k in (1, 2, 10, 1000)]
    epsilons = [cost.epsilon for cost in costs]
    assert epsilons == sorted(epsilons) and epsilons[0] == costs[0].trial_epsilon < epsilons[1]
    # Choosing among 1000 costs less than publishing 10 runs by plain composition.
    ten = best_of_trials([(a, 10 * r) for a, r in GAUSSIAN], expected_trials=1, delta=1e-5)
    assert epsilons[-1] < ten.epsilon


def test_of_the_main_job():
    release = TrainingRelease(1.0, 1.7, 5485, 512, num_parameters=50_504)
    cost = choice_cost(release, steps=120, expected_trials=130, delta=1e-5)
    assert 3.0 < cost.trial_epsilon < 4.0 < cost.epsilon < 20.0


@pytest.mark.parametrize(
    "bad", [{"expected_trials": 0.5}, {"delta": 1.0}, {"eta": -1.0}, {"expected_trials": math.nan}]
)
def test_bad_arguments_are_named(bad):
    """V23."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        best_of_trials(GAUSSIAN, **({"expected_trials": 2.0, "delta": 1e-5} | bad))
