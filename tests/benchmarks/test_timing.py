"""Windows of queued calls."""

import importlib.util
import itertools
import statistics
import time
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location(
    "benchmark_timing", Path(__file__).parents[2] / "benchmarks" / "timing.py"
)
timing = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(timing)


def test_calls_take_turns():
    """Each window holds all of them, about as long each, in an order of its own."""
    order, waited = [], []

    def call(name, seconds):
        order.append(name)
        time.sleep(seconds)
        return name

    calls = {
        name: (lambda name=name, s=s: call(name, s), waited.append)
        for name, s in (("short", 0.002), ("long", 0.004), ("longer", 0.008))
    }
    times = timing.in_turns(calls, seconds=0.08)
    assert [len(x) for x in times.values()] == [timing.WINDOWS] * 3
    short, long, longer = (statistics.median(times[name]) for name in calls)
    assert 2.0 <= short < long < longer, "no call sleeps for less than it was told"
    order = order[2 * len(calls) :]  # the calls that warm up and count
    neighbours = {pair for pair in itertools.pairwise(order) if pair[0] != pair[1]}
    assert len(neighbours) > len(calls), "one always follows the same other one"
    assert waited.count("short") == 2 + timing.WINDOWS
