"""Clipping modes, adaptive clip norms and correlated noise in whole runs of a few steps."""

import dataclasses
import json
import signal

import numpy as np
import pytest
from helpers.tiny_run import tiny_config, write_csv

import dpfa_jax.train.loop as loop
from dpfa_jax.accounting import LedgerFile
from dpfa_jax.core import ArgumentError
from dpfa_jax.dpsgd import DPSGDPlan
from dpfa_jax.train import RunError, TrainConfig, train
from dpfa_jax.train.charges import index_batches
from dpfa_jax.train.checkpoints import Checkpoints
from dpfa_jax.train.noise_sums import summed_noise
from dpfa_jax.train.options import less_than_asked
from dpfa_jax.train.progress import PlainProgress
from dpfa_jax.train.run_folder import RunFolder, require_same_settings, stored_config


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "texts.csv")


def _run(csv, out, **options):
    config = tiny_config(csv, out, insecure_test_noise=True, evaluate_every=6, **options)
    return config, train(config, PlainProgress())


def _interrupted_and_resumed(csv, out, monkeypatch, at, **options):
    """A run that a signal stops after the block that begins at step `at`, then goes on."""
    real = loop.charge_block

    def charge_and_signal(*args, **kwargs):
        keys = real(*args, **kwargs)
        if kwargs["first"] == at:
            signal.raise_signal(signal.SIGINT)
        return keys

    with monkeypatch.context() as patch:
        patch.setattr(loop, "charge_block", charge_and_signal)
        config, report = _run(csv, out, **options)
    assert not report["finished"]
    resumed = dataclasses.replace(config, resume=True)
    return resumed, train(resumed, PlainProgress())


def _parameters(out):
    with np.load(out / "model" / "parameters.npz") as stored:
        return {name: stored[name] for name in stored.files}


def _record(out):
    with LedgerFile.open(out / "ledger.jsonl", read_only=True) as file:
        (entry,) = file.ledger.entries
        return entry, dict(file.metadata)


ADAPTIVE = {"adaptive_clipping": True, "clip": 0.25, "clip_quantile": 0.4, "clipping": "per-layer"}


@pytest.mark.slow
def test_adaptive_clip_norms_survive_a_resumption(csv, tmp_path, monkeypatch):
    """The clip norm is state: it comes out of the checkpoint, bit for bit what it would have been.

    A run that started again from the first clip norm would end elsewhere: the norms have moved.
    """
    whole, expected = _run(csv, tmp_path / "whole", **ADAPTIVE)
    cut, report = _interrupted_and_resumed(csv, tmp_path / "cut", monkeypatch, 4, **ADAPTIVE)
    options = report["options"]
    assert report["finished"] and options == expected["options"]
    first, last = options["l2_clip_norms"], options["last_l2_clip_norms"]
    assert set(first) == set(last) == {"head.bias", "head.kernel"}
    assert all(abs(np.log(last[name] / first[name])) > 0.05 for name in first)
    assert all(
        np.array_equal(a, _parameters(cut.out)[n]) for n, a in _parameters(whole.out).items()
    )
    entry, metadata = _record(cut.out)
    # Two layers' sums with C / sqrt(2) each, then their counts.
    assert entry.record.sensitivities == pytest.approx([0.25 / 2**0.5] * 2 + [0.5] * 2)
    assert entry.record.dimension == report["model"]["parameters"] + 2
    assert metadata["clipping"] == "per-layer"
    assert metadata["adaptive_clipping"]["quantile"] == 0.4 and metadata["noise_bands"] == 1
    page = (cut.out / "report.html").read_text()
    assert "per-layer, adaptive" in page and "0.4 quantile" in page and "INSECURE" in page
    # What moved the norms was released: no count, norm or clip fraction without noise is stored.
    assert "unclipped" not in json.dumps(report) and "fraction" not in json.dumps(report)
    with pytest.raises(RunError, match=r"clip_quantile was 0\.4, is 0\.5"):
        train(dataclasses.replace(cut, clip_quantile=0.5), PlainProgress())


@pytest.mark.slow
def test_correlated_noise_pays_whole_cycles_and_keeps_no_secret(csv, tmp_path, monkeypatch):
    """Thirteen steps in cycles of three are charged as fifteen, never beyond the budget.

    A checkpoint holds no past noise, so a resumed run starts afresh: no continuation shares any.
    """
    options = {"noise_bands": 3, "steps": 13, "checkpoint_every": 3}
    seen = []
    real = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, state, note: (seen.append(state), real(self, state, note))
    )
    cut, report = _interrupted_and_resumed(csv, tmp_path / "cut", monkeypatch, 3, **options)
    assert report["finished"] and (report["steps"], report["steps_charged"]) == (13, 15)
    assert 0.0 < report["epsilon_nominal"] <= 8.0 and report["accuracy"] > 0.9
    assert seen and all(state.private.noise_memory == () for state in seen)
    entry, metadata = _record(cut.out)
    assert entry.count == 15 and entry.record.sampling.cycle_length == 3
    assert metadata["noise_bands"] == 3 and len(report["options"]["noise_strategy"]) == 3
    page = (cut.out / "report.html").read_text()
    assert "correlated over 3 steps" in page and "but lost" not in page


