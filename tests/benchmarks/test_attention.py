"""The attention benchmark on a tiny call, so that no typo is left for a device to find."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quickly_compiled

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPT = FOLDER / "attention.py"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        spec = importlib.util.spec_from_file_location("attention_benchmark", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_the_grid_has_every_head_size_and_length(bench):
    """Lengths 512 to 32768 of each head size, and grouped heads; as many tokens where they fit."""
    for size in (64, 128, 256):
        shapes = [shape for shape in bench.SHAPES if shape[-1] == size]
        assert {2**n for n in range(9, 16)} <= {length for _, length, *_ in shapes}
        assert any(heads != kv_heads for _, _, heads, kv_heads, _ in shapes)
        assert all(batch * length >= bench.TOKENS for batch, length, *_ in shapes)


@pytest.mark.parametrize(
    ("mask", "gradients"), [("full", 3), ("boolean", 3), ("bias", 3), ("learned_bias", 4)]
)
def test_a_learned_bias_has_a_gradient_and_a_constant_none(bench, mask, gradients):
    import attention_calls

    programs = attention_calls.programs_of((1, 16, 2, 2, 64), mask, ["dpfa"])
    function, sets = programs["forward_backward", "dpfa"]
    assert len(sets[0]) == (3 if mask == "full" else 4)
    output, found = function(*sets[0])
    assert output.shape == (1, 16, 2, 64) and len(found) == gradients
    assert all(abs(x.astype("float32")).max() > 0 for x in found)


BAD = {
    "--implementations foo": "invalid choice: 'foo'",
    "--implementations dpfa_bound --masks bias": "none serves the mask bias; add cudnn, dpfa",
    "--head-sizes 48": "invalid choice: 48",
    "--shapes -3": "'-3' is not a whole number of 1 or more",
    "--seconds 0": "'0' is not a number above 0",
    "--output /nonexistent/x.json": "there is no folder /nonexistent; make it first",
    "--masks full": "no GPU here, only a CPU",
}


@pytest.mark.parametrize("words", BAD)
def test_what_cannot_work_is_refused_first(bench, words, monkeypatch, capsys):
    """V23: before a device or a child is asked for, and a CPU before anything is timed."""

    def run(*_):
        raise AssertionError("nothing is timed")

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(bench, "begun", lambda *_: {"device": "cpu"})
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words.split()])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert BAD[words] in capsys.readouterr().err


def test_every_implementation_has_its_name_in_the_help(bench):
    """Peers that may not be installed are named too."""
    import attention_calls

    for mask in ("full", *bench.WITH_PAIRS):
        names = {*attention_calls.implementations((1, 16, 2, 2, 64), mask)}
        if mask == "full":
            names |= {"tokamax", "torch_sdpa"}
        assert names == set(bench.WITH_PAIRS.get(mask, bench.IMPLEMENTATIONS))
    text = bench.parser().format_help()
    assert all(name in text for name in bench.IMPLEMENTATIONS)
    assert "(default: 0.3)" in text and "None" not in text


@pytest.mark.slow
def test_what_was_measured_is_in_the_file(bench, tmp_path, monkeypatch):
    """Two cases in two processes; what does not serve a CPU is left out, with its reason."""
    out = tmp_path / "attention.json"
    monkeypatch.setattr(bench, "SHAPES", ((1, 64, 2, 2, 64), (1, 64, 4, 2, 64)))
    arguments = (
        "--implementations dpfa dpfa_example cudnn --masks causal --seconds 0.001 --at-once 2 "
        "--output"
    )
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments.split(), str(out)])
    monkeypatch.setattr(bench, "CEILING_SIZE", 256)
    monkeypatch.setattr(bench, "require_gpu", lambda parser, kind: None)
    bench.main()
    stored = json.loads(out.read_text())
    assert stored["command"].endswith(str(out)) and stored["device"] and stored["date"]
    assert "jax" in stored["versions"] and stored["ceiling"]["tflops"] > 0
    found = [(row["H"], row["direction"], row["implementation"]) for row in stored["rows"]]
    one = [("forward", "dpfa"), ("forward", "dpfa_example"), ("forward_backward", "dpfa")]
    assert found == [(heads, *which) for heads in (2, 4) for which in one]
    assert all(row["milliseconds"] > 0 and row["spread"] >= 0 for row in stored["rows"])
    assert all(row["peak_bytes"] > 0 and row["mask"] == "causal" for row in stored["rows"])
    missing = [(x["H"], x["direction"], x["implementation"]) for x in stored["left_out"]]
    assert missing == [(h, d, "cudnn") for h in (2, 4) for d in ("forward", "forward_backward")]
    assert all(x["why"] for x in stored["left_out"])


@pytest.mark.slow
def test_a_case_that_fails_is_named(bench, tmp_path, monkeypatch):
    out = tmp_path / "attention.json"
    monkeypatch.setattr(bench, "SHAPES", ((1, 64, 3, 2, 64),))  # 3 heads of 2 key heads
    arguments = f"--implementations dpfa --masks causal --seconds 0.001 --output {out}"
    monkeypatch.setattr(bench, "CEILING_SIZE", 256)
    monkeypatch.setattr(bench, "require_gpu", lambda parser, kind: None)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments.split()])
    bench.main()
    stored = json.loads(out.read_text())
    assert stored["rows"] == [] and stored["left_out"]
    assert all((x["H"], x["K"]) == (3, 2) and x["why"] for x in stored["left_out"])
