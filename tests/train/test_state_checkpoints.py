"""A loop of one's own, cut off and resumed: no charge is lost, no key comes back (V20)."""

import functools
import inspect
import itertools
import textwrap
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.dpsgd_cases import batch_of, loss_fn, params_of, plan_of

from dpfa_jax import LedgerFile, charge, dpsgd, train
from dpfa_jax.core import LedgerError
from dpfa_jax.release import AdaptiveClipping
from dpfa_jax.train.checkpoints import Checkpoints

pytestmark = pytest.mark.quickly_compiled


@functools.cache
def built(**changes):
    """A plan and its step, which is compiled once."""
    plan = plan_of(steps=6, insecure_test_noise=False, **changes)
    return plan, dpsgd.make_dp_step(loss_fn, optax.adam(0.1), plan)


def parts(**changes):
    plan, dp = built(**changes)
    return plan, dp, dp.init(params_of())


def steps(dp, state, ledger, plan, number):
    """`number` steps, charged together; the keys that they drew."""
    ledger, keys = charge(ledger, plan.release, count=number)
    for key in keys:
        state = dp.step(state, batch_of(16), jnp.ones(16, bool), key)
    return state, np.asarray(jax.random.key_data(keys)).tolist()


@pytest.mark.parametrize(
    "changes",
    [{}, {"adaptive_clipping": AdaptiveClipping()}, {"noise_strategy": (0.8, 0.6)}],
    ids=["fixed", "adaptive", "correlated"],
)
def test_what_was_charged_and_lost_stays_charged(tmp_path, changes):
    plan, dp, first = parts(**changes)
    with LedgerFile.create(tmp_path / "ledger.jsonl") as ledger:
        with train.StateCheckpoints(tmp_path / "states", plan) as checkpoints:
            begun = checkpoints.restore(first, ledger)
            assert (begun.charged, begun.lost, int(begun.state.step)) == (0, 0, 0)
            saved, keys = steps(dp, begun.state, ledger, plan, 2)
            checkpoints.save(saved, ledger)
        _, more = steps(dp, saved, ledger, plan, 2)  # released, and then the process died
        keys += more
    with (
        LedgerFile.open(tmp_path / "ledger.jsonl") as ledger,
        train.StateCheckpoints(tmp_path / "states", plan) as checkpoints,
    ):
        state, charged, lost, _ = checkpoints.restore(first, ledger)
        assert (charged, lost, int(state.step)) == (4, 2, 2)
        for found, expected in zip(
            jax.tree.leaves(state._replace(noise_memory=())),
            jax.tree.leaves(saved._replace(noise_memory=())),
            strict=True,
        ):
            np.testing.assert_array_equal(found, expected)
        assert not any(leaf.any() for leaf in jax.tree.leaves(state.noise_memory))
        state, more = steps(dp, state, ledger, plan, 2)
        checkpoints.save(state, ledger)
        assert len({tuple(key) for key in keys + more}) == 6
        assert checkpoints.restore(first, ledger)[1:3] == (6, 2)


def test_no_past_noise_goes_to_the_disk(tmp_path, monkeypatch):
    """Whoever has it can take noise out of what was released."""
    plan, dp, first = parts(noise_strategy=(0.8, 0.6))
    written, save = [], Checkpoints.save

    def spied(self, state, note):
        written.append(state)
        save(self, state, note)

    monkeypatch.setattr(Checkpoints, "save", spied)
    with LedgerFile.create(tmp_path / "ledger.jsonl") as ledger:
        state, _ = steps(dp, first, ledger, plan, 2)
        assert any(leaf.any() for leaf in jax.tree.leaves(state.noise_memory))  # the control
        with train.StateCheckpoints(tmp_path / "states", plan) as checkpoints:
            checkpoints.save(state, ledger)
    assert [state.noise_memory for state in written] == [()]


def test_a_ledger_that_did_not_pay_is_refused(tmp_path):
    """Rolled back, another's, or another plan's."""
    plan, dp, first = parts()
    path = tmp_path / "ledger.jsonl"
    with LedgerFile.create(path) as ledger, train.StateCheckpoints(tmp_path / "s", plan) as saving:
        before = path.read_bytes()
        state, _ = steps(dp, first, ledger, plan, 2)
        saving.save(state, ledger)
        with pytest.raises(LedgerError, match=r"2 steps of this plan are charged, .* has 3"):
            saving.save(state._replace(step=np.asarray(3, np.int32)), ledger)
    path.write_bytes(before)
    with LedgerFile.open(path) as ledger:
        charge(ledger, plan.release, count=2)
        with (
            train.StateCheckpoints(tmp_path / "s", plan) as reading,
            pytest.raises(LedgerError, match="expect_head"),
        ):
            reading.restore(first, ledger)


def test_a_state_is_saved_once_and_none_before_it(tmp_path):
    """Saving after the loop what the loop has saved is no fault; going back is one."""
    plan, dp, first = parts()
    with (
        LedgerFile.create(tmp_path / "ledger.jsonl") as ledger,
        train.StateCheckpoints(tmp_path / "s", plan) as checkpoints,
    ):
        one, _ = steps(dp, first, ledger, plan, 1)
        two, _ = steps(dp, one, ledger, plan, 1)
        checkpoints.save(two, ledger)
        checkpoints.save(two, ledger)
        with pytest.raises(LedgerError, match=r"state.step = 1: a state with 2 steps is saved"):
            checkpoints.save(one, ledger)
        assert checkpoints.restore(first, ledger).left == plan.steps - 2


def test_a_cycle_charged_in_full_leaves_no_less_than_nothing(tmp_path):
    plan, _, first = parts(noise_strategy=(0.8, 0.6))
    with (
        LedgerFile.create(tmp_path / "ledger.jsonl") as ledger,
        train.StateCheckpoints(tmp_path / "s", plan) as checkpoints,
    ):
        charge(ledger, plan.release, count=plan.steps + 1)
        assert checkpoints.restore(first, ledger).left == 0


def test_the_documented_loop_spends_what_the_plan_is_of(tmp_path):
    """Correlated noise, cut off in its second block and resumed: all charged, and no more."""
    page = inspect.getdoc(train.StateCheckpoints).partition("A loop::\n\n")[2]
    loop = "\n".join(itertools.takewhile(lambda line: line[:1] in " ", page.splitlines()))
    plan, dp, _ = parts(noise_strategy=(0.8, 0.6))
    path, taken = tmp_path / "ledger.jsonl", []
    loop = textwrap.dedent(loop).replace("10 * noise_bands", "noise_bands")

    def step(state, *given):
        taken.append(state)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return dp.step(state, *given)

    known = {"LedgerFile": LedgerFile, "charge": charge, "take_batch": dpsgd.take_batch}
    known |= {"StateCheckpoints": train.StateCheckpoints, "itertools": itertools, "np": np}
    known |= {"path": path, "folder": tmp_path / "states", "plan": plan, "noise_bands": 2}
    known |= {"dp": SimpleNamespace(init=dp.init, step=step), "params": params_of()}
    known |= {"examples": batch_of(plan.release.dataset_size)}
    LedgerFile.create(path).close()
    with pytest.raises(KeyboardInterrupt):
        exec(loop, known)
    exec(loop, known)
    with LedgerFile.open(path, read_only=True) as ledger:
        assert ledger.ledger.count_of(plan.release) == plan.steps
    assert known["begun"][1:] == (4, 2, 2) and len(taken) == 6
