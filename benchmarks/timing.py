"""Medians over windows of queued steps."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

WINDOWS = 5


def measured(step: Callable[[], Any], wait: Callable[[Any], Any], seconds: float) -> dict[str, Any]:
    for _ in range(2):
        wait(step())
    start = time.perf_counter()
    wait(step())
    queued = max(2, math.ceil(seconds / WINDOWS / (time.perf_counter() - start)))
    times = []
    for _ in range(WINDOWS):
        start = time.perf_counter()
        for _ in range(queued):
            last = step()
        wait(last)
        times.append((time.perf_counter() - start) / queued * 1e3)
    return {
        "milliseconds": round(statistics.median(times), 3),
        "spread": round(max(times) - min(times), 3),
    }
