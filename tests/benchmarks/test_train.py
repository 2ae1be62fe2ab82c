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


@pytest.fixture(scope="module")
def steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import train_steps

        yield train_steps


@pytest.mark.slow
@pytest.mark.parametrize("method", ["per_layer", "jax_privacy"])
def test_steps_are_timed(steps, method):
    row = steps.prepared("gpt2-tiny", 8, 4, method, 2 if method == "jax_privacy" else None)(0.01)
    assert row["milliseconds"] > 0.0 and row["spread"] >= 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_model_is_timed(steps, name):
    for method in METHODS:
        assert steps.prepared(name, 8, 8, method)(0.01)["milliseconds"] > 0.0, method


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_model_is_traced(steps, name):
    for method in METHODS:
        assert "main" in steps.lowered(name, 8, 4, method).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_case_is_traced_at_full_size(bench, steps, method):
    for name, length, batch in bench.CASES:
        assert "main" in steps.lowered(name, length, batch, method).as_text()


@pytest.mark.parametrize("bend", [0, 3])
def test_largest_batch_is_the_largest(steps, bend):
    """On memory that grows linearly, and with a bend; in fewer compilations than a bisection."""
    asked = []

    def needed(batch):
        asked.append(batch)
        return 1000 + 7 * batch + bend * max(0, batch - 100)

    for limit in (1027, 1028, 1400, 5000, 10**9):
        asked.clear()
        found = steps.largest(needed, 32, limit, 4096)
        fitting = [size for size in range(4, 4097, 4) if needed(size) <= limit]
        assert found == (max(fitting) if fitting else None)
    asked.clear()
    assert steps.largest(needed, 32, 5000, 4096) is not None and len(asked) <= 8


@pytest.mark.slow
def test_largest_batch_of_a_compiled_step_fits(steps):
    limit = steps.step_bytes("gpt2-tiny", 8, 24, "per_layer")
    found = steps.largest_batch("gpt2-tiny", 8, 8, "per_layer", limit)
    assert found is not None and found >= 24
    assert steps.step_bytes("gpt2-tiny", 8, found, "per_layer") <= limit
    assert steps.step_bytes("gpt2-tiny", 8, found + 4, "per_layer") > limit


def test_a_sweep_keeps_the_best_and_tells_the_others(bench, tmp_path):
    case = ("gpt2-tiny", 8, 8)
    rows = bench.rows_of(case, ["flat", "jax_privacy"], (1, 2, 4, 8, 16))
    assert [row.micro_batch for row in rows] == [None, 1, 2, 4, 8]
    results = bench.Results(str(tmp_path / "out.json"), {"rows": [], "left_out": []})
    times = {1: 9.0, 2: 4.0, 8: 5.0}
    for row in rows:
        time = times.get(row.micro_batch, 3.0)
        found = None if row.micro_batch == 4 else {"milliseconds": time, "peak_bytes": 1}
        results.add(row, "0", found, "" if found else "out of memory")
    stored = json.loads((tmp_path / "out.json").read_text())
    flat, peer = stored["rows"]
    assert flat["milliseconds"] == 3.0 and "micro_batch" not in flat
    assert peer["milliseconds"] == 4.0 and peer["micro_batch"] == 2
    assert peer["tried"] == {"1": 9.0, "2": 4.0, "8": 5.0} and peer["gpu"] == "0"
    assert peer["tokens_per_second"] == 16_000
    (missing,) = stored["left_out"]
    assert missing["micro_batch"] == 4 and missing["why"] == "out of memory"


