"""The training benchmark on tiny stand-ins, so that no typo is left for a device to find."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = ("gpt2-tiny", "vit-tiny", "llama-tiny", "llama-tiny-lora")
METHODS = ("nonprivate", "per_layer", "flat", "jax_privacy")

# What a peer calls that is old is the peer's.
pytestmark = pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated")


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        spec = importlib.util.spec_from_file_location("training_benchmark", FOLDER / "train.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.slow
@pytest.mark.parametrize("method", ["per_layer", "jax_privacy"])
def test_steps_are_timed(bench, method):
    row = bench.in_jax("gpt2-tiny", 8, 4, method, 0.01)
    assert row["milliseconds"] > 0.0 and row["spread"] >= 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_model_is_timed(bench, name):
    for method in METHODS:
        assert bench.in_jax(name, 8, 8, method, 0.01)["milliseconds"] > 0.0, method


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_model_is_traced(bench, name):
    for method in METHODS:
        assert "main" in bench.lowered(name, 8, 4, method).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_case_is_traced_at_full_size(bench, method):
    for name, length, batch in bench.CASES:
        assert "main" in bench.lowered(name, length, batch, method).as_text()


@pytest.mark.parametrize("bend", [0, 3])
def test_largest_batch_is_the_largest(bench, bend):
    """On memory that grows linearly, and with a bend; in fewer compilations than a bisection."""
    asked = []

    def needed(batch):
        asked.append(batch)
        return 1000 + 7 * batch + bend * max(0, batch - 100)

    for limit in (1027, 1028, 1400, 5000, 10**9):
        asked.clear()
        found = bench.largest(needed, 32, limit, 4096)
        fitting = [size for size in range(4, 4097, 4) if needed(size) <= limit]
        assert found == (max(fitting) if fitting else None)
    asked.clear()
    assert bench.largest(needed, 32, 5000, 4096) is not None and len(asked) <= 8


@pytest.mark.slow
def test_largest_batch_of_a_compiled_step_fits(bench):
    limit = bench.step_bytes("gpt2-tiny", 8, 24, "per_layer")
    found = bench.largest_batch("gpt2-tiny", 8, 8, "per_layer", limit)
    assert found is not None and found >= 24
    assert bench.step_bytes("gpt2-tiny", 8, found, "per_layer") <= limit
    assert bench.step_bytes("gpt2-tiny", 8, found + bench.GRANULE, "per_layer") > limit


def _words(monkeypatch, tmp_path, *more):
    out = tmp_path / "out.json"
    words = ["--cases", "gpt2-tiny:8:8", "--methods", "nonprivate", "--output", str(out)]
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--seconds", "0.01", *more])
    return out


def _checked(out):
    found = json.loads(out.read_text())
    (row,) = found["rows"]
    names = {"model", "T", "batch", "method", "milliseconds", "spread"}
    assert names | {"tokens_per_second", "peak_bytes", "largest_batch"} == set(row)
    assert math.isclose(row["tokens_per_second"], 64e3 / row["milliseconds"], rel_tol=0.1)
    assert found["left_out"] == [] and found["device"] and found["versions"]["jax"]
    return row


@pytest.mark.slow
def test_a_whole_run_from_the_command_line(bench, monkeypatch, tmp_path):
    """One process a row; what is stored has the documented form."""
    out = _words(monkeypatch, tmp_path)
    bench.main()
    assert _checked(out)["largest_batch"] is None


@pytest.mark.slow
def test_a_whole_run_with_the_largest_batch(bench, monkeypatch, tmp_path):
    out = _words(monkeypatch, tmp_path, "--largest-batch", "--memory-bytes", "4000000")
    bench.main()
    assert _checked(out)["largest_batch"] % bench.GRANULE == 0


@pytest.mark.slow
def test_a_row_beyond_its_limit_is_left_out_and_said(bench, monkeypatch, tmp_path, capsys):
    out = _words(monkeypatch, tmp_path, "--row-limit-seconds", "0.2")
    bench.main()
    found = json.loads(out.read_text())
    assert found["rows"] == [] and "0.2 seconds" in found["left_out"][0]["why"]
    assert "left out" in capsys.readouterr().out
