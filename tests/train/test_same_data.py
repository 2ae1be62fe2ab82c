"""A run goes on with the examples it was started with, and publishes no hash of them."""

import dataclasses

import numpy as np
import pytest
from helpers.tiny_run import tiny_config, write_csv

from dpfa_jax.train import RunError, run, train
from dpfa_jax.train.data import ClassificationData, load_data
from dpfa_jax.train.job import prepare
from dpfa_jax.train.progress import PlainProgress
from dpfa_jax.train.same_data import require_same_data


def data_of(rows=4):
    inputs = np.arange(rows * 4, dtype=np.float32).reshape(rows, 2, 2)
    labels = np.arange(rows, dtype=np.int32) % 2
    return ClassificationData(
        "d", inputs, labels, inputs, labels, ("a", "b"), "image", None, np.asarray, ()
    )


def test_any_change_of_the_training_examples_is_seen(tmp_path):
    data = data_of()
    require_same_data(tmp_path, data, step=0)
    for step in (0, 7):
        require_same_data(tmp_path, data_of(), step=step)
    pixel = data.train_inputs.copy()
    pixel[2, 1, 0] += 1e-4
    for changed in (
        {"train_inputs": pixel},
        {"train_inputs": data.train_inputs[::-1]},
        {"train_inputs": data.train_inputs.view(np.int32)},
        {"train_labels": 1 - data.train_labels},
        {"class_names": ("b", "a")},
    ):
        with pytest.raises(RunError, match="other training examples"):
            require_same_data(tmp_path, dataclasses.replace(data, **changed), step=7)
    require_same_data(tmp_path, dataclasses.replace(data, test_labels=1 - data.test_labels), step=7)
    (tmp_path / "private-data.sha256").unlink()
    with pytest.raises(RunError, match="is missing"):
        require_same_data(tmp_path, data, step=7)


def _interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_a_file_edited_between_start_and_resume_is_refused(whole, tmp_path, monkeypatch):
    """Of equal length and classes, so no setting tells it. The hash stays with the checkpoints."""
    csv = write_csv(tmp_path / "texts.csv")
    config = tiny_config(csv, tmp_path / "run", epsilon=2.0, steps=2, insecure_test_noise=True)
    job = prepare(config)
    monkeypatch.setattr(run, "prepare", lambda config: job)
    if whole:
        train(config, PlainProgress())
        assert (config.out / "report.json").exists()
    else:  # stopped before its first charge
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(run, "run_steps", _interrupted)
            train(config, PlainProgress())
    hash_file = config.out / "checkpoints" / "private-data.sha256"
    digest = hash_file.read_text().strip().encode()
    assert len(digest) == 64
    holders = [p for p in config.out.rglob("*") if p.is_file() and digest in p.read_bytes()]
    assert holders == [hash_file]
    ledger = (config.out / "ledger.jsonl").read_bytes()
    csv.write_text(csv.read_text().replace("butter", "tennis"))
    edited = dataclasses.replace(job, data=load_data(str(csv), max_length=8))  # the same plan
    monkeypatch.setattr(run, "prepare", lambda config: edited)
    with pytest.raises(RunError, match="other training examples"):
        train(dataclasses.replace(config, resume=True), PlainProgress())
    assert (config.out / "ledger.jsonl").read_bytes() == ledger
