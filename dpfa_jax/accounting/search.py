"""The largest argument of an increasing cost that stays within a limit, in few evaluations."""

import math
from collections.abc import Callable

# A real search stops where the cost is within this relative distance below the limit.
SLACK = 1e-3


def largest_within(
    cost: Callable[[float], float],
    limit: float,
    start: float,
    most: float,
    *,
    growth: float = 2.0,
    whole: bool = False,
) -> float:
    """The largest x in [start, most] with cost(x) <= limit, exact over integers where `whole`.

    The result always satisfies the limit itself; `cost` must increase, be within the limit at
    `start`, and may be infinite. Interpolates, with a bisection every third step.
    """
    low, low_cost = start, cost(start)
    while True:
        if low >= most:
            return low
        high = min(math.ceil(low * growth) if whole else low * growth, most)
        high_cost = cost(high)
        if high_cost > limit:
            break
        low, low_cost, growth = high, high_cost, growth**2
    step = 0
    while not _is_done(low, low_cost, high, limit, whole):
        step += 1
        aim = limit if whole else limit * (1.0 - 0.5 * SLACK)
        share = (aim - low_cost) / (high_cost - low_cost) if math.isfinite(high_cost) else 0.5
        middle = low + (0.5 if step % 3 == 0 else share) * (high - low)
        if whole:
            middle = min(max(math.floor(middle), low + 1), high - 1)
        middle_cost = cost(middle)
        if middle_cost <= limit:
            low, low_cost = middle, middle_cost
        else:
            high, high_cost = middle, middle_cost
    return low


def _is_done(low: float, low_cost: float, high: float, limit: float, whole: bool) -> bool:
    if whole:
        return high - low <= 1
    return low_cost >= limit * (1.0 - SLACK) or high / low <= 1.0 + 1e-9
