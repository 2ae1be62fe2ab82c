"""`charge`: recorded first, then and only then a key."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpfa_jax.accounting import Budget, Ledger, LedgerFile
from dpfa_jax.attention import charge, charging, dp_attention
from dpfa_jax.core import ArgumentError, BudgetExceededError, KeyReuseError
from dpfa_jax.dpsgd import DPSGDPlan, make_dp_step
from dpfa_jax.noise import generator_of
from dpfa_jax.release import ExampleRelease, TrainingRelease

pytestmark = pytest.mark.quickly_compiled

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


def test_a_key_serves_the_release_that_was_charged_and_no_other():
    """V23: noise 400 times smaller than was paid for would look the same in the ledger."""
    quiet = dataclasses.replace(RELEASE, noise_multiplier=0.025)
    _, noise_keys = charge(Ledger(), RELEASE, count=3)
    _, quiet_key = charge(Ledger(), quiet)
    x = jnp.ones((1, 3, 2, 4))
    with pytest.raises(ArgumentError, match=r"noise_key.*charged for another release"):
        dp_attention(x, x, x, release=quiet, noise_key=noise_keys[1])
    stacked = jnp.stack([x, x])
    with pytest.raises(ArgumentError, match="charged for another release"):
        jax.vmap(lambda x, key: dp_attention(x, x, x, release=quiet, noise_key=key))(
            stacked, jnp.stack([quiet_key, noise_keys[0]])
        )
    dp_attention(x, x, x, release=RELEASE, noise_key=noise_keys[1])  # the refusals spent nothing
    dp_attention(x, x, x, release=quiet, noise_key=quiet_key)


def test_a_key_of_another_plan_is_refused_by_the_step():
    plans = [
        DPSGDPlan(TrainingRelease(1.0, noise, 100, 4, 1), steps=2, delta=1e-3, micro_batch_size=7)
        for noise in (1.0, 0.01)
    ]
    _, noise_key = charge(Ledger(), plans[0].release)
    params, batch = {"w": jnp.zeros(1)}, {"x": jnp.ones((plans[1].capacity, 1))}
    dp = make_dp_step(lambda p, b: b["x"] @ p["w"], optax.sgd(0.1), plans[1])
    with pytest.raises(ArgumentError, match="charged for another release"):
        dp.step(dp.init(params), batch, jnp.ones(plans[1].capacity, bool), noise_key)
