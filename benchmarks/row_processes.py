"""Processes that each time one row: all set up at once, timed one after the other.

A row's process sets up (imports, tracing, compilation), prints a line that says so, waits for a
line on its standard input, times, and prints its row as JSON. So rows of one GPU share the time of
setting up, and nothing else runs there while one is timed.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

POLL, QUIET = 0.05, 5.0  # seconds
READY = "ready"
PAST_END = "the time limit of the run"


class Limits(NamedTuple):
    """Seconds to set up and to be timed; when the run ends, by `time.monotonic`."""

    setup: float
    timing: float
    end: float


class RowProcess:
    """One child in a process group of its own, which is killed whole."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        # Files, not pipes: a child that hangs, or prints much, must not hold up its parent.
        self._out, self._err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        self._began = time.monotonic()
        self._child = subprocess.Popen(
            command, env=dict(environment), start_new_session=True, text=True,
            stdin=subprocess.PIPE, stdout=self._out, stderr=self._err,
        )  # fmt: skip

    def ready(self, deadline: float) -> str:
        """ "" once the child has set up, or why it has not."""
        why = self._until(lambda: READY in self._lines(), deadline)
        if why:
            self.end()
        return why

    def timed(self, deadline: float) -> tuple[dict[str, Any] | None, str]:
        """Lets the child go on: (its row, "") or (None, why not).

        A child may print its row and go on for more: where that fails, (its row, why).
        """
        with contextlib.suppress(BrokenPipeError):  # gone meanwhile: its end says why
            assert self._child.stdin is not None
            self._child.stdin.write("go\n")
            self._child.stdin.flush()
        why = self._until(lambda: False, deadline)
        rows = [line for line in self._lines() if line.startswith("{")]
        with contextlib.suppress(IndexError, json.JSONDecodeError):
            return json.loads(rows[-1]), why
        return None, why or "ended without a row"

    def end(self) -> None:
        if self._out.closed:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to it
            self._child.wait(10.0)
        with contextlib.suppress(BrokenPipeError):
            assert self._child.stdin is not None
            self._child.stdin.close()
        self._out.close()
        self._err.close()

    def _until(self, reached: Callable[[], bool], deadline: float) -> str:
        while not reached():
            code = self._child.poll()
            if code is not None:
                return "" if code == 0 else self._error(code)
            if time.monotonic() >= deadline:
                return self._too_long()
            time.sleep(POLL)
        return ""

    def _too_long(self) -> str:
        seconds, stages = time.monotonic() - self._began, self._lines()
        return (
            f"ended after {seconds:.0f} seconds, in its stage {stages[-1] if stages else 'start'!r}"
        )

    def _lines(self) -> list[str]:
        return _read(self._out)

    def _error(self, code: int) -> str:
        lines = [line.strip() for line in _read(self._err) if line.strip()]
        return lines[-1][:300] if lines else f"exit code {code}"


def _read(file: Any) -> list[str]:
    # By position: the child writes through the same open file, whose offset must stay its own.
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="replace").splitlines()


def in_turn(
    commands: Mapping[Hashable, Sequence[str]],
    environment: Mapping[str, str],
    limits: Limits,
    done: Callable[[Any, dict[str, Any] | None, str], None],
) -> None:
    """Starts all commands, and once each has set up or failed, times one after the other.

    `done(key, row, why)` is called for each, as soon as it is known; no process is left behind, and
    none is started past the end of the run.
    """
    if time.monotonic() >= limits.end:
        for key in commands:
            done(key, None, PAST_END)
        return
    processes: dict[Hashable, RowProcess] = {}
    try:
        for key, command in commands.items():
            processes[key] = RowProcess(command, environment)
        deadline = min(time.monotonic() + limits.setup, limits.end)
        waiting = []
        for key, process in processes.items():
            why = process.ready(deadline)
            if why:
                done(key, None, f"setting up: {why}")
            else:
                waiting.append(key)
        for key in waiting:
            now = time.monotonic()
            found, why = None, PAST_END
            if now < limits.end:
                found, why = processes[key].timed(min(now + limits.timing, limits.end))
            processes[key].end()
            done(key, found, why)
    finally:
        for process in processes.values():
            process.end()


def over_gpus(gpus: Sequence[str], cases: Sequence[Any], work: Callable[[str, Any], None]) -> None:
    """work(gpu, case) for all cases in order, on each GPU one at a time; errors are raised."""
    left, lock = iter(cases), threading.Lock()
    errors: list[BaseException] = []

    def serve(gpu: str) -> None:
        while not errors:
            with lock:
                case = next(left, None)
            if case is None:
                return
            try:
                work(gpu, case)
            except BaseException as error:  # a thread's own would be lost
                errors.append(error)

    # Daemons: where the parent is told to end, its children see their input closed and end too.
    threads = [threading.Thread(target=serve, args=(gpu,), daemon=True) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Turn:
    """The child's side: `wait()` says that all is set up, and returns when it may be timed."""

    def __init__(self) -> None:
        self._go = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def wait(self) -> None:
        stage(READY)
        self._go.wait()
        stage("timing")

    def _listen(self) -> None:
        # By the descriptor: a reader that waits in `sys.stdin` would block the interpreter's end.
        if os.read(0, 100):
            self._go.set()
            os.read(0, 100)
        os._exit(1)  # the parent is gone, maybe in the midst of a compilation


def stage(name: str) -> None:
    """What the child is at, for its parent to tell should the child hang."""
    print(name, flush=True)


@contextlib.contextmanager
def tuning(path: str | None, allocations: Callable[[], int]) -> Iterator[None]:
    """Holds the lock file at `path` while a compilation tunes kernels on the GPU.

    Two compilations that time kernels on one GPU at once disturb each other's choice. Tuning comes
    first, code generation, which the GPU has no part in, after: the lock is let go once the device
    allocator, having been used, has rested for QUIET seconds, and else at the end.
    """
    if not path:
        yield
        return
    with open(path, "w") as file:
        stage("waiting to compile")
        fcntl.flock(file, fcntl.LOCK_EX)
        stage("compiling")
        over = threading.Event()
        watcher = threading.Thread(target=_release_when_quiet, args=(file, allocations, over))
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
            fcntl.flock(file, fcntl.LOCK_UN)


def _release_when_quiet(file: Any, allocations: Callable[[], int], over: threading.Event) -> None:
    first = last = allocations()
    since = time.monotonic()
    while not over.wait(POLL):
        now = allocations()
        if now != last:
            last, since = now, time.monotonic()
        if last != first and time.monotonic() - since > QUIET:
            fcntl.flock(file, fcntl.LOCK_UN)
            return
