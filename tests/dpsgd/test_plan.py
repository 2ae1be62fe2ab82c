"""The plan refuses what contradicts itself, and keeps its budget (V18, V23)."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.dpsgd_cases import batch_of, loss_fn, params_of, plan_of

from dpfa_jax import accounting, dpsgd
from dpfa_jax.core import ArgumentError, BudgetExceededError, CoverageError, KeyReuseError
from dpfa_jax.noise.keys import insecure_test_key, new_noise_key

pytestmark = pytest.mark.quickly_compiled

GROUPS = (("bias", "head"), ("kernel",))


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1e-3}, "delta"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"micro_batch_size": 5}, "micro_batch_size"),
        ({"l2_clip_norm": float("nan")}, "l2_clip_norm"),
        ({"l2_clip_norm": -1.0}, "l2_clip_norm"),
        ({"l2_clip_norm": 1e-40}, "l2_clip_norm"),
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"truncated_batch_size": 4}, "truncated_batch_size"),
        ({"expected_batch_size": 2000}, "expected_batch_size"),
        ({"sampling": "shuffled", "truncated_batch_size": None}, "release.sampling"),
        ({"l2_clip_norm": (1.0, 1.0)}, "groups"),
        ({"groups": GROUPS}, "groups"),
        ({"groups": [["kernel"]]}, "groups"),
        ({"l2_clip_norm": (1.0,), "groups": ((),)}, "groups"),
    ],
)
def test_inconsistent_plans_are_refused_by_name(changes, parameter):
    """V23."""
    with pytest.raises(ArgumentError) as error:
        plan_of(**changes)
    assert error.value.parameter == parameter
    assert error.value.advice


def good_call():
    plan = plan_of()
    dp = dpsgd.make_dp_step(loss_fn, optax.sgd(0.1), plan)
    return {
        "state": dp.init(params_of()),
        "batch": batch_of(16),
        "is_real": jnp.ones(16, bool),
        "noise_key": insecure_test_key(0),
    }, dp


@pytest.mark.parametrize(
    ("argument", "value", "error_type", "match"),
    [
        ("noise_key", None, ArgumentError, "noise_key = None"),
        ("noise_key", 7, ArgumentError, "seed where a noise key is due"),
        ("noise_key", np.zeros(2, np.uint32), ArgumentError, "noise_key"),
        ("noise_key", insecure_test_key(0, (2,)), ArgumentError, "single key"),
        ("noise_key", new_noise_key(), ArgumentError, "noise_key"),
        ("is_real", jnp.ones(16), ArgumentError, "is_real"),
        ("is_real", jnp.ones(12, bool), ArgumentError, "capacity 16"),
        ("batch", batch_of(12), ArgumentError, "batch"),
    ],
)
def test_bad_calls_are_refused_before_anything_runs(argument, value, error_type, match):
    """V23: the state is untouched and the same call with a good argument goes through."""
    arguments, dp = good_call()
    with pytest.raises(error_type, match=match):
        dp.step(**arguments | {argument: value})


def test_parameters_that_do_not_fit_the_plan_are_refused_at_init():
    """V23: a wrong number names both; an integer leaf and an uncovered leaf are named."""
    dp = dpsgd.make_dp_step(loss_fn, optax.sgd(0.1), plan_of(num_parameters=26))
    with pytest.raises(ArgumentError, match=r"params = 25.*num_parameters = 26"):
        dp.init(params_of())
    with pytest.raises(ArgumentError, match=r"params\['table'\]"):
        dp.init(params_of() | {"table": jnp.zeros(1, jnp.int32)})
    with pytest.raises(ArgumentError, match="optimizer"):
        dpsgd.make_dp_step(loss_fn, 0.1, plan_of())


@pytest.mark.parametrize(
    ("groups", "error_type", "match"),
    [
        ((("head",), ("kernel",)), CoverageError, "'bias'"),
        ((("bias", "head", "kernel"), ("kernel",)), ArgumentError, "'kernel' is under"),
        ((("bias", "head", "kern"), ("kernel",)), ArgumentError, "covers none"),
        ((("bias", "hea"), ("kernel",)), CoverageError, "'head'"),
    ],
)
def test_every_parameter_is_in_exactly_one_group(groups, error_type, match):
    plan = plan_of(l2_clip_norm=(1.0, 0.5), groups=groups)
    for owner in (dpsgd.noisy_sum(plan), dpsgd.make_dp_step(loss_fn, optax.sgd(0.1), plan)):
        with pytest.raises(error_type, match=match):
            owner.init(params_of())


def test_no_step_beyond_the_plan_and_no_key_twice():
    """V11, V22's sense: the refusal comes before the launch."""
    plan = plan_of(steps=2, insecure_test_noise=False)
    dp = dpsgd.make_dp_step(loss_fn, optax.sgd(0.1), plan)
    first, key = dp.init(params_of()), new_noise_key()
    batch, real = batch_of(16), jnp.ones(16, bool)
    second = dp.step(first, batch, real, key)
    for state in (first, second):  # one charge pays for one step, whatever its number
        with pytest.raises(KeyReuseError):
            dp.step(state, batch, real, key)
    third = dp.step(second, batch, real, new_noise_key())
    with pytest.raises(BudgetExceededError, match="step 2 is beyond"):
        dp.step(third, batch, real, new_noise_key())


