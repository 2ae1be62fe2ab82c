"""Figures and tables of stored results, for the documentation.

    python benchmarks/plot.py                           the newest results -> docs/benchmarks.md
    python benchmarks/plot.py RESULTS.json FIGURE.svg   one figure

Attention results: `attention_figure`. Training results: time of a step and peak memory
against the non-private step, for each model. Utility results: accuracy against epsilon. Counters
of kernels: a table. Figures of results that a newer run has replaced are removed.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention_figure
from stored_runs import commands, newest

Rows = list[dict[str, Any]]
ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
NAMES = {
    "nonprivate": "without privacy",
    "per_layer": "per layer",
    "flat": "flat",
    "jax_privacy": "jax_privacy",
    "opacus_ghost": "Opacus, ghost clipping",
    "fastdp": "fastDP",
}
STYLE = {
    "font.size": 10,
    "svg.hashsalt": "dpfa",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def train(stored: dict[str, Any], figure: Any) -> None:
    """Time of a step and peak memory over those of the same model's non-private step."""
    rows = stored["rows"]
    cases = list(dict.fromkeys((row["model"], row["T"], row["batch"]) for row in rows))
    found = {(row["model"], row["T"], row["batch"], row["method"]): row for row in rows}
    methods = [name for name in NAMES if any(row["method"] == name for row in rows)]
    methods.remove("nonprivate")  # the base of each ratio, shown as the line at 1
    panels = figure.subplots(2, 1, sharex=True)
    width = 0.8 / max(1, len(methods))
    for axes, number, label in (
        (panels[0], "milliseconds", "time of a step /\nwithout privacy"),
        (panels[1], "peak_bytes", "peak memory /\nwithout privacy"),
    ):
        for place, method in enumerate(methods):
            bars = [
                (index, found[*case, method][number] / found[*case, "nonprivate"][number])
                for index, case in enumerate(cases)
                if (*case, method) in found and found.get((*case, "nonprivate"), {}).get(number)
            ]
            spots = [index - 0.4 + (place + 0.5) * width for index, _ in bars]
            drawn = axes.bar(
                spots, [ratio for _, ratio in bars], width, label=NAMES[method], color=f"C{place}"
            )
            axes.bar_label(drawn, fmt="%.2f", fontsize=7, padding=1)
        axes.axhline(1.0, color="grey", linewidth=1)
        axes.set_ylabel(label)
        axes.margins(y=0.15)
    names = [f"{model}\nT = {length}\nbatch {batch}" for model, length, batch in cases]
    panels[1].set_xticks(range(len(cases)), names, fontsize=8)
    _legend(figure, panels[0], columns=4)


def utility(stored: dict[str, Any], figure: Any) -> None:
    """Accuracy against epsilon: each seed a dot, the mean with its 95 % interval (Student's t)."""
    rows = stored["rows"]
    axes = figure.subplots()
    modes = list(dict.fromkeys(row["clipping"] for row in rows if row["epsilon"] is not None))
    plain = [row["accuracy"] for row in rows if row["epsilon"] is None]
    for place, mode in enumerate(modes):
        own = [row for row in rows if row["clipping"] == mode]
        levels = sorted({row["epsilon"] for row in own})
        seeds = [[row["accuracy"] for row in own if row["epsilon"] == level] for level in levels]
        # Side by side, or the intervals would hide each other.
        spots = [level * 1.05 ** (place - (len(modes) - 1) / 2) for level in levels]
        axes.errorbar(
            spots, [statistics.fmean(values) for values in seeds],
            yerr=[interval(values) for values in seeds],
            marker="o", capsize=4, color=f"C{place}", label=mode,
        )  # fmt: skip
        for spot, values in zip(spots, seeds, strict=True):
            axes.plot([spot] * len(values), values, ".", color=f"C{place}", alpha=0.4, markersize=5)
    if plain:
        mean, half = statistics.fmean(plain), interval(plain)
        axes.axhline(mean, color="grey", label="without privacy")
        axes.axhspan(mean - half, mean + half, color="grey", alpha=0.2, linewidth=0)
    levels = sorted({row["epsilon"] for row in rows if row["epsilon"] is not None})
    axes.set(xscale="log", xlabel="epsilon", ylabel="accuracy on the test split")
    axes.set_xticks(levels, [f"{level:g}" for level in levels])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    _legend(figure, axes, columns=4)


