"""Losses: every one trains the task's networks from the same weights on the same batches, by Adam.

A part is ``part(**settings)``, a class or a function that makes a loss of outputs and targets. It may ask by name for
what the task's networks offer, such as the number of classes; weights that it holds are trained with the network's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from provenn.claims.claim import Event, Metric, Point, Progress, Settings
from provenn.compare.kind import Kind, accepted
from provenn.compare.loss_task import Learning, LossSetup, LossTask
from provenn.core.experiment.seeding import seeded
from provenn.core.experiment.training import train

DEFAULT_RATE = 1e-3


def run(setup: LossSetup, part: Any, settings: Settings) -> Iterator[Event]:
    """Train the task's networks by a loss."""
    total, steps, scores = len(setup.learnings) * setup.task.epochs, 0, []
    for place, learning in enumerate(setup.learnings):
        with seeded(setup.seed, "criterion", place):
            criterion = build(part, learning, settings).to(setup.device)
        trained = nn.ModuleList([learning.model, criterion])
        optimizer = torch.optim.Adam(trained.parameters(), lr=float(settings.get("lr", DEFAULT_RATE)))
        epochs = train(trained, optimizer, learning.batches, _loss, epochs=setup.task.epochs)
        for epoch in epochs:
            yield Progress(place * setup.task.epochs + epoch.index + 1, total)
            yield Point(f"training loss {place + 1}", epoch.step, epoch.loss)
            last = epoch.step
        steps += last
        scores.append(learning.score(learning.model))
    yield Metric("steps", steps)
    yield Metric("score", sum(scores) / len(scores))


def build(part: Any, learning: Learning, settings: Settings) -> nn.Module:
    """Make a loss, with what it asks for of what the network offers."""
    wanted = {name: learning.offers[name] for name in inspect.signature(part).parameters if name in learning.offers}
    made: nn.Module = part(**wanted, **accepted(part, {k: v for k, v in settings.items() if k != "lr"}))
    return made


def _loss(trained: nn.ModuleList, x: Tensor, y: Tensor) -> Tensor:
    model, criterion = trained
    loss: Tensor = criterion(model(x), y)
    return loss


def unfit(task: LossTask, part: Any) -> str | None:
    """Say why a loss cannot train a task's networks: by what it takes, then by its first batch."""
    takes = inspect.signature(part).parameters
    missing = [name for name in task.asks if name not in takes]
    if missing:
        return f"takes no {', '.join(missing)}"
    learning = task.setup(0, "cpu", tuning=True).learnings[0]
    x, y = next(iter(learning.batches(0)))
    try:
        loss = _loss(nn.ModuleList([learning.model, build(part, learning, {})]), x, y)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    except Exception as error:
        return f"cannot take the task's batches: {str(error).partition(chr(10))[0] or type(error).__name__}"
    return None


KIND = Kind(name="losses", part_kind="loss", run=run, unfit=unfit)
