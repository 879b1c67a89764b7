"""What a claim is: a statement, the paper's figures, studies to run, and two pure functions, ``run`` and ``judge``.

A claim has one or more *studies* (the parts a, b, ... of a card). In each study every *arm* (the method first, then
baselines) runs once a seed; one such run is a *cell*, independent of all others. Where a study is tuned, every arm
first runs the same number of settings on one seed, the best by a validation metric is kept, and its cells run with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from provenn.core.experiment.statistics import Interval, paired_difference

Scalar = int | float | str | bool
Settings = Mapping[str, Scalar]
TIERS = ("smoke", "small", "full")
Outcome = Literal["reproduced", "partly", "not reproduced"]


@dataclass(frozen=True)
class Metric:
    """An event of a run: a named figure of the cell. Yielded twice, the last value stands."""

    name: str
    value: float


@dataclass(frozen=True)
class Point:
    """An event of a run: one point of a named curve."""

    curve: str
    x: float
    y: float


@dataclass(frozen=True)
class Bar:
    """An event of a run: one bar of a named chart, such as a task in a schedule: a stretch of a row, by its kind."""

    chart: str
    row: str
    kind: str
    start: float
    end: float

    @property
    def curve(self) -> str:
        """The name of the curve whose points (start, end) are the bars of the same chart, row and kind."""
        return _BETWEEN.join(("", self.chart, self.row, self.kind))

    @staticmethod
    def place(curve: str) -> tuple[str, str, str] | None:
        """Return the chart, the row and the kind that a curve's name stands for; None for a curve of points."""
        parts = curve.split(_BETWEEN)
        return (parts[1], parts[2], parts[3]) if len(parts) == 4 and not parts[0] else None


_BETWEEN = "\x1f"


@dataclass(frozen=True)
class Progress:
    """An event of a run: ``done`` of ``total`` steps. Shown live, not kept; also a sign of life."""

    done: int
    total: int


Event = Metric | Point | Bar | Progress


@dataclass(frozen=True)
class Tier:
    """How much one study runs at one tier: the number of seeds, and a budget in steps and sizes, never seconds."""

    seeds: int
    budget: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Tuning:
    """The tuning that every arm of a study gets before its seeds run.

    Args:
        settings: The settings to try: one sequence for all arms, or one of the same length for each arm.
        metric: Name of the validation metric that picks among them (ties: the earlier setting).
        maximize: Whether more is better.
        tiers: The tiers that tune; at the others each arm takes its first setting.
    """

    settings: Sequence[Settings] | Mapping[str, Sequence[Settings]]
    metric: str
    maximize: bool = True
    tiers: tuple[str, ...] = ("small", "full")

    def of(self, arm: str) -> Sequence[Settings]:
        """Return the settings that an arm tries."""
        return self.settings[arm] if isinstance(self.settings, Mapping) else self.settings


@dataclass(frozen=True)
class Study:
    """One experiment of a claim: arms (the method first) compared seed by seed."""

    arms: tuple[str, ...]
    tiers: Mapping[str, Tier]
    tuning: Tuning | None = None


