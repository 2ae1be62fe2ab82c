"""Correlated noise: it is C^-1 z, batches keep the distance it needs, and the charge is right."""

import dataclasses
import functools
import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.dpsgd_cases import PARAMETERS, batch_of, loss_fn, params_of, plan_of
from jax_privacy.experimental import accounting as jax_privacy_accounting

from dpfa_jax import accounting, dpsgd
from dpfa_jax.accounting import Budget, Ledger, dp_event, epsilon, record
from dpfa_jax.core import ArgumentError, BudgetExceededError, KeyReuseError
from dpfa_jax.dpsgd import correlated_noise, sum_noise
from dpfa_jax.noise.keys import insecure_test_key, new_noise_key
from dpfa_jax.release import TrainingRelease, sensitivity

pytestmark = pytest.mark.quickly_compiled

STRATEGY = (0.75, 0.5, 0.375, 0.25)


def correlated_plan(strategy=STRATEGY, **changes):
    return plan_of(noise_strategy=strategy, l2_clip_norm=16.0, **changes)


def strategy_matrix(strategy, steps: int) -> np.ndarray:
    """C: lower triangular, constant along diagonals, banded."""
    return sum(c * np.eye(steps, k=-k) for k, c in enumerate(strategy))


def noise_of_steps(plan, steps: int) -> np.ndarray:
    """(steps, PARAMETERS): what empty batches release, one key for all steps."""
    noisy, params = dpsgd.noisy_sum(plan), params_of()
    zeros = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def run(state, noise_key):
        def body(carry, _):
            state, noise_key = carry
            means, after = noisy.update(zeros, state, noise_key=noise_key)
            flat = jnp.concatenate([jnp.ravel(mean) for mean in jax.tree.leaves(means)])
            return (after, noise_key), flat * plan.release.expected_batch_size

        return jax.lax.scan(body, (state, noise_key), None, length=steps)[1]

    return np.asarray(run(noisy.init(params), insecure_test_key(2)), np.float64)


independent_noise = functools.cache(noise_of_steps)  # the mutants do not reach it


def check_strategy_times_noise_is_independent_noise() -> None:
    """C x = z, where z is what the plan without correlation draws from the same key."""
    steps, plan = 11, correlated_plan()
    plain = correlated_plan((1.0,))
    length = math.hypot(*STRATEGY)  # by which the sensitivity grows, and z with it
    assert plan.release.noise_stddevs[0] == pytest.approx(length * plain.release.noise_stddevs[0])
    whitened = strategy_matrix(STRATEGY, steps) @ noise_of_steps(plan, steps)
    independent = independent_noise(plain, steps) * length
    slack = plan.release.grids[0] * (sum(STRATEGY) + 1.0)
    assert np.abs(whitened - independent).max() <= slack
    assert independent.std() > 5 * slack


def test_strategy_times_noise_is_independent_noise():
    """V9's sense for correlated noise; the wrap of the ring is passed three times."""
    check_strategy_times_noise_is_independent_noise()


def memory_never_turns(original):
    return lambda independent, memory, step, strategy: original(
        independent, memory, jnp.zeros_like(step), strategy
    )


def not_divided(original):
    def build(independent, memory, step, strategy):
        noise, after = original(independent, memory, step, strategy)
        return noise * strategy[0], after

    return build


def forgotten(original):
    return lambda independent, memory, step, strategy: (independent, memory)


@pytest.mark.parametrize(
    "build",
    [
        not_divided,
        pytest.param(memory_never_turns, marks=pytest.mark.slow),
        pytest.param(forgotten, marks=pytest.mark.slow),
    ],
)
def test_the_mutant_is_caught(build, monkeypatch):
    """V16."""
    monkeypatch.setattr(sum_noise, "correlated", build(correlated_noise.correlated))
    with pytest.raises(AssertionError):
        check_strategy_times_noise_is_independent_noise()


