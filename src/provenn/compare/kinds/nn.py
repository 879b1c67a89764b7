"""Layers: every one sits in the task's network, as wide as the budget of parameters allows, and trains by Adam.

What a part is to a task — a layer of sequences, a layer of images, a front end for sound — the task's ``build`` knows.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from provenn.claims.claim import Event, Metric, Point, Progress, Settings
from provenn.compare.kind import Kind
from provenn.compare.layer_task import FIGURES, LayerSetup, LayerTask
from provenn.core.experiment.training import Batch, Update, train

DEFAULT_RATE = 1e-3
NARROW = 4


def run(setup: LayerSetup, part: Any, settings: Settings) -> Iterator[Event]:
    """Train the task's network around a part, and weigh it."""
    # Weighed before training, as a training may change what a layer skips; and on a network of its own, as weighing
    # moves the statistics that norms keep.
    for name, value in setup.figures(setup.model(part)).items():
        yield Metric(name, value)
    model, task = setup.model(part), setup.task
    optimizer = torch.optim.Adam(model.parameters(), lr=float(settings.get("lr", DEFAULT_RATE)))
    steps = 0
    update = _update(model, optimizer, task)
    for epoch in train(model, optimizer, setup.batches, task.loss, epochs=task.epochs, update=update):
        steps = epoch.step
        yield Progress(epoch.index + 1, task.epochs)
        yield Point("training loss", epoch.step, epoch.loss)
    yield Metric("steps", steps)
    yield Metric("score", setup.measure(model))


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, task: LayerTask) -> Update | None:
    """Return a step that clips gradients, and projects layers that have ``project_``; ``None`` for neither."""
    constrained = [module for module in model.modules() if callable(getattr(module, "project_", None))]
    return partial(_step, model, optimizer, task, constrained) if constrained or task.clip is not None else None


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, task: LayerTask, constrained: list[Any], batch: Batch
) -> Tensor:
    optimizer.zero_grad()
    loss = task.loss(model, *batch)
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    if task.clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), task.clip)
    optimizer.step()
    for module in constrained:
        module.project_()
    return loss.detach()


def unfit(task: LayerTask, part: Any) -> str | None:
    """Say why a part cannot sit in a task's network: by building it, then by a batch.

    A narrow network comes first: what fits at no width is refused with small sizes in its words, and at once.
    """
    setup = task.setup(0, "cpu", tuning=True)
    x, y = (one[:2] for one in (setup.split.x_train, setup.split.y_train))
    try:
        with warnings.catch_warnings(action="ignore"):
            if task.parameters is not None:
                task.loss(task.build(part, NARROW * task.step), x, y)
            task.loss(setup.model(part), x, y).backward()  # type: ignore[no-untyped-call]  # torch's own
    except Exception as error:
        return _in_words(error)
    return None


def _in_words(error: Exception) -> str:
    """Return an error's first line; what a part asks for beside what a task gives, by its names alone."""
    line = str(error).partition("\n")[0] or type(error).__name__
    asked = re.search(r"missing \d+ required \S+ arguments?: (.*)", line) if isinstance(error, TypeError) else None
    return f"also asks for {asked[1]}" if asked else line


def note(task: LayerTask) -> str:
    """Say how the figures are measured."""
    return (
        "MACs: of matrix products and convolutions; Fourier transforms, scans and elementwise work are not counted. "
        f"ms: a forward pass of {task.batch_size} samples in evaluation mode, beside whatever else the machine does. "
        "Peak: tensors alive in a forward and backward pass in training mode, weights not counted."
    )


KIND = Kind(name="nn", part_kind="module", run=run, unfit=unfit, figures=FIGURES, note=note)
