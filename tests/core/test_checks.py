"""Numbers that no float or array index holds are refused by name (V23)."""

import fractions

import numpy as np
import pytest

from dpfa_jax.core import ArgumentError, checks
from dpfa_jax.noise import insecure_test_key
from dpfa_jax.release import ExampleRelease, TrainingRelease

VAST = (10**400, 10**5000, -(10**5000), fractions.Fraction(10**400))


def refused(name, call):
    with pytest.raises(ArgumentError) as error:
        call()
    assert error.value.parameter == name and str(error.value).startswith(f"{name} = ")
    return str(error.value)


@pytest.mark.parametrize("value", VAST, ids=["int", "long int", "negative int", "fraction"])
def test_numbers_too_large_for_a_float(value):
    """A typed error that can be printed: Python itself refuses to print an int of 5000 digits."""
    for check in (checks.real, checks.positive, checks.probability, checks.delta, checks.magnitude):
        refused("x", lambda check=check: check("x", value))
    refused("x", lambda: checks.count("x", value))


def test_counts_have_an_upper_limit():
    assert checks.count("n", 2**53) == 2**53
    assert checks.count("n", np.int64(7)) == 7
    assert checks.count("n", 2**60, maximum=2**60) == 2**60
    assert "more than 9007199254740992" in refused("n", lambda: checks.count("n", 2**53 + 1))
    assert "more than 5" in refused("n", lambda: checks.count("n", 6, maximum=5))
    assert insecure_test_key(2**63 - 1).shape == ()
    refused("seed", lambda: insecure_test_key(2**63))


def test_releases_refuse_absurd_sizes():
    """Without the limit these overflow later, in an accountant."""
    refused("dataset_size", lambda: TrainingRelease(1.0, 1.0, 10**20, 100, 10))
    refused("num_parameters", lambda: TrainingRelease(1.0, 1.0, 1000, 100, 10**400))
    example = {"query_length": 4, "num_heads": 2, "head_dim": 8}
    example |= {"l2_clip_norm": 1.0, "noise_multiplier": 1.0}
    ExampleRelease(**example)
    refused("query_length", lambda: ExampleRelease(**example | {"query_length": 10**400}))
    refused("noise_multiplier", lambda: ExampleRelease(**example | {"noise_multiplier": 10**400}))
