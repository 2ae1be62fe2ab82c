"""Ledger -> epsilon."""

import functools
import math

from dpfa_jax.accounting.events import charged_count
from dpfa_jax.accounting.ledger import Ledger, require_ledger
from dpfa_jax.accounting.losses import FINE, composed_epsilon
from dpfa_jax.accounting.renyi import ORDERS, curve_epsilon, renyi_curve
from dpfa_jax.accounting.tails import gaussian_delta, record_tail_cost
from dpfa_jax.core import checks
from dpfa_jax.release import GaussianRecord

ACCOUNTANTS = ("pld", "rdp")


def epsilon(
    ledger: Ledger, delta: float, *, accountant: str = "pld", nominal: bool = False
) -> float:
    """The epsilon of the (epsilon, delta) guarantee that `ledger` gives to one of its units.

    Args:
      ledger: what has been, or will be, released; of an open `LedgerFile` its `.ledger`.
      delta: in (0, 1), below 1/n wherever the ledger knows n, and at least 100 times what the
        noise generator's finite tail costs (that cost is taken off before the analysis).
      accountant: "pld" (privacy loss distributions; tight; for schedules fixed in advance) or
        "rdp" (Renyi; looser; numpy only).
      nominal: count answers whose noise came from a test seed as if it had been secret. Such a
        number protects nobody; without it they make epsilon infinite.

    Returns: epsilon >= 0; infinite after an un-noised answer or one with test noise.
    Errors: ArgumentError for a delta out of range or what is no Ledger; UnsupportedEventError for a
      record that the accountant cannot describe.
    """
    require_ledger(ledger)
    checks.choice("accountant", accountant, ACCOUNTANTS)
    checks.delta("delta", delta)
    for entry in ledger.entries:
        if isinstance(entry.record, GaussianRecord) and entry.record.sampling is not None:
            checks.delta("delta", delta, units=entry.record.sampling.dataset_size)
    answers = []
    for entry in ledger.entries:
        if not isinstance(entry.record, GaussianRecord):
            return math.inf
        if not (entry.record.is_secret_noise or nominal):
            return math.inf
        answers.append((entry.record, entry.count))
    return answers_epsilon(tuple(answers), float(delta), accountant, FINE)


@functools.lru_cache(maxsize=4096)
def answers_epsilon(
    answers: tuple[tuple[GaussianRecord, int], ...], delta: float, accountant: str, interval: float
) -> float:
    """`epsilon` of Gaussian answers only; `interval` is the grid of the loss distribution."""
    if not answers:
        return 0.0
    remaining = gaussian_delta(
        delta,
        tuple(
            (record_tail_cost(record), charged_count(record, count)) for record, count in answers
        ),
    )
    if accountant == "pld":
        return composed_epsilon(answers, remaining, interval)
    curve = sum((renyi_curve(record, count) for record, count in answers), 0.0 * ORDERS)
    return curve_epsilon(curve, remaining)
