"""What every stored run says of itself, device, date, command and versions, and where it lies.

A file is benchmarks/results/<kind of device>/<date>-<what>.json.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def begun(script: str, packages: Sequence[str]) -> dict[str, Any]:
    """A run without rows, as `script` was called; `packages`: those whose versions matter."""
    return {
        "device": device(),
        "date": today(),
        "command": shlex.join(["python", script, *sys.argv[1:]]),
        "versions": {"python": platform.python_version()} | _versions(packages),
        "rows": [],
        "left_out": [],
    }


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def commands(stored: dict[str, Any]) -> list[str]:
    """What repeats a stored run, in order; those after the first add to its file.

    They are stored in one string, as a shell takes them.
    """
    command: str = stored["command"]
    return command.split("; ")


def dated(file: Path, date: str) -> Path:
    """The name of a later run of the same."""
    return file.with_name(date + file.name[len(date) :])


def newest(files: Iterable[Path]) -> list[Path]:
    """The last run of each thing on each kind of device, the newest of all first."""
    last: dict[Path, Path] = {}
    for file in sorted(files, key=lambda file: file.name):
        last[dated(file, "0000-00-00")] = file
    return sorted(last.values(), key=lambda file: file.name, reverse=True)


def is_of(file: Path, kind: str) -> bool:
    """Whether a result is of this kind of device: nvidia-h200/... of "NVIDIA H200"."""
    return f"{kind.lower().replace(' ', '-')}-".startswith(f"{file.parent.name}-")


def child_environment() -> dict[str, str]:
    """Of a process that times: those that wait hold no memory that the one being timed needs."""
    return dict(os.environ) | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def write(result: dict[str, Any], path: str | None) -> None:
    """All that there is so far, in one step: a run that is cut off keeps it."""
    if not path:
        return
    with open(path + ".part", "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    os.replace(path + ".part", path)


def device() -> str:
    """The kind of the first device, as JAX names it."""
    # Asked for by another process: this one leaves the device alone.
    code = "import jax; print(jax.devices()[0].device_kind)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120.0,
        env=child_environment(),
    )  # fmt: skip
    return done.stdout.strip()


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
