"""Figures and tables of stored results, from synthetic ones of the documented form."""

import importlib.util
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
_SPEC = importlib.util.spec_from_file_location("benchmark_plot", FOLDER / "plot.py")
plot = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(plot)


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


def test_interval_is_that_of_student():
    # t(0.975, 4) = 2.776; standard deviation sqrt(2.5).
    assert plot.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(
        2.7764 * (2.5 / 5) ** 0.5, 1e-4
    )
    assert plot.interval([0.9]) == 0.0


def test_what_is_in_the_docs_is_what_is_stored(tmp_path):
    """`dpfa bench plot` was run after the last result was stored."""
    made = plot.page(plot.RESULTS, tmp_path).read_text()
    assert made == (plot.DOCS / "benchmarks.md").read_text(), "run `dpfa bench plot`"
