"""Rows set up at once and timed in turn: what hangs or crashes costs its own row alone."""

import fcntl
import itertools
import os
import sys
import threading
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
# A child as a row's process is, without the seconds that JAX takes to be imported.
CHILD = f"""
import json, os, subprocess, sys, time
sys.path.insert(0, {str(FOLDER)!r})
from row_processes import Turn, stage
what, log = sys.argv[1:]
turn = Turn()
if what == "hang": stage("compiling"); time.sleep(600)
if what == "crash": sys.exit("no such kernel")
if what == "silent": os._exit(0)
if what == "nest": subprocess.Popen(["sleep", "600"]); time.sleep(600)
turn.wait()
if what == "hang timed": time.sleep(600)
if what == "search fails":
    print(json.dumps({{"milliseconds": 1.0, "of": what}}), flush=True); stage("searching")
    sys.exit("no time left")
if what == "crash timed": sys.exit("out of memory")
if what == "loud": sys.stderr.write("x" * 1_000_000); sys.stderr.flush()
began = time.monotonic()
time.sleep(0.2)
with open(log, "a") as file: print(began, time.monotonic(), file=file)
print("a library's own line")
print(json.dumps({{"milliseconds": 1.0, "of": what}}))
"""


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import row_processes

        yield row_processes


def _run(rows, tmp_path, names, setup=60.0, timing=60.0, seconds=120.0):
    log, found = tmp_path / "log", {}
    commands = {name: [sys.executable, "-c", CHILD, name, str(log)] for name in names}
    limits = rows.Limits(setup, timing, time.monotonic() + seconds)
    rows.in_turn(commands, os.environ, limits, lambda key, *rest: found.update({key: rest}))
    spans = [tuple(map(float, line.split())) for line in log.read_text().splitlines()]
    return found, sorted(spans)


def test_rows_are_timed_one_after_the_other(rows, tmp_path):
    found, spans = _run(rows, tmp_path, ["a", "b", "loud"])
    assert {key: row["of"] for key, (row, _) in found.items()} == {k: k for k in found}
    assert len(spans) == 3
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_a_row_that_crashes_is_left_out_with_its_last_word(rows, tmp_path):
    found, spans = _run(rows, tmp_path, ["crash", "a", "crash timed", "silent"])
    assert len(spans) == 1 and found["a"][0]["of"] == "a"
    assert found["crash"] == (None, "setting up: no such kernel")
    assert found["crash timed"] == (None, "out of memory")
    assert found["silent"][0] is None and "without a row" in found["silent"][1]


def test_a_row_that_was_printed_stays_whatever_comes_after(rows, tmp_path):
    found, _ = _run(rows, tmp_path, ["search fails", "a"])
    row, why = found["search fails"]
    assert row["of"] == "search fails" and why == "no time left"


@pytest.mark.slow
def test_a_row_that_hangs_is_killed_with_its_children(rows, tmp_path):
    found, spans = _run(rows, tmp_path, ["hang", "nest", "a"], setup=8.0)
    assert len(spans) == 1 and found["a"][0] is not None
    assert "'compiling'" in found["hang"][1] and found["nest"][0] is None
    groups = {int(path.name) for path in Path("/proc").glob("[0-9]*") if _sleeps(path)}
    assert not groups, groups


def _sleeps(path):
    try:
        words = (path / "cmdline").read_bytes().split(b"\0")
        zombie = (path / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return False
    return not zombie and words[:2] == [b"sleep", b"600"]


def test_a_row_that_hangs_while_timed_holds_up_no_other(rows, tmp_path):
    found, spans = _run(rows, tmp_path, ["hang timed", "a"], timing=3.0)
    assert "'timing'" in found["hang timed"][1]
    assert len(spans) == 1 and found["a"][0] is not None


@pytest.mark.slow
def test_the_run_ends_at_its_limit(rows, tmp_path):
    (tmp_path / "log").touch()
    began = time.monotonic()
    found, spans = _run(rows, tmp_path, ["hang", "a"], seconds=3.0)
    assert time.monotonic() - began < 15.0
    assert not spans and all(row is None for row, _ in found.values())


@pytest.mark.slow
def test_nothing_starts_past_the_end(rows, tmp_path):
    found, started = {}, tmp_path / "started"
    commands = {"late": [sys.executable, "-c", f"open({str(started)!r}, 'w')"]}
    limits = rows.Limits(60.0, 60.0, time.monotonic())
    rows.in_turn(commands, os.environ, limits, lambda key, *rest: found.update({key: rest}))
    assert found == {"late": (None, rows.PAST_END)}
    assert not started.exists()


def test_children_end_with_their_parent(rows, tmp_path):
    process = rows.RowProcess([sys.executable, "-c", CHILD, "hang", "-"], os.environ)
    assert process.ready(time.monotonic() + 1.0) != ""  # killed; now one whose input just closes
    other = rows.RowProcess([sys.executable, "-c", CHILD, "hang", "-"], os.environ)
    other._child.stdin.close()
    assert other._child.wait(30.0) == 1
    other.end()


def test_each_gpu_has_one_case_at_a_time_and_none_is_lost(rows):
    busy, seen, clash = set(), [], []

    def work(gpu, case):
        clash.extend([gpu] if gpu in busy else [])
        busy.add(gpu)
        time.sleep(0.01)
        busy.discard(gpu)
        seen.append((gpu, case))

    rows.over_gpus(["0", "1", "2"], range(20), work)
    assert not clash and sorted(case for _, case in seen) == list(range(20))
    assert len({gpu for gpu, _ in seen}) == 3

    def fails(gpu, case):
        raise ValueError(case)

    with pytest.raises(ValueError):
        rows.over_gpus(["0", "1"], range(4), fails)


def test_tuning_is_alone_until_the_allocator_rests(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "QUIET", 0.3)
    path, count = str(tmp_path / "lock"), [0]

    def is_held():
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    with rows.tuning(path, lambda: count[0]):
        time.sleep(0.8)
        assert is_held()  # nothing allocated yet: nothing is known
        for _ in range(8):
            count[0] += 1
            time.sleep(0.1)
            assert is_held()
        time.sleep(0.8)
        assert not is_held()
        with rows.tuning(path, lambda: 0):  # another compilation begins meanwhile
            pass
    with rows.tuning(path, lambda: 0):
        assert is_held()
    assert not is_held() and threading.active_count() < 10
