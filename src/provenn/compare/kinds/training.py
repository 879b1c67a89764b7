"""Trainers: each trains a classifier of the task's widths on the same batches, and is judged by what it predicts.

A part is ``part(model, **settings)``, where ``model`` is the task's network with the seed's initial weights, or one of
the catalogue's trainers that make layers of their own, which are built to the network's widths. Of ``epochs``,
``batch_size``, ``lr`` and ``seed`` a part gets what its signature takes. It trains by ``fit(loader, progress=…)``,
which calls ``progress`` once an epoch; classes come from its ``predict(x)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from provenn.claims.claim import Event, Metric, Point, Progress, Settings
from provenn.compare.kind import Kind, accepted
from provenn.compare.kinds._trainers import BUILD, Backpropagation, sizes_of
from provenn.compare.task import Setup
from provenn.core.experiment.seeding import seeded


class Loader:
    """The task's batches; each pass over it is the next epoch's, with an order and a disturbance of its own.

    Args:
        setup: The run.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.passes = 0
        self.steps = 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield the batches of the next epoch."""
        self.passes += 1
        for batch in self._setup.batches(self.passes - 1):
            self.steps += 1
            yield batch


def run(setup: Setup, part: Any, settings: Settings) -> Iterator[Event]:
    """Train with a trainer, and measure what it predicts."""
    budget = {"epochs": setup.scale.epochs, "batch_size": setup.scale.batch_size, "seed": setup.seed}
    trainer = build(setup, part, {**budget, **settings})
    loader, losses = Loader(setup), []
    trainer.fit(loader, progress=lambda epoch: losses.append(float(epoch.loss)))
    for index, loss in enumerate(losses):
        yield Progress(index + 1, len(losses))
        yield Point("training loss", index + 1, loss)
    yield Metric("steps", loader.steps)
    yield Metric("score", setup.measure(Predictions(trainer, setup)))


def build(setup: Setup, part: Any, settings: Settings) -> Any:
    """Build a trainer over the task's network, or over layers of its own of the same widths."""
    model = setup.model()
    adapter = BUILD.get(getattr(part, "__name__", ""))
    if adapter is None:
        return part(model, **accepted(part, settings))
    with seeded(setup.seed, "weights"):
        trainer = adapter(part, sizes_of(model), **accepted(part, settings))
    trainer.model.to(setup.device)
    return trainer


class Predictions(nn.Module):
    """What a trainer predicts, as scores of the classes, so that the task can measure them as it does a network's.

    Args:
        trainer: Its ``predict(x)`` returns classes.
        setup: The run; it knows how many classes there are.
    """

    def __init__(self, trainer: Any, setup: Setup) -> None:
        super().__init__()
        self._predict = trainer.predict
        self._classes = int(setup.split.y_train.max()) + 1

    def forward(self, x: Tensor) -> Tensor:
        """Return 1 at the predicted class and 0 elsewhere."""
        classes = torch.as_tensor(self._predict(x))
        return nn.functional.one_hot(classes.to(torch.int64), self._classes).to(x.dtype)


KIND = Kind(name="training", part_kind="trainer", run=run, references={"backpropagation": Backpropagation})
