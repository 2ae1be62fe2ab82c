"""Figure and table of a stored run of `attention.py`."""

import math
from typing import Any

Rows = list[dict[str, Any]]
CASE = ("direction", "B", "T", "H", "K", "D", "mask")
DIRECTIONS = {"forward": "forward", "forward_backward": "forward and backward"}
# Products of attention: two forward, five backward.
MASKS = ("full", "causal")  # that have figures
PRODUCTS = {"forward": 2, "forward_backward": 7}
SKIPPED = {"causal": 0.5}  # part of the work that a mask spares


def tflops(row: dict[str, Any]) -> float:
    """Useful ones a second: two operations for each product, no work on what a mask hides."""
    product = 2 * row["B"] * row["H"] * row["T"] * row["S"] * row["D"]
    work = PRODUCTS[row["direction"]] * product * SKIPPED.get(row["mask"], 1.0)
    return work / row["milliseconds"] * 1e-9


def draw(found: dict[str, Any], figure: Any) -> None:
    """A column of panels for each head size and mask, lines over T for each implementation.

    Time over that of cuDNN, TFLOP/s with the matrix product's as the ceiling, and peak memory.
    """
    rows = [row for row in found["rows"] if row["H"] == row["K"] and row["mask"] in MASKS]
    columns = sorted(
        {(row["D"], row["mask"]) for row in rows}, key=lambda c: (c[0], c[1] != "full")
    )
    directions = [d for d in DIRECTIONS if any(row["direction"] == d for row in rows)]
    kinds = [(kind, d) for kind in ("time / cuDNN", "TFLOP/s") for d in directions]
    kinds.append(("peak MiB beside inputs", directions[-1]))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    figure.set_size_inches(max(7.5, 2.9 * len(columns)), 0.8 + 2.3 * len(kinds))
    panels = figure.subplots(len(kinds), len(columns), squeeze=False, sharex=True, sharey="row")
    ceiling = found.get("ceiling", {}).get("tflops")
    for line, (kind, direction) in zip(panels, kinds, strict=True):
        for axes, (size, mask) in zip(line, columns, strict=True):
            own = [
                r for r in rows if (r["D"], r["mask"], r["direction"]) == (size, mask, direction)
            ]
            for name, points in _lines(own, kind).items():
                axes.plot(
                    *zip(*points, strict=True), marker="o", markersize=3, label=name,
                    color=f"C{names.index(name) % 10}", linestyle="-:"[names.index(name) // 10],
                )  # fmt: skip
            if kind.startswith("time"):
                axes.axhline(1.0, color="grey", linewidth=1)
            elif kind == "TFLOP/s" and ceiling:
                axes.axhline(ceiling, color="grey", linewidth=1)
            axes.set(xscale="log", title=f"D = {size}, {mask}, {DIRECTIONS[direction]}")
            axes.title.set_fontsize(8)
            if kind.startswith("peak"):
                axes.set_ylim(bottom=0.0)
        line[0].set_ylabel(kind)
    lengths = sorted({row["T"] for row in rows})
    panels[-1, 0].set_xticks(lengths, [_short(length) for length in lengths])
    for axes in panels.flat:
        axes.minorticks_off()
        axes.tick_params(labelsize=7)
    for axes in panels[-1]:
        axes.set_xlabel("T")
    labels = {
        label: handle
        for axes in panels.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labels.values(), labels, loc="outside upper center", ncols=6, fontsize=8)


def _lines(rows: Rows, kind: str) -> dict[str, list[tuple[int, float]]]:
    base = {
        (row["T"], row["B"]): row["milliseconds"]
        for row in rows
        if row["implementation"] == "cudnn"
    }
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: row["T"]):
        if kind == "TFLOP/s":
            value = tflops(row)
        elif kind.startswith("peak"):
            value = (row.get("peak_bytes") or math.nan) / 2**20
        elif row["implementation"] == "cudnn":
            continue
        else:
            value = row["milliseconds"] / base.get((row["T"], row["B"]), math.nan)
        if math.isfinite(value):
            lines.setdefault(row["implementation"], []).append((row["T"], value))
    return lines


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def table(rows: Rows) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """(header, lines) of milliseconds, a column for each implementation."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        key = tuple(row[name] for name in CASE)
        times.setdefault(key, {})[row["implementation"]] = row["milliseconds"]
    lines = [
        (*key, *(f"{found[name]:.3f}" if name in found else "–" for name in names))
        for key, found in times.items()
    ]
    return (*CASE, *names), lines
