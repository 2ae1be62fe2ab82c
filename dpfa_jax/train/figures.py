"""Plots of a report, as SVG text whose colours follow the page's light or dark mode."""

import io
import re
from collections.abc import Sequence
from typing import Any

# Colours that appear in no other place; each becomes a variable of the page's style sheet.
_INK, _FAINT, _PRIVATE, _TWIN, _BASE = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
_VARIABLES = {
    _INK: "var(--ink)",
    _FAINT: "var(--line)",
    _PRIVATE: "var(--private)",
    _TWIN: "var(--twin)",
    _BASE: "var(--soft)",
}
_STYLE = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be read aloud
    "svg.hashsalt": "dpfa",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
}

History = Sequence[dict[str, float]]


def accuracy_figure(private: History, twin: History, majority: float) -> str:
    """Held-out accuracy over steps, in per cent, against the twin and the commonest class."""

    def draw(axes: Any) -> None:
        axes.axhline(100 * majority, color=_BASE, linestyle=(0, (2, 3)), label="always one class")
        if twin:
            axes.plot(*_series(twin, "accuracy", 100), color=_TWIN, label="without privacy")
        axes.plot(*_series(private, "accuracy", 100), color=_PRIVATE, label="private")
        axes.set_ylabel("held-out accuracy (%)")
        axes.set_ylim(top=100)

    return _svg(draw, "Held-out accuracy over training steps")


def loss_figure(private: History, twin: History) -> str:
    """Held-out cross-entropy over steps, in nats."""

    def draw(axes: Any) -> None:
        if twin:
            axes.plot(*_series(twin, "loss"), color=_TWIN, label="without privacy")
        axes.plot(*_series(private, "loss"), color=_PRIVATE, label="private")
        axes.set_ylabel("held-out loss (nats)")
        axes.set_ylim(bottom=0)

    return _svg(draw, "Held-out loss over training steps")


def epsilon_figure(private: History, budget: float) -> str:
    """Upper bound on the epsilon spent over steps."""

    def draw(axes: Any) -> None:
        axes.axhline(budget, color=_BASE, linestyle=(0, (2, 3)), label="budget")
        steps, spent = _series(private, "epsilon")
        axes.plot(steps, spent, color=_PRIVATE, label="spent, at most")
        axes.fill_between(steps, spent, color=_PRIVATE, alpha=0.12, linewidth=0)
        axes.set_ylabel("epsilon")
        axes.set_ylim(0, 1.15 * budget)

    return _svg(draw, "Privacy budget spent over training steps")


def _series(history: History, name: str, factor: float = 1.0) -> tuple[list[float], list[float]]:
    return [look["step"] for look in history], [factor * look[name] for look in history]


def _svg(draw: Any, title: str) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 3.3), layout="constrained")
        figure.patch.set_alpha(0.0)
        axes = figure.subplots()
        axes.patch.set_alpha(0.0)
        draw(axes)
        axes.set_xlabel("step")
        axes.margins(x=0.01)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, columnspacing=1.6)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    # A fixed size in points would not shrink on a small screen; the view box keeps the shape.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
