"""Tasks with a budget of evaluations, whatever a step of a part takes: deterministic problems, zeroth-order methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from provenn.compare.task import Space

LOSS_SHARE = 1 / 3
"""What a loss without gradient counts: a forward pass, where a gradient takes a forward and a backward of two."""


class Problem(Protocol):
    """What one run of one part optimizes.

    ``model`` holds the parameters. ``evaluate(step)`` returns the loss at the parameters as they stand, on the data of
    a step, and fills the parameters' gradients where gradients are enabled. ``spent`` counts what that has cost so far,
    in evaluations of a gradient. ``measure()`` returns the headline metric of the parameters as they stand, at no cost.
    """

    model: nn.Module
    spent: float

    def evaluate(self, step: int) -> Tensor: ...
    def measure(self) -> float: ...


class LossProblem:
    """A network's loss on a batch of each step. A gradient counts 1, a loss without one a third; what a part computes
    of the loss' graph besides, a Hessian for one, is not seen here, but its seconds are.

    Args:
        model: The network.
        loss: ``loss(model, *batch)`` → scalar.
        batch: ``batch(step)`` → the step's batch, the same at every call.
        metric: ``metric(model)`` → the headline metric.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        batch: Callable[[int], tuple[Tensor, ...]],
        metric: Callable[[nn.Module], float],
    ) -> None:
        self.model, self.spent = model, 0.0
        self._loss, self._batch, self._metric = loss, batch, metric

    def evaluate(self, step: int) -> Tensor:
        """Return a step's loss on its graph, with the parameters' gradients where gradients are enabled."""
        loss = self._loss(self.model, *self._batch(step))
        if torch.is_grad_enabled():
            self.model.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        self.spent += 1.0 if torch.is_grad_enabled() else LOSS_SHARE
        return loss

    def measure(self) -> float:
        """Return the headline metric."""
        return self._metric(self.model)


@dataclass(frozen=True, eq=False)
class CountedTask:
    """A task that compares optimizers at an equal number of evaluations. A task's module defines one as ``TASK``.

    Args:
        name: Its name.
        summary: One line: problem, data, budget.
        kinds: The kinds of parts it compares, each with the space its parts are tuned in.
        problem: ``problem(seed, device, tuning)`` → what one run optimizes; runs of a seed start alike.
        evaluations: The budget, in evaluations of a gradient. A run's score is what it has reached at the end of the
            step that uses it up.
        metric: The headline metric's name.
        maximize: Whether more of it is better.
        references: Parts that come with the task, by name.
        over: What the metric's course is drawn over.
        cost: What the second axis is: the seconds of the steps, measured where it runs.
    """

    name: str
    summary: str
    kinds: Mapping[str, Space]
    problem: Callable[[int, str, bool], Problem]
    evaluations: float
    metric: str
    maximize: bool
    references: Mapping[str, Any] = field(default_factory=dict)
    over: str = "evaluations of the gradient (a loss counts a third)"
    cost: str = "seconds"

    def setup(self, seed: int, device: str, tuning: bool) -> CountedSetup:
        """Return what one run receives."""
        return CountedSetup(self, self.problem(seed, device, tuning), seed, device)


@dataclass(frozen=True)
class CountedSetup:
    """One run of one part on a task that counts evaluations."""

    task: CountedTask
    problem: Problem
    seed: int
    device: str
