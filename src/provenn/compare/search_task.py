"""Tasks of searchers: a black-box function, its bounds, and a budget of evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.compare.task import Space
from provenn.core.experiment.seeding import generator


class Objective(Protocol):
    """A function to maximise whose best value is known: ``objective(points)`` gives one value a row."""

    @property
    def bounds(self) -> Float[Tensor, "2 dimensions"]: ...
    @property
    def maximum(self) -> float: ...
    def __call__(self, points: Float[Tensor, "n dimensions"]) -> Float[Tensor, " n"]: ...


@dataclass(frozen=True, eq=False)
class SearchTask:
    """A task that compares searchers. A task's module defines one as ``TASK``.

    Args:
        name: Its name.
        summary: One line: function, noise, budget.
        objective: Builds the function, which is maximised.
        evaluations: Evaluations of one search.
        noise: Standard deviation of the noise on every value that a searcher is told.
        kinds: The kinds of parts it compares; searchers are not tuned.
        metric: The headline metric's name.
        maximize: Whether more of it is better.
    """

    name: str
    summary: str
    objective: Callable[[], Objective]
    evaluations: int
    noise: float = 0.0
    kinds: Mapping[str, Space] = field(default_factory=lambda: {"search": {}})
    metric: str = "log10 regret"
    maximize: bool = False

    def setup(self, seed: int, device: str, tuning: bool) -> SearchSetup:
        """Return what one run receives."""
        return SearchSetup(self, self.objective(), seed, device)


@dataclass(frozen=True)
class SearchSetup:
    """One run of one searcher on a function; the n-th evaluation of a seed has the same noise for every searcher."""

    task: SearchTask
    objective: Objective
    seed: int
    device: str

    @property
    def bounds(self) -> Float[Tensor, "2 dimensions"]:
        """Return lower and upper bounds, on the device."""
        return self.objective.bounds.to(self.device)

    def evaluate(self, point: Float[Tensor, " dimensions"], index: int) -> float:
        """Return the value, with noise, that evaluation ``index`` of a point yields."""
        noise = torch.randn((), generator=generator(self.seed, "noise", index), dtype=torch.float64).item()
        return self.value(point) + self.task.noise * noise

    def value(self, point: Float[Tensor, " dimensions"]) -> float:
        """Return a point's value without noise."""
        return self.objective(point.unsqueeze(0)).item()

    def regret(self, point: Float[Tensor, " dimensions"]) -> float:
        """Return how far below the maximum a point's value is, without noise; at least 1e-12, for logarithms."""
        return max(self.objective.maximum - self.value(point), 1e-12)

    def log_regret(self, point: Float[Tensor, " dimensions"]) -> float:
        """Return the logarithm to base 10 of the regret."""
        return math.log10(self.regret(point))