def test_the_calibrated_plan_keeps_its_budget():
    """V18: epsilon of the planned steps is at most the one asked for, and not far below."""
    plan = dpsgd.DPSGDPlan.calibrated(
        epsilon=3.0,
        delta=1e-5,
        dataset_size=5000,
        expected_batch_size=250,
        steps=50,
        l2_clip_norm=1.0,
        num_parameters=PARAMETERS_OF_A_MODEL,
        micro_batch_size=64,
    )
    assert plan.capacity % 64 == 0 and plan.capacity >= 250 + 5 * np.sqrt(250 * 0.95)
    assert 2.9 < plan.epsilon <= 3.0
    assert plan.record().sampling == plan.release.batches()
    assert plan.record().dimension == PARAMETERS_OF_A_MODEL
    quieter = dataclasses.replace(
        plan,
        release=dataclasses.replace(
            plan.release, noise_multiplier=0.8 * plan.release.noise_multiplier
        ),
    )
    assert quieter.epsilon > 3.0


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [
        (3, 33),
        (512 / 5485 * 7, 7),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((0.1, 2), (1e-9, 1), (10.0, 108))),
    ],
)
def test_epochs_stand_for_steps(epochs, steps, monkeypatch):
    """ceil(epochs * dataset_size / expected_batch_size), and never a step more by rounding."""
    numbers = {"epsilon": 3.0, "delta": 1e-5, "dataset_size": 5485, "expected_batch_size": 512}
    rest = {"l2_clip_norm": 1.0, "num_parameters": 9}
    # The same question takes its seconds once.
    monkeypatch.setattr(accounting, "calibrate", functools.cache(accounting.calibrate))
    plan = dpsgd.DPSGDPlan.calibrated(epochs=epochs, **numbers, **rest)
    assert plan.steps == steps and plan.epsilon <= 3.0
    assert plan == dpsgd.DPSGDPlan.calibrated(steps=steps, **numbers, **rest)


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({}, "steps"),
        ({"steps": 3, "epochs": 1.0}, "steps"),
        ({"epochs": 0.0}, "epochs"),
        ({"epochs": float("nan")}, "epochs"),
        ({"epochs": 1e308}, "steps"),
        ({"epochs": 1.0, "expected_batch_size": 0}, "expected_batch_size"),
        ({"epochs": 1.0, "dataset_size": 0}, "dataset_size"),
    ],
)
def test_steps_or_epochs_and_not_both(changes, parameter):
    """V23."""
    numbers = {"epsilon": 3.0, "delta": 1e-5, "dataset_size": 5485, "expected_batch_size": 512}
    with pytest.raises(ArgumentError) as error:
        dpsgd.DPSGDPlan.calibrated(**numbers | changes, l2_clip_norm=1.0, num_parameters=9)
    assert error.value.parameter == parameter


PARAMETERS_OF_A_MODEL = 62_000
