"""Tasks of losses: networks that train by a part, and figures that no part optimizes as it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from provenn.compare.task import Space


@dataclass(frozen=True)
class Learning:
    """One network to train by a loss.

    Args:
        model: The network, with the seed's initial weights.
        batches: ``batches(epoch)`` → inputs and targets, in the order that seed and epoch decide. A loss is called as
            ``loss(model(inputs), targets)``.
        score: ``score(model)`` → the headline metric of the trained network, on validation data while tuning.
        offers: What a part may ask for by name when it is built, the size of its inputs for one.
    """

    model: nn.Module
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]]
    score: Callable[[nn.Module], float]
    offers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class LossTask:
    """A task that compares losses. A task's module defines one as ``TASK``.

    Args:
        name: Its name.
        summary: One line: networks, data, budget.
        kinds: The kinds of parts it compares, each with the space its parts are tuned in; ``lr`` is the rate of Adam.
        learnings: ``learnings(seed, device, tuning)`` → the networks that one run trains; its score is their mean.
        epochs: Epochs of each.
        metric: The headline metric's name.
        maximize: Whether more of it is better.
        references: Parts that come with the task, by name.
        asks: What a part must take by name when it is built, for the task to make sense of it.
    """

    name: str
    summary: str
    kinds: Mapping[str, Space]
    learnings: Callable[[int, str, bool], Sequence[Learning]]
    epochs: int
    metric: str
    maximize: bool = True
    references: Mapping[str, Any] = field(default_factory=dict)
    asks: tuple[str, ...] = ()

    def setup(self, seed: int, device: str, tuning: bool) -> LossSetup:
        """Return what one run receives."""
        return LossSetup(self, tuple(self.learnings(seed, device, tuning)), seed, device)


@dataclass(frozen=True)
class LossSetup:
    """One run of one loss on a task."""

    task: LossTask
    learnings: tuple[Learning, ...]
    seed: int
    device: str
