"""DP-SGD steps, private and not, against peers: whole steps, one process a row, one GPU a case.

    python benchmarks/train.py --gpus 4 --output benchmarks/results/<device>/<date>-train.json
    python benchmarks/train.py --largest-of <that file>

A step is forward, backward, clipping, noise and AdamW. Times are medians over windows of queued
steps, in milliseconds; compare times of one case only: the methods of a case are timed in turn on
one GPU (`gpu`), where nothing else runs meanwhile, while cases are spread over the GPUs. A peer
that works through a batch in parts is timed with each size of part: `tried` has the milliseconds of
each, the row is of the best, `micro_batch`. `peak_bytes` is the allocator's peak over the run,
model and optimizer included. `largest_batch` (with --largest-of) is the largest batch of one pass,
without micro-batches, whose step fits the device: in JAX read from the compiler's memory figures,
in torch from steps that are run. `left_out` names what is missing and why: a row beyond a limit,
one that does not fit, a peer that is not installed or that a model does not run with. Parameters
are float32 and products bfloat16 for all; how each peer in torch comes to that, and what it rounds
besides, is said in its file (`torch_opacus`, `torch_fastdp`).
"""

import argparse
import functools
import itertools
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from row_processes import Limits, Turn, in_turn, over_gpus, stage, tuning
from stored_runs import begun, child_environment, write

FASTDP = (
    "git+https://github.com/awslabs/fast-differential-privacy"
    "@3d5cc561aa337c72f79873ccc4fe8b900b5493b5"
)
# Peers, and what they are installed with.
PEERS = {
    "jax_privacy": "pip install jax-privacy",
    "opacus_ghost": "pip install torch opacus",
    "fastdp": f"pip install torch transformers scipy {FASTDP}",
}
IN_TORCH = ("opacus_ghost", "fastdp")
METHODS = ("nonprivate", "per_layer", "flat", *PEERS)
CASES = (
    ("gpt2-small", 1024, 32),
    ("gpt2-medium", 1024, 16),
    ("vit-b", 512, 64),
    ("llama-1b-lora", 1024, 8),
    ("llama-1b", 1024, 8),
    ("gpt2-small", 512, 64),
    ("gpt2-small", 4096, 8),
)
PEER_MICRO_BATCHES = (2, 4, 8)


class Row(NamedTuple):
    """One process: a method, and the size of the parts that it takes the batch in, if any."""

    model: str
    T: int
    batch: int
    method: str
    micro_batch: int | None = None


def rows_of(
    case: tuple[str, int, int],
    methods: list[str],
    micro_batches: Sequence[int],
) -> list[Row]:
    rows = []
    for method in methods:
        sizes: list[int | None] = [None]
        if method == "jax_privacy":
            sizes = [size for size in micro_batches if case[2] % size == 0]
        rows += [Row(*case, method, size) for size in sizes]
    return rows


def time_row(row: Row, seconds: float, lock: str | None) -> dict[str, Any]:
    """In a process of its own: sets up, waits for its turn, and is timed."""
    turn = Turn()
    if row.method in IN_TORCH:
        import torch
        import train_torch

        train_torch.peer_of(row.method)
        turn.wait()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return train_torch.timed(row.method, *row[:3], seconds, device)
    import train_steps

    stage("tracing")
    timed = train_steps.prepared(*row, tuning=functools.partial(tuning, lock))
    turn.wait()
    return timed(seconds)


def find_largest(row: Row, memory_bytes: int | None) -> dict[str, Any]:
    Turn().wait()
    if row.method in IN_TORCH:
        import torch
        import train_torch

        limit = memory_bytes or int(0.93 * torch.cuda.mem_get_info()[1])
        return {"largest_batch": train_torch.largest_batch(row.method, *row[:3], limit)}
    import train_steps

    return {"largest_batch": train_steps.largest_batch(*row[:4], memory_bytes)}


class Results:
    """What is stored, written whenever something is added."""

    def __init__(self, path: str | None, result: dict[str, Any]) -> None:
        self.path, self.result, self._lock = path, result, threading.Lock()

    def add(self, row: Row, gpu: str, found: dict[str, Any] | None, why: str) -> None:
        with self._lock:
            if found is None:
                self._leave_out(row, "row", why)
            else:
                self._take(row, gpu, found)
            write(self.result, self.path)

    def add_largest(self, row: Row, found: dict[str, Any] | None, why: str) -> None:
        with self._lock:
            if found is None:
                self._leave_out(row, "largest", why)
            else:
                self._find(row)["largest_batch"] = found["largest_batch"]
                print(*row[:4], found, flush=True)
            write(self.result, self.path)

    def _find(self, row: Row) -> dict[str, Any]:
        for known in self.result["rows"]:
            if all(
                known[name] == value
                for name, value in row._asdict().items()
                if name != "micro_batch"
            ):
                return known
        return {}

    def _take(self, row: Row, gpu: str, found: dict[str, Any]) -> None:
        print(*row, f"GPU {gpu}", found, flush=True)
        known = self._find(row)
        tried = dict(known.get("tried", {}))
        if row.micro_batch is not None:
            tried[str(row.micro_batch)] = found["milliseconds"]
            found = found | {"micro_batch": row.micro_batch, "tried": tried}
        if known and known["milliseconds"] <= found["milliseconds"]:
            known["tried"] = tried
            return
        tokens = round(row.batch * row.T / found["milliseconds"] * 1e3)
        names = {name: value for name, value in row._asdict().items() if name != "micro_batch"}
        new = names | found | {"tokens_per_second": tokens, "largest_batch": None, "gpu": gpu}
        if known:
            known.clear()
            known.update(new)
        else:
            self.result["rows"].append(new)

    def _leave_out(self, row: Row, what: str, why: str) -> None:
        names = {name: value for name, value in row._asdict().items() if value is not None}
        self.result["left_out"].append(names | {"what": what, "why": why})
        print(f"left out: {self.result['left_out'][-1]}", flush=True)


