"""Rank what ran: mean over seeds with its interval, and how far each stands behind the leader, seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from provenn.compare.running import PartResult
from provenn.core.experiment.statistics import Interval, bootstrap_mean, paired_difference

TELLING_SEEDS = 3
"""Of fewer, an interval is no more than their range: two agree in sign half the time where there is no difference."""


@dataclass(frozen=True)
class Row:
    """A line of the ranking.

    Args:
        rank: From 1; equal means share it. ``None`` if the part failed.
        result: What the part did.
        score: Mean over seeds, 95 % interval.
        behind: How much better the leader is, seed by seed, 95 % interval; above 0 whichever way the figure goes.
    """

    rank: int | None
    result: PartResult
    score: Interval | None = None
    behind: Interval | None = None

    @property
    def beaten(self) -> bool:
        """Whether the leader is better with its interval clear of 0, over seeds enough to say so."""
        return self.behind is not None and len(self.result.runs) >= TELLING_SEEDS and self.behind.above_zero

    def mean_figure(self, name: str) -> float:
        """Return the mean over seeds of one of the kind's figures."""
        return sum(run.figures[name] for run in self.result.runs) / len(self.result.runs)


def rank(results: Sequence[PartResult], maximize: bool) -> list[Row]:
    """Order parts from the best mean to the worst; those that failed come last, in the order given.

    Args:
        results: One a part; those that did not fail have the same seeds.
        maximize: Whether more is better.
    """
    scores = {one.part: [run.score for run in one.runs] for one in results if one.failure is None}
    means = {part: bootstrap_mean(values) for part, values in scores.items()}
    sign = 1 if maximize else -1
    ordered = sorted((one for one in results if one.failure is None), key=lambda one: -sign * means[one.part].estimate)
    rows: list[Row] = []
    for place, one in enumerate(ordered, start=1):
        tied = bool(rows) and rows[-1].score is not None and rows[-1].score.estimate == means[one.part].estimate
        leader = scores[ordered[0].part]
        better, worse = (leader, scores[one.part]) if maximize else (scores[one.part], leader)
        behind = paired_difference(better, worse) if place > 1 else None
        rows.append(Row(rows[-1].rank if tied else place, one, means[one.part], behind))
    return rows + [Row(None, one) for one in results if one.failure is not None]
