"""`dpfa account LEDGER`: verify the chain, compose what was charged, say what is left."""

import dataclasses
import json
import math
import shutil
import tempfile
from pathlib import Path

import tyro

from dpfa_jax.accounting import Ledger, LedgerFile, epsilon
from dpfa_jax.accounting.budget import largest_count
from dpfa_jax.accounting.locks import exclusive
from dpfa_jax.cli.entry import DONE, FAILED
from dpfa_jax.cli.table import print_table
from dpfa_jax.core import LedgerError

_WIDEST = 100


@dataclasses.dataclass(frozen=True)
class AccountConfig:
    """Verify a ledger and say what it has spent. Exit code 1 where it cannot be trusted.

    Attributes:
      ledger: the ledger.jsonl of a run, or the run's folder.
      delta: at which epsilon is stated; the budget's own where not given.
      expect_head: a head that the chain must hold, from a report or a checkpoint: a file whose end
        was cut off is whole in itself. Where not given, that of the report beside the ledger.
        The head at a run's start, which its config.json names, is due in any case.
    """

    ledger: tyro.conf.Positional[Path]
    delta: float | None = None
    expect_head: str | None = None


def run(arguments: list[str]) -> int:
    """Prints the account and returns the exit code."""
    config = tyro.cli(AccountConfig, prog="dpfa account", args=arguments)
    path = config.ledger / "ledger.jsonl" if config.ledger.is_dir() else config.ledger
    if not path.exists():
        raise LedgerError(f"ledger = {str(path)!r}: no such file. Pass the ledger.jsonl of a run.")
    in_use = _in_use(path)
    expected = config.expect_head or _named_head(path, "report.json", "ledger", "head")
    started = _named_head(path, "config.json", "ledger_head")
    with tempfile.TemporaryDirectory() as folder:
        # A copy: a run holds the lock of its ledger from its first step to its last. A line that
        # it is just writing reads as unfinished, and stands for nothing that was released yet.
        copy = Path(folder) / "ledger.jsonl"
        shutil.copyfile(path, copy)
        try:
            file = LedgerFile.open(copy, read_only=True, expect_head=expected)
            if started is not None:
                file.require_head(started)
        except LedgerError as error:
            print(f"NOT VERIFIED  {str(error).replace(str(copy), str(path))}")
            return FAILED
        with file:
            if in_use:
                print("in use by a run: what follows is the ledger at this moment; it may grow")
            print(f"verified: the chain is whole; head {file.head}")
            if not file.has_line_ids:
                print(
                    "not known: whether charges were cut off and written again; no line has an id"
                )
            if expected is None:
                print("not known: whether its end was cut off; --expect-head HEAD would tell")
            _print_account(file, config.delta)
    return DONE


def _named_head(path: Path, beside: str, *names: str) -> str | None:
    """The head that a file beside the ledger names; None where it names none."""
    try:
        value = json.loads((path.parent / beside).read_text(encoding="utf-8"))
        for name in names:
            value = value[name]
        return str(value)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _in_use(path: Path) -> bool:
    """Whether another process holds the ledger's lock now."""
    with path.open("rb") as stream:
        try:
            with exclusive(stream.fileno(), str(path), 0.0):
                return False
        except LedgerError as error:
            return error.__cause__ is None  # with a cause, the file system offers no locks


def _print_account(file: LedgerFile, asked_delta: float | None) -> None:
    ledger, budget = file.ledger, file.budget
    if file.insecure_test_noise:
        print("INSECURE: noise from a test seed. This ledger protects nobody; epsilon is infinite.")
        print("Below: what the same charges would cost with secret noise.")
    rows = []
    for entry in ledger.entries:
        record, noise = entry.record, getattr(entry.record, "noise_multiplier", None)
        rows.append(
            (
                f"{entry.count:,}",
                getattr(record, "kind", "un-noised"),
                f"{record.unit}, {record.relation.replace('_', ' ')}",
                "none" if noise is None else f"{noise:.4f}",
                getattr(record, "generator", "-"),
            )
        )
    print_table(("answers", "kind", "unit and relation", "noise multiplier", "generator"), rows)
    delta = asked_delta if asked_delta is not None else (budget.delta if budget else 1e-5)
    pld = epsilon(ledger, delta, nominal=True)
    rdp = epsilon(ledger, delta, accountant="rdp", nominal=True)
    # Escaped and cut: a ledger's header holds whatever its writer put there.
    summary = [(name, json.dumps(value)[:_WIDEST]) for name, value in file.metadata.items()]
    summary += [("delta", f"{delta:g}"), ("epsilon (PLD)", _number(pld))]
    summary.append(("epsilon (RDP, looser)", _number(rdp)))
    if budget is not None:
        summary.append(("budget", f"epsilon {budget.epsilon:g} at delta {budget.delta:g}"))
        spent = epsilon(ledger, budget.delta, accountant=budget.accountant, nominal=True)
        summary.append(("budget left", f"epsilon {_number(max(budget.epsilon - spent, 0.0))}"))
        if len(ledger.entries) == 1:
            # One kind of answer: how many more of it fit is the exact form of what is left.
            only = ledger.entries[0]
            room = largest_count(budget, Ledger(), only.record) - only.count
            summary.append(("more such answers", f"{max(room, 0):,}"))
    print_table(("", ""), summary)


def _number(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.4f}"
