"""Medians over windows of queued calls."""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
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


def in_turns[Name](
    calls: Mapping[Name, tuple[Callable[[], Any], Callable[[Any], Any]]], seconds: float
) -> dict[Name, list[float]]:
    """Milliseconds a call in each window, of several (call, wait), `seconds` for each in all.

    Each window takes all of them in an order of its own: a clock that falls as the device warms
    falls for all, and none always follows a pause, or a neighbour that leaves the device hot or
    cool (with one order, programs that were the same differed by up to 5 %).
    """
    queued = {}
    for name, (call, wait) in calls.items():
        wait(call())
        start = time.perf_counter()
        wait(call())
        queued[name] = math.ceil(seconds / WINDOWS / (time.perf_counter() - start))
    times: dict[Name, list[float]] = {name: [] for name in calls}
    orders = random.Random(0)
    for _ in range(WINDOWS):
        for name in orders.sample(list(calls), len(calls)):
            call, wait = calls[name]
            start = time.perf_counter()
            for _ in range(queued[name]):
                last = call()
            wait(last)
            times[name].append((time.perf_counter() - start) / queued[name] * 1e3)
    return times