@dataclass(frozen=True)
class Trial:
    """One cell, as ``run`` receives it.

    Args:
        study: The study's name.
        arm: The arm to train.
        seed: The cell's seed: data order, initial weights and noise all derive from it. Same seed, same figures.
        tier: ``"smoke"``, ``"small"`` or ``"full"``.
        budget: The tier's budget.
        settings: The hyperparameters of the arm: picked by tuning, or under trial. Empty without tuning.
        tuning: Whether this run only serves to pick settings: yield the validation metric, do not look at test data.
        device: Where to run: ``"cpu"`` or a CUDA device.
    """

    study: str
    arm: str
    seed: int
    tier: str
    budget: Settings = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)
    tuning: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Cell:
    """What one cell left: its figures, its curves, and the settings it ran with."""

    seed: int
    metrics: Mapping[str, float]
    curves: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """Everything the cells of a claim left at one tier: what ``judge`` sees, and nothing else."""

    cells: Mapping[tuple[str, str], tuple[Cell, ...]]

    @classmethod
    def of(cls, figures: Mapping[tuple[str, str], Mapping[str, Sequence[float]]]) -> Evidence:
        """Make up evidence: ``{(study, arm): {metric: [value of seed 0, value of seed 1, ...]}}``."""
        made = {}
        for key, metrics in figures.items():
            seeds = {len(values) for values in metrics.values()}
            if len(seeds) != 1:
                raise ValueError(f"every metric of {key} needs the same number of seeds, got {sorted(seeds)}")
            rows = ({name: float(values[seed]) for name, values in metrics.items()} for seed in range(seeds.pop()))
            made[key] = tuple(Cell(seed, row) for seed, row in enumerate(rows))
        return cls(made)

    def values(self, study: str, arm: str, metric: str) -> np.ndarray:
        """Return a metric of an arm, one value a seed, by ascending seed.

        Raises:
            KeyError: No such study, arm or metric; the message says which.
        """
        cells = self.cells.get((study, arm))
        if cells is None:
            raise KeyError(f"no cells of study {study!r}, arm {arm!r}")
        missing = [cell.seed for cell in cells if metric not in cell.metrics]
        if missing:
            raise KeyError(f"study {study!r}, arm {arm!r}, seeds {missing} left no metric {metric!r}")
        return np.array([cell.metrics[metric] for cell in sorted(cells, key=lambda cell: cell.seed)])

    def mean(self, study: str, arm: str, metric: str) -> float:
        """Return the mean of a metric over the seeds of an arm."""
        return float(self.values(study, arm, metric).mean())

    def difference(self, study: str, method: str, baseline: str, metric: str) -> Interval:
        """Return the mean of method minus baseline over seeds, with its paired-bootstrap interval (95 %)."""
        return paired_difference(self.values(study, method, metric), self.values(study, baseline, metric))


@dataclass(frozen=True)
class Verdict:
    """The answer: the outcome by the card's rule, the reason in words, and the margins it rests on."""

    outcome: Outcome
    reason: str
    margins: Mapping[str, Interval | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A figure of the paper's own, and where in the paper it stands."""

    text: str
    where: str


@dataclass(frozen=True)
class Comparison:
    """A row of the result table: one metric, method against baseline."""

    study: str
    metric: str
    method: str
    baseline: str
    label: str = ""
    maximize: bool = True


@dataclass(frozen=True)
class Claim:
    """A paper's claim as an experiment. A claim's module defines one as ``CLAIM``.

    Args:
        slug: The paper's slug.
        statement: The paper's claim in one or two sentences.
        figures: The paper's own figures, with where they stand.
        rule: The rule of the verdict in words, fixed before anything ran.
        studies: The studies by name.
        comparisons: The rows of the result table, most important first.
        run: Trains one arm with one seed at one tier, and yields events.
        judge: Applies the rule to the evidence of a tier.
        deviations: Where this experiment departs from the paper's, and why.

    Raises:
        ValueError: A study has no arms, an unknown tier, or unequal tuning budgets; or a comparison names a study or
            an arm that does not exist.
    """

    slug: str
    statement: str
    figures: tuple[Figure, ...]
    rule: str
    studies: Mapping[str, Study]
    comparisons: tuple[Comparison, ...]
    run: Callable[[Trial], Iterator[Event]]
    judge: Callable[[Evidence], Verdict]
    deviations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, study in self.studies.items():
            _check_study(f"claim {self.slug}, study {name}", study)
        for row in self.comparisons:
            if row.study not in self.studies:
                raise ValueError(f"claim {self.slug}: a comparison names the unknown study {row.study!r}")
            for arm in (row.method, row.baseline):
                if arm not in self.studies[row.study].arms:
                    raise ValueError(f"claim {self.slug}: a comparison names the unknown arm {arm!r}")

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers that the claim has, from the shortest on."""
        return tuple(tier for tier in TIERS if any(tier in study.tiers for study in self.studies.values()))


def _check_study(where: str, study: Study) -> None:
    if not study.arms or len(set(study.arms)) != len(study.arms):
        raise ValueError(f"{where}: arms must be distinct and at least one, got {study.arms}")
    for name, tier in study.tiers.items():
        if name not in TIERS:
            raise ValueError(f"{where}: unknown tier {name!r}; one of {', '.join(TIERS)}")
        if tier.seeds < 1:
            raise ValueError(f"{where}, tier {name}: seeds must be ≥ 1, got {tier.seeds}")
    if study.tuning is not None:
        budgets = {arm: len(study.tuning.of(arm)) for arm in study.arms}
        if len(set(budgets.values())) != 1 or 0 in budgets.values():
            raise ValueError(f"{where}: every arm needs the same number of settings, at least one, got {budgets}")