def test_a_strategy_is_worth_its_memory_and_made_once():
    """Parameters (prefix sums) are less noisy than under independent noise of the same privacy."""
    steps, bands = 32, 4
    strategy = dpsgd.banded_strategy(steps, bands)
    assert dpsgd.banded_strategy(steps, bands) is strategy and len(strategy) == bands
    assert math.hypot(*strategy) == pytest.approx(1.0, abs=1e-6)
    assert strategy == tuple(float(np.float32(c)) for c in strategy)
    prefix = np.tril(np.ones((steps, steps)))

    def error(found):
        noise = prefix @ np.linalg.inv(strategy_matrix(found, steps)) * math.hypot(*found)
        return np.sqrt(np.mean(np.sum(noise**2, axis=1)))

    assert error(strategy) < 0.75 * error((1.0,))
    assert dpsgd.banded_strategy(steps, 1) == (1.0,)
    for bad in ({"bands": 33}, {"bands": 0}, {"bands": 2.5}, {"bands": 2, "steps": 0}):
        with pytest.raises(ArgumentError):
            dpsgd.banded_strategy(**{"steps": steps} | bad)


def test_a_plan_correlates_noise_in_one_argument(monkeypatch):
    """The noise itself is calibrated in test_plan; here it would only take seconds."""
    solved = accounting.Calibration(None, 32, 1.0, 1e-5)
    monkeypatch.setattr(
        accounting, "calibrate", lambda release, **_: dataclasses.replace(solved, release=release)
    )
    plan = dpsgd.DPSGDPlan.calibrated(
        epsilon=1.0,
        delta=1e-5,
        dataset_size=4000,
        expected_batch_size=100,
        steps=32,
        l2_clip_norm=1.0,
        params=params_of(),
        noise_bands=4,
    )
    assert plan.release.noise_strategy == dpsgd.banded_strategy(32, 4)
    assert plan.release.batches().cycle_length == 4 and plan.release.batches().probability == 0.1
    assert plan.capacity == 192  # 100 + 5 sqrt(100 * 0.9), in whole micro-batches


def test_the_sensitivity_is_that_of_one_turn():
    """V1: any participation once a cycle moves C G by at most rounds * (C |c|)^2; tight.

    Control (V2): once in b - 1 steps passes that bound, since columns then overlap.
    """
    rng, steps, bands = np.random.default_rng(0), 24, len(STRATEGY)
    matrix = strategy_matrix(STRATEGY, steps)

    def moved(period, gradients):
        inputs = np.zeros((steps, 3))
        inputs[::period] = gradients[: len(inputs[::period])]
        return np.sum((matrix @ inputs) ** 2) / len(inputs[::period])

    bound = sensitivity.training_group(2.0, STRATEGY) ** 2
    found = []
    for _ in range(200):
        gradients = rng.standard_normal((steps, 3))
        gradients *= 2.0 / np.linalg.norm(gradients, axis=1, keepdims=True)
        found.append(moved(bands, gradients))
    assert 0.97 * bound < max(found) <= bound * (1 + 1e-9)  # the last columns are cut off
    aligned = np.tile([2.0, 0.0, 0.0], (steps, 1))
    assert moved(bands - 1, aligned) > 1.01 * bound


def test_cyclic_batches_keep_the_distance_across_calls():
    """V19: nobody is drawn twice within b steps; everyone in a group at the accounted rate."""
    plan = correlated_plan(dataset_size=402, expected_batch_size=50, truncated_batch_size=96)
    assert plan.release.batches().probability == 0.5 and plan.release.batches().group_size == 100
    rng = np.random.default_rng(0)
    drawn = [*plan.index_batches(rng, 301, first_step=0)]
    drawn += [*plan.index_batches(rng, 299, first_step=301)]
    assert all(batch.shape == (96,) for batch in drawn)
    for step, batch in enumerate(drawn):
        present = batch[batch >= 0]
        assert np.all(present % 4 == step % 4) and len(np.unique(present)) == len(present)
    counts = np.bincount(np.concatenate(drawn)[np.concatenate(drawn) >= 0], minlength=402)
    assert np.all(counts[400:] == 0)
    # 150 draws at 1/2 each: 4.9 deviations are 1e-6, over 400 examples.
    assert np.all(np.abs(counts[:400] - 75) < 4.9 * np.sqrt(37.5))
    with pytest.raises(ArgumentError, match="first_step"):
        plan.index_batches(rng, 10)


