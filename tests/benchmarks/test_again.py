"""Stored results are run again by their own commands, on their own kind of device only."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = """
import json, os, sys
path = sys.argv[sys.argv.index("--output") + 1 if "--output" in sys.argv else 2]
old = json.load(open(path)) if "--add-to" in sys.argv else []
json.dump([*old, [os.environ.get("MORE"), sys.argv[1:]]], open(path, "w"))
"""


@pytest.fixture
def again(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    import again

    monkeypatch.setattr(again, "ROOT", tmp_path)
    monkeypatch.setattr(again, "device", lambda: "NVIDIA H200")
    (tmp_path / "tiny.py").write_text(TINY)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("see `2020-01-02-tiny.json` and `2020-01-01-tiny.json`")
    return again


def stored(tmp_path, command, name="2020-01-02-tiny.json", kind="nvidia-h200"):
    path = tmp_path / "benchmarks" / "results" / kind / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command}))
    return path


def new_of(path):
    (found,) = [x for x in path.parent.iterdir() if not x.name.startswith("2020")]
    return json.loads(found.read_text())


def run(again, monkeypatch, *files):
    monkeypatch.setattr(sys, "argv", ["again.py", *map(str, files)])
    return again.main()


def test_a_stored_file_is_run_again_into_a_new_one(again, monkeypatch, tmp_path, capsys):
    """Each command in turn, with its environment; the old file stays, and so does the new one."""
    old = "benchmarks/results/nvidia-h200/2020-01-02-tiny.json"
    path = stored(tmp_path, f"MORE=1 python tiny.py --output {old}; python tiny.py --add-to {old}")
    before = path.read_text()
    assert run(again, monkeypatch) == 0
    (more, first), (none, second) = new_of(path)
    assert (more, none) == ("1", None) and path.read_text() == before
    assert first[0] == "--output" and second[0] == "--add-to"
    assert first[1] == second[1] != old and first[1].startswith("benchmarks/results/nvidia-h200/")
    assert run(again, monkeypatch) == 1  # on the same day
    assert "is there already" in capsys.readouterr().out


def test_a_command_without_a_file_gets_one(again, monkeypatch, tmp_path):
    path = stored(tmp_path, "python tiny.py --seconds 1")
    assert run(again, monkeypatch, path) == 0
    assert new_of(path)[0][1][:3] == ["--seconds", "1", "--output"]


def test_another_kind_of_device_is_refused(again, monkeypatch, tmp_path, capsys):
    path = stored(tmp_path, "python tiny.py", kind="nvidia-h100")
    assert run(again, monkeypatch) == 0  # not asked for by name
    assert run(again, monkeypatch, path) == 1
    assert capsys.readouterr().out.count("another kind of device than NVIDIA H200") == 2
    assert list(path.parent.iterdir()) == [path]
    assert again.is_of(path, "NVIDIA H100 80GB HBM3") and not again.is_of(path, "NVIDIA H1000")


def test_a_command_that_fails_is_told(again, monkeypatch, tmp_path, capsys):
    path = stored(tmp_path, "python nowhere.py")
    assert run(again, monkeypatch, path) == 1
    assert "exit code 2 of python nowhere.py" in capsys.readouterr().out


def test_the_newest_run_of_each_is_the_one_that_is_repeated(again, tmp_path):
    files = [stored(tmp_path, "python tiny.py", name) for name in
             ("2020-01-01-tiny.json", "2020-01-02-tiny.json", "2020-01-03-tiny.json")]  # fmt: skip
    assert again.cited(tmp_path) == [files[1]]  # no page names the third


def test_outcomes_of_tests_are_stored(again, monkeypatch, tmp_path):
    (tmp_path / "test_two.py").write_text("def test_a(): pass\ndef test_b(): assert False\n")
    path = stored(tmp_path, "python -m pytest -q -p no:cacheprovider test_two.py")
    assert run(again, monkeypatch, path) == 0
    found = new_of(path)
    assert found["device"] == "NVIDIA H200" and found["command"].endswith("test_two.py")
    told = [(x["test"], x["outcome"]) for x in found["tests"]]
    assert told == [("test_two::test_a", "passed"), ("test_two::test_b", "failure")]
