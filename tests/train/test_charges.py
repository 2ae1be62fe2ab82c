"""Real noise is never seeded; every key is charged first."""

import numpy as np
import pytest

from dpfa_jax.accounting import LedgerFile
from dpfa_jax.dpsgd import DPSGDPlan
from dpfa_jax.noise import key_words
from dpfa_jax.release import TrainingRelease
from dpfa_jax.train.charges import charge_block, charged_steps, default_block, index_batches


def _plan(insecure):
    release = TrainingRelease(
        1.0, 2.0, 100, 10, 5, truncated_batch_size=32, insecure_test_noise=insecure
    )
    return DPSGDPlan(release, steps=8, delta=1e-5, micro_batch_size=32)


def _words(path, insecure, seed):
    with LedgerFile.create(path, insecure_test_noise=insecure) as file:
        keys = charge_block(file, _plan(insecure), 4, insecure_seed=seed, first=2)
        assert charged_steps(file) == 4
        return np.asarray(key_words(keys)).tolist()


def test_real_keys_differ_and_test_keys_repeat(tmp_path):
    real = _words(tmp_path / "a", False, None), _words(tmp_path / "b", False, None)
    assert len({tuple(words) for run in real for words in run}) == 8
    assert _words(tmp_path / "c", True, 3) == _words(tmp_path / "d", True, 3)
    assert _words(tmp_path / "e", True, 4) != _words(tmp_path / "f", True, 3)


def test_no_key_without_a_charge(tmp_path, monkeypatch):
    """V20: the key is made after the charge is on the disk, or never."""
    made = []
    monkeypatch.setattr("dpfa_jax.attention.charging.new_noise_key", made.append)
    with LedgerFile.create(tmp_path / "a") as file:
        monkeypatch.setattr(file, "charge", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            charge_block(file, _plan(False), 2, insecure_seed=None, first=0)
    assert made == []


def test_batches_are_secret_unless_seeded():
    real = [
        list(index_batches(_plan(False), 8, insecure_seed=None, first=0, charged=0))
        for _ in range(2)
    ]
    assert not np.array_equal(*real)
    whole = list(index_batches(_plan(True), 8, insecure_seed=5, first=0, charged=0))
    rest = list(index_batches(_plan(True), 5, insecure_seed=5, first=3, charged=3))
    assert np.array_equal(whole[3:], rest)


def test_one_kill_wastes_about_a_hundredth():
    assert [default_block(steps) for steps in (1, 120, 1000, 20_000)] == [1, 2, 20, 400]
