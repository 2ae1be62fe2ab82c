"""A budget that the data cannot carry."""

import pytest

from dpfa_jax.core import ArgumentError
from dpfa_jax.release import TrainingRelease
from dpfa_jax.train.feasible import require_signal, signal_to_noise


def _release(noise, batch=512, parameters=62_000):
    return TrainingRelease(1.0, noise, 5485, batch, parameters)


def test_ratio_follows_the_formula():
    # 120 steps: signal 120 C; noise sigma C sqrt(120 D) / batch.
    expected = 512 * 120**0.5 / (1.7 * 62_000**0.5)
    assert signal_to_noise(_release(1.7), 120) == pytest.approx(expected)
    assert expected > 10.0


def test_drowned_signal_is_refused_and_says_what_to_do():
    require_signal(_release(22.0), 120, 0.2)
    with pytest.raises(ArgumentError, match=r"--epsilon.*--batch.*--model") as caught:
        require_signal(_release(23.0), 120, 0.2)
    assert caught.value.parameter == "epsilon" and caught.value.value == 0.2
