"""Counters of the attention kernels, by NVIDIA Nsight Compute, on one GPU.

    python benchmarks/counters.py --output benchmarks/results/nvidia-h200/<date>-counters.json

One launch of each kernel of each case is counted, after warm calls, with clocks as they are and
caches flushed before (the profiler's default): times are those of a kernel alone on a rested
device, not the benchmark's. `counters` are per cent of the peak over the kernel's time where
`metrics`, which says what of the profiler's each is, has "pct"; `ghz` is cycles over time. `stalls`
are warps that wait for that reason, on average, whenever an instruction is issued. Kernels of less
than 5 microseconds have no row. A group of cases shares a process; groups compile
at the same time and are counted one after the other. What fails is in `left_out`, with its reason.
"""

import argparse
import csv
import glob
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

from counter_cases import GROUPS, MARK, METRICS, STALLS, Case
from stored_runs import begun, child_environment, write

LEAST_NANOSECONDS = 5000.0
PLACES = ("/usr/local/cuda*/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")
SHOWN = ("ghz", "tensor", "issue", "alu", "fma", "xu")
FLAGS = "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0"
FOUND_MARK = re.compile(MARK.format(r"(\d+)"))


class ProfilerError(Exception):
    """Nsight Compute is not there, or counted nothing."""


def profiler() -> str:
    """The one of the search path, or else the newest of the usual places."""
    found = shutil.which("ncu") or max((p for x in PLACES for p in glob.glob(x)), default=None)
    if found is None:
        raise ProfilerError(f"no ncu (NVIDIA Nsight Compute) on the search path or in {PLACES}")
    return found