def interval(values: list[float]) -> float:
    """Half the 95 % confidence interval of the mean; 0 of a single number."""
    if len(values) < 2:
        return 0.0
    from scipy import stats

    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def _legend(figure: Any, axes: Any, *, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=8)


def kind_of(rows: Rows) -> Callable[[dict[str, Any], Any], None]:
    if "clipping" in rows[0]:
        return utility
    return train if "method" in rows[0] else attention_figure.draw


def draw(results: Path, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    found = json.loads(results.read_text(encoding="utf-8"))
    with matplotlib.rc_context(STYLE):
        kind = kind_of(found["rows"])
        figure = Figure(figsize=(9, 6.4 if kind is train else 5), layout="constrained")
        kind(found, figure)
        figure.supxlabel(
            f"{found['device']}, {found['date']}", x=0.99, ha="right", fontsize=7, color="grey"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        # No date inside: the same results give the same file.
        date = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, metadata=date, dpi=150)


def _table(header: tuple[str, ...], lines: list[tuple[Any, ...]]) -> str:
    texts = [header, ("---",) * len(header), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in texts)


def train_table(rows: Rows) -> str:
    plain = {
        (row["model"], row["T"], row["batch"]): row for row in rows if row["method"] == "nonprivate"
    }
    lines = []
    for row in rows:
        base = plain.get((row["model"], row["T"], row["batch"]))
        ratio = f"{row['milliseconds'] / base['milliseconds']:.2f}" if base else "–"
        lines.append(
            (
                row["model"],
                row["T"],
                row["batch"],
                NAMES.get(row["method"], row["method"]),
                f"{row['milliseconds']:.1f} ± {row['spread'] / 2:.1f}"
                if row["spread"] is not None
                else f"{row['milliseconds']:.1f}",
                ratio,
                f"{row['tokens_per_second']:,}",
                f"{row['peak_bytes'] / 2**30:.1f}",
                row["largest_batch"] or "–",
            )
        )
    return _table(
        ("model", "T", "batch", "method", "ms", "/ without privacy", "tokens/s", "peak GiB",
         "largest batch"),
        lines,
    )  # fmt: skip


def utility_table(rows: Rows) -> str:
    groups: dict[tuple[str, Any], list[float]] = {}
    for row in rows:
        groups.setdefault((row["clipping"], row["epsilon"]), []).append(row["accuracy"])
    lines = [
        (mode, "–" if level is None else f"{level:g}", f"{statistics.fmean(values):.4f}",
         f"± {interval(values):.4f}", f"{min(values):.4f}", len(values))
        for (mode, level), values in groups.items()
    ]  # fmt: skip
    header = ("clipping", "epsilon", "mean accuracy", "95 % interval", "least", "seeds")
    return _table(header, lines)


def attention_table(rows: Rows) -> str:
    return _table(*attention_figure.table(rows))


def counters_table(rows: Rows) -> str:
    names = ("ghz", "tensor", "issue", "alu", "fma", "xu")
    case = ("B", "T", "H", "K", "D", "mask", "implementation")
    lines = [
        (", ".join(str(row[name]) for name in case),
         f"`{row['kernel'].removesuffix('_mosaic_gpu_kernel')[:48]}`",
         f"{row['milliseconds']:.3f}", *(_short(row["counters"].get(name)) for name in names),
         ", ".join(f"{name} {value:.2f}" for name, value in row["stalls"].items()
                   if name != "selected" and value >= 0.1))
        for row in rows
    ]  # fmt: skip
    header = ("B, T, H, K, D, mask", "kernel", "ms", "GHz", *names[1:], "warps stalled an issue")
    return _table(header, lines)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


SECTIONS = {
    "train": ("Training steps", "A whole step: forward, backward, clipping, noise, AdamW.",
              train_table),
    "utility": ("Utility on Reuters R8", "The main job with each kind of clipping, and without "
                "privacy, on the official test split.", utility_table),
    "attention": ("Attention", "Milliseconds, medians; compare those of a line.", attention_table),
    "counters": ("Counters of attention kernels", "One launch of each kernel alone; per cent of "
                 "the peak where no unit is given.", counters_table),
}  # fmt: skip
# The one that reproduces the page, where there is such a device.
AGAIN = "`python benchmarks/again.py; python benchmarks/plot.py`"


def page(results: Path, docs: Path) -> Path:
    """docs/benchmarks.md: a table, and mostly a figure, of the last run of each thing.

    A figure of a result that is not in it is removed.
    """
    parts = [
        "# Benchmarks",
        "Made by `dpfa bench plot` from `benchmarks/results`; each file there names its device, "
        "date, command and versions. Compare figures of one file only.",
        f"{AGAIN} repeats what README and docs cite of the kind of device at hand (files of its "
        "tests too), each by the command in its file and into a new file, and makes this page "
        "anew; `python benchmarks/again.py FILE` repeats one. Figures of another kind of device "
        "need that device.",
    ]
    drawn = set()
    for name, (title, text, table) in SECTIONS.items():
        for file in newest(results.glob(f"*/*-{name}.json")):
            found = json.loads(file.read_text(encoding="utf-8"))
            shown = "; ".join(f"`{command.strip()}`" for command in commands(found))
            parts += [
                f"## {title}, {found['device']}, {found['date']}",
                f"{text} From `benchmarks/results/{file.parent.name}/{file.name}`: {shown}.",
            ]
            drawn_rows = [row for row in found["rows"] if row.get("mask") in attention_figure.MASKS]
            has_lengths = len({row["T"] for row in drawn_rows}) > 1
            if name in ("train", "utility") or (name == "attention" and has_lengths):
                figure = docs / "figures" / f"{file.parent.name}-{file.stem}.svg"
                draw(file, figure)
                drawn.add(figure)
                parts.append(f"![{title}](figures/{figure.name})")
            parts.append(table(_by_case(found["rows"])))
            parts += [f"Left out: {row}." for row in _left_out(found)]
    for figure in (docs / "figures").glob("*-????-??-??-*.svg"):
        if figure not in drawn:
            figure.unlink()
    path = docs / "benchmarks.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _by_case(rows: Rows) -> Rows:
    """Rows of one model and size behind each other, as the first of each came."""
    first: dict[tuple[Any, ...], int] = {}
    places = [
        first.setdefault((row.get("model"), row.get("T"), row.get("batch")), place)
        for place, row in enumerate(rows)
    ]
    is_training = bool(rows) and "model" in rows[0]
    return (
        [rows[i] for i in sorted(range(len(rows)), key=places.__getitem__)] if is_training else rows
    )


def _left_out(found: dict[str, Any]) -> list[str]:
    """A line for each model and size: which methods are missing, and the reasons given."""
    missing: dict[str, dict[str, str]] = {}
    for row in found.get("left_out", ()):
        if "model" in row:
            case = f"{row['model']}, T = {row['T']}, batch {row['batch']}, {row['what']}"
            method = NAMES.get(row["method"], row["method"])
            if size := row.get("micro_batch"):
                method += f" in parts of {size}"
        elif "B" not in row:  # of counters: a group
            case, method = row["group"], row.get("implementation", "all")
        else:  # of attention: a whole case has no implementation
            case = ", ".join(f"{name} = {row[name]}" for name in ("B", "T", "H", "K", "D"))
            case += f", {row['mask']}, {row.get('direction', 'all')}"
            method = row.get("implementation", "all")
        missing.setdefault(case, {}).setdefault(method, row["why"])
    return [
        f"{case}: " + "; ".join(f"{method} (`{why}`)" for method, why in methods.items())
        for case, methods in missing.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", help="one stored result")
    parser.add_argument("figure", type=Path, nargs="?", help=".svg or .png to write of it")
    arguments = parser.parse_args()
    if arguments.results is None:
        print(page(RESULTS, DOCS))
        return
    if arguments.figure is None:
        parser.error("a figure to write is due: RESULTS.json FIGURE.svg")
    draw(arguments.results, arguments.figure)


if __name__ == "__main__":
    main()
