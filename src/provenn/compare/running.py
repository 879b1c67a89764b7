"""Tune every part equally, then run its best setting on every seed; what fails is noted and stops nothing else.

A run that ends well is kept in the ledger, where there is one, so that who is interrupted, or asks for more seeds, goes
on from there. A run that failed is tried again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import optuna

from provenn.claims.cells import Done, Failed, Job, Live
from provenn.claims.claim import Scalar, Trial
from provenn.claims.errors import UsageError
from provenn.claims.ledger import CellKey, Record, canonical
from provenn.claims.workers import Executor
from provenn.compare.cells import REFERENCE, study_name
from provenn.compare.keeping import Keeper
from provenn.compare.listing import by_reason
from provenn.compare.lookup import find_kind, find_part, find_task, unfit_parts
from provenn.compare.task import AnyTask, Space

TUNING_SEED = 0
"""The seed that tuning runs on; the seeds that count are 1, 2, ..."""
SAMPLER_SEED = 0
LEAST_SPREAD = 4


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        kind: Name of the kind.
        task: Name of the task.
        parts: Names of the parts.
        trials: Tuning runs of each part; with 0, or where the task leaves nothing to tune, each runs with its own
            defaults.
        seeds: Runs of each part that count.
        device: Where they run.
    """

    kind: str
    task: str
    parts: tuple[str, ...]
    trials: int
    seeds: int
    device: str = "cpu"


def tuning_runs(comparison: Comparison) -> int:
    """Return the tuning runs that each part gets: none where the task leaves nothing to tune."""
    return comparison.trials if find_task(comparison.task).kinds[comparison.kind] else 0


@dataclass(frozen=True)
class SeedRun:
    """What one seed left: headline figure, steps, points of trade-off and course, seconds, the kind's figures, and the
    versions, hardware and threads that it ran with.
    """

    seed: int
    score: float
    steps: int
    front: tuple[tuple[float, float], ...] = ()
    course: tuple[tuple[float, float], ...] = ()
    seconds: float = 0.0
    figures: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class PartResult:
    """What a part did: its tuning runs, its setting, its seeds; and why it failed, if it did."""

    part: str
    tried: list[tuple[Mapping[str, Scalar], float]] = field(default_factory=list)
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    runs: list[SeedRun] = field(default_factory=list)
    failure: str | None = None


