"""The largest batch that fits a memory, in few tries."""

import math
import time
from collections.abc import Callable

GRANULE, MOST_BATCH = 4, 4096


def largest(
    needed: Callable[[int], float],
    start: int,
    limit: int,
    most: int = MOST_BATCH,
    seconds: float = math.inf,
) -> int | None:
    """The largest multiple of `GRANULE` up to `most` with needed(batch) <= limit; None without one.

    Memory grows about linearly with the batch, so a line through the last two figures finds it in a
    few tries; each is checked, and bounds that are known are halved where the line misleads. Where
    a batch has no figure but does not fit, `needed` is infinite. TimeoutError says what is known
    where `seconds` are over first.
    """
    known: dict[int, float] = {}
    low, high = 0, most // GRANULE + 1  # fits, or is nothing; does not fit, or is too many
    guess = max(1, min(start // GRANULE, high - 1))
    end = time.monotonic() + seconds
    for turn in range(40):
        known[guess] = needed(guess * GRANULE)
        low, high = (guess, high) if known[guess] <= limit else (low, guess)
        if high - low <= 1:
            return low * GRANULE or None
        if time.monotonic() >= end:
            known_not = f", {high * GRANULE} does not" if high in known else ""
            raise TimeoutError(f"{low * GRANULE} fits{known_not}; {seconds:.0f} seconds were over")
        line = _on_line(known, limit)
        if line is None or (turn % 3 == 2 and high in known):
            guess = (low + high) // 2
        else:
            guess = min(max(line, low + 1), high - 1)
    return low * GRANULE or None


def _on_line(known: dict[int, float], limit: int) -> int | None:
    """Where the line through the two largest batches, or one and no memory, meets the limit."""
    figures = sorted((size, figure) for size, figure in known.items() if figure < math.inf)
    (x0, y0), (x1, y1) = ([(0, 0.0), (0, 0.0), *figures])[-2:]
    if y1 <= y0:
        return None
    return math.floor(x0 + (limit - y0) * (x1 - x0) / (y1 - y0))
