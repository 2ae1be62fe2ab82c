"""Runs stored benchmarks again, by the commands that they hold, into new files beside them.

    python benchmarks/again.py                   what README and docs cite of this kind of device
    python benchmarks/again.py RESULTS.json ...  these alone

A new file has today's date; none is written over. Files of another kind of device are named and
left. `benchmarks/plot.py` then makes tables and figures of the newest files.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from stored_runs import commands, dated, device, is_of, newest, today

ROOT = Path(__file__).resolve().parents[1]
# The scripts' options whose value is the file.
OUTPUTS = ("--output", "--out", "--add-to", "--largest-of")
TESTS = "python -m pytest "


def cited(root: Path) -> list[Path]:
    """Results that README or docs name; the newest where there are several runs of the same."""
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    files = (root / "benchmarks" / "results").glob("*/*.json")
    return newest(file for file in files if file.name in text)


def execute(command: str, new: Path) -> int:
    """Runs a stored command with `new` for its file, a report where it runs tests."""
    words, variables = shlex.split(command), dict(os.environ)
    while "=" in words[0]:
        name, _, variables[name] = words.pop(0).partition("=")
    places = [i + 1 for i, word in enumerate(words) if word in OUTPUTS]
    for place in places:
        words[place] = str(new)
    if TESTS in command:
        words.append(f"--junitxml={new}")
    elif not places:
        words += [OUTPUTS[0], str(new)]
    words[0] = sys.executable
    return subprocess.run(words, cwd=ROOT, env=variables, check=False).returncode


def run(file: Path, new: Path, kind: str) -> str:
    """ "" where all commands of a stored result have run into `new`, or why one has not."""
    stored, tests = json.loads(file.read_text(encoding="utf-8")), []
    for command in commands(stored):
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "tests.xml")
            code = execute(
                command, report if TESTS in command else Path(os.path.relpath(new, ROOT))
            )
            if report.exists():  # a test that fails is an outcome too
                tests += [outcome(test) for test in ElementTree.parse(report).iter("testcase")]
            elif code != 0:
                return f"exit code {code} of {command}"
    if tests:
        head = {"device": kind, "date": today(), "command": stored["command"]}
        new.write_text(json.dumps(head | {"tests": tests}, indent=1) + "\n", encoding="utf-8")
    return ""


def outcome(test: Any) -> dict[str, Any]:
    name = f"{test.get('classname').rpartition('.')[2]}::{test.get('name')}"
    found = {x.tag for x in test} & {"failure", "error", "skipped"}
    return {"test": name, "outcome": min(found, default="passed"), "seconds": test.get("time")}


def main() -> int:
    asked = parser().parse_args().results
    kind, failed = device(), False
    for file in asked or cited(ROOT):
        new = dated(file, today())
        if not is_of(file.resolve(), kind):
            print(f"{file}: of another kind of device than {kind}", flush=True)
            failed |= bool(asked)
            continue
        why = f"{new} is there already" if new.exists() else run(file, new, kind)
        print(f"{file}: {why or new}", flush=True)
        failed |= bool(why)
    return int(failed)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("results", type=Path, nargs="*", help="stored results; all cited if none")
    return made


if __name__ == "__main__":
    sys.exit(main())
