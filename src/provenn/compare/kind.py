"""What a kind of part is to a comparison, and the setup that one run of a part receives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn, optim

from provenn.claims.claim import Event, Settings
from provenn.compare.task import Scale, Split, Task
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import Batch, Epoch, Update, minibatches, train


@dataclass(frozen=True)
class Setup:
    """One run of one part on a task. Runs of the same seed share initial weights, data order and augmentation.

    Args:
        task: The task.
        scale: Its size on this device.
        split: Its data, on this device.
        seed: The run's seed.
        device: The device.
        tuning: Whether the run serves tuning, and so is judged by validation data.
    """

    task: Task
    scale: Scale
    split: Split
    seed: int
    device: str
    tuning: bool

    def model(self) -> nn.Module:
        """Build the network with the seed's initial weights."""
        with seeded(self.seed, "weights"):
            return self.scale.model().to(self.device)

    def batches(self, epoch: int, stream: str = "training") -> Iterator[tuple[Tensor, ...]]:
        """Return an epoch's batches, in the order that seed, epoch and stream decide."""
        data = (self.split.x_train, self.split.y_train)
        noise = generator(self.seed, stream, "augmentation", epoch)
        for x, y in minibatches(data, self.scale.batch_size, generator(self.seed, stream, "order", epoch)):
            yield (x if self.task.augment is None else self.task.augment(x, noise)), y

    def train(self, model: nn.Module, optimizer: optim.Optimizer, update: Update | None = None) -> Iterator[Epoch]:
        """Train a network for the task's epochs, yielding after each."""
        return train(model, optimizer, self.batches, self.task.loss, epochs=self.scale.epochs, update=update)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the task's loss of a batch."""
        return self.task.loss(model, *batch)

    def measure(self, model: nn.Module) -> float:
        """Return the task's metric: on validation data while tuning, on test data after."""
        split = self.split
        x, y = (split.x_validation, split.y_validation) if self.tuning else (split.x_test, split.y_test)
        return self.task.measure(model, x, y)


@dataclass(frozen=True)
class Kind:
    """A kind of part that can be compared. A kind's module defines one as ``KIND``.

    Args:
        name: Its name on the command line.
        part_kind: The kind of its parts in the catalogue.
        run: ``run(setup, part, settings)`` runs a part once. It yields ``Metric("score", ...)``, the headline figure;
            ``Metric("steps", ...)``, the optimizer steps it took; ``Progress`` as a sign of life; and, where there are
            two axes, a ``Point("front", cost, score)`` for each point of the trade-off.
        references: Parts that come with the kind, by name, to compare with.
        score: What the headline is; ``None``: the task's metric. More of it is better, unless it is the task's metric
            and the task says otherwise.
        cost: What the second axis is, less of it being better; ``None`` if there is none.
    """

    name: str
    part_kind: str
    run: Callable[[Setup, Any, Settings], Iterator[Event]]
    references: Mapping[str, Any] = field(default_factory=dict)
    score: str | None = None
    cost: str | None = None

    def headline(self, task: Task) -> str:
        """Return the name of the headline figure."""
        return self.score or task.metric

    def maximize(self, task: Task) -> bool:
        """Return whether more of the headline figure is better."""
        return self.score is not None or task.maximize


def accepted(part: Callable[..., Any], settings: Settings) -> dict[str, Any]:
    """Keep the settings that a part's signature takes."""
    parameters = inspect.signature(part).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return dict(settings)
    return {name: value for name, value in settings.items() if name in parameters}
