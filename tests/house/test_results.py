"""Stored results can be run again as they say, and pages name only those that are there."""

import importlib
import json
import pathlib
import re
import shlex

import pytest

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("*/*.json"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def check(command):
    """Raises what the script's own parser raises."""
    words = shlex.split(command)
    while "=" in words[0]:
        del words[0]
    assert words[0] == "python", command
    if words[1:3] == ["-m", "pytest"]:
        paths = [word for word in words if word.startswith("tests/")]
        assert paths and all((ROOT / path).exists() for path in paths), command
        return
    script = pathlib.Path(words[1])
    assert script.parent == pathlib.Path("benchmarks"), command
    importlib.import_module(script.stem).parser().parse_args(words[2:])


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_commands_of_a_stored_result_parse(file):
    from stored_runs import commands

    stored = json.loads(file.read_text())
    found = commands(stored)
    assert found and stored["device"] and re.fullmatch(r"\d{4}-\d\d-\d\d", stored["date"])
    for place, command in enumerate(found):
        check(command)
        written = re.findall(r"--(?:output|out|add-to|largest-of) (\S+)", command)
        assert set(written) <= {str(file.relative_to(ROOT))}, "another file than its own"
        assert place == 0 or re.search("--add-to|--largest-of|pytest", command), command


@pytest.mark.parametrize(
    "command",
    ["a tuning run", "python benchmarks/attention.py --no-such-option 1",
     "python -m pytest tests/nowhere.py", "python benchmarks/nowhere.py"],
)  # fmt: skip
def test_a_command_that_does_not_run_is_found(command):
    with pytest.raises((AssertionError, SystemExit, ImportError)):
        check(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_results_that_are_there_or_say_where_they_were(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\d{4}-\d\d-\d\d-[a-z0-9-]+\.json", text))
    missing = named - {file.name for file in FILES}
    assert not missing or "`git show 1d2d938:benchmarks/results/" in text, missing
