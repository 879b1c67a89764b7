"""The plot of a comparison: the trade-off where there are two axes, else the seeds and their mean, and their course."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from provenn.compare.pareto import front
from provenn.compare.ranking import Row


def draw(
    rows: Sequence[Row],
    metric: str,
    maximize: bool,
    cost: str | None,
    over: str | None,
    title: str,
    figures: Sequence[str] = (),
) -> bytes:
    """Return the plot as PNG.

    Args:
        rows: The ranking.
        metric: What the task measures, for an axis.
        maximize: Whether more of it is better.
        cost: What the second axis is; ``None`` if there is none.
        over: What the course is drawn over; ``None`` if there is none.
        title: The plot's title.
        figures: Figures of the kind to draw the metric against, a panel each.
    """
    ranked = [row for row in rows if row.rank is not None]
    bars = 1.6 + 0.4 * len(ranked)
    heights = [bars if cost is None else 4.8, *(3.6 for _ in figures), *([] if over is None else [3.6])]
    figure = Figure(figsize=(7, sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    figure.suptitle(title)
    if cost is not None:
        _trade_off(panels[0], ranked, metric, maximize, cost)
    else:
        _seeds(panels[0], ranked, metric)
    for axes, name in zip(panels[1:], figures, strict=False):
        _against(axes, ranked, metric, maximize, name)
    if over is not None:
        _courses(panels[-1], ranked, metric, over)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def _seeds(axes: Axes, ranked: Sequence[Row], metric: str) -> None:
    for place, row in enumerate(ranked):
        assert row.score is not None
        scores = [run.score for run in row.result.runs]
        axes.plot(scores, [place] * len(scores), "|", color="0.6", markersize=9)
        reach = [[row.score.estimate - row.score.low], [row.score.high - row.score.estimate]]
        axes.errorbar(row.score.estimate, place, xerr=reach, fmt="o", color="C0", capsize=3)
    axes.set_yticks(range(len(ranked)), [row.result.part for row in ranked])
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric} (bars: mean over seeds, 95 % interval)")


def _trade_off(axes: Axes, ranked: Sequence[Row], metric: str, maximize: bool, cost: str) -> None:
    sign = 1 if maximize else -1
    means = {row.result.part: mean_points(row) for row in ranked}
    for part, points in means.items():
        axes.plot(*zip(*points, strict=True), "o-", label=part, alpha=0.8)
    best = front([(x, sign * y) for points in means.values() for x, y in points])
    axes.plot([x for x, _ in best], [sign * y for _, y in best], "s", color="black", mfc="none", ms=11, label="Pareto")
    axes.set(xscale="log", xlabel=cost, ylabel=f"{metric} (mean over seeds)")
    axes.legend()


def _against(axes: Axes, ranked: Sequence[Row], metric: str, maximize: bool, name: str) -> None:
    """Draw each part's mean against one of the kind's figures, and step through those that no other part beats."""
    sign = 1 if maximize else -1
    points = {row.result.part: (row.mean_figure(name), row.score.estimate) for row in ranked if row.score is not None}
    for part, point in points.items():
        axes.plot(*point, "o")
        axes.annotate(part, point, xytext=(4, 4), textcoords="offset points", fontsize=7)
    best = sorted(front([(x, sign * y) for x, y in points.values()]))
    axes.step([x for x, _ in best], [sign * y for _, y in best], where="post", color="0.6", zorder=0)
    axes.set(xscale=scale_of([x for x, _ in points.values()]), xlabel=name, ylabel=f"{metric} (mean over seeds)")


def scale_of(values: Sequence[float]) -> str:
    """Return the scale of an axis: logarithmic for positive values that differ by a factor of ten or more."""
    return "log" if values and min(values) > 0 and max(values) >= 10 * min(values) else "linear"


def _courses(axes: Axes, ranked: Sequence[Row], metric: str, over: str) -> None:
    for row in ranked:
        courses = np.array([run.course for run in row.result.runs])
        x, y = courses[0, :, 0], courses[:, :, 1]
        (line,) = axes.plot(x, y.mean(axis=0), label=row.result.part)
        if len(y) > 1:
            error = y.std(axis=0, ddof=1) / math.sqrt(len(y))
            axes.fill_between(x, y.mean(axis=0) - error, y.mean(axis=0) + error, color=line.get_color(), alpha=0.2)
    axes.set(xlabel=over, ylabel=f"{metric} (mean ± standard error)")
    axes.legend()


def mean_points(row: Row) -> list[tuple[float, float]]:
    """Return the points of a trade-off, each the mean over seeds of cost and figure."""
    columns = zip(*(run.front for run in row.result.runs), strict=True)
    return [(sum(x for x, _ in one) / len(one), sum(y for _, y in one) / len(one)) for one in columns]
