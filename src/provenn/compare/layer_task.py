"""Tasks of layers: networks built around a part, widened to one number of parameters, trained alike and weighed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from provenn.compare.task import Space, Split, cross_entropy
from provenn.core.experiment.accounting import TensorMemory, median_seconds, multiply_accumulates
from provenn.core.experiment.checks import check_integer
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import accuracy, minibatches

Build = Callable[[Any, int], nn.Module]
"""``build(part, width)`` makes the task's network of a width around a part."""

WIDEST = 1024
FIGURES = ("parameters", "MACs a sample", "ms a batch", "peak MiB a step")
"""What a network costs: to store, to run, and to train."""


@dataclass(frozen=True, eq=False)
class LayerTask:
    """A task that compares layers. A task's module defines one as ``TASK``.

    Args:
        name: Its name.
        summary: One line: network, data, budget.
        kinds: The kinds of parts it compares, each with the space its parts are tuned in; ``lr`` is the rate of Adam.
        build: Makes the network around a part.
        data: Returns the split, the same at every call.
        epochs: Epochs of a training.
        batch_size: Samples a step.
        parameters: Every network gets the width that brings it nearest to so many parameters; ``None``: the width is
            ``width`` for all.
        width: The width without a budget of parameters.
        step: Within a budget every part takes its multiples as widths; those between come in where it takes them too.
        loss: ``loss(model, x, y)`` → scalar.
        measure: ``measure(model, x, y)`` → the headline metric.
        metric: Its name.
        maximize: Whether more of it is better.
        references: Parts that come with the task, by name.
        clip: The norm that every step's gradient is shortened to; ``None``: it is left as it is.
        place: What it has a place for, in words: the layer, how it is called, and on what.
    """

    name: str
    summary: str
    kinds: Mapping[str, Space]
    build: Build
    data: Callable[[], Split]
    epochs: int
    batch_size: int
    parameters: int | None = None
    width: int = 32
    step: int = 4
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = cross_entropy
    measure: Callable[[nn.Module, Tensor, Tensor], float] = accuracy
    metric: str = "accuracy"
    maximize: bool = True
    references: Mapping[str, Any] = field(default_factory=dict)
    clip: float | None = None
    place: str = ""

    def setup(self, seed: int, device: str, tuning: bool) -> LayerSetup:
        """Return what one run receives."""
        return LayerSetup(self, _split(self, device), seed, device, tuning)

    def fitting_width(self, part: Any) -> int:
        """Return the width whose network comes nearest to the budget of parameters, of those that the part takes.

        Raises:
            ValueError: No multiple of the step up to 1024 comes within a fifth of it.
        """
        if self.parameters is None:
            return self.width
        budget, step = self.parameters, self.step
        coarse = matching_width(lambda width: count_parameters(self.build(part, width)), budget, step)
        between = {width: self._size(part, width) for width in range(max(1, coarse - step + 1), coarse + step)}
        sizes = {width: size for width, size in between.items() if size is not None}
        ordered = sorted(sizes, key=lambda width: (abs(sizes[width] - budget), width != coarse))
        return next(width for width in ordered if width == coarse or self._runs(part, width))

    def _size(self, part: Any, width: int) -> int | None:
        """Return a network's parameters; ``None`` if the part refuses the width."""
        try:
            return count_parameters(self.build(part, width))
        except Exception:
            return None

    def _runs(self, part: Any, width: int) -> bool:
        """Return whether a network of a width takes samples: some layers refuse a width no earlier."""
        split = _split(self, "cpu")
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings(action="ignore"):
                self.loss(self.build(part, width), split.x_train[:2], split.y_train[:2])
        except Exception:
            return False
        return True


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers a model trains."""
    return sum(one.numel() for one in model.parameters() if one.requires_grad)


def matching_width(count: Callable[[int], int], budget: int, step: int = 4) -> int:
    """Return the multiple of ``step`` whose count comes nearest to a budget, by bisection of a growing count.

    Args:
        count: ``count(width)`` → parameters.
        budget: How many there should be.
        step: Widths are multiples of it, so that heads and groups divide them.

    Raises:
        ValueError: No width up to 1024 comes within a fifth of the budget.
    """
    check_integer("budget", budget, at_least=1)
    low, high = 1, WIDEST // step
    while low < high:
        middle = (low + high) // 2
        if count(middle * step) < budget:
            low = middle + 1
        else:
            high = middle
    near = [one * step for one in {low, max(1, low - 1)}]
    best = min(near, key=lambda width: abs(count(width) - budget))
    if abs(count(best) - budget) > 0.2 * budget:
        raise ValueError(f"no width comes near {budget} parameters: width {best} has {count(best)}")
    return best


@cache
def _split(task: LayerTask, device: str) -> Split:
    return task.data().to(device)


@dataclass(frozen=True)
class LayerSetup:
    """One run of one part on a task. Runs of the same seed share data order.

    Args:
        task: The task.
        split: Its data, on this device.
        seed: The run's seed.
        device: The device.
        tuning: Whether the run serves tuning, and so is judged by validation data.
    """

    task: LayerTask
    split: Split
    seed: int
    device: str
    tuning: bool

    def model(self, part: Any) -> nn.Module:
        """Build the network around a part, with the seed's initial weights."""
        width = self.task.fitting_width(part)
        with seeded(self.seed, "weights"):
            return self.task.build(part, width).to(self.device)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """Return an epoch's batches, in the order that seed and epoch decide."""
        data = (self.split.x_train, self.split.y_train)
        return minibatches(data, self.task.batch_size, generator(self.seed, "order", epoch))

    def measure(self, model: nn.Module) -> float:
        """Return the task's metric: on validation data while tuning, on test data after."""
        split = self.split
        x, y = (split.x_validation, split.y_validation) if self.tuning else (split.x_test, split.y_test)
        return self.task.measure(model, x, y)

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Return what a network costs, each of :data:`FIGURES`; times are of the machine it runs on."""
        x, y = (one[: self.task.batch_size] for one in (self.split.x_train, self.split.y_train))
        with TensorMemory() as memory:
            self.task.loss(model, x, y).backward()  # type: ignore[no-untyped-call]  # torch's own
        model.zero_grad()
        training = model.training
        model.eval()
        with torch.no_grad():
            seconds = median_seconds(lambda: model(x), rounds=5, warmup=1)
        work = multiply_accumulates(model, x)
        model.train(training)
        values = (count_parameters(model), work / len(x), 1e3 * seconds, memory.peak / 2**20)
        return dict(zip(FIGURES, map(float, values), strict=True))
