"""The ledger: what has been released of one unit of privacy, as a frozen value."""

import dataclasses

from dpfa_jax.core import ArgumentError, UnsupportedEventError, checks
from dpfa_jax.release import GaussianRecord, Release
from dpfa_jax.release.gaussian import RELATIONS


@dataclasses.dataclass(frozen=True)
class NonPrivateRecord:
    """An un-noised answer computed from private units: epsilon is infinite from here on.

    Attributes:
      unit: what one individual contributes, in words.
      relation: "add_or_remove", "replace", "mask" or "substitute".
      description: what was released.
    """

    unit: str
    relation: str
    description: str

    def __post_init__(self) -> None:
        checks.choice("relation", self.relation, RELATIONS)


Record = GaussianRecord | NonPrivateRecord


@dataclasses.dataclass(frozen=True)
class Entry:
    """`count` answers under one record."""

    record: Record
    count: int

    def __post_init__(self) -> None:
        checks.count("count", self.count)


@dataclasses.dataclass(frozen=True)
class Ledger:
    """All answers released about one unit of privacy, equal records merged, in order of arrival.

    Attributes:
      entries: one entry for each distinct record.

    Errors: UnsupportedEventError where two records differ in unit or relation: epsilons of
      different units do not add up, and neither do those of different neighbours.
    """

    entries: tuple[Entry, ...] = ()

    def __post_init__(self) -> None:
        for entry in self.entries[1:]:
            _check_composes(self.entries[0].record, entry.record)
        if len({entry.record for entry in self.entries}) != len(self.entries):
            raise ArgumentError(
                "entries", self.entries, "one record appears twice", "Add by `record`."
            )

    @property
    def unit(self) -> str | None:
        """The unit of privacy in words, or None while nothing is recorded."""
        return self.entries[0].record.unit if self.entries else None

    @property
    def relation(self) -> str | None:
        """The neighbouring relation, or None while nothing is recorded."""
        return self.entries[0].record.relation if self.entries else None

    @property
    def total_count(self) -> int:
        """Answers recorded, of all records together."""
        return sum(entry.count for entry in self.entries)

    @property
    def is_private(self) -> bool:
        """False where any answer was un-noised or its noise came from a test seed."""
        return all(
            isinstance(entry.record, GaussianRecord) and entry.record.is_secret_noise
            for entry in self.entries
        )

    def count_of(self, release: "Release | Record") -> int:
        """How many answers of `release` are recorded."""
        wanted = as_record(release)
        return sum(entry.count for entry in self.entries if entry.record == wanted)


def as_record(release: Release | Record) -> Record:
    """The frozen record of a release object; a record is returned as it is.

    Errors: ArgumentError for anything else.
    """
    if isinstance(release, (GaussianRecord, NonPrivateRecord)):
        return release
    if isinstance(release, Release):
        return release.record()
    raise ArgumentError(
        "release",
        release,
        "not a release",
        "Pass a TrainingRelease, ExampleRelease, RecordRelease, or a record of one.",
    )


def require_ledger(ledger: object) -> Ledger:
    """`ledger`, if it is one. Errors: ArgumentError."""
    if isinstance(ledger, Ledger):
        return ledger
    raise ArgumentError(
        "ledger",
        ledger,
        "not a Ledger",
        "Pass a Ledger; of an open LedgerFile its `.ledger`, of a path "
        "LedgerFile.open(path, read_only=True).ledger.",
    )


def record(ledger: Ledger, release: Release | Record, count: int = 1) -> Ledger:
    """A new ledger with `count` answers of `release` added. `ledger` itself never changes.

    Charge before releasing: call this (or `LedgerFile.charge`) first, then draw the noise. The
    steps of a shuffled loader are rounded up to whole epochs, those of cyclic batches to whole
    cycles (see `whole_turns`).

    Errors: UnsupportedEventError where unit or relation differ from the ledger's; ArgumentError for
    what is no Ledger, release or count.
    """
    require_ledger(ledger)
    new = as_record(release)
    count = whole_turns(new, checks.count("count", count))
    entries = list(ledger.entries)
    for index, entry in enumerate(entries):
        if entry.record == new:
            entries[index] = Entry(new, entry.count + count)
            return Ledger(tuple(entries))
    return Ledger((*entries, Entry(new, count)))


def whole_turns(charge: Record, count: int) -> int:
    """`count`, for a shuffled loader rounded up to whole epochs, for cyclic batches to cycles.

    Nobody can tell whether two charges belong to one shuffle: in two, an example may be met twice
    within one epoch's number of steps. So each charge pays for epochs of its own.
    """
    sampling = charge.sampling if isinstance(charge, GaussianRecord) else None
    turn = 1 if sampling is None else sampling.steps_per_turn
    return -(-count // turn) * turn


def _check_composes(first: Record, second: Record) -> None:
    for name in ("unit", "relation"):
        have, got = getattr(first, name), getattr(second, name)
        if have != got:
            raise UnsupportedEventError(
                f"{name} = {got!r}: this ledger keeps {name} = {have!r}, and the two do not "
                "compose. Keep one ledger for each unit and relation."
            )
