"""Clip groups made from a parameter tree, and trees that no plan may take (V18, V23)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.dpsgd_cases import (
    PARAMETERS,
    batch_of,
    flat,
    loss_fn,
    params_of,
    plan_of,
    release_once,
)

from dpfa_jax import accounting, dpsgd
from dpfa_jax.core import ArgumentError

pytestmark = pytest.mark.quickly_compiled

NESTED = {"encoder": [{"kernel": np.ones((3, 4)), "bias": np.ones(4)}] * 2, "head": np.ones(6)}


@pytest.mark.parametrize("weights", ["equal", "size"])
def test_per_layer_norms_allow_an_example_as_much_as_one_flat_norm(weights):
    """V18: sum C_l^2 = C^2, so the noise at a given multiplier is that of flat clipping."""
    groups, norms = dpsgd.per_layer_groups(params_of(), 0.7, weights=weights)
    assert groups == (("bias",), ("head",), ("kernel",))
    assert np.sum(np.square(norms)) == pytest.approx(0.49, rel=1e-12)
    sizes = np.array([1, 4, 20]) if weights == "size" else np.ones(3)
    np.testing.assert_allclose(np.square(norms), 0.49 * sizes / sizes.sum())
    layered = plan_of(l2_clip_norm=norms, groups=groups).release
    flat_release = plan_of(l2_clip_norm=0.7).release
    np.testing.assert_allclose(layered.noise_stddevs, flat_release.noise_stddevs * 3)


def test_a_layer_is_as_many_names_as_asked_for():
    assert dpsgd.per_layer_groups(NESTED, 1.0, depth=1).groups == (("encoder",), ("head",))
    layers = dpsgd.per_layer_groups(NESTED, 1.0, depth=2, weights="size")
    assert layers.groups == (("encoder/0",), ("encoder/1",), ("head",))
    np.testing.assert_allclose(np.square(layers.l2_clip_norms), np.array([16, 16, 6]) / 38)
    assert len(dpsgd.per_layer_groups(NESTED, 1.0).groups) == 5
    assert dpsgd.per_layer_groups(np.ones(3), 2.0) == ((("",),), (2.0,))


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        ({"l2_clip_norm": -1.0}, "l2_clip_norm"),
        ({"weights": "loud"}, "weights"),
        ({"depth": 0}, "depth"),
        ({"params": {}}, "params"),
    ],
)
def test_bad_groupings_are_refused_by_name(arguments, parameter):
    """V23."""
    arguments = {"params": NESTED, "l2_clip_norm": 1.0} | arguments
    with pytest.raises(ArgumentError) as error:
        dpsgd.per_layer_groups(**arguments)
    assert error.value.parameter == parameter


def calibrated(**changes):
    arguments = {
        "epsilon": 1.0,
        "delta": 1e-5,
        "dataset_size": 1000,
        "expected_batch_size": 64,
        "steps": 3,
        "l2_clip_norm": 0.7,
        "params": params_of(),
        "insecure_test_noise": True,
    }
    return dpsgd.DPSGDPlan.calibrated(**arguments | changes)


def test_a_plan_clips_per_layer_in_one_line(monkeypatch):
    """The noise itself is calibrated in test_plan; here it would only take seconds."""
    solved = accounting.Calibration(None, 3, 1.0, 1e-5)
    monkeypatch.setattr(
        accounting, "calibrate", lambda release, **_: dataclasses.replace(solved, release=release)
    )
    plan = calibrated(clipping="per_layer")
    assert plan.release.num_parameters == PARAMETERS
    assert (plan.groups, plan.release.l2_clip_norms) == dpsgd.per_layer_groups(params_of(), 0.7)
    assert plan.capacity == 128 and plan.micro_batch_size == 64


def test_each_layer_of_an_example_is_clipped_to_its_own_norm():
    """Of one loud example every parameter's sum has exactly that parameter's clip norm."""
    groups, norms = dpsgd.per_layer_groups(params_of(), 0.7)
    plan = plan_of(l2_clip_norm=norms, groups=groups, noise_multiplier=2.0**-12)
    batch = batch_of(16)
    batch["y"] = batch["y"] + 100.0
    sums = release_once(plan, batch, np.arange(16) < 1).sums
    for name, norm in zip(("bias", "head", "kernel"), norms, strict=True):
        assert np.linalg.norm(flat(sums[name])) == pytest.approx(norm, abs=2e-3)


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"params": None}, "num_parameters"),
        ({"params": None, "num_parameters": 25, "clipping": "per_layer"}, "params"),
        ({"clipping": "per_layer", "l2_clip_norm": (1.0, 1.0)}, "clipping"),
        ({"clipping": "per_layer", "groups": (("",),)}, "clipping"),
        ({"clipping": "none"}, "clipping"),
    ],
)
def test_contradicting_clipping_is_refused_by_name(changes, parameter):
    """V23."""
    with pytest.raises(ArgumentError) as error:
        calibrated(**changes)
    assert error.value.parameter == parameter


def test_one_array_under_two_names_is_refused_by_both_names():
    """Tied weights must be one leaf; equal values in two arrays pass."""
    params = params_of()
    tied = {"first": params["head"], "second": params["head"], "rest": jnp.zeros(17)}
    plan = plan_of(num_parameters=PARAMETERS)
    for owner in (dpsgd.make_dp_step(loss_fn, optax.sgd(0.1), plan), dpsgd.noisy_sum(plan)):
        with pytest.raises(ArgumentError, match=r"params\['second'\].*params\['first'\]"):
            owner.init(tied)
        owner.init(jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tied))