def test_sizes_beyond_a_slow_one_are_not_tried(bench):
    """Beyond as seen from the best: a slow size of 8 says nothing of 2."""
    results = bench.Results(None, {"rows": [], "left_out": []})
    sizes = {size: bench.Row("gpt2-tiny", 8, 16, "jax_privacy", size) for size in (2, 4, 8, 16)}
    assert all(results.is_wanted(row) for row in sizes.values())
    results.add(sizes[4], "0", {"milliseconds": 10.0}, "")
    assert [size for size in sizes if results.is_wanted(sizes[size])] == [2, 8, 16]
    results.add(sizes[8], "0", {"milliseconds": 12.1}, "")
    assert [size for size in sizes if results.is_wanted(sizes[size])] == [2]
    results.add(sizes[2], "0", None, "out of memory")
    assert results.result["left_out"][0]["micro_batch"] == 2


def test_a_row_stays_where_its_largest_batch_is_not_found_and_keeps_one_found_early(bench):
    results = bench.Results(None, {"rows": [], "left_out": []})
    torch_row = bench.Row("gpt2-tiny", 8, 16, "fastdp")
    peer = bench.Row("gpt2-tiny", 8, 16, "jax_privacy")
    results.add(torch_row, "0", {"milliseconds": 10.0}, "30 seconds were over")
    results.add_largest(peer, {"largest_batch": 64}, "")
    for size, time in ((4, 3.0), (2, 2.0)):
        results.add(peer._replace(micro_batch=size), "0", {"milliseconds": time}, "")
    first, second = results.result["rows"]
    assert first["largest_batch"] is None and results.is_largest_wanted(torch_row)
    assert second["largest_batch"] == 64 and second["micro_batch"] == 2
    (missing,) = results.result["left_out"]
    assert missing["what"] == "largest" and missing["why"] == "30 seconds were over"
    results.add_largest(torch_row, {"largest_batch": 32}, "")
    assert first["largest_batch"] == 32 and results.result["left_out"] == []


def test_a_run_is_added_to_a_stored_one_of_its_device_alone(bench, tmp_path):
    path = tmp_path / "out.json"
    head = {"device": "some GPU", "date": "2026-01-02", "versions": {"jax": "1"}}
    row = {"model": "gpt2-tiny", "T": 8, "batch": 8, "method": "flat", "milliseconds": 1.0}
    path.write_text(json.dumps(head | {"command": "one", "rows": [row], "left_out": []}))
    again = head | {"command": "two", "date": "2026-01-03", "rows": [], "left_out": []}
    result = bench.added_to(str(path), again)
    assert [run["command"] for run in result["runs"]] == ["one", "two"]
    assert [run["date"] for run in result["runs"]] == ["2026-01-02", "2026-01-03"]
    assert result["command"] == "one; two" and result["rows"] == [row]
    results = bench.Results(None, result)
    flat, plain = (bench.Row("gpt2-tiny", 8, 8, method) for method in ("flat", "nonprivate"))
    assert not results.is_wanted(flat) and results.is_wanted(plain)
    results.add(plain, "0", {"milliseconds": 2.0}, "")
    assert "run" not in result["rows"][0] and result["rows"][1]["run"] == 1
    with pytest.raises(ValueError, match="other GPU"):
        bench.added_to(str(path), again | {"device": "other GPU"})
    with pytest.raises(ValueError, match=r"versions \{'jax': '1'\}, this .* \{'jax': '2'\}"):
        bench.added_to(str(path), again | {"versions": {"jax": "2"}})
    without_jax = again | {"versions": {"torch": "3"}}  # then it times none of its rows
    assert bench.added_to(str(path), without_jax)["versions"] == {"jax": "1", "torch": "3"}


@pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("results/*/*-train.json")), ids=lambda path: path.stem
)
def test_every_stored_run_can_be_added_to(bench, path):
    """Its rows stay, its commands stay in order, and what it lacks is wanted."""
    from stored_runs import commands

    stored = json.loads(path.read_text())
    words = f"python benchmarks/train.py --add-to {path}"
    again = stored | {"command": words, "date": "2026-12-31", "rows": [], "left_out": []}
    result = bench.added_to(str(path), again)
    assert result["rows"] == stored["rows"] and result["versions"] == stored["versions"]
    assert commands(result) == [*commands(stored), words]
    results = bench.Results(None, result)
    known = [bench.Row(x["model"], x["T"], x["batch"], x["method"]) for x in stored["rows"]]
    assert not any(map(results.is_wanted, known))
    assert results.is_wanted(known[0]._replace(T=4))


