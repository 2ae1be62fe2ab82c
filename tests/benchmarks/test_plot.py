"""Figures and tables of stored results, from synthetic ones of the documented form."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
_SPEC = importlib.util.spec_from_file_location("benchmark_plot", FOLDER / "plot.py")
plot = importlib.util.module_from_spec(_SPEC)
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(str(FOLDER))
    _SPEC.loader.exec_module(plot)
    figures = sys.modules["attention_figure"]


def _stored(path, rows, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"device": "some GPU", "date": "2026-01-02", "command": "python x.py ", "versions": {}}
    path.write_text(json.dumps(head | {"rows": rows} | more))


def _step(method, milliseconds, **more):
    row = {"model": "gpt2-small", "T": 1024, "batch": 32, "method": method}
    row |= {"milliseconds": milliseconds, "spread": 0.4, "tokens_per_second": 400_000}
    return row | {"peak_bytes": 2**34, "largest_batch": 96} | more


def _runs():
    for seed in range(3):
        yield {"clipping": "non-private", "epsilon": None, "seed": seed, "accuracy": 0.96}
        for level in (1.0, 3.0):
            accuracy = 0.9 + 0.01 * level + 0.01 * seed
            yield {"clipping": "flat", "epsilon": level, "seed": seed, "accuracy": accuracy}


def test_page_of_all_results(tmp_path):
    """Each file is a section, the newest first; ratios are to the non-private row of one model."""
    results, docs = tmp_path / "results", tmp_path / "docs"
    rows = [_step("nonprivate", 80.0), _step("per_layer", 84.0), _step("flat", 90.0)]
    rows.append(_step("flat", 50.0, model="vit-b", largest_batch=None))  # nothing to compare with
    missing = {"model": "vit-b", "T": 1, "batch": 2, "method": "opacus_ghost"}
    left_out = [missing | {"what": "row", "why": "ImportError: no torch model"}]
    _stored(results / "gpu" / "2026-01-02-train.json", rows, left_out=left_out)
    _stored(results / "gpu" / "2026-01-02-utility.json", list(_runs()))
    docs.mkdir()
    text = plot.page(results, docs).read_text()
    assert "| per layer | 84.0 ± 0.2 | 1.05 |" in text and "| flat | 90.0 ± 0.2 | 1.12 |" in text
    assert "| flat | 50.0 ± 0.2 | – |" in text and "ImportError: no torch model" in text
    assert "| flat | 1 | 0.9200 | ± 0.0248 | 0.9100 | 3 |" in text
    for name in ("train", "utility"):
        figure = docs / "figures" / f"gpu-2026-01-02-{name}.svg"
        assert f"figures/{figure.name}" in text and "<svg" in figure.read_text()
        before = figure.read_bytes()
        plot.page(results, docs)
        assert figure.read_bytes() == before, "the same results gave another file"


def _call(implementation, milliseconds, **more):
    row = {"B": 8, "T": 2048, "S": 2048, "H": 16, "K": 16, "D": 128, "mask": "full"}
    row |= {"direction": "forward", "implementation": implementation, "spread": 0.0}
    return row | {"milliseconds": milliseconds, "peak_bytes": 2**20} | more


def test_attention_is_a_table_and_a_figure(tmp_path):
    """A line a case, a panel for each head size and mask; what is left out is named."""
    rows = [
        _call(name, ms * factor, T=length, S=length, direction=direction, mask=mask)
        for name, ms in (("cudnn", 0.5), ("dpfa", 0.4))
        for length in (1024, 2048)
        for mask in ("full", "causal")
        for direction, factor in (("forward", 1.0), ("forward_backward", 3.0))
    ]
    left_out = {name: rows[0][name] for name in ("B", "T", "H", "K", "D", "mask")}
    more = {"ceiling": {"tflops": 700.0}, "left_out": [left_out | {"why": "the time limit"}]}
    _stored(tmp_path / "results" / "gpu" / "2026-01-02-attention.json", rows, **more)
    docs = tmp_path / "docs"
    docs.mkdir()
    text = plot.page(tmp_path / "results", docs).read_text()
    assert "| forward | 8 | 1024 | 16 | 16 | 128 | full | 0.500 | 0.400 |" in text
    assert "Left out: B = 8, T = 1024" in text and "the time limit" in text
    drawn = (docs / "figures" / "gpu-2026-01-02-attention.svg").read_text()
    assert all(f"D = 128, {mask}" in drawn for mask in ("full", "causal"))
    assert "TFLOP/s" in drawn and "peak MiB" in drawn


def test_tflops_are_those_of_the_useful_products():
    """4 B H T S D operations forward, 14 with the backward pass, half of them under causality."""
    row = _call("dpfa", 0.5)
    operations = 4 * 8 * 16 * 2048 * 2048 * 128
    assert figures.tflops(row) == pytest.approx(operations / 0.5e-3 / 1e12)
    causal = row | {"mask": "causal", "direction": "forward_backward"}
    assert figures.tflops(causal) == pytest.approx(14 / 4 / 2 * figures.tflops(row))


def test_interval_is_that_of_student():
    # t(0.975, 4) = 2.776; standard deviation sqrt(2.5).
    assert plot.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(
        2.7764 * (2.5 / 5) ** 0.5, 1e-4
    )
    assert plot.interval([0.9]) == 0.0


def test_what_is_in_the_docs_is_what_is_stored(tmp_path, monkeypatch):
    """`dpfa bench plot` was run after the last result was stored."""
    # The text is compared, which names each figure.
    monkeypatch.setattr(plot, "draw", lambda *_: None)
    made = plot.page(plot.RESULTS, tmp_path).read_text()
    assert made == (plot.DOCS / "benchmarks.md").read_text(), "run `dpfa bench plot`"
    named = set(re.findall(r"\((figures/\S+\.svg)\)", made))
    assert named == {f"figures/{file.name}" for file in (plot.DOCS / "figures").glob("*.svg")}


def test_the_page_has_the_last_run_of_each_and_no_other_figure(tmp_path):
    """A file is replaced by a later one of the same device and name, and by no other."""
    results, docs = tmp_path / "results", tmp_path / "docs"
    for name in ("gpu/2026-01-02-train", "gpu/2026-01-03-train", "gpu/2026-01-01-short-train",
                 "other/2026-01-02-train"):  # fmt: skip
        _stored(results / f"{name}.json", [_step("nonprivate", 80.0), _step("flat", 90.0)])
    kept = {
        f"{x}-train.svg" for x in ("gpu-2026-01-03", "gpu-2026-01-01-short", "other-2026-01-02")
    }
    (docs / "figures").mkdir(parents=True)
    (docs / "figures" / "gpu-2026-01-02-train.svg").write_text("an older one")
    text = plot.page(results, docs).read_text()
    assert {x.name for x in (docs / "figures").iterdir()} == kept
    assert all(name in text for name in kept) and "gpu/2026-01-02-train.json" not in text
    assert "again.py" in text


def test_counters_are_a_table(tmp_path):
    row = _call("dpfa", 0.5) | {"kernel": "dpfa_attention_forward_mosaic_gpu_kernel"}
    row["counters"] = {"ghz": 1.7251, "tensor": 68.38, "issue": 35.0, "alu": 18.0, "fma": 9.0}
    row["stalls"] = {"wait": 2.5, "selected": 1.0, "gmma": 0.46, "sleeping": 0.01}
    failed = {"group": "peer", "why": "no profiler"}
    path = tmp_path / "results" / "gpu" / "2026-01-02-counters.json"
    _stored(path, [row], left_out=[failed], command="python x.py; python y.py")
    (tmp_path / "docs").mkdir()
    text = plot.page(tmp_path / "results", tmp_path / "docs").read_text()
    case = "| 8, 2048, 16, 16, 128, full, dpfa | `dpfa_attention_forward` | 0.500 |"
    assert f"{case} 1.73 | 68.4 | 35 | 18 | 9 | – | wait 2.50, gmma 0.46 |" in text
    assert "peer: all (`no profiler`)" in text and "`python x.py`; `python y.py`" in text
