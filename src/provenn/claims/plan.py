"""Which cells a run needs, which can run already, and which setting tuning picks: pure functions of the claim."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from provenn.claims.claim import Cell, Claim, Evidence, Settings, Trial, Tuning
from provenn.claims.errors import UsageError
from provenn.claims.ledger import CellKey, Record, canonical

TUNING_SEED = 0
Finished = Mapping[CellKey, Record]


@dataclass(frozen=True)
class Choice:
    """The settings that an arm's seeds run with, and the index of the setting picked."""

    index: int
    settings: str


@dataclass(frozen=True)
class Plan:
    """The cells of a claim at one tier.

    Args:
        claim: The claim.
        tier: The tier.
        studies: The studies to run, by default every study that has the tier.
        seeds: More seeds than the tier's, for exploration.

    Raises:
        UsageError: The claim has no such tier or study, and the message lists what exists; or ``seeds`` is below the
            tier's.
    """

    claim: Claim
    tier: str
    studies: tuple[str, ...] = ()
    seeds: int | None = None

    def __post_init__(self) -> None:
        claim = self.claim
        if self.tier not in claim.tiers:
            raise UsageError(f"{claim.slug} has no tier {self.tier!r}; it has {', '.join(claim.tiers) or 'none'}")
        having = tuple(name for name, study in claim.studies.items() if self.tier in study.tiers)
        unknown = [name for name in self.studies if name not in having]
        if unknown:
            raise UsageError(
                f"{claim.slug} has no study {unknown[0]!r} at tier {self.tier}; it has {', '.join(having)}"
            )
        if not self.studies:
            object.__setattr__(self, "studies", having)
        fewest = max(claim.studies[name].tiers[self.tier].seeds for name in self.studies)
        if self.seeds is not None and self.seeds < fewest:
            raise UsageError(f"--seeds must be at least the tier's {fewest}, got {self.seeds}")

    def arms(self) -> list[tuple[str, str]]:
        """Return every (study, arm)."""
        return [(name, arm) for name in self.studies for arm in self.claim.studies[name].arms]

    def tuning(self, study: str, arm: str) -> list[CellKey]:
        """Return the tuning cells of an arm: none where there is nothing to pick."""
        tuned = self._tuned(study)
        if tuned is None or self.tier not in tuned.tiers or len(tuned.of(arm)) == 1:
            return []
        return [CellKey(study, arm, canonical(dict(one)), TUNING_SEED, True) for one in tuned.of(arm)]

    def choice(self, study: str, arm: str, finished: Finished) -> Choice | None:
        """Return the setting that an arm's seeds run with, or None while its tuning is not done.

        The best value of the tuning metric wins, the earlier setting among equals; a setting that diverged (NaN or
        infinite) never wins. If all diverged there is no choice.
        """
        tuned = self._tuned(study)
        if tuned is None:
            return Choice(0, canonical({}))
        tried = self.tuning(study, arm)
        if not tried:
            return Choice(0, canonical(dict(tuned.of(arm)[0])))
        if any(key not in finished for key in tried):
            return None
        values = [finished[key].metrics[tuned.metric] * (1 if tuned.maximize else -1) for key in tried]
        sound = [index for index, value in enumerate(values) if math.isfinite(value)]
        if not sound:
            return None
        best = max(sound, key=lambda index: (values[index], -index))
        return Choice(best, tried[best].settings)

    def seed_cells(self, study: str, arm: str, choice: Choice) -> list[CellKey]:
        """Return the cells of an arm, one a seed, with the settings chosen."""
        return [CellKey(study, arm, choice.settings, seed, False) for seed in range(self._seeds(study))]

    def runnable(self, finished: Finished) -> list[CellKey]:
        """Return the unfinished cells that can run, in the order to run them: tuning first, then seed by seed."""
        tuning = [key for study, arm in self.arms() for key in self.tuning(study, arm) if key not in finished]
        chosen = {(study, arm): self.choice(study, arm, finished) for study, arm in self.arms()}
        seeds = [
            key
            for (study, arm), choice in chosen.items()
            if choice is not None
            for key in self.seed_cells(study, arm, choice)
            if key not in finished
        ]
        return tuning + sorted(seeds, key=lambda key: key.seed)

    def done(self, finished: Finished) -> int:
        """Return how many of the plan's cells are finished."""
        return self.size - len(self._unfinished(finished))

    @property
    def size(self) -> int:
        """Number of cells, tuning included."""
        return sum(len(self.tuning(study, arm)) + self._seeds(study) for study, arm in self.arms())

    def missing(self, finished: Finished) -> list[str]:
        """Name the cells that the evidence lacks; empty when it is complete."""
        return self._unfinished(finished)

    def evidence(self, finished: Finished) -> Evidence:
        """Return the evidence of the finished seed cells, by ascending seed."""
        cells = {}
        for study, arm in self.arms():
            choice = self.choice(study, arm, finished)
            keys = [] if choice is None else self.seed_cells(study, arm, choice)
            cells[study, arm] = tuple(_cell(key, finished[key]) for key in keys if key in finished)
        return Evidence(cells)

    def trial(self, key: CellKey, device: str) -> Trial:
        """Return what ``run`` receives for a cell."""
        budget = dict(self.claim.studies[key.study].tiers[self.tier].budget)
        settings = json.loads(key.settings)
        return Trial(key.study, key.arm, key.seed, self.tier, budget, settings, key.tuning, device)

    def needed(self, key: CellKey) -> tuple[str, ...]:
        """Return the metrics that a cell must leave: the tuning metric, or those that the comparisons name."""
        tuned = self._tuned(key.study)
        if key.tuning and tuned is not None:
            return (tuned.metric,)
        rows = (row for row in self.claim.comparisons if row.study == key.study)
        return tuple(dict.fromkeys(row.metric for row in rows if key.arm in (row.method, row.baseline)))

    def _tuned(self, study: str) -> Tuning | None:
        return self.claim.studies[study].tuning

    def _seeds(self, study: str) -> int:
        return self.seeds or self.claim.studies[study].tiers[self.tier].seeds

    def _unfinished(self, finished: Finished) -> list[str]:
        names = []
        for study, arm in self.arms():
            tried = self.tuning(study, arm)
            names += [str(key) for key in tried if key not in finished]
            choice = self.choice(study, arm, finished)
            if choice is not None:
                names += [str(key) for key in self.seed_cells(study, arm, choice) if key not in finished]
            else:
                waits = "every setting diverged in" if all(key in finished for key in tried) else "waiting for its"
                names += [
                    f"study {study}, arm {arm}, seed {seed} ({waits} tuning)" for seed in range(self._seeds(study))
                ]
        return names


def _cell(key: CellKey, record: Record) -> Cell:
    curves = {name: tuple(points) for name, points in record.curves.items()}
    settings: Settings = json.loads(key.settings)
    return Cell(key.seed, record.metrics, curves, settings)
