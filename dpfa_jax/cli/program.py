"""How to call this program again: words that work as typed in the folder at hand."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path


def program() -> str:
    """ "dpfa" where the shell finds the one that is running; else its path, for the shell."""
    own = Path(sys.argv[0])
    if own.stem != "dpfa" or not own.exists():  # run as a module, or called from Python
        return f"{_typed(Path(sys.executable))} -m dpfa_jax.cli"
    found = shutil.which("dpfa")
    if found is not None and Path(found).absolute() == own.absolute():
        return "dpfa"
    return _typed(own)


def quoted(path: str) -> str:
    """`path` as one word of the shell."""
    return subprocess.list2cmdline([path]) if os.name == "nt" else shlex.quote(path)


def _typed(path: Path) -> str:
    """The path from the current folder where that lies above it, else the whole path."""
    absolute = path.absolute()  # no links followed: the one in a virtual environment is meant
    try:
        below = absolute.relative_to(Path.cwd())
    except ValueError:
        return quoted(str(absolute))
    return quoted(str(below) if len(below.parts) > 1 else os.path.join(os.curdir, below))
