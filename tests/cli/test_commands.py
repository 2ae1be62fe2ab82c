"""Commands in this process: help, bad input (V23), account, plan, predict."""

import functools
import json
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_run import write_csv

import dpfa_jax
from dpfa_jax.accounting import Budget, LedgerFile
from dpfa_jax.cli import attention_check, main
from dpfa_jax.cli.program import program, quoted
from dpfa_jax.cli.train import parse
from dpfa_jax.dpsgd import DPSGDPlan
from dpfa_jax.kernels import tile_tables
from dpfa_jax.release import TrainingRelease
from dpfa_jax.train import TrainConfig

pytestmark = pytest.mark.quickly_compiled


@pytest.fixture
def csv(tmp_path):
    return write_csv(tmp_path / "texts.csv", rows=200)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    release = TrainingRelease(1.0, 4.0, 1000, 1000, 10, sampling="full")
    with LedgerFile.create(path, budget=Budget(9.0, 1e-5), metadata={"clipping": "flat"}) as file:
        file.charge(release, count=3)
        file.charge(release, count=4)
    return path


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("train", "predict", "plan", "account", "bench", "doctor"))
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("dpfa ")
    assert main([]) == 2
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--nonprivate-twin" in text and "--insecure-test-noise" in text


def _folder_of_another_run(path):
    path.mkdir()
    (path / "config.json").write_text("{}")
    return str(path)


def _never_started(path, torn):
    """What a crash inside LedgerFile.create leaves."""
    path.mkdir()
    (path / "ledger.jsonl").write_bytes(torn)
    return str(path)


def _without_ledger(path):
    path.mkdir()
    stored = {"config": TrainConfig().settings(), "resolved": {}}
    (path / "config.json").write_text(json.dumps(stored))
    return str(path)


# Name -> (arguments made from tmp_path and a csv, what the message must hold).
BAD = {
    "unknown command": (lambda t, c: ["trian"], "trian"),
    "unknown flag": (lambda t, c: ["train", "--epsilonn", "3"], "epsilonn"),
    "negative epsilon": (lambda t, c: ["train", "--epsilon", "-1"], "epsilon = -1.0"),
    "zero epsilon": (lambda t, c: ["train", "--epsilon", "0"], "epsilon = 0.0"),
    "nan epsilon": (lambda t, c: ["train", "--epsilon", "nan"], "epsilon = nan"),
    "infinite epsilon": (lambda t, c: ["train", "--epsilon", "inf"], "epsilon = inf"),
    "word for epsilon": (lambda t, c: ["train", "--epsilon", "three"], "three"),
    "delta one": (lambda t, c: ["train", "--delta", "1"], "delta = 1.0"),
    "delta above 1/n": (lambda t, c: ["train", "--data", c, "--delta", "0.01"], "1/n"),
    "hopeless epsilon": (
        lambda t, c: ["train", "--data", c, "--epsilon", "0.005", "--steps", "4"],
        "epsilon = 0.005",
    ),
    "nan clip": (lambda t, c: ["train", "--clip", "nan"], "clip = nan"),
    "negative clip": (lambda t, c: ["train", "--clip", "-1"], "clip = -1.0"),
    "zero steps": (lambda t, c: ["train", "--steps", "0"], "steps = 0"),
    "zero batch": (lambda t, c: ["train", "--batch", "0"], "batch = 0"),
    "batch above n": (lambda t, c: ["train", "--data", c, "--batch", "5000"], "batch = 5000"),
    "negative seed": (lambda t, c: ["train", "--seed", "-1"], "seed = -1"),
    "no rate": (lambda t, c: ["train", "--learning-rate", "0"], "learning_rate = 0.0"),
    "unknown model": (lambda t, c: ["train", "--data", c, "--model", "magic"], "model = 'magic'"),
    "vast seed": (lambda t, c: ["train", "--seed", "1" + "0" * 23], "seed = 1"),
    "vast steps": (
        lambda t, c: ["train", "--steps", "1" + "0" * 400],
        "steps = '<an int of 1329 bits>'",
    ),
    "vast length": (
        lambda t, c: ["train", "--data", c, "--max-length", "100000000"],
        "max_length = 100000000",
    ),
    "file of no known letters": (
        lambda t, c: ["train", "--data", c[:-4] + "\udcff.csv"],
        "not UTF-8",
    ),
    "unknown data": (lambda t, c: ["train", "--data", "nothing"], "nothing"),
    "missing file": (lambda t, c: ["train", "--data", f"{t}/none.csv"], "none.csv"),
    "empty file": (lambda t, c: ["train", "--data", _file(t, "")], "data.csv"),
    "one class": (
        lambda t, c: ["train", "--data", _file(t, "text,label\n" + "a b,x\n" * 200)],
        "class",
    ),
    "no such column": (lambda t, c: ["train", "--data", c, "--text-column", "body"], "body"),
    "another run": (
        lambda t, c: ["train", "--out", _folder_of_another_run(t / "run")],
        "holds another run",
    ),
    "folder in use": (lambda t, c: ["train", "--out", str(t)], "not empty"),
    "out is a file": (lambda t, c: ["train", "--out", c], "is a file"),
    "resume nothing": (lambda t, c: ["train", "--resume", "--out", f"{t}/no"], "holds no run"),
    "resume what never started": (
        lambda t, c: ["train", "--resume", "--out", _never_started(t / "run", b'{"hal')],
        "Delete this folder",
    ),
    "start over what never started": (
        lambda t, c: ["train", "--out", _never_started(t / "run", b"")],
        "nothing was charged",
    ),
    "resume without ledger": (
        lambda t, c: ["train", "--resume", "--out", _without_ledger(t / "run")],
        "is missing",
    ),
    "resume nowhere": (lambda t, c: ["train", "--resume"], "resume"),
    "missing config": (lambda t, c: ["train", "--config", f"{t}/no.json"], "no.json"),
    "predict nothing": (lambda t, c: ["predict", "--model", str(t)], "texts"),
    "predict by nothing": (lambda t, c: ["predict", "--model", str(t), "hi"], "no trained model"),
    "no ledger": (lambda t, c: ["account", f"{t}/none.jsonl"], "none.jsonl"),
    "predict blank": (lambda t, c: ["predict", "--model", str(t), "oil", " "], "texts = ' '"),
    "predict undecodable": (
        lambda t, c: ["predict", "--model", str(t), "caf\udce9"],
        r"texts = 'caf\udce9': not UTF-8",
    ),
    "predict a file in Latin-1": (
        lambda t, c: ["predict", "--model", str(t), "--file", _latin(t)],
        "latin.txt': not UTF-8",
    ),
    "per head": (lambda t, c: ["train", "--clipping", "per-head"], "per-head"),
    "quantile of nothing": (lambda t, c: ["train", "--clip-quantile", "0.5"], "clip_quantile"),
    "adaptive and correlated": (
        lambda t, c: ["train", "--adaptive-clipping", "--noise-bands", "2"],
        "noise_bands = 2",
    ),
    "plan more bands than steps": (
        lambda t, c: ["plan", "--batch", "500", "--epochs", "0.2", "--noise-bands", "4"],
        "noise_bands = 4",
    ),
    "plan of nothing": (lambda t, c: ["plan", "--noise", "-1"], "noise = -1.0"),
    "plan above n": (lambda t, c: ["plan", "--batch", "9999"], "batch = 9999"),
}


