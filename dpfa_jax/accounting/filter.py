"""A privacy filter: a budget that holds even if every release is chosen after seeing the last.

Per Renyi order, divergences of adaptively chosen answers add up, and stopping before a fixed sum is
passed keeps that sum for the whole interaction (Feldman and Zrnic, "Individual privacy accounting
via a Renyi filter", 2021; Lecuyer, "Practical privacy filters and odometers with Renyi differential
privacy", 2021). Which order lives longest depends on what was released, so the orders may not share
one delta: transcripts are split by the last order alive, each part keeps its own moment, and the
parts' deltas add up. Hence every order is given delta / (number of orders).
"""

import dataclasses
import functools
import math

import numpy as np

from dpfa_jax.accounting.events import charged_count
from dpfa_jax.accounting.ledger import Ledger, Record, as_record, record
from dpfa_jax.accounting.renyi import ORDERS, conversion_credit, renyi_curve
from dpfa_jax.accounting.tails import TAIL_FACTOR, TailCost, record_tail_cost
from dpfa_jax.core import BudgetExceededError, checks
from dpfa_jax.release import GaussianRecord, Release

ALERTS = (0.50, 0.80, 0.95)

# Few orders: each costs log(number) / (alpha - 1). The best one moves like 1 / epsilon.
_FILTER_ORDERS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 128.0, 256.0)
_PICKED = np.searchsorted(ORDERS, _FILTER_ORDERS)
# Share of delta kept for the noise generator's tail, and the largest log c (see `tails`).
_TAIL_SHARE, _LOG_FACTOR = 1.0 / TAIL_FACTOR, 0.01


@dataclasses.dataclass(frozen=True)
class PrivacyFilter:
    """What may still be released within (epsilon, delta), whatever the next release depends on.

    Frozen: `spend` returns a new filter. Launch nothing that `spend` has not accepted.

    Attributes:
      epsilon: > 0, the budget.
      delta: in (0, 1), below 1/n of every data set it is spent on.
      ledger: what was spent.

    Errors: ArgumentError for a budget out of range.
    """

    epsilon: float
    delta: float
    ledger: Ledger = dataclasses.field(default_factory=Ledger)

    def __post_init__(self) -> None:
        checks.positive("epsilon", self.epsilon)
        checks.delta("delta", self.delta)
        if not self._holds(self.ledger):
            raise BudgetExceededError(
                f"ledger: it passes epsilon = {self.epsilon:g}, delta = {self.delta:g} already. "
                "Start from an empty ledger or a larger budget."
            )

    @property
    def fraction(self) -> float:
        """Spent share of the budget at the order that lasts longest, in [0, 1]."""
        if not self.ledger.entries:
            return 0.0
        limits = _limits(self.epsilon, self.delta)
        alive = limits > 0.0
        spent = _spent(self.ledger)
        moments = float(np.min(spent[alive] / limits[alive])) if alive.any() else 1.0
        tails = _tails(self.ledger)
        return max(
            moments, tails.delta / (_TAIL_SHARE * self.delta), tails.log_factor / _LOG_FACTOR
        )

    @property
    def alerts(self) -> tuple[float, ...]:
        """Those of 50 %, 80 % and 95 % that the spent share has reached."""
        return tuple(level for level in ALERTS if self.fraction >= level)

    def admits(self, release: Release | Record, count: int = 1) -> bool:
        """True if `count` answers of `release` fit.

        Errors: UnsupportedEventError where unit or relation differ from what was spent;
          ArgumentError for delta >= 1/n.
        """
        new = as_record(release)
        if isinstance(new, GaussianRecord) and new.sampling is not None:
            checks.delta("delta", self.delta, units=new.sampling.dataset_size)
        return self._holds(record(self.ledger, new, count))

    def spend(self, release: Release | Record, count: int = 1) -> "PrivacyFilter":
        """The filter after `count` answers of `release`. Call it BEFORE releasing them.

        Errors: BudgetExceededError where they do not fit, and whatever `admits` raises.
        """
        if not self.admits(release, count):
            raise BudgetExceededError(
                f"{count} answers do not fit: {self.fraction:.1%} of epsilon = {self.epsilon:g}, "
                f"delta = {self.delta:g} are spent. Nothing may be released."
            )
        return dataclasses.replace(self, ledger=record(self.ledger, release, count))

    def _holds(self, ledger: Ledger) -> bool:
        if not ledger.is_private:
            return False
        tails = _tails(ledger)
        if tails.delta > _TAIL_SHARE * self.delta or tails.log_factor > _LOG_FACTOR:
            return False
        return bool(np.any(_spent(ledger) <= _limits(self.epsilon, self.delta)))


@functools.lru_cache(maxsize=256)
def _limits(epsilon: float, delta: float) -> np.ndarray:
    """The largest log-moment at each order of the filter that proves (epsilon, delta)."""
    remaining = delta * (1.0 - _TAIL_SHARE) * math.exp(-_LOG_FACTOR) / len(_FILTER_ORDERS)
    orders = ORDERS[_PICKED]
    return (epsilon + conversion_credit(remaining)[_PICKED]) * (orders - 1.0)


def _spent(ledger: Ledger) -> np.ndarray:
    total = np.zeros(len(_FILTER_ORDERS))
    for entry in ledger.entries:
        assert isinstance(entry.record, GaussianRecord)
        total += renyi_curve(entry.record, entry.count)[_PICKED]
    return total


def _tails(ledger: Ledger) -> TailCost:
    delta = log_factor = 0.0
    for entry in ledger.entries:
        assert isinstance(entry.record, GaussianRecord)
        cost = record_tail_cost(entry.record)
        count = charged_count(entry.record, entry.count)
        delta += count * cost.delta
        log_factor += count * cost.log_factor
    return TailCost(delta, log_factor)
