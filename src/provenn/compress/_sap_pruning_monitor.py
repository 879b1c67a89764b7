"""The compressibility monitor: the PQ Index over rounds, and the phases that it goes through."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from provenn.compress._sap_pruning_index import check_exponents, gini_index, pq_index
from provenn.core.compression.masks import prunable_weights
from provenn.core.experiment.checks import check_choice
from provenn.core.experiment.reports import Report

STAGES = ("retrained", "pruned")


@dataclass(frozen=True)
class Observation(Report):
    """The indices of one model: over all weights, of each tensor, and the mean over the output units of each."""

    stage: str
    density: float
    accuracy: float
    pq_global: float
    pq_layers: dict[str, float]
    pq_neurons: dict[str, float]
    gini_global: float
    gini_layers: dict[str, float]


@dataclass(frozen=True)
class Phase(Report):
    """A stretch of rounds, both ends included, in which the smoothed index moves one way."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class SparsityReport(Report):
    """What the monitor saw, round by round.

    ``retrained`` and ``pruned`` hold one observation a round, before and after its pruning. ``smoothed`` is the global
    index of the retrained models, averaged over three rounds.
    """

    p: float
    q: float
    retrained: tuple[Observation, ...]
    pruned: tuple[Observation, ...]
    nested: ClassVar[dict[str, type[Report]]] = {"retrained": Observation, "pruned": Observation}

    @property
    def smoothed(self) -> tuple[float, ...]:
        """The global index of the retrained models, averaged with its neighbours."""
        return smooth([one.pq_global for one in self.retrained])

    @property
    def differences(self) -> tuple[float, ...]:
        """The global index of each round's retrained model minus that of its pruned one."""
        return tuple(
            before.pq_global - after.pq_global for before, after in zip(self.retrained, self.pruned, strict=False)
        )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The course of the index: falling (regularisation), rising (compression limit), falling (collapse)."""
        return find_phases(self.smoothed)

    @property
    def stop_round(self) -> int | None:
        """The round of the first local minimum of the smoothed index, where the paper would stop; if there is one."""
        for phase, following in pairwise(self.phases):
            if phase.name == "regularisation" and following.name == "compression limit":
                return phase.last
        return None

    def plot(self) -> Figure:
        """Draw the index and the accuracy over rounds, with the phases shaded."""
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for label, observations in (("retrained", self.retrained), ("pruned", self.pruned)):
            axes.plot([one.pq_global for one in observations], "o-", label=label)
        for phase in self.phases:
            axes.axvspan(
                phase.first, phase.last, alpha=0.08, color="tab:red" if phase.name == "collapse" else "tab:blue"
            )
        axes.set(xlabel="round", ylabel="PQ index")
        accuracy = axes.twinx()
        accuracy.plot([one.accuracy for one in self.retrained], "--", color="gray")
        accuracy.set_ylabel("accuracy (dashed)")
        axes.legend()
        return figure


def smooth(values: list[float]) -> tuple[float, ...]:
    """Average each value with its neighbours; the ends have one."""
    return tuple(float(np.mean(values[max(0, place - 1) : place + 2])) for place in range(len(values)))


def find_phases(smoothed: tuple[float, ...]) -> tuple[Phase, ...]:
    """Cut a curve into stretches that fall or rise; the first fall is regularisation, any later one collapse."""
    phases: list[Phase] = []
    start, fallen = 0, False
    signs = np.sign(np.diff(smoothed)).astype(int).tolist()
    for place, sign in enumerate(signs):
        if sign != 0 and (place + 1 == len(signs) or signs[place + 1] != sign):
            falling = "collapse" if fallen else "regularisation"
            phases.append(Phase("compression limit" if sign > 0 else falling, start, place + 1))
            start, fallen = place + 1, fallen or sign < 0
    return tuple(phases)


class SparsityMonitor:
    """Watch the PQ Index of a model over the rounds of pruning, and name the phase it is in.

    The index of retrained models first falls (pruning regularises), then rises (the compression limit, where
    underfitting sets in), then falls again (collapse).

    Args:
        p: The smaller exponent of the index.
        q: The larger exponent.

    Raises:
        ValueError: Not 0 < p < q.

    Cost: an observation is one pass over the weights for each PQ Index, and a sort for the Gini index; the model is
    only read.

    Source: the paper's section on the course of the PQ Index under iterative pruning.
    """

    def __init__(self, p: float = 0.5, q: float = 1.0) -> None:
        check_exponents(p, q)
        self.p = p
        self.q = q
        self._observations: dict[str, list[Observation]] = {stage: [] for stage in STAGES}

    @torch.no_grad()
    def observe(
        self,
        model: nn.Module,
        mask: Mapping[str, Tensor] | None = None,
        accuracy: float = math.nan,
        stage: Literal["retrained", "pruned"] = "retrained",
    ) -> Observation:
        """Measure a model once, and keep the measurement for the report.

        Args:
            model: Any model with weights of more than one dimension; only read.
            mask: For each weight's name, true where it is not pruned. ``None``: nothing is pruned.
            accuracy: The model's accuracy, for the report.
            stage: Whether the model was just retrained, or just pruned.

        Returns:
            The observation.

        Raises:
            ValueError: ``stage`` is unknown, a weight has no mask, or the model has nothing to prune.
        """
        check_choice("stage", stage, STAGES)
        weights = {name: weight.detach() for name, weight in prunable_weights(model).items()}
        kept = {name: torch.ones_like(one, dtype=torch.bool) for name, one in weights.items()} if mask is None else mask
        missing = [name for name in weights if name not in kept]
        if missing:
            raise ValueError(f"mask has no entry for {', '.join(missing)}")
        everything = torch.cat([one.reshape(-1) for one in weights.values()])
        left = torch.cat([kept[name].reshape(-1) for name in weights])
        seen = Observation(
            stage=stage,
            density=left.double().mean().item(),
            accuracy=float(accuracy),
            pq_global=pq_index(everything, self.p, self.q, left).item(),
            pq_layers={name: pq_index(one, self.p, self.q, kept[name]).item() for name, one in weights.items()},
            pq_neurons={
                name: pq_index(one.flatten(1), self.p, self.q, kept[name].flatten(1), dim=1).mean().item()
                for name, one in weights.items()
            },
            gini_global=gini_index(everything, left).item(),
            gini_layers={name: gini_index(one, kept[name]).item() for name, one in weights.items()},
        )
        self._observations[stage].append(seen)
        return seen

    def report(self) -> SparsityReport:
        """Return everything observed so far."""
        return SparsityReport(
            self.p, self.q, tuple(self._observations["retrained"]), tuple(self._observations["pruned"])
        )