class _Course:
    """One part's way: tuning one run after another, then all seeds."""

    def __init__(self, comparison: Comparison, part: str) -> None:
        kind, task = find_kind(comparison.kind), find_task(comparison.task)
        self.result = PartResult(part)
        self._comparison = comparison
        self._space = task.kinds[comparison.kind]
        self._maximize = kind.maximize(task)
        self._figures = kind.figures
        self._trials = tuning_runs(comparison)
        self._study = _study(self._space, self._trials, self._maximize)
        self._trial: optuna.Trial | None = None
        self._reason = ""
        self._waiting = list(range(1, comparison.seeds + 1)) if self._trials == 0 else []
        self._tuned = self._trials == 0

    def next_job(self) -> Job | None:
        """Return the next run, if one can start now."""
        if self.result.failure is not None:
            return None
        if not self._tuned and self._trial is None:
            self._trial = self._study.ask()
            drawn = {name: one.draw(self._trial, name) for name, one in self._space.items()}
            return self._job(drawn, TUNING_SEED, tuning=True)
        if self._tuned and self._waiting:
            return self._job(self.result.settings, self._waiting.pop(0), tuning=False)
        return None

    def _job(self, settings: Mapping[str, Scalar], seed: int, tuning: bool) -> Job:
        one = self._comparison
        study, arm = study_name(one.kind, one.task), self.result.part
        trial = Trial(study, arm, seed, "small", {}, settings, tuning, one.device)
        key = CellKey(study, arm, canonical(dict(settings)), seed, tuning)
        return Job(key, REFERENCE, trial, needed=("score", "steps", *self._figures))

    def done(self, key: CellKey, record: Record) -> None:
        """Take what a run left."""
        score = record.metrics["score"]
        if key.tuning:
            self._tell(score if math.isfinite(score) else None, f"its {score} score is no number")
            return
        front, course = (tuple(record.curves.get(name, ())) for name in ("front", "course"))
        figures = {name: record.metrics[name] for name in self._figures}
        steps = int(record.metrics["steps"])
        where = record.environment
        self.result.runs.append(SeedRun(key.seed, score, steps, front, course, record.seconds, figures, where))
        self.result.runs.sort(key=lambda run: run.seed)

    def failed(self, key: CellKey, cause: str) -> None:
        """Take that a run failed: a tuning run is just no choice, a seed is the part's failure."""
        if key.tuning:
            self._tell(None, reason(cause))
        elif self.result.failure is None:
            self.result.failure = f"seed {key.seed}: {reason(cause)}"
            self._waiting = []

    def _tell(self, score: float | None, why_not: str) -> None:
        assert self._trial is not None
        self.result.tried.append((self._trial.params, math.nan if score is None else score))
        if score is None:
            self._reason = why_not
            self._study.tell(self._trial, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(self._trial, score)
        self._trial = None
        if len(self.result.tried) == self._trials:
            self._settle()

    def _settle(self) -> None:
        good = [(settings, score) for settings, score in self.result.tried if not math.isnan(score)]
        if not good:
            self.result.failure = f"every tuning run; the last: {self._reason}"
            return
        sign = 1 if self._maximize else -1
        self.result.settings = max(good, key=lambda one: sign * one[1])[0]
        self._waiting = list(range(1, self._comparison.seeds + 1))
        self._tuned = True


def _study(space: Space, trials: int, maximize: bool) -> optuna.Study:
    """Return a study whose first half of trials is spread evenly, the same for every part, before TPE takes over.

    Of fewer than four scores TPE learns nothing: it would try again what it has seen.
    """
    spread = max(min(trials, LEAST_SPREAD), math.ceil(trials / 2))
    sampler = optuna.samplers.TPESampler(seed=SAMPLER_SEED, n_startup_trials=spread)
    study = optuna.create_study(direction="maximize" if maximize else "minimize", sampler=sampler)
    for shares in spread_points(spread, len(space)):
        settings = {name: one.at(share) for (name, one), share in zip(space.items(), shares, strict=True)}
        study.enqueue_trial(settings)
    return study


def spread_points(count: int, dimensions: int) -> list[list[float]]:
    """Return points that fill the unit cube evenly, from its centre on.

    Source: Roberts, "The unreasonable effectiveness of quasirandom sequences" (2018): additive recurrence by the powers
    of 1/φ, where φ is the root of φ^(d+1) = φ + 1.
    """
    ratio = 2.0
    for _ in range(64):
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    return [[(0.5 + index / ratio**axis) % 1 for axis in range(1, dimensions + 1)] for index in range(count)]


def reason(cause: str) -> str:
    """Return a failed cell's cause in one line, without its traceback."""
    return cause.strip().partition("\n")[0].removeprefix("raised ")


def check(comparison: Comparison) -> None:
    """Check that kind, task and parts exist and fit.

    Raises:
        UsageError: One does not.
    """
    kind, task = find_kind(comparison.kind), find_task(comparison.task)
    if comparison.kind not in task.kinds:
        raise UsageError(f"task {comparison.task} compares {', '.join(task.kinds)}, not {comparison.kind}")
    for part in comparison.parts:
        find_part(kind, part, task)


def check_fit(comparison: Comparison) -> None:
    """Check that every part fits the task, before anything is trained.

    Raises:
        UsageError: Some do not, each with its reason; or the task's data are not there, or damaged.
    """
    kind, task = find_kind(comparison.kind), find_task(comparison.task)
    reasons = unfit_parts(kind, task, comparison.parts)
    if reasons:
        told = [f"  {line}" for line in by_reason(reasons)]
        raise UsageError("\n".join([f"nothing was run: these parts cannot stand in {task.name}", *told, *_place(task)]))


def _place(task: AnyTask) -> list[str]:
    """Return in words what a task has a place for, if it says so."""
    place = getattr(task, "place", "")
    return [f"{task.name} has a place for {place}"] if place else []


def run_comparison(
    comparison: Comparison,
    executor: Executor,
    advance: Callable[[str, float], None] = lambda part, share: None,
    keeper: Keeper | None = None,
    ended: Callable[[CellKey, Record | None, bool], None] = lambda key, record, kept: None,
) -> list[PartResult]:
    """Run a comparison.

    Args:
        comparison: What to compare.
        executor: Runs the cells; the caller closes it.
        advance: Told the part whenever one of its runs has moved on, and by how much of a run (negative: start over).
        keeper: Where runs that end are stored, and those of before are found.
        ended: Told a run that is over, what it left (``None``: it failed), and whether it was kept from before.

    Returns:
        One result a part, in the order asked for.

    Raises:
        UsageError: A name is unknown, or the task does not compare this kind.
        LedgerError: The ledger refuses; what is stored is kept.
    """
    check(comparison)
    with _quiet_optuna():
        desk = _Desk(comparison, executor, advance, keeper, ended)
        while desk.submit():
            for message in executor.wait():
                desk.take(message)
    return [course.result for course in desk.courses.values()]


class _Desk:
    """Hands out runs, and takes in what they leave."""

    def __init__(
        self,
        comparison: Comparison,
        executor: Executor,
        advance: Callable[[str, float], None],
        keeper: Keeper | None,
        ended: Callable[[CellKey, Record | None, bool], None],
    ) -> None:
        self.courses = {part: _Course(comparison, part) for part in comparison.parts}
        self._executor = executor
        self._advance = advance
        self._keeper = keeper
        self._ended = ended
        self._shown: dict[CellKey, float] = {}

    def submit(self) -> bool:
        """Hand out runs while there are free hands; return whether any is under way."""
        for part, course in self.courses.items():
            while self._executor.idle() > 0 and (job := course.next_job()) is not None:
                record = self._keeper.find(job.key) if self._keeper else None
                if record is not None:
                    course.done(job.key, record)
                    self._advance(part, 1.0)
                    self._ended(job.key, record, True)
                    continue
                self._shown[job.key] = 0.0
                self._executor.submit(job)
        return bool(self._shown)

    def take(self, message: Live | Done | Failed) -> None:
        """Take what happened to a run."""
        key, course = message.key, self.courses[message.key.arm]
        if isinstance(message, Live):
            share = message.done / message.total if message.total else 0.0
            self._advance(key.arm, share - self._shown[key])
            self._shown[key] = share
            return
        record = message.record if isinstance(message, Done) else None
        if isinstance(message, Done):
            if self._keeper:
                self._keeper.keep(key, message.record)
            course.done(key, message.record)
        else:
            course.failed(key, message.cause)
        self._advance(key.arm, 1.0 - self._shown.pop(key))
        self._ended(key, record, False)


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
