"""What the benchmarks' command lines share: values are checked before a device is asked for."""

import argparse
import os


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells each default, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.default or action.default == float("inf"):
            return action.help
        return super()._get_help_string(action)


def count(text: str) -> int:
    """An int of 1 or more."""
    return int(_positive(text, int))


def seconds(text: str) -> float:
    """A time above 0."""
    return _positive(text, float)


def file(text: str) -> str:
    """A file in a folder that exists: a run of hours is not to end without its figures."""
    folder = os.path.dirname(text) or "."
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {folder}; make it first")
    if os.path.isdir(text) or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written; name another file")
    return text


def require_gpu(parser: argparse.ArgumentParser, kind: str) -> None:
    """Ends the program, with advice, where the first device is no GPU."""
    if kind == "cpu":
        parser.error(
            "JAX sees no GPU here, only a CPU, on which these cases take hours: run this on a "
            "machine with an NVIDIA GPU and JAX for CUDA (dpfa doctor says what is there)"
        )


def _positive(text: str, number: type[int] | type[float]) -> float:
    try:
        found = number(text)
    except ValueError:
        found = number(0)
    if not found > 0:
        what = "a whole number of 1 or more" if number is int else "a number above 0"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return found
