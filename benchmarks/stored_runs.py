"""What every stored run says of itself: device, date, command and versions."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def begun(script: str, packages: Sequence[str]) -> dict[str, Any]:
    """A run without rows, as `script` was called; `packages`: those whose versions matter."""
    return {
        "device": _device(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", script, *sys.argv[1:]]),
        "versions": {"python": platform.python_version()} | _versions(packages),
        "rows": [],
        "left_out": [],
    }


def commands(stored: dict[str, Any]) -> list[str]:
    """What repeats a stored run, in order; those after the first add to its file."""
    command = stored["command"]
    return command.split("; ") if isinstance(command, str) else list(command)


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


def _device() -> str:
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
