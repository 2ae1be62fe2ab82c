"""The largest batch that fits a memory, in few tries."""

import math
from collections.abc import Callable

GRANULE, MOST_BATCH = 4, 4096


def largest(
    needed: Callable[[int], int], start: int, limit: int, most: int = MOST_BATCH
) -> int | None:
    """The largest multiple of `GRANULE` up to `most` with needed(batch) <= limit; None without one.

    Memory grows about linearly with the batch, so a line through the last two figures finds it in a
    few compilations; each step is checked, and halved where the line misleads.
    """
    known: dict[int, int] = {}

    def fits(units: int) -> bool:
        if units not in known:
            known[units] = needed(units * GRANULE)
        return known[units] <= limit

    low, high = 0, most // GRANULE + 1  # fits, or is nothing; does not fit, or is too many
    guess = max(1, min(start // GRANULE, high - 1))
    for turn in range(40):
        low, high = (guess, high) if fits(guess) else (low, guess)
        if high - low <= 1:
            return low * GRANULE or None
        guess = (low + high) // 2
        if turn % 3 != 2:
            line = _on_line(sorted(known.items()), limit, 2 * max(low, 1))
            guess = min(max(line, low + 1), high - 1)
    return low * GRANULE or None


def _on_line(known: list[tuple[int, int]], limit: int, otherwise: int) -> int:
    """Where the line through the two largest batches meets the limit."""
    if len(known) < 2 or known[-1][1] <= known[-2][1]:
        return otherwise
    (x0, y0), (x1, y1) = known[-2:]
    return math.floor(x0 + (limit - y0) * (x1 - x0) / (y1 - y0))