def _file(folder, text):
    path = folder / "data.csv"
    path.write_text(text)
    return str(path)


def _latin(folder):
    path = folder / "latin.txt"
    path.write_bytes(b"caf\xe9\n")
    return str(path)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_sentence(case, tmp_path, csv, capsys, monkeypatch):
    """V23: exit code 2, the name and the value, no traceback, nothing written."""
    monkeypatch.chdir(tmp_path)
    make, expected = BAD[case]
    arguments = make(tmp_path, str(csv))
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


def test_interrupt_before_the_first_step(monkeypatch, capsys):
    def interrupted(config, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("dpfa_jax.train.run.train", interrupted)
    # A shell starts background jobs with SIGINT ignored, and the tests may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["train"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopped" in capsys.readouterr().err


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('epsilon = 2.0\nsteps = 7\ndata = "digits"\n')
    config = parse(["--config", str(path), "--steps", "9"])
    assert (config.epsilon, config.steps, config.data) == (2.0, 9, "digits")


def test_account_adds_up_and_finds_tampering(ledger, tmp_path, capsys):
    """V18, V21: seven full-batch answers at sigma 4 are one Gaussian at 4 / sqrt(7)."""
    assert main(["account", str(ledger)]) == 0
    text = capsys.readouterr().out
    # Balle and Wang (2018) at mu = sqrt(7)/4, delta 1e-5.
    shown = float(text.split("epsilon (PLD)")[1].split()[0])
    assert shown == pytest.approx(_closed_form(7**0.5 / 4, 1e-5), abs=2e-3)
    assert "verified" in text and "more such answers" in text
    assert ["clipping", '"flat"'] in [line.split() for line in text.splitlines()]
    content = bytearray(ledger.read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(20):
        place, bit = int(rng.integers(len(content) - 1)), 1 << int(rng.integers(7))
        changed = bytearray(content)
        changed[place] ^= bit
        path = tmp_path / "changed.jsonl"
        path.write_bytes(bytes(changed))
        assert main(["account", str(path)]) == 1, (place, bit)
        assert "NOT VERIFIED" in capsys.readouterr().out


def test_account_of_a_ledger_in_use(ledger, tmp_path, capsys):
    """A run's lock neither blocks the account nor passes for damage; damage is still found."""
    copy = tmp_path / "ledger.jsonl"
    copy.write_bytes(ledger.read_bytes())
    with LedgerFile.open(copy):
        assert main(["account", str(copy)]) == 0
        text = capsys.readouterr().out
        assert "in use by a run" in text and "verified: the chain is whole" in text
        content = bytearray(copy.read_bytes())
        content[len(content) // 2] ^= 1
        copy.write_bytes(bytes(content))
        assert main(["account", str(copy)]) == 1
        text = capsys.readouterr().out
        assert text.startswith("NOT VERIFIED") and "line 2" in text
    copy.write_bytes(ledger.read_bytes())
    assert main(["account", str(copy)]) == 0 and "in use" not in capsys.readouterr().out


def _closed_form(mu, delta):
    from scipy import optimize, stats

    def excess(epsilon):
        upper = stats.norm.cdf(mu / 2 - epsilon / mu)
        return upper - np.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu) - delta

    return optimize.brentq(excess, 0.0, 50.0)


def test_plan_prints_and_plots(tmp_path, capsys):
    """Figures fall with the noise and rise with the epochs."""
    out = tmp_path / "plan.svg"
    words = ["plan", "--batch", "512", "--epochs", "5", "10", "--noise", "1", "2"]
    assert main([*words, "--out", str(out)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:4]]
    short, long = ([float(cell) for cell in line[3:]] for line in lines)
    assert short[0] > short[1] and long[0] > long[1] and long[0] > short[0]
    assert out.read_text().startswith("<?xml")


@pytest.mark.slow
def test_plan_compares_correlated_noise_and_says_what_a_large_budget_spends(capsys):
    """The noise of a plan is what the API finds; no budget is said to be spent that is not."""
    words = ["plan", "--batch", "64", "--epochs", "1", "--noise", "2", "--examples", "1024"]
    assert main([*words, "--noise-bands", "2", "--epsilon", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "cyclic Poisson batches" in shown[0] and "against independent" in shown[1]
    plan = DPSGDPlan.calibrated(
        epsilon=2.0, delta=1e-5, dataset_size=1024, expected_batch_size=64, steps=16,
        l2_clip_norm=1.0, num_parameters=100_000, noise_bands=2, micro_batch_size=1,
    )  # fmt: skip
    _, _, _, _, noise, ratio = shown[2].split()
    assert float(noise) == pytest.approx(plan.release.noise_multiplier, abs=2e-3)
    assert 0.5 < float(ratio) < 1.5
    assert main([*words, "--epsilon", "1000"]) == 0
    spends = capsys.readouterr().out.splitlines()[2].split("(spends ")[1]
    assert 0.0 < float(spends.rstrip(")")) < 100.0


def test_what_is_printed_to_type_next_works_as_typed(tmp_path, monkeypatch):
    """The running `dpfa` by its path where the shell would not find it, or would find another."""
    here = tmp_path / "a checkout"
    script = here / ".venv" / "bin" / "dpfa"
    script.parent.mkdir(parents=True)
    script.write_text(f"#!{sys.executable}\nprint('typed')\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.chdir(here)
    assert program() == ".venv/bin/dpfa"
    monkeypatch.chdir(script.parent)
    assert program() == "./dpfa"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    typed = subprocess.run(program(), shell=True, capture_output=True, text=True, check=True)
    assert typed.stdout == "typed\n" and str(here) in program()
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    assert program() == "dpfa"
    monkeypatch.setattr(sys, "argv", [str(here / "not_dpfa.py")])
    assert program().endswith("-m dpfa_jax.cli") and sys.executable in program()
    assert quoted("runs/my run") == "'runs/my run'"


@pytest.mark.slow
def test_doctor_passes_and_fails(capsys, monkeypatch):
    """A healthy machine gives 0; a broken check is named and gives 1."""
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "all is well" in text and "1024 of 1024" in text
    assert "blocked in 8 cases, reference in 4 cases" in text
    assert tile_tables.in_use() in text
    with monkeypatch.context() as patch:
        patch.setattr(tile_tables, "device_kind", lambda: "a GPU")
        damaged = functools.partial(tile_tables.parsed, b"{}", "a-gpu.json")
        patch.setattr(tile_tables, "of_device", lambda _: damaged())
        assert main(["doctor"]) == 1
        assert "FAILED: TileTableError: a-gpu.json" in capsys.readouterr().out
    monkeypatch.setattr("dpfa_jax.noise.threefry2x32", lambda a, b, c, d: (c, d))
    monkeypatch.setattr("dpfa_jax.cli.attention_check.check", lambda: "not run again")
    assert main(["doctor"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("case", "result", "change"),
    [
        ("plain, head size 64, float32", "output", lambda x: x * 1.00001),
        pytest.param(
            "plain, head size 256, float32",
            "key",
            lambda x: x.at[0, 3, 1, 255].add(1e-4),
            marks=pytest.mark.slow,
        ),
        pytest.param("causal, bfloat16", "query", lambda x: x * 1.05, marks=pytest.mark.slow),
        ("mask and bias, float16", "bias", lambda x: x * 1.05),
        pytest.param(
            "lengths and window, bfloat16",
            "value",
            lambda x: x.at[1, 77].set(x[1, 40]),
            marks=pytest.mark.slow,
        ),
        ("private example, float32", "output", lambda x: x.at[1, 7, 2, 5].add(0.125)),
        ("private memory, bfloat16", "output", lambda x: x.at[0, 99, 3, 63].add(0.05)),
    ],
)
def test_doctor_sees_a_backend_that_errs(case, result, change, monkeypatch):
    """Negative control: one wrong number, or a wrong scale, in one backend is found and named."""
    only = {case: attention_check.cases()[case]}
    monkeypatch.setattr(attention_check, "cases", lambda: only)
    monkeypatch.setattr(attention_check.dispatch, "BACKENDS", _BLOCKED)
    real = attention_check.results

    def wrong(*call):
        found = real(*call)
        return {**found, result: np.asarray(change(jnp.asarray(found[result], jnp.float32)))}

    monkeypatch.setattr(attention_check, "results", wrong)
    with pytest.raises(AssertionError, match=f"blocked, {case}, {result}.*is allowed"):
        attention_check.check()


_BLOCKED = {"blocked": ("dpfa_jax.kernels.blocked", None)}


def test_predict_prints_json_and_text(tmp_path, capsys, monkeypatch):
    class Model:
        kind, class_names = "text", ("no", "yes")

        @staticmethod
        def probabilities(texts):
            return np.asarray([[0.25, 0.75]] * len(texts), np.float32)

    monkeypatch.setattr("dpfa_jax.train.saved_model.load_model", lambda folder: Model)
    lines = tmp_path / "lines.txt"
    lines.write_text("one\n\ntwo\n")
    assert main(["predict", "--model", "x", "--file", str(lines), "--json", "three"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["text"] for answer in answers] == ["three", "one", "two"]
    assert answers[0]["class"] == "yes" and answers[0]["probabilities"]["no"] == 0.25
    assert main(["predict", "--model", "x", "three"]) == 0
    assert "75.0 %" in capsys.readouterr().out


def test_bench_names_its_benchmarks(capsys):
    assert main(["bench", "--help"]) == 0
    assert "attention" in capsys.readouterr().out
    assert main(["bench"]) == 2
    assert main(["bench", "nothing"]) == 2
    assert "'nothing'" in capsys.readouterr().err


def test_bench_is_said_to_need_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(dpfa_jax, "__file__", str(tmp_path / "dpfa_jax" / "__init__.py"))
    assert main(["bench", "train"]) == 2
    assert "clone of the repository" in capsys.readouterr().err


def test_bench_runs_the_script_with_its_arguments(capsys):
    assert main(["bench", "train", "--help"]) == 0
    assert "--limit-seconds" in capsys.readouterr().out


def test_account_sees_an_end_that_was_cut_off(ledger, tmp_path, capsys):
    """V21: the report beside a ledger, or a head that was kept, tells what the file cannot."""
    lines = ledger.read_text().splitlines(keepends=True)
    with LedgerFile.open(ledger, read_only=True) as file:
        head = file.head
    cut = tmp_path / "ledger.jsonl"
    cut.write_text("".join(lines[:-1]))
    assert main(["account", str(cut)]) == 0
    assert "--expect-head" in capsys.readouterr().out
    assert main(["account", str(cut), "--expect-head", head]) == 1
    (tmp_path / "report.json").write_text(json.dumps({"ledger": {"head": head}}))
    assert main(["account", str(tmp_path)]) == 1
    assert "NOT VERIFIED" in capsys.readouterr().out
    cut.write_text("".join(lines))
    assert main(["account", str(tmp_path)]) == 0
    assert "not known" not in capsys.readouterr().out
