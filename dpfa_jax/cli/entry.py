"""From the command line to a command, and from an error to one sentence and an exit code."""

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

# Name -> (module with `run(arguments) -> exit code`, what it does). Imported when called for.
COMMANDS = {
    "train": ("dpfa_jax.cli.train", "train a classifier privately; report, ledger and model"),
    "predict": ("dpfa_jax.cli.predict", "classify texts with a trained model"),
    "plan": ("dpfa_jax.cli.plan", "epsilon against noise, batch and epochs, before you train"),
    "account": ("dpfa_jax.cli.account", "verify a ledger and say what it has spent"),
    "bench": ("dpfa_jax.cli.bench", "time attention or training against peers, on this machine"),
    "doctor": ("dpfa_jax.cli.doctor", "check this machine: devices, versions, self-test"),
}
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns: 0 done; 1 a check failed; 2 the input cannot be used (one sentence on stderr);
    130 stopped by Ctrl-C or SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return DONE if words else BAD_INPUT
    if words[0] in ("--version", "version"):
        print(f"dpfa {_version()}")
        return DONE
    if words[0] not in COMMANDS:
        return _complain(f"{words[0]!r} is no command. Choose one of: {', '.join(COMMANDS)}.")
    return _guarded(COMMANDS[words[0]][0], words[1:])


def _guarded(module: str, words: list[str]) -> int:
    from dpfa_jax.core import DPFAError

    try:
        return importlib.import_module(module).run(words)
    except DPFAError as error:
        return _complain(str(error))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _complain(f"{place}{error.strerror or error}.")
    except KeyboardInterrupt:
        print("\ndpfa: stopped. What was charged stays charged; --resume goes on.", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as error:  # tyro has already said what is wrong, or printed the help
        return error.code if isinstance(error.code, int) else BAD_INPUT


def _version() -> str:
    try:
        return importlib.metadata.version("dp-flash-attention")
    except importlib.metadata.PackageNotFoundError:
        return "(run from a source tree that is not installed)"


def _complain(text: str) -> int:
    print(f"dpfa: {text}", file=sys.stderr)
    return BAD_INPUT


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "dpfa: differentially private transformers, from data to a report you can read.",
            "",
            "usage: dpfa COMMAND [options]",
            "",
            *lines,
            "",
            "Start with `dpfa train`: it trains on public news texts within epsilon = 3.",
            "`dpfa COMMAND --help` lists the options of a command; `dpfa --version` the version.",
        ]
    )
