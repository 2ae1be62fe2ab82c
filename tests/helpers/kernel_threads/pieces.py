"""What lies in a slot of shared memory, and what must fit together."""

from typing import Any, NamedTuple

BLOCK = 64


class Fault(AssertionError):
    """What a kernel must not do."""


class Piece(NamedTuple):
    """What lies in a slot.

    `mask`: of weights: None or what hid some of them.
    `columns`: of the values, or of what was multiplied with them; None: all.
    """

    name: str
    batch: int | None = None
    head: int | None = None
    key_head: int | None = None
    rows: range | None = None
    keys: range | None = None
    mask: Any = None
    columns: range | None = None

    @property
    def of_row(self):
        return self.batch, self.head


def require(condition, *what):
    if not condition:
        raise Fault(*what)


def inside(part, whole):
    return None in (part, whole) or (whole.start <= part.start and part.stop <= whole.stop)


def overlap(key, other):
    return all(x == y for x, y in zip(key, other, strict=False))


def times(part, factor):
    return range(part.start * factor, part.stop * factor)


def check_fit(piece, other):
    """What is of `piece` is of `other` too, where both say of what they are."""
    require(inside(piece.rows, other.rows) and inside(piece.keys, other.keys), piece, other)
    for x, y in zip(piece[1:4], other[1:4], strict=True):
        require(None in (x, y) or x == y, piece, other)
