"""Whole runs in this process, with test noise: same result, resume, report, page, model."""

import dataclasses
import html.parser
import json
import math
import shutil
import signal

import jax
import numpy as np
import pytest
from helpers.tiny_run import PARAMETERS, tiny_config, write_csv
from jax.experimental.compilation_cache import compilation_cache

import dpfa_jax.train.loop as loop
from dpfa_jax.accounting import Budget, Entry, Ledger, LedgerFile, epsilon
from dpfa_jax.cli import main
from dpfa_jax.cli.program import program
from dpfa_jax.core import LedgerError
from dpfa_jax.train import RunError, load_model, train
from dpfa_jax.train.job import prepare
from dpfa_jax.train.progress import PlainProgress
from dpfa_jax.train.run_folder import RunFolder
from dpfa_jax.train.run_ledger import create_run_ledger, open_run_ledger

pytestmark = pytest.mark.quickly_compiled


@pytest.fixture(scope="module", autouse=True)
def programs_of_earlier_runs(tmp_path_factory):
    """Each run builds its step anew; the same program is compiled once."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is options:
            yield


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "texts.csv")


@pytest.fixture(scope="module")
def finished(csv, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    config = tiny_config(csv, out, insecure_test_noise=True, nonprivate_twin=True)
    return config, train(config, PlainProgress())


def _parameters(out):
    with np.load(out / "model" / "parameters.npz") as stored:
        return {name: stored[name] for name in stored.files}


def _same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def test_report_holds_what_it_must(finished):
    config, report = finished
    stored = json.loads((config.out / "report.json").read_text())
    assert stored == {name: value for name, value in report.items() if name != "folder"}
    assert stored["finished"] and stored["steps"] == stored["steps_charged"] == 12
    assert stored["epsilon"] is None and stored["insecure_test_noise"] is True
    assert 0.0 < stored["epsilon_nominal"] <= 8.0 and stored["delta"] == 1e-5
    assert stored["accuracy"] > 0.9 and stored["accuracy_nonprivate"] > 0.9
    assert 0.4 < stored["accuracy_majority"] < 0.65
    assert stored["release"]["dimension"] == stored["model"]["parameters"] == PARAMETERS
    assert stored["release"]["generator"].startswith("INSECURE")
    assert stored["seconds"] > 0 and stored["peak_memory_bytes"] > 2**26
    assert stored["versions"]["jax"] and stored["device"]
    assert [look["step"] for look in stored["history"]] == [0, 4, 8, 12]
    spent = [look["epsilon"] for look in stored["history"]]
    assert spent == sorted(spent) and spent[0] == 0.0 and spent[-1] <= 8.0
    assert any("INSECURE" in text or "test seed" in text for text in stored["does_not_protect"])
    assert "clip_fraction" not in json.dumps(stored) and "train_loss" not in json.dumps(stored)


def test_ledger_belongs_to_the_report_and_says_insecure(finished):
    config, report = finished
    file = LedgerFile.open(
        config.out / "ledger.jsonl", expect_head=report["ledger"]["head"], read_only=True
    )
    assert file.ledger.total_count == 12 and file.insecure_test_noise
    assert not file.ledger.is_private
    file.close()


class _Page(html.parser.HTMLParser):
    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag


def test_page_is_whole_self_contained_and_loud(finished):
    config, _ = finished
    text = (config.out / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.open == [] and page.seen.count("svg") == 3 and page.seen.count("table") >= 3
    assert all(link.startswith("#") for link in page.links), "fetched from elsewhere"
    assert "each parameter" not in text and "independent from step to step" in text
    assert "script" not in page.seen and "INSECURE" in text and "prefers-color-scheme" in text
    assert "#010203" not in text and "var(--private)" in text


class _Watching(PlainProgress):
    def __init__(self):
        super().__init__()
        self.seen = []

    def show(self, status, *, keep):
        self.seen.append(status)


@pytest.mark.slow  # the quick suite resumes a run, to the same bits
def test_same_seed_and_config_give_the_same_bits(finished, csv, tmp_path):
    """(seed, config) fixes everything under --insecure-test-noise.

    And what a person reads at any step is no less than what has been spent by then.
    """
    config, _ = finished
    again, watching = tiny_config(csv, tmp_path / "again", insecure_test_noise=True), _Watching()
    assert train(again, watching)["finished"]
    assert _same(_parameters(config.out), _parameters(again.out))
    with LedgerFile.open(again.out / "ledger.jsonl") as file:
        (entry,) = file.ledger.entries
    assert [status.step for status in watching.seen] == list(range(1, 13))
    for status in watching.seen:
        charged = Ledger((Entry(entry.record, 2 * math.ceil(status.step / 2)),))
        assert epsilon(charged, again.delta, nominal=True) <= status.epsilon <= again.epsilon


def test_ctrl_c_and_resume_give_the_same_bits(finished, csv, tmp_path, monkeypatch, capsys):
    """Through the command line: Ctrl-C ends the run after the block at hand with exit code 130 and
    says how to go on; what follows is the run that was cut off."""
    config, _ = finished
    real = loop.charge_block

    def charge_and_signal(*args, **kwargs):
        keys = real(*args, **kwargs)
        if kwargs["first"] == 4:
            signal.raise_signal(signal.SIGINT)
        return keys

    stopped = tiny_config(csv, tmp_path / "run", insecure_test_noise=True)
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(stopped.settings()))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "charge_block", charge_and_signal)
        assert main(["train", "--config", str(settings), "--out", str(stopped.out)]) == 130
    error = capsys.readouterr().err
    assert "Stopped after step 6 of 12" in error and "Traceback" not in error
    assert f"{program()} train --resume --out {stopped.out}" in error
    report = json.loads((stopped.out / "report.json").read_text())
    assert not report["finished"] and report["steps"] == report["steps_charged"] == 6
    assert "Stopped early" in (stopped.out / "report.html").read_text()
    assert main(["train", "--resume", "--out", str(stopped.out)]) == 0
    assert _same(_parameters(config.out), _parameters(stopped.out))


def test_resume_refuses_what_does_not_belong_together(finished, csv, tmp_path):
    config, _ = finished
    changed = tiny_config(
        csv,
        config.out,
        insecure_test_noise=True,
        nonprivate_twin=True,
        resume=True,
        learning_rate=0.06,
    )
    with pytest.raises(RunError, match=r"learning_rate was 0\.05, is 0\.06"):
        train(changed, PlainProgress())
    out = tmp_path / "rolled-back"
    shutil.copytree(config.out, out)
    ledger = out / "ledger.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
    again = tiny_config(csv, out, insecure_test_noise=True, nonprivate_twin=True, resume=True)
    with pytest.raises(LedgerError, match="rolled back"):
        train(again, PlainProgress())
    shutil.copy(config.out / "ledger.jsonl", ledger)
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(RunError, match="paid for all 12 steps"):
        train(again, PlainProgress())
    ledger.unlink()
    with pytest.raises(RunError, match=r"ledger\.jsonl: is missing"):
        train(again, PlainProgress())


def _copy_without_checkpoints(config, out):
    shutil.copytree(config.out, out)
    shutil.rmtree(out / "checkpoints")
    return dataclasses.replace(config, out=out, resume=True)


@pytest.mark.slow
def test_v21_resume_finds_charges_missing_that_the_report_counts(finished, tmp_path):
    """V21: no checkpoint is left to tell, the report is; and it is not written over."""
    config = _copy_without_checkpoints(finished[0], tmp_path / "cut")
    ledger, report = config.out / "ledger.jsonl", config.out / "report.json"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-2]))
    before = report.read_bytes(), ledger.read_bytes()
    with pytest.raises(LedgerError, match="rolled back"):
        train(config, PlainProgress())
    # Charged again, as often as before: the same number of lines is not the same ledger.
    with LedgerFile.open(ledger) as file:
        (entry,) = file.ledger.entries
        file.charge(entry.record, 2)
        file.charge(entry.record, 2)
    with pytest.raises(LedgerError, match="rolled back"):
        train(config, PlainProgress())
    assert main(["account", str(config.out)]) == 1
    ledger.write_bytes(before[1])
    assert report.read_bytes() == before[0]
    report.write_text("{}")
    with pytest.raises(RunError, match="does not name the head"):
        train(config, PlainProgress())
    # The negative control: it is the report that tells, and nothing else does.
    report.unlink()
    assert train(config, PlainProgress())["steps_charged"] == 12


def test_resume_refuses_the_ledger_of_another_run(finished, tmp_path):
    """Neither checkpoint nor report, and a ledger that is new and whole in itself."""
    config = _copy_without_checkpoints(finished[0], tmp_path / "run")
    folder, job = RunFolder(config.out), prepare(config)
    folder.report.unlink()
    open_run_ledger(folder, job).close()  # the negative control: the run's own
    assert main(["account", str(config.out)]) == 0
    with LedgerFile.open(folder.ledger, read_only=True) as own:
        header = {"budget": own.budget, "metadata": own.metadata, "insecure_test_noise": True}
    foreign = {
        "budget = None": header | {"budget": None},
        "budget = ": header | {"budget": Budget(80.0, 1e-5)},
        "metadata = ": header | {"metadata": {"purpose": "another"}},
        "insecure_test_noise = False": header | {"insecure_test_noise": False},
    }
    for found, other in foreign.items():
        folder.ledger.unlink()
        LedgerFile.create(folder.ledger, **other).close()
        with pytest.raises(LedgerError, match=f"{found}.*another run's ledger"):
            train(config, PlainProgress())
    folder.ledger.unlink()
    create_run_ledger(folder, job)  # all the same but the id
    with pytest.raises(LedgerError, match="belongs to another run"):
        train(config, PlainProgress())
    assert main(["account", str(config.out)]) == 1


def test_saved_model_answers_as_the_run_did(finished):
    config, report = finished
    model = load_model(config.out)
    rows = model.probabilities(["goal match team", "flour oven butter"])
    assert model.class_names == ("kitchen", "sport") and rows.shape == (2, 2)
    assert rows[0].argmax() == 1 and rows[1].argmax() == 0
    assert math.isclose(rows.sum(), 2.0, rel_tol=1e-5)
    assert model.description["promise"]["epsilon"] is None
    assert model.description["promise"]["epsilon_nominal"] == report["epsilon_nominal"]
    with pytest.raises(RunError, match="holds no trained model"):
        load_model(config.out / "checkpoints")


@pytest.mark.slow
def test_another_seed_gives_another_model(finished, csv, tmp_path):
    config, _ = finished
    other = tiny_config(csv, tmp_path / "other", insecure_test_noise=True, seed=1)
    train(other, PlainProgress())
    assert not _same(_parameters(config.out), _parameters(other.out))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's loops
def test_disk_full_stops_with_what_was_saved(finished, csv, tmp_path, monkeypatch):
    """A write that fails for real (file size limit) is a clear error, and the run goes on later."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = tiny_config(csv, tmp_path / "full", insecure_test_noise=True)
    real = loop.charge_block

    def charge_and_fill(*args, **kwargs):
        if kwargs["first"] == 6:
            size = (full.out / "ledger.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        return real(*args, **kwargs)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "charge_block", charge_and_fill)
            with pytest.raises((LedgerError, RunError)):
                train(full, PlainProgress())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resumed = tiny_config(csv, full.out, insecure_test_noise=True, resume=True)
    report = train(resumed, PlainProgress())
    assert report["finished"] and report["steps_charged"] == 12 and report["accuracy"] > 0.9
