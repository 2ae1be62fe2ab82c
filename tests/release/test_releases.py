"""The three releases: what each says of itself, and what it refuses (parts of V18 and V23)."""

import dataclasses
import math

import numpy as np
import pytest

from dpfa_jax.core import ArgumentError
from dpfa_jax.release import ExampleRelease, RecordRelease, TrainingRelease, noise_grid, sensitivity
from dpfa_jax.release.memory import sensitivity as memory_sensitivity

TRAINING = TrainingRelease((1.0, 0.5), 1.5, 1000, 50, 10_000, noise_shares=(1.0, 3.0))
EXAMPLE = ExampleRelease(0.5, 2.0, 16, 4, 8, noise_shares=(1.0, 1.0, 2.0, 4.0))
WHOLE = ExampleRelease(0.5, 2.0, 16, 4, 8, clip="example")
SUM = RecordRelease(2.0, 1.0, 1.2, 3, 4, 8)
RATIO = RecordRelease(
    2.0, 1.0, 1.2, 3, 4, 8, form="ratio", relation="substitute", memory_length=4096
)
ALL = (TRAINING, EXAMPLE, WHOLE, SUM, RATIO)


@pytest.mark.parametrize("release", ALL)
def test_record_folds_to_the_noise_multiplier(release):
    record = release.record()
    assert record.noise_multiplier == pytest.approx(release.noise_multiplier, rel=1e-12)
    assert record.unit == release.unit and record.relation == release.relation
    assert hash(record) == hash(release.record())
    assert release.does_not_protect
    assert record.is_secret_noise


@pytest.mark.parametrize("release", ALL)
def test_noise_follows_the_multiplier_only(release):
    doubled = dataclasses.replace(release, noise_multiplier=2.0 * release.noise_multiplier)
    np.testing.assert_allclose(
        doubled.noise_stddevs, 2.0 * np.array(release.noise_stddevs), rtol=1e-14
    )
    assert doubled.l2_sensitivities == release.l2_sensitivities


@pytest.mark.parametrize("release", ALL)
def test_every_release_tells_its_event(release):
    import dp_accounting

    event = release.record().dp_event()
    if release is TRAINING:
        assert isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent)
        assert (event.dataset_size, event.sampling_probability) == (1000, 0.05)
        # capacity: mean + 5 standard deviations
        assert event.truncated_batch_size == math.ceil(50 + 5 * math.sqrt(50 * 0.95))
    else:
        assert isinstance(event, dp_accounting.GaussianDpEvent)
    assert event.noise_multiplier == pytest.approx(release.noise_multiplier, rel=1e-12)


def test_memory_sensitivity_holds_the_floating_point_slack():
    slack = 1.0 + memory_sensitivity.ACCUMULATION_SLACK
    assert SUM.l2_sensitivities[0] == slack * sensitivity.memory_sum(1.0, 1.0, 3, 1, "mask")
    assert RATIO.l2_sensitivities[0] == slack * sensitivity.memory_ratio(1.0, 2.0, 3, 4096, 1)
    assert len(SUM.l2_sensitivities) == 4


def test_dimension_counts_every_released_number():
    assert TRAINING.record().dimension == 10_000
    assert EXAMPLE.record().dimension == 16 * 4 * 8
    assert SUM.record().dimension == 3 * 4 * 9
    assert RATIO.record().dimension == 3 * 4 * 8


def test_insecure_noise_is_said_by_the_record():
    insecure = dataclasses.replace(TRAINING, insecure_test_noise=True).record()
    assert not insecure.is_secret_noise
    assert "INSECURE" in insecure.generator
    assert insecure != TRAINING.record()


@pytest.mark.parametrize("stddev", [1e-3, 0.7, 1.0, 123.4])
def test_grid_is_a_power_of_two_near_a_sixteenth(stddev):
    grid = noise_grid(stddev)
    assert math.log2(grid) == round(math.log2(grid))
    assert 2**-0.5 <= grid / (stddev / 16) <= 2**0.5


BAD = [
    (TRAINING, "l2_clip_norm", math.nan),
    (TRAINING, "l2_clip_norm", -1.0),
    (TRAINING, "l2_clip_norm", "1"),
    (TRAINING, "noise_multiplier", 0.0),
    (TRAINING, "noise_multiplier", None),
    (TRAINING, "dataset_size", 0),
    (TRAINING, "dataset_size", 10.5),
    (TRAINING, "expected_batch_size", 2000),
    (TRAINING, "truncated_batch_size", 10),
    (TRAINING, "sampling", "random"),
    (TRAINING, "noise_shares", (1.0,)),
    (TRAINING, "noise_shares", (1.0, -1.0)),
    (TRAINING, "num_parameters", True),
    (TRAINING, "noise_multiplier", 1e300),
    (TRAINING, "l2_clip_norm", 1e-40),
    (EXAMPLE, "noise_multiplier", 1e-300),
    (EXAMPLE, "noise_shares", (1.0, 1e-200, 1.0, 1.0)),
    (SUM, "weight_scale", 1e30),
    (EXAMPLE, "l2_clip_norm", math.inf),
    (EXAMPLE, "query_length", 0),
    (EXAMPLE, "num_heads", -3),
    (EXAMPLE, "clip", "batch"),
    (EXAMPLE, "noise_shares", (1.0, 0.0, 1.0, 1.0)),
    (WHOLE, "noise_shares", (1.0, 2.0, 1.0, 1.0)),
    (SUM, "logit_bound", 0.0),
    (SUM, "logit_bound", math.nan),
    (SUM, "value_clip_norm", -1.0),
    (SUM, "weight_scale", 0.0),
    (SUM, "floor", -1.0),
    (SUM, "memory_length", 100),
    (SUM, "tokens_per_record", 0),
    (SUM, "relation", "add_or_remove"),
    (SUM, "form", "mean"),
    (RATIO, "relation", "mask"),
    (RATIO, "memory_length", None),
    (RATIO, "memory_length", 0),
]


@pytest.mark.parametrize(("release", "name", "value"), BAD)
def test_bad_arguments_are_refused_by_name(release, name, value):
    """V23: the error names the parameter and the value, and says what to do."""
    with pytest.raises(ArgumentError) as caught:
        dataclasses.replace(release, **{name: value})
    assert caught.value.parameter == name
    assert repr(caught.value.value) in repr(value)
    assert repr(caught.value.value) in str(caught.value)
    assert caught.value.advice in str(caught.value) and caught.value.advice


def test_traced_and_array_numbers_are_refused():
    """A bound must not depend on traced values."""
    with pytest.raises(ArgumentError, match="noise_multiplier"):
        dataclasses.replace(TRAINING, noise_multiplier=np.ones(3))