@pytest.mark.slow
def test_lost_steps_count_as_taken_in_cyclic_batches():
    """After a crash the next batch is drawn from the group whose turn it is by what was charged."""
    plan = DPSGDPlan.calibrated(
        epsilon=8.0, delta=1e-5, dataset_size=400, expected_batch_size=40, steps=12,
        l2_clip_norm=1.0, num_parameters=10, noise_bands=4,
    )  # fmt: skip
    drawn = index_batches(plan, 4, insecure_seed=None, first=4, charged=8)
    for step, indices in enumerate(drawn, start=8):
        assert set(indices[indices >= 0] % 4) == {step % 4}


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"adaptive_clipping": True, "noise_bands": 2}, "noise_bands"),
        ({"clip_quantile": 0.5}, "clip_quantile"),
        ({"clip_learning_rate": 0.1}, "clip_learning_rate"),
        ({"clip_budget_share": 0.1}, "clip_budget_share"),
        ({"adaptive_clipping": True, "clip_quantile": 1.0}, "clip_quantile"),
        ({"adaptive_clipping": True, "clip_learning_rate": 3.0}, "clip_learning_rate"),
        ({"adaptive_clipping": True, "clip_budget_share": 0.0}, "clip_budget_share"),
        ({"clipping": "per_head"}, "clipping"),
        ({"noise_bands": 0}, "noise_bands"),
    ],
)
def test_combinations_that_nobody_accounts_for(options, parameter):
    """V23: refused before any data are read, by the name that the user wrote."""
    with pytest.raises(ArgumentError) as caught:
        TrainConfig(**options).check()
    assert caught.value.parameter == parameter


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"noise_bands": 13}, "noise_bands"),  # more than steps
        ({"noise_bands": 4, "batch": 300, "checkpoint_every": 4}, "noise_bands"),  # small groups
        ({"noise_bands": 3}, "checkpoint_every"),  # 2, no multiple
    ],
)
def test_cycles_that_do_not_fit_the_data(csv, tmp_path, options, parameter):
    """V23."""
    with pytest.raises(ArgumentError) as caught:
        train(tiny_config(csv, tmp_path / "run", **options), PlainProgress())
    assert caught.value.parameter == parameter and not (tmp_path / "run").exists()


def test_a_run_of_an_older_version_goes_on(csv, tmp_path):
    """Settings that a run's file does not know had what is the default now; others are refused."""
    config, folder = tiny_config(csv, tmp_path / "run"), RunFolder(tmp_path / "run")
    folder.start(config, {}, ledger_head="")
    stored = folder.read()
    for name in ("clipping", "adaptive_clipping", "clip_quantile", "noise_bands"):
        del stored["config"][name]
    folder.config.write_text(json.dumps(stored))
    assert stored_config(config.out).noise_bands == 1
    require_same_settings(folder, config, {})
    with pytest.raises(RunError, match="noise_bands was 1, is 2"):
        require_same_settings(folder, dataclasses.replace(config, noise_bands=2), {})


def _plan(epsilon):
    return DPSGDPlan.calibrated(
        epsilon=epsilon, delta=1e-5, dataset_size=5485, expected_batch_size=512, steps=120,
        l2_clip_norm=1.0, num_parameters=50504,
    )  # fmt: skip


@pytest.mark.slow
def test_less_epsilon_than_asked_is_said():
    plan = _plan(1000.0)
    text = less_than_asked(plan, 1000.0)
    assert f"at most {plan.epsilon:.3g}" in text and "epsilon 1000" in text
    assert "tail" in text or "no run is planned" in text
    assert less_than_asked(_plan(3.0), 3.0) is None


def test_summed_noise_equals_the_matrix():
    """Rows of A C^-1 in float64, A the prefix sums and C the banded Toeplitz matrix."""
    steps, band = 17, (0.8, 0.45, 0.3, 0.1)
    matrix = sum(c * np.eye(steps, k=-lag) for lag, c in enumerate(band))
    rows = np.tril(np.ones((steps, steps))) @ np.linalg.inv(matrix)
    deviations = np.linalg.norm(rows, axis=1) * np.linalg.norm(band)
    found = summed_noise(band, steps)
    assert found.last == pytest.approx(deviations[-1], rel=1e-12)
    assert found.mean == pytest.approx(np.sqrt(np.mean(deviations**2)), rel=1e-12)
    independent = summed_noise((1.0,), steps)
    assert independent.last == pytest.approx(steps**0.5)
    assert independent.mean == pytest.approx(np.sqrt(np.mean(np.arange(1, steps + 1))))
