"""DP-SGD steps, private and not, against peers: whole steps, one process a row, one GPU a case.

    python benchmarks/train.py --gpus 4 --output benchmarks/results/<device>/<date>-train.json
    python benchmarks/train.py --add-to <that file>      what it lacks, after a run that was cut off
    python benchmarks/train.py --largest-of <that file> [--cases ...] [--methods ...]

A step is forward, backward, clipping, noise and AdamW. Times are medians over windows of queued
steps, in milliseconds; compare times of one case only: the methods of a case are timed in turn on
one GPU (`gpu`), where nothing else runs meanwhile, while cases are spread over the GPUs. `run`, if
any, tells which of `runs` a row is of, if not of the first; runs may have had different GPUs of one
kind. A peer that works through a batch in parts is timed with each size of part, but for sizes
beyond one that is slower than the best by a fifth: `tried` has the milliseconds of each, the row is
of the best, `micro_batch`. `peak_bytes` is the allocator's peak over the run, model and optimizer
included. `largest_batch` (with --largest or --largest-of) is the largest batch of one pass, without
micro-batches, whose step fits the device: in JAX read from the compiler's memory figures
(compilations, which run beside the timing and leave the GPU alone), in torch from steps that are
run. `left_out` names what is missing and why: a row beyond a limit, one that does not fit, a peer
that is not installed or that a model does not run with. Parameters are float32 and products
bfloat16 for all; how each peer in torch comes to that, and what it rounds besides, is said in its
file (`torch_opacus`, `torch_fastdp`).
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from arguments import Help, count, file, require_gpu, seconds
from largest_batch import GRANULE
from row_processes import Limits, Turn, in_turn, over_gpus, stage, tuning
from stored_runs import begun, child_environment
from train_results import Results, Row, added_to

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
    ("gpt2-small", 2048, 16),
    ("gpt2-small", 4096, 8),
    ("gpt2-medium-stacked", 1024, 32),
)
PEER_MICRO_BATCHES = (4, 8, 2, 16)  # the likeliest first


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


def time_row(
    row: Row, seconds: float, lock: str | None, largest_seconds: float, memory_bytes: int | None
) -> dict[str, Any]:
    """In a process of its own: sets up, waits for its turn, and is timed.

    Largest batches in torch are of steps that run: where they are to be found, that is in the turn
    too, after the row has been printed, which stays whatever comes of the search.
    """
    turn = Turn()
    if row.method in IN_TORCH:
        import torch
        import train_torch

        train_torch.peer_of(row.method)
        turn.wait()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found = train_torch.timed(row.method, *row[:3], seconds, device)
        if largest_seconds:
            print(json.dumps(found), flush=True)
            stage("searching")
            found |= find_largest(row, memory_bytes, largest_seconds)
        return found
    import train_steps

    stage("tracing")
    timed = train_steps.prepared(*row, tuning=functools.partial(tuning, lock))
    turn.wait()
    return timed(seconds)


def find_largest(row: Row, memory_bytes: int | None, seconds: float) -> dict[str, Any]:
    if row.method in IN_TORCH:
        import torch
        import train_torch

        limit = memory_bytes or int(0.93 * torch.cuda.mem_get_info()[1])
        found = train_torch.largest_batch(row.method, *row[:3], limit, seconds)
    else:
        import train_steps

        found = train_steps.largest_batch(*row[:4], memory_bytes)
    if found is None:
        raise MemoryError(f"no batch of {GRANULE} fits")
    return {"largest_batch": found}


def _command(words: dict[str, Any]) -> list[str]:
    return [sys.executable, __file__, "--child", json.dumps(words)]


def _environment(cache: str | None, gpu: str | None) -> dict[str, str]:
    environment = child_environment()
    if cache is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = cache
    environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.93"
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    return environment


def time_cases(arguments: argparse.Namespace, results: Results, limits: Limits, cache: str) -> None:
    # Rows of one run share compiled programs and, on a GPU, what tuning found.
    more = {"memory_bytes": arguments.memory_bytes, "seconds": arguments.seconds}
    more["largest_seconds"] = arguments.largest_seconds if arguments.largest else 0.0

    def work(gpu: str, cases: Sequence[tuple[str, int, int]]) -> None:
        lock = os.path.join(cache, f"tuning-{gpu}")
        rows = [
            row
            for case in cases
            for row in rows_of(case, arguments.methods, arguments.micro_batches)
        ]
        # In torch last, when those in JAX hold no memory any more; one size of part a round.
        rows.sort(key=lambda row: row.method in IN_TORCH)
        sizes = [
            size for size in arguments.micro_batches if any(r.micro_batch == size for r in rows)
        ]
        for turn, size in enumerate(sizes or [None]):
            due = [
                row for row in rows
                if row.micro_batch == size or (turn == 0 and row.micro_batch is None)
            ]  # fmt: skip
            commands: dict[Any, list[str]] = {
                row: _command(more | {"row": row, "lock": lock})
                for row in due if results.is_wanted(row)
            }  # fmt: skip
            in_turn(
                commands, _environment(cache, gpu), limits,
                lambda row, found, why: results.add(row, gpu, found, why),
            )  # fmt: skip

    groups = itertools.batched(arguments.cases, arguments.cases_at_once)
    over_gpus(_gpus(arguments.gpus), list(groups), work)


def find_all_largest(
    rows: Sequence[Row], arguments: argparse.Namespace, results: Results, limits: Limits
) -> None:
    """Compilations, `--at-once` at a time, and for torch short runs; nothing is timed.

    Compilations run no kernel, and give way to whatever else the host has to do.
    """
    gpus = _gpus(arguments.gpus)
    rows = [row for row in rows if results.is_largest_wanted(row)]
    # Compilations are no work for a GPU; torch's steps are, and fill it: one a GPU.
    slots = [gpus[index % len(gpus)] for index in range(arguments.at_once)]

    def work(gpu: str, row: Row) -> None:
        words = {"row": row, "memory_bytes": arguments.memory_bytes}
        command = _command(words | {"largest_seconds": arguments.largest_seconds})
        in_turn(
            {row: ["nice", "-n", "19", *command]}, _environment(None, gpu), limits,
            results.add_largest,
        )  # fmt: skip

    over_gpus(slots, [row for row in rows if row.method not in IN_TORCH], work)
    over_gpus(gpus, [row for row in rows if row.method in IN_TORCH], work)


def run(arguments: argparse.Namespace, results: Results, limits: Limits) -> None:
    # A search compiles several steps, and gives way: it has all the time that there is.
    searching = limits._replace(timing=math.inf)
    with contextlib.ExitStack() as stack:
        cache = arguments.cache or stack.enter_context(tempfile.TemporaryDirectory())
        os.makedirs(cache, exist_ok=True)
        if arguments.largest_of:
            stored = (
                Row(row["model"], row["T"], row["batch"], row["method"])
                for row in results.result["rows"]
            )
            rows = [row for row in stored if _is_asked_for(row, arguments)]
            find_all_largest(rows, arguments, results, searching)
            return
        searches: list[tuple[str, list[Row]]] = []
        if arguments.largest:
            rows = [
                Row(name, length, batch, method) for name, length, batch in arguments.cases
                for method in arguments.methods if method not in IN_TORCH
            ]  # fmt: skip
            searches = [("searches", rows)]
        # Beside the timing, in a thread of its own; over_gpus raises what fails in either.
        over_gpus(
            ["times", "searches"], [("times", []), *searches],
            lambda _, what: (
                time_cases(arguments, results, limits, cache) if what[0] == "times"
                else find_all_largest(what[1], arguments, results, searching)
            ),
        )  # fmt: skip


def _is_asked_for(row: Row, arguments: argparse.Namespace) -> bool:
    return row[:3] in (arguments.cases or [row[:3]]) and row.method in arguments.methods


def _gpus(count: int) -> list[str]:
    """As the children are to see them: those that this process may see."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[:count] or [str(index) for index in range(count)]