def _command(words: dict[str, Any]) -> list[str]:
    return [sys.executable, __file__, "--child", json.dumps(words)]


def _environment(cache: str, gpu: str | None) -> dict[str, str]:
    environment = {"JAX_COMPILATION_CACHE_DIR": cache} | child_environment()
    environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.93"
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    return environment


def time_cases(arguments: argparse.Namespace, results: Results, limits: Limits) -> None:
    # Rows of one run share compiled programs and, on a GPU, what tuning found.
    with tempfile.TemporaryDirectory() as cache:

        def work(gpu: str, cases: Sequence[tuple[str, int, int]]) -> None:
            lock = os.path.join(cache, f"tuning-{gpu}")
            commands: dict[Any, list[str]] = {
                row: _command({"row": row, "seconds": arguments.seconds, "lock": lock})
                for case in cases
                for row in rows_of(case, arguments.methods, arguments.micro_batches)
            }
            in_turn(
                commands, _environment(cache, gpu), limits,
                lambda row, found, why: results.add(row, gpu, found, why),
            )  # fmt: skip

        groups = itertools.batched(arguments.cases, arguments.cases_at_once)
        over_gpus(_gpus(arguments.gpus), list(groups), work)


def find_all_largest(arguments: argparse.Namespace, results: Results, limits: Limits) -> None:
    """Compilations, `--at-once` at a time, and for torch short runs; nothing is timed."""
    rows = [Row(*(row[name] for name in Row._fields[:4])) for row in results.result["rows"]]
    gpus = _gpus(arguments.gpus)
    # Compilations are no work for a GPU; torch's steps are, and fill it: one a GPU.
    slots = gpus + [gpus[i % len(gpus)] for i in range(arguments.at_once - len(gpus))]
    torch_rows = [row for row in rows if row.method in IN_TORCH]
    with tempfile.TemporaryDirectory() as cache:

        def work(gpu: str, row: Row) -> None:
            words = {"row": row, "memory_bytes": arguments.memory_bytes}
            in_turn(
                {row: _command(words)}, _environment(cache, gpu), limits,
                results.add_largest,
            )  # fmt: skip

        over_gpus(slots, [row for row in rows if row.method not in IN_TORCH], work)
        over_gpus(gpus, torch_rows, work)


def _gpus(count: int) -> list[str]:
    """As the children are to see them: those that this process may see."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[:count] or [str(index) for index in range(count)]


def _case(text: str) -> tuple[str, int, int]:
    name, length, batch = text.split(":")
    return name, int(length), int(batch)


def child(words: Mapping[str, Any]) -> dict[str, Any]:
    row = Row(*words["row"])
    try:
        if "seconds" in words:
            return time_row(row, words["seconds"], words["lock"])
        return find_largest(row, words["memory_bytes"])
    except ModuleNotFoundError as error:
        if row.method not in PEERS:
            raise
        raise ModuleNotFoundError(f"{error}: {PEERS[row.method]}") from error


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(json.loads(sys.argv[2]))))
        return
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="JSON file to write, after each row")
    parser.add_argument(
        "--largest-of", metavar="FILE", help="add the largest batch to the rows of a stored run"
    )
    parser.add_argument(
        "--cases", nargs="*", type=_case, default=CASES,
        help="MODEL:T:BATCH; the list in this file if none",
    )  # fmt: skip
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument(
        "--micro-batches", type=int, nargs="+", default=PEER_MICRO_BATCHES,
        help="sizes of the parts that jax_privacy takes a batch in; the best one is the row",
    )  # fmt: skip
    parser.add_argument("--gpus", type=int, default=1, help="to spread the cases over")
    parser.add_argument(
        "--cases-at-once", type=int, default=1, help="that set up at once on a GPU; timed in turn"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing, for each process")
    for name, default, what in (
        ("--limit-seconds", math.inf, "of the whole run"),
        ("--row-limit-seconds", math.inf, "to set up the rows of the cases at once"),
        ("--timing-limit-seconds", 120.0, "to time one row"),
    ):
        parser.add_argument(name, type=float, default=default, help=what)
    parser.add_argument(
        "--at-once", type=int, default=4, help="processes, for --largest-of, which only compile"
    )
    parser.add_argument(
        "--memory-bytes", type=int, help="for --largest-of; what the device tells if none"
    )
    arguments = parser.parse_args()
    limits = Limits(
        arguments.row_limit_seconds,
        arguments.timing_limit_seconds,
        began + arguments.limit_seconds,
    )
    if arguments.largest_of:
        with open(arguments.largest_of) as file:
            results = Results(arguments.largest_of, json.load(file))
        # A search is one go: it has the time of a row's setting up.
        find_all_largest(arguments, results, limits._replace(timing=limits.setup))
        return
    result = begun("benchmarks/train.py", ("jax", "jax-privacy", "torch", "opacus", "fastDP"))
    time_cases(arguments, Results(arguments.output, result), limits)


if __name__ == "__main__":
    main()