def test_the_event_is_that_of_banded_matrix_factorisation():
    """V18: truncated amplified BandMF, one sampled Gaussian a cycle; jax_privacy's event equals."""
    release = TrainingRelease(1.0, 1.5, 4000, 100, PARAMETERS, 160, noise_strategy=STRATEGY)
    found = dp_event(release.record(), 42)
    sigma = release.record().noise_multiplier
    assert sigma == pytest.approx(1.5, rel=1e-12)
    assert found == jax_privacy_accounting.truncated_amplified_bandmf_event(
        sigma,
        42,
        num_bands=4,
        sampling_prob=0.1,
        largest_group_size=1000,
        truncated_batch_size=160,
    )
    assert isinstance(found.event, dp_accounting.TruncatedSubsampledGaussianDpEvent)
    assert release.record().dimension == 4 * PARAMETERS
    group = TrainingRelease(1.0, 1.5, 1000, 100, 4 * PARAMETERS, 160)
    for steps, cycles in ((40, 10), (41, 11)):
        spent = epsilon(record(Ledger(), release, steps), 1e-5, accountant="rdp")
        alone = epsilon(record(Ledger(), group, cycles), 1e-5, accountant="rdp")
        assert spent == pytest.approx(alone, rel=1e-12)


def test_each_charge_pays_for_whole_cycles():
    """Two charges may belong to two runs, so a started cycle is paid for; the file knows too."""
    release = TrainingRelease(1.0, 1.5, 4000, 100, PARAMETERS, noise_strategy=STRATEGY)
    ledger = record(record(Ledger(), release, 3), release, 9)
    assert ledger.total_count == 4 + 12
    budget = Budget(epsilon(record(Ledger(), release, 8), 1e-5, accountant="rdp"), 1e-5, "rdp")
    budget.require(record(Ledger(), release, 1), release.record(), 4)
    with pytest.raises(BudgetExceededError):
        budget.require(record(Ledger(), release, 1), release.record(), 5)


def test_the_step_carries_secret_memory_and_restarts_without_it():
    plan = correlated_plan(insecure_test_noise=False)
    dp = dpsgd.make_dp_step(loss_fn, optax.adam(0.1), plan)
    batch, real, key = batch_of(16), jnp.ones(16, bool), new_noise_key()
    first = dp.init(params_of())
    assert first.noise_memory["kernel"].shape == (3, 5, 4)
    second = dp.step(first, batch, real, key)
    assert jax.tree.structure(second) == jax.tree.structure(first)
    assert np.any(np.asarray(second.noise_memory["kernel"][0]))
    assert not np.any(np.asarray(second.noise_memory["kernel"][1:]))
    with pytest.raises(KeyReuseError):
        dp.step(first, batch, real, key)
    wiped = dpsgd.restarted(second)
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(wiped.noise_memory))
    assert wiped._replace(noise_memory=()) == second._replace(noise_memory=())
    with pytest.raises(ArgumentError, match=r"state\.noise_memory"):
        dp.step(second._replace(noise_memory=()), batch, real, new_noise_key())
    plain = dpsgd.make_dp_step(loss_fn, optax.adam(0.1), plan_of()).init(params_of())
    assert dpsgd.restarted(plain) == plain and plain.noise_memory == ()


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"noise_strategy": ()}, "noise_strategy"),
        ({"noise_strategy": [1.0]}, "noise_strategy"),
        ({"noise_strategy": (0.5,)}, "noise_strategy"),
        ({"noise_strategy": (0.0, 0.0)}, "noise_strategy"),
        ({"noise_strategy": (0.0, 1.0)}, "noise_strategy"),
        ({"noise_strategy": (-1.0, 0.5)}, "noise_strategy"),
        ({"noise_strategy": (math.nan,)}, "noise_strategy"),
        ({"noise_strategy": STRATEGY, "sampling": "full"}, "noise_strategy"),
        ({"noise_strategy": STRATEGY, "expected_batch_size": 300}, "expected_batch_size"),
    ],
)
def test_strategies_that_cannot_be_accounted_are_refused_by_name(changes, parameter):
    """V23."""
    release = TrainingRelease(1.0, 1.5, 1000, 100, PARAMETERS)
    with pytest.raises(ArgumentError) as error:
        dataclasses.replace(release, **changes)
    assert error.value.parameter == parameter