def test_a_search_says_what_it_knows_when_its_time_is_over(steps):
    with pytest.raises(TimeoutError, match="32 fits"):
        steps.largest(lambda batch: 7 * batch, 32, 5000, seconds=0.0)


def _words(monkeypatch, tmp_path, *more):
    out = tmp_path / "out.json"
    words = ["--cases", "gpt2-tiny:8:8", "--methods", "nonprivate", "--output", str(out)]
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--seconds", "0.01", *more])
    return out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--cases gpt2-small", "'gpt2-small' is not MODEL:T:BATCH, as gpt2-small:1024:32 is"),
        ("--cases gpt2-small:8:0", "'gpt2-small:8:0' is not"),
        ("--gpus 0", "'0' is not a whole number of 1 or more"),
        ("--methods foo", "invalid choice: 'foo'"),
        ("--output /nonexistent/x.json", "there is no folder /nonexistent; make it first"),
        ("", "no GPU here, only a CPU"),
    ],
)
def test_what_cannot_work_is_refused_first(bench, words, said, monkeypatch, capsys):
    """V23: before a process is started for a row."""
    monkeypatch.setattr(bench, "begun", lambda *_: {"device": "cpu", "rows": []})
    monkeypatch.setattr(sys, "argv", ["train.py", *words.split()])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_run_from_the_command_line(bench, monkeypatch, tmp_path):
    """One process a row; what is stored has the documented form, and takes the largest batch."""
    out = _words(monkeypatch, tmp_path)
    bench.main()
    found = json.loads(out.read_text())
    (row,) = found["rows"]
    names = {"model", "T", "batch", "method", "milliseconds", "spread"}
    assert names | {"tokens_per_second", "peak_bytes", "largest_batch", "gpu"} <= set(row)
    assert math.isclose(row["tokens_per_second"], 64e3 / row["milliseconds"], rel_tol=0.1)
    assert found["left_out"] == [] and found["device"] and found["versions"]["jax"]
    assert row["largest_batch"] is None
    words = ["train.py", "--largest-of", str(out), "--memory-bytes", "4000000"]
    rows = ("--methods", "flat"), ("--cases", "gpt2-tiny:8:16"), ("--cases", "gpt2-tiny:8:8")
    for more in rows:
        assert json.loads(out.read_text())["rows"] == [row], "not asked for so far"
        monkeypatch.setattr(sys, "argv", [*words, *more])
        bench.main()
    after = json.loads(out.read_text())
    (again,) = after["rows"]
    assert again.pop("largest_batch") % 4 == 0
    del row["largest_batch"]
    assert again == row and after["command"].endswith(" ".join(more)) and len(after["runs"]) == 2


@pytest.mark.slow
def test_a_row_beyond_its_limit_is_left_out_and_said(bench, monkeypatch, tmp_path, capsys):
    out = _words(monkeypatch, tmp_path, "--row-limit-seconds", "0.2")
    bench.main()
    found = json.loads(out.read_text())
    assert found["rows"] == [] and "ended after 0 seconds" in found["left_out"][0]["why"]
    assert "left out" in capsys.readouterr().out


@pytest.mark.slow
def test_a_missing_peer_is_left_out_and_how_to_install_it_said(bench, monkeypatch, tmp_path):
    (tmp_path / "fastDP.py").write_text("raise ModuleNotFoundError(\"No module named 'fastDP'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = _words(monkeypatch, tmp_path, "--methods", "fastdp")
    bench.main()
    found = json.loads(out.read_text())
    (missing,) = found["left_out"]
    assert found["rows"] == [] and missing["method"] == "fastdp" and missing["what"] == "row"
    assert "No module named" in missing["why"] and bench.FASTDP in missing["why"]