def printed(command: Sequence[str], seconds: float, more: Mapping[str, str] | None = None) -> str:
    """What a command prints, on both streams; a time limit ends its whole process group."""
    child = subprocess.Popen(
        command, env=child_environment() | dict(more or {}), start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        return child.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        last = child.communicate()[0][-500:]
        raise ProfilerError(f"ended after {seconds:.0f} seconds: {last}") from None


def report_of(
    ncu: str, cases: Sequence[Case], metrics: Sequence[str], seconds: float, lock: str
) -> Any:
    """The raw page of a report of these cases as CSV, and the cases that failed.

    lock: a file that the process holds while it is counted.
    """
    environment = {
        # Buffers of their own: the profiler saves and restores what a kernel may write. Kernels
        # launched one by one: in a graph they are not its kernels. No tuning beside a count.
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip(),
    }
    with tempfile.TemporaryDirectory() as folder:
        report, failures = Path(folder, "report.ncu-rep"), Path(folder, "failed.json")
        command = [
            ncu, "--target-processes", "all", "--profile-from-start", "off",
            "--clock-control", "none", "--metrics", ",".join(metrics), "--export", str(report),
            sys.executable, __file__, "--child", json.dumps(cases), str(failures), lock,
        ]  # fmt: skip
        told = printed(command, seconds, environment)
        failed = json.loads(failures.read_text()) if failures.exists() else []
        if not report.exists():
            lines = [line for line in told.splitlines() if "100%" not in line]
            why = "\n".join(lines[-12:])[-1500:] or "no report"
            raise ProfilerError(" | ".join([why, *(x["why"] for x in failed)]))
        if not failures.exists():  # in the midst of a case
            failed = [{"why": f"the process ended early: {told[-500:]}"}]
        page = ["--import", str(report), "--csv", "--page", "raw", "--print-units", "base"]
        return printed([ncu, *page], 60.0), failed


def rows_of(page: str, cases: Sequence[Case]) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each kernel of a raw page, and the metrics that it does not have.

    The line that begins with "ID" names the columns, the next one has their units.
    """
    lines = page.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        raise ProfilerError(f"no table in the report: {page[-500:]}")
    header, _, *launches = csv.reader(lines[begin:])
    rows: list[dict[str, Any]] = []
    case, missing = None, set()
    for launch in launches:
        cell = dict(zip(header, launch, strict=False))
        if found := FOUND_MARK.search(cell["Kernel Name"]):
            case = cases[int(found[1])]
            continue
        counters = {name: number(cell.get(metric)) for name, metric in METRICS.items()}
        stalls = {name: number(cell.get(metric)) for name, metric in STALLS.items()}
        missing |= {METRICS[name] for name, value in counters.items() if value is None}
        missing |= {STALLS[name] for name, value in stalls.items() if value is None}
        nanoseconds = counters.pop("nanoseconds") or 0.0
        if case is None or nanoseconds < LEAST_NANOSECONDS:
            continue
        if counters["cycles"]:
            counters["ghz"] = round(counters["cycles"] / nanoseconds, 4)
        most = sorted(((value, name) for name, value in stalls.items() if value), reverse=True)
        rows.append(
            case.fields()
            | {
                "kernel": cell["Kernel Name"].split("(")[0],
                "milliseconds": round(nanoseconds * 1e-6, 4),
                "counters": {name: value for name, value in counters.items() if value is not None},
                "stalls": {name: value for value, name in most},
            }
        )
    return rows, sorted(missing)


def number(text: str | None) -> float | None:
    try:
        value = float((text or "").replace(",", ""))
    except ValueError:  # "n/a"
        return None
    return round(value, 4) if math.isfinite(value) else None


def known(ncu: str, metrics: Sequence[str]) -> list[str]:
    """Those that the profiler lists for this device; it lists none of a launch."""
    lines = printed([ncu, "--query-metrics"], 60.0).splitlines()
    listed = {line.split()[0] for line in lines if line.strip()}
    return [x for x in metrics if x.startswith("launch__") or x.split(".")[0] in listed]


def counted(ncu: str, cases: Sequence[Case], seconds: float, lock: str) -> Any:
    """Rows, and what failed."""
    metrics = [*METRICS.values(), *STALLS.values()]
    try:
        page, failed = report_of(ncu, cases, metrics, seconds, lock)
    except ProfilerError:
        # A profiler that refuses all for one metric's sake names it, in words that change.
        served = known(ncu, metrics)
        if not served or len(served) == len(metrics):
            raise
        page, failed = report_of(ncu, cases, served, seconds, lock)
    rows, missing = rows_of(page, cases)
    if missing:
        failed = [*failed, {"why": f"no metric {', '.join(missing)}"}]
    return rows, failed


def run(arguments: argparse.Namespace) -> int:
    """The exit code: 0 where something was counted."""
    ncu = profiler()
    result = begun("benchmarks/counters.py", ("jax",))
    result["profiler"] = printed([ncu, "--version"], 60.0).strip().splitlines()[-1]
    result["metrics"] = METRICS | STALLS
    with tempfile.NamedTemporaryFile() as lock, futures.ThreadPoolExecutor() as pool:
        counting = {
            pool.submit(counted, ncu, GROUPS[group], arguments.limit_seconds, lock.name): group
            for group in arguments.groups
        }
        for done in futures.as_completed(counting):
            try:
                rows, failed = done.result()
            except ProfilerError as error:
                rows, failed = [], [{"why": str(error)}]
            result["rows"] += rows
            result["left_out"] += [{"group": counting[done]} | x for x in failed]
            for x in failed:
                print(f"{counting[done]}: left out: {x}", flush=True)
            for row in rows:
                print(line_of(row), flush=True)
            write(result, arguments.output)
    return 0 if result["rows"] else 1


def line_of(row: dict[str, Any]) -> str:
    case = " ".join(str(row[x]) for x in ("B", "T", "H", "K", "D", "mask", "implementation"))
    values = " ".join(f"{x} {row['counters'].get(x, math.nan):.3g}" for x in SHOWN)
    stalls = [f"{name} {value:.2f}" for name, value in row["stalls"].items() if name != "selected"]
    return (
        f"{case:42} {row['kernel']:.40} {row['milliseconds']:.3f} ms {values} "
        f"{', '.join(stalls[:3])}"
    )


def child(cases: str, failures: str, lock: str) -> None:
    from counter_calls import count

    found = [Case(tuple(shape), *more) for shape, *more in json.loads(cases)]
    Path(failures).write_text(json.dumps(count(found, lock)))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--output", help="JSON file to write, after each group")
    made.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    made.add_argument("--limit-seconds", type=float, default=600.0, help="of each group")
    return made


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:5])
        return 0
    try:
        return run(parser().parse_args())
    except ProfilerError as error:
        print(f"counters: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
