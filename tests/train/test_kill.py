"""kill -9 and resume: no noise key twice, the ledger never below what was released."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_run import write_csv

_TESTS = Path(__file__).parents[1]


def _killed(tmp_path: Path, steps: int, kills: int, seed: int) -> dict:
    out = tmp_path / "run"
    csv = write_csv(tmp_path / "texts.csv")
    driver = Path(__file__).with_name("kill_driver.py")
    arguments = [csv, out, steps, kills, seed]
    environment = os.environ | {
        "PYTHONPATH": f"{_TESTS}{os.pathsep}{_TESTS.parent}",
        # Every attempt runs the same programs: only the first one compiles them.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    done = subprocess.run(
        [sys.executable, str(driver), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    return seen | {"report": json.loads((out / "report.json").read_text()), "errors": done.stderr}


def _check(seen: dict, kills: int) -> None:
    assert seen["codes"] == [-9] * kills + [0], seen
    assert seen["short"] == [], "the ledger was below what had been released"
    assert seen["drawn"] == seen["drawn_once"], "a noise key was drawn twice"
    assert seen["released"] == seen["released_once"], "a noise key was used twice"
    assert seen["released"] <= seen["charged"] <= seen["planned"]
    assert seen["report"]["finished"]
    assert seen["report"]["steps"] < seen["report"]["steps_charged"] == seen["planned"]
    assert seen["report"]["epsilon"] <= 8.0


@pytest.mark.slow
def test_one_kill(tmp_path):
    """V20 for a whole run: a kill while steps run, then to the end."""
    seen = _killed(tmp_path, steps=16, kills=1, seed=1)
    _check(seen, 1)
    assert seen["report"]["accuracy"] > 0.9  # uninterrupted: 1.0; one class: 0.5


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    """V20 for a whole run: 20 kills at random moments, accuracy in the same range."""
    seen = _killed(tmp_path, steps=160, kills=20, seed=2)
    _check(seen, 20)
    assert seen["report"]["accuracy"] > 0.95
