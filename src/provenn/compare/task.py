"""What a task is: a model family, data, a budget, one headline metric, and the kinds of parts that it compares.

A :class:`Task` trains networks; its :class:`Setup` is what one run of one part receives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn, optim

from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import Batch, Epoch, Update, accuracy, minibatches, train

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class LogUniform:
    """A hyperparameter between two positive bounds, uniform in its logarithm."""

    low: float
    high: float

    def at(self, share: float) -> float:
        """Return the value at a share of the way from the lower bound to the upper."""
        return float(self.low * (self.high / self.low) ** share)

    def draw(self, trial: optuna.Trial, name: str) -> float:
        """Draw a value for an optuna trial."""
        return float(trial.suggest_float(name, self.low, self.high, log=True))


Space = Mapping[str, LogUniform]
"""The hyperparameters that every part of a kind is tuned in; a part that lacks one goes without it."""


class AnyTask(Protocol):
    """What every task has, whatever its parts do; see :class:`Task` and ``provenn.compare.search_task.SearchTask``.

    ``name``, ``summary`` and ``kinds`` (each with the space its parts are tuned in, empty if nothing is), the headline
    ``metric`` and whether to ``maximize`` it, and ``setup(seed, device, tuning)``, which makes what one run receives.
    """

    @property
    def name(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def kinds(self) -> Mapping[str, Space]: ...
    @property
    def metric(self) -> str: ...
    @property
    def maximize(self) -> bool: ...
    def setup(self, seed: int, device: str, tuning: bool) -> Any: ...


@dataclass(frozen=True)
class Split:
    """Inputs and targets to train on, to tune on, and to judge by."""

    x_train: Shaped[Tensor, "train ..."]
    y_train: Shaped[Tensor, "train ..."]
    x_validation: Shaped[Tensor, "validation ..."]
    y_validation: Shaped[Tensor, "validation ..."]
    x_test: Shaped[Tensor, "test ..."]
    y_test: Shaped[Tensor, "test ..."]

    def to(self, device: str) -> Split:
        """Return the split on a device."""
        return Split(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class Scale:
    """How large a task is on one type of device.

    Args:
        model: Builds the network; drawn from torch's global generator, which is seeded around the call.
        data: Returns the split, the same at every call.
        batch_size: Samples a step.
        epochs: Epochs of a training from scratch.
        fine_tuning_epochs: Epochs of the fine-tuning after one compression.
    """

    model: Callable[[], nn.Module]
    data: Callable[[], Split]
    batch_size: int
    epochs: int
    fine_tuning_epochs: int


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of a classifier."""
    return nn.functional.cross_entropy(model(x), y)


@dataclass(frozen=True, eq=False)
class Task:
    """A task to compare parts on. A task's module defines one as ``TASK``.

    Args:
        name: Its name.
        summary: One line: model, data, budget.
        kinds: The kinds of parts it compares, each with the space its parts are tuned in.
        scales: Its size by type of device, ``"cpu"`` at least; a device without its own takes that one.
        augment: ``augment(x, generator)`` disturbs a training batch, drawn afresh every epoch.
        loss: ``loss(model, x, y)`` → scalar, the mean over the batch.
        measure: ``measure(model, x, y)`` → the headline metric.
        metric: The metric's name.
        maximize: Whether more of it is better.
        reference: The metric of a guess that has learnt nothing; hypervolumes count from it.

    Raises:
        ValueError: There is no scale for the CPU, or no kind.
    """

    name: str
    summary: str
    kinds: Mapping[str, Space]
    scales: Mapping[str, Scale]
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = cross_entropy
    measure: Callable[[nn.Module, Tensor, Tensor], float] = accuracy
    metric: str = "accuracy"
    maximize: bool = True
    reference: float = 0.0

    def __post_init__(self) -> None:
        if "cpu" not in self.scales:
            raise ValueError(f"scales of task {self.name} must have 'cpu', got {sorted(self.scales)}")
        if not self.kinds:
            raise ValueError(f"kinds of task {self.name} must name at least one kind")

    def scale(self, device: str) -> Scale:
        """Return the scale for a device such as ``"cuda:1"``."""
        return self.scales.get(device.partition(":")[0], self.scales["cpu"])

    def setup(self, seed: int, device: str, tuning: bool) -> Setup:
        """Return what one run receives."""
        return Setup(self, self.scale(device), _split(self, device), seed, device, tuning)


@cache
def _split(task: Task, device: str) -> Split:
    return task.scale(device).data().to(device)


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