def _case(text: str) -> tuple[str, int, int]:
    try:
        name, length, batch = text.split(":")
        return name, count(length), count(batch)
    except (ValueError, argparse.ArgumentTypeError):
        example = ":".join(map(str, CASES[0]))
        raise argparse.ArgumentTypeError(
            f"{text!r} is not MODEL:T:BATCH, as {example} is"
        ) from None


def child(words: Mapping[str, Any]) -> dict[str, Any]:
    row = Row(*words["row"])
    try:
        if "seconds" in words:
            return time_row(row, **{name: words[name] for name in words if name != "row"})
        Turn().wait()
        stage("searching")
        return find_largest(row, words["memory_bytes"], words["largest_seconds"])
    except ModuleNotFoundError as error:
        if row.method not in PEERS:
            raise
        raise ModuleNotFoundError(f"{error}: {PEERS[row.method]}") from error


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=Help)
    parser.add_argument("--output", type=file, help="JSON file to write, after each row")
    parser.add_argument(
        "--add-to", metavar="FILE",
        help="a stored run of this device and these versions, whose rows are kept, not timed again",
    )  # fmt: skip
    parser.add_argument("--cache", metavar="FOLDER", help="keeps compiled programs for a later run")
    parser.add_argument(
        "--largest", action="store_true", help="find largest batches too, beside the timing"
    )
    parser.add_argument(
        "--largest-seconds", type=seconds, default=30.0, help="of a search that runs steps (torch)"
    )
    parser.add_argument(
        "--largest-of", metavar="FILE", help="add the largest batch to the rows of a stored run"
    )
    parser.add_argument(
        "--cases", nargs="*", type=_case, default=[],
        help="MODEL:T:BATCH; if none, the list in this file, or what the stored run has",
    )  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--micro-batches", type=count, nargs="+", default=list(PEER_MICRO_BATCHES),
        help="sizes of the parts that jax_privacy takes a batch in; the best one is the row",
    )  # fmt: skip
    parser.add_argument("--gpus", type=count, default=1, help="to spread the cases over")
    parser.add_argument(
        "--cases-at-once", type=count, default=1, help="that set up at once on a GPU; timed in turn"
    )
    parser.add_argument("--seconds", type=seconds, default=3.0, help="of timing, for each process")
    for name, default, what in (
        ("--limit-seconds", math.inf, "of the whole run"),
        ("--row-limit-seconds", math.inf, "to set up the rows of the cases at once"),
        ("--timing-limit-seconds", 120.0, "to time one row"),
    ):
        parser.add_argument(name, type=seconds, default=default, help=what)
    parser.add_argument(
        "--at-once",
        type=count,
        default=4,
        help="processes that find largest batches and only compile",
    )
    parser.add_argument(
        "--memory-bytes",
        type=count,
        help="that a largest batch is to fit; what the device tells if none",
    )
    return parser


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(json.loads(sys.argv[2]))))
        return
    began = time.monotonic()
    arguments = parser().parse_args()
    if not arguments.largest_of:
        arguments.cases = arguments.cases or CASES
    limits = Limits(
        arguments.row_limit_seconds,
        arguments.timing_limit_seconds,
        began + arguments.limit_seconds,
    )
    stored = arguments.add_to or arguments.largest_of
    if arguments.output and (stored or os.path.exists(arguments.output)):
        parser().error(f"{arguments.output} would be written anew: --add-to FILE keeps its rows")
    result = begun("benchmarks/train.py", ("jax", "jax-privacy", "torch", "opacus", "fastDP"))
    if any("tiny" not in name for name, *_ in arguments.cases):  # stand-ins run anywhere
        require_gpu(parser(), result["device"])
    if stored:
        result = added_to(stored, result)
    run(arguments, Results(stored or arguments.output, result), limits)


if __name__ == "__main__":
    main()
