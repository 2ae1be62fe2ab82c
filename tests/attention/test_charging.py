"""`charge`: recorded first, then and only then a key."""

import jax
import numpy as np
import pytest

from dpfa_jax.accounting import Budget, Ledger, LedgerFile
from dpfa_jax.attention import charge, charging, dp_attention
from dpfa_jax.core import BudgetExceededError, KeyReuseError
from dpfa_jax.noise import generator_of
from dpfa_jax.release import ExampleRelease

RELEASE = ExampleRelease(1.0, 10.0, 3, 2, 4)


def refuse_keys(shape):
    raise OSError("no entropy")


def test_a_ledger_gets_the_charge_and_the_caller_a_secret_key():
    ledger, noise_key = charge(Ledger(), RELEASE)
    assert ledger.total_count == 1 and ledger.is_private
    assert noise_key.shape == () and generator_of(noise_key).is_secret
    again, other = charge(ledger, RELEASE)
    assert again.total_count == 2 and ledger.total_count == 1  # frozen
    assert (jax.random.key_data(noise_key) != jax.random.key_data(other)).any()


def test_a_count_gives_that_many_keys():
    """None: one key without an axis; n: n keys, all different, also for n = 1."""
    ledger, keys = charge(Ledger(), RELEASE, 5)
    assert ledger.total_count == 5 and keys.shape == (5,)
    assert len({tuple(w) for w in np.asarray(jax.random.key_data(keys)).tolist()}) == 5
    assert charge(ledger, RELEASE, 1)[1].shape == (1,)


def test_a_file_holds_the_charge_before_there_is_a_key(tmp_path, monkeypatch):
    """A crash between charge and key wastes budget; it never loses a charge."""
    path = tmp_path / "ledger.jsonl"
    with LedgerFile.create(path) as file:
        assert charge(file, RELEASE)[0] is file
        monkeypatch.setattr(charging, "new_noise_key", refuse_keys)
        with pytest.raises(OSError, match="no entropy"):
            charge(file, RELEASE, 3)
    with LedgerFile.open(path) as file:
        assert file.ledger.total_count == 4


def test_over_budget_there_is_no_key(tmp_path, monkeypatch):
    """V22: refusal comes before the key is made, and the file does not grow."""
    with LedgerFile.create(tmp_path / "ledger.jsonl", budget=Budget(0.7, 1e-5)) as file:
        charge(file, RELEASE)
        made = []
        monkeypatch.setattr(charging, "new_noise_key", made.append)
        with pytest.raises(BudgetExceededError):
            charge(file, RELEASE, 50)
        assert not made and file.ledger.total_count == 1


@pytest.mark.parametrize("count", [0, -1, 1.5, True, 2**24 + 1, 10**15])
def test_a_bad_count_is_refused_and_not_charged(count, tmp_path):
    """V23."""
    with LedgerFile.create(tmp_path / "ledger.jsonl") as file:
        with pytest.raises(ValueError, match="count"):
            charge(file, RELEASE, count)
        assert file.ledger.total_count == 0


def test_one_key_serves_disjoint_parts_of_one_answer_only():
    """V11: `batch_start` counted in calls instead of rows would repeat the noise of shared rows."""
    _, noise_key = charge(Ledger(), RELEASE)
    x = np.ones((2, 3, 2, 4), np.float32)

    def part(start):
        return dp_attention(x, x, x, release=RELEASE, noise_key=noise_key, batch_start=start)

    assert (part(0) != part(2)).any()
    with pytest.raises(KeyReuseError, match="overlapping"):
        part(1)
