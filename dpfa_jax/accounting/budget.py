"""A privacy budget, and how many more answers of a kind fit into it."""

import dataclasses
import functools
import math
from collections.abc import Callable

from dpfa_jax.accounting.guarantee import ACCOUNTANTS, epsilon
from dpfa_jax.accounting.ledger import Ledger, Record, record, require_ledger, whole_turns
from dpfa_jax.accounting.search import largest_within
from dpfa_jax.core import ArgumentError, BudgetExceededError, checks
from dpfa_jax.release import GaussianRecord

_MOST_ANSWERS = 2**40


@dataclasses.dataclass(frozen=True)
class Budget:
    """The (epsilon, delta) that may be spent.

    Attributes:
      epsilon: > 0.
      delta: in (0, 1).
      accountant: "pld" for schedules fixed in advance, "rdp" for others (see `PrivacyFilter`).
    """

    epsilon: float
    delta: float
    accountant: str = "pld"

    def __post_init__(self) -> None:
        checks.positive("epsilon", self.epsilon)
        checks.delta("delta", self.delta)
        checks.choice("accountant", self.accountant, ACCOUNTANTS)

    def require(self, ledger: Ledger, charge: Record, count: int) -> None:
        """Refuse `count` answers of `charge` on top of `ledger` where they pass the budget.

        Test noise is counted as if it were secret, so that a test run stops where a real one would.
        Repeated calls for one record cost microseconds: the largest count is kept.

        Errors: BudgetExceededError; ArgumentError for what is no Ledger.
        """
        present = require_ledger(ledger).count_of(charge)
        others = Ledger(tuple(entry for entry in ledger.entries if entry.record != charge))
        room = largest_count(self, others, charge) - present
        if whole_turns(charge, count) > room:
            raise BudgetExceededError(
                f"{count} answers would pass the budget (epsilon = {self.epsilon:g}, "
                f"delta = {self.delta:g}); {max(room, 0)} more of this kind fit. "
                "Nothing was charged and nothing may be released."
            )


@functools.lru_cache(maxsize=1024)
def largest_count(budget: Budget, others: Ledger, charge: Record) -> int:
    """The most answers of `charge` that fit into `budget` beside `others`; 0 where none does.

    Errors: UnsupportedEventError where `charge` does not compose with `others`; ArgumentError where
      delta is no delta for this data set.
    """
    record(others, charge)  # refuses what does not compose before any search
    for entry in (*others.entries, *record(Ledger(), charge).entries):
        if not isinstance(entry.record, GaussianRecord):
            return 0
        if entry.record.sampling is not None:
            checks.delta("delta", budget.delta, units=entry.record.sampling.dataset_size)

    def cost(accountant: str) -> Callable[[float], float]:
        def spent(count: float) -> float:
            ledger = record(others, charge, int(count))
            try:
                return epsilon(ledger, budget.delta, accountant=accountant, nominal=True)
            except ArgumentError:  # more answers than the generator's tail allows at this delta
                return math.inf

        return spent

    # The Renyi bound is a proof as well, and cheap: it decides most counts.
    start = 0
    if cost("rdp")(1) <= budget.epsilon:
        start = int(largest_within(cost("rdp"), budget.epsilon, 1, _MOST_ANSWERS, whole=True))
    if budget.accountant == "rdp":
        return start
    tight = cost("pld")
    if start == 0 and tight(1) > budget.epsilon:
        return 0
    if start and tight(start) > budget.epsilon:
        return start  # rounding of the loss distribution; the Renyi bound stands
    return int(
        largest_within(tight, budget.epsilon, max(start, 1), _MOST_ANSWERS, growth=1.2, whole=True)
    )
