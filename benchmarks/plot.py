"""Figures of stored results, for the documentation.

    python benchmarks/plot.py RESULTS.json FIGURE.svg

Attention results: time against the fastest plain peer over T. Training results: time of a step
against the non-private one, for each model. Utility results: accuracy against epsilon.
"""

import argparse
import json
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def attention(rows: Rows, axes: Any) -> None:
    """Time against cuDNN's, forward; one line an implementation, mask and head size."""
    forward = [row for row in rows if row["direction"] == "forward"]
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in forward:
        key = (row["D"], row["mask"], row["H"], row["K"], row["T"], row["B"])
        times.setdefault(key, {})[row["implementation"]] = row["milliseconds"]
    lines: dict[tuple[str, int, str], list[tuple[int, float]]] = {}
    for (size, mask, heads, kv_heads, length, _), found in times.items():
        for name, milliseconds in found.items():
            if name != "cudnn" and "cudnn" in found and heads == kv_heads:
                line = lines.setdefault((name, size, mask), [])
                line.append((length, milliseconds / found["cudnn"]))
    for (name, size, mask), points in sorted(lines.items()):
        style = {"full": "-", "causal": "--"}[mask]
        axes.plot(
            *zip(*sorted(points), strict=True), style, marker="o", label=f"{name} {size} {mask}"
        )
    axes.set(xscale="log", xlabel="T", ylabel="time / cuDNN", title="Attention, forward")


def train(rows: Rows, axes: Any) -> None:
    """Time of a step over the non-private step of the same model; one bar a method."""
    cases = list(dict.fromkeys((row["model"], row["T"], row["batch"]) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {
        (row["model"], row["T"], row["batch"], row["method"]): row["milliseconds"] for row in rows
    }
    width = 0.8 / len(methods)
    for place, method in enumerate(methods):
        bars = [
            found.get((*case, method), 0.0) / found[(*case, "nonprivate")]
            if (*case, "nonprivate") in found
            else 0.0
            for case in cases
        ]
        axes.bar([i + place * width for i in range(len(cases))], bars, width, label=method)
    names = [f"{model}\nT={length} B={batch}" for model, length, batch in cases]
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(cases))], names)
    axes.set(ylabel="time / non-private step", title="Training step")


def utility(rows: Rows, axes: Any) -> None:
    """Mean accuracy with the range over seeds, against epsilon; one line a clipping mode."""
    for mode in dict.fromkeys(row["clipping"] for row in rows):
        own = [row for row in rows if row["clipping"] == mode]
        levels = sorted({row["epsilon"] for row in own if row["epsilon"] is not None})
        seeds = [[r["accuracy"] for r in own if r["epsilon"] == level] for level in levels]
        if not levels:
            values = [row["accuracy"] for row in own]
            axes.axhline(sum(values) / len(values), color="grey", label=mode)
            axes.axhspan(min(values), max(values), color="grey", alpha=0.2)
            continue
        means = [sum(values) / len(values) for values in seeds]
        low = [mean - min(values) for mean, values in zip(means, seeds, strict=True)]
        high = [max(values) - mean for mean, values in zip(means, seeds, strict=True)]
        axes.errorbar(levels, means, yerr=[low, high], marker="o", capsize=3, label=mode)
    axes.set(xscale="log", xlabel="epsilon", ylabel="test accuracy", title="Utility on Reuters R8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("figure", type=Path)
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    found = json.loads(arguments.results.read_text(encoding="utf-8"))
    rows = found["rows"]
    kind = utility if "clipping" in rows[0] else train if "method" in rows[0] else attention
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    kind(rows, axes)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.text(0.01, 0.005, f"{found['device']}, {found['date']}", fontsize=7, color="grey")
    figure.savefig(arguments.figure)


if __name__ == "__main__":
    main()
