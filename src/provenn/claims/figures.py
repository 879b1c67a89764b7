"""Figures of a claim's page, as SVG that takes its colours and its font from the page around it."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from provenn.core.experiment.statistics import bootstrap_mean

SERIES = 8
"""Number of series colours that the page defines; more arms than that share them in turn."""
_WIDTH = 5.0  # inches: 360 units of the SVG, so that text keeps its size on a phone
_INK, _GRID = "#010203", "#010204"
_SERIES = tuple(f"#0102{10 + index}" for index in range(SERIES))
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "path.simplify": True,
}


def dots(values: Mapping[str, Sequence[float]], label: str, name: str) -> str:
    """Draw a metric of every arm: a dot a seed, and the mean with its bootstrap interval.

    Args:
        values: The values by arm, the method first.
        label: The metric in words.
        name: A name unlike any other figure's on the page.
    """
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH, 0.75 + 0.5 * len(values)), layout="constrained")
        axes = figure.subplots()
        for row, (arm, sample) in enumerate(values.items()):
            colour = _SERIES[row % SERIES]
            mean = bootstrap_mean(sample)
            axes.plot([mean.low, mean.high], [-row, -row], color=colour, linewidth=3, solid_capstyle="round")
            axes.plot(sample, [-row] * len(sample), "o", color=colour, alpha=0.45, markersize=6, markeredgewidth=0)
            axes.plot([mean.estimate], [-row], "D", color=colour, markersize=7, markeredgewidth=0)
            axes.text(0.01, 0.22 - row, arm, transform=axes.get_yaxis_transform(), va="bottom")
        axes.set_ylim(0.4 - len(values), 0.75)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.08)
        axes.set_xlabel(label)
        if _wide_range([value for sample in values.values() for value in sample]):
            axes.set_xscale("log")
        return _svg(figure, f"{label}, by arm: {', '.join(values)}")


def lines(arms: Mapping[str, Mapping[str, Any]], order: Sequence[str], label: str, name: str) -> str:
    """Draw a curve of every arm: the mean over seeds, and their range as a band.

    Args:
        arms: By arm, the summary's ``x``, ``mean``, ``low`` and ``high``.
        order: Every arm of the study, which fixes their colours.
        label: The curve in words.
        name: A name unlike any other figure's on the page.
    """
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH, 3.0), layout="constrained")
        axes = figure.subplots()
        for arm, band in arms.items():
            _line(axes, band, _SERIES[list(order).index(arm) % SERIES])
        axes.set_ylabel(label)
        if _wide_range([value for band in arms.values() for value in band["low"] if value is not None]):
            axes.set_yscale("log")
        return _svg(figure, f"{label}, a line for each of {', '.join(arms)}")


def bars(rows: Sequence[Mapping[str, Any]], label: str, name: str) -> str:
    """Draw a schedule as a Gantt chart: a bar a task, in the row of who does it, coloured by its kind.

    Args:
        rows: Bars with ``row``, ``kind``, ``start`` and ``end``.
        label: The chart in words.
        name: A name unlike any other figure's on the page.
    """
    order = sorted({one["row"] for one in rows})
    kinds = list(dict.fromkeys(one["kind"] for one in rows))
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH, 1.5 + 0.35 * len(order)), layout="constrained")
        axes = figure.subplots()
        for index, kind in enumerate(kinds):
            of_kind = [one for one in rows if one["kind"] == kind]
            axes.barh(
                [order.index(one["row"]) for one in of_kind],
                [one["end"] - one["start"] for one in of_kind],
                left=[one["start"] for one in of_kind],
                height=0.8,
                color=_SERIES[index % SERIES],
                edgecolor=_GRID,
                linewidth=0.5,
                label=kind,
            )
        axes.set_yticks(range(len(order)), order)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(textwrap.fill(label, 56))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=9)
        return _svg(figure, f"{label}, a row for each of {', '.join(order)}")


def _line(axes: Axes, band: Mapping[str, Any], colour: str) -> None:
    x, mean, low, high = (_numbers(band[key]) for key in ("x", "mean", "low", "high"))
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    marker = "o" if len(x) == 1 else ""
    axes.plot(x, mean, color=colour, linewidth=1.8, marker=marker)


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _wide_range(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > 100


def _svg(figure: Figure, description: str) -> str:
    """Return the figure as an SVG element that scales with its column, colours left to the page's style."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    for index, colour in enumerate(_SERIES):
        text = text.replace(colour, f"var(--series-{index})")
    words = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{words}"', 1)
