"""The main job with several seeds: accuracy, time and memory at epsilon 3, from whole runs.

    python benchmarks/main_job.py --seeds 0 1 2 --out benchmarks/results/cpu/<date>-main-job.json

Each seed is one `dpfa train` in a process of its own, so that imports and compilation count.
"""

import argparse
import datetime
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time


def run(seed: int, arguments: list[str]) -> dict[str, object]:
    """One whole run; what its report says, and the wall time from outside."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "run"
        command = [sys.executable, "-m", "dpfa_jax.cli", "train", "--seed", str(seed)]
        start = time.perf_counter()
        subprocess.run([*command, *arguments, "--out", str(out)], check=True, stdout=sys.stderr)
        seconds = time.perf_counter() - start
        report = json.loads((out / "report.json").read_text())
    names = ("epsilon", "delta", "accuracy", "accuracy_majority", "steps", "peak_memory_bytes")
    row = {"seed": seed, "seconds_of_process": round(seconds, 1)}
    return row | {name: report[name] for name in names} | {"_report": report}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--out", type=pathlib.Path, required=True)
    return made


def main() -> None:
    options, arguments = parser().parse_known_args()
    rows = [run(seed, arguments) for seed in options.seeds]
    report = rows[-1]["_report"]
    for row in rows:
        del row["_report"]
    accuracies = [row["accuracy"] for row in rows]
    result = {
        "device": report["device"],
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "versions": report["versions"],
        "data": report["data"]["name"],
        "accuracy_mean": statistics.fmean(accuracies),
        "accuracy_min": min(accuracies),
        "seconds_max": max(row["seconds_of_process"] for row in rows),
        "peak_memory_bytes_max": max(row["peak_memory_bytes"] for row in rows),
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=2))


if __name__ == "__main__":
    main()
