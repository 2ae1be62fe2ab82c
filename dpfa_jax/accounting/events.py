"""Record -> DpEvent. Events are always read under add-or-remove: the relation is inside Delta."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpfa_jax.accounting.ledger import NonPrivateRecord, Record
from dpfa_jax.core import UnsupportedEventError, checks
from dpfa_jax.release import GaussianRecord

if TYPE_CHECKING:
    import dp_accounting


def dp_event(record: Record, count: int = 1) -> dp_accounting.DpEvent:
    """The dp_accounting event of `count` answers under `record`.

    Account it under `NeighboringRelation.ADD_OR_REMOVE_ONE`, whatever the record's relation:
    the relation is folded into the sensitivity, and dp_accounting's accountants disagree on others.
    A shuffled loader is charged once an epoch, without amplification.

    Errors: UnsupportedEventError for sampling that does not go with the relation.
    """
    import dp_accounting

    checks.count("count", count)
    if isinstance(record, NonPrivateRecord):
        return dp_accounting.NonPrivateDpEvent()
    return dp_accounting.SelfComposedDpEvent(record.dp_event(), charged_count(record, count))


def charged_count(record: GaussianRecord, count: int) -> int:
    """How many times one unit takes part in `count` answers, at most, before amplification.

    Shuffled: each example once an epoch, and an epoch has at least floor(n / batch) steps, whether
    a last short batch is kept or dropped. Cyclic Poisson batches: once a cycle. Otherwise every
    answer counts.

    Errors: UnsupportedEventError for sampling that does not go with the relation.
    """
    require_supported(record)
    return count if record.sampling is None else -(-count // record.sampling.steps_per_turn)


def is_amplified(record: GaussianRecord) -> bool:
    """True where units reach the answer by Poisson sampling."""
    return record.sampling is not None and record.sampling.scheme == "poisson"


def require_supported(record: GaussianRecord) -> None:
    """Refuse a record that no sound event describes. Errors: UnsupportedEventError."""
    if record.sampling is not None and record.relation != "add_or_remove":
        raise UnsupportedEventError(
            f"sampling.scheme = {record.sampling.scheme!r} with relation = {record.relation!r}: "
            "sampled batches are accounted under add_or_remove only. "
            'Use relation="add_or_remove", or leave sampling out.'
        )
