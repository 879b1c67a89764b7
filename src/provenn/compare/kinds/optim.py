"""Optimizers: every one trains the task's network from the same weights on the same batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from provenn.claims.claim import Event, Metric, Point, Progress, Settings
from provenn.compare.kind import Kind, accepted
from provenn.compare.task import Setup
from provenn.core.experiment.training import Batch, Update


def run(setup: Setup, part: Any, settings: Settings) -> Iterator[Event]:
    """Train with an optimizer: ``part(parameters, **settings)``, a class or a function that makes one."""
    model = setup.model()
    optimizer = part(model.parameters(), **accepted(part, settings))
    update = _closure_step(setup, model, optimizer) if _needs_closure(optimizer) else None
    steps = 0
    for epoch in setup.train(model, optimizer, update):
        steps = epoch.step
        yield Progress(epoch.index + 1, setup.scale.epochs)
        yield Point("training loss", epoch.step, epoch.loss)
    yield Metric("steps", steps)
    yield Metric("score", setup.measure(model))


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _closure_step(setup: Setup, model: nn.Module, optimizer: torch.optim.Optimizer) -> Update:
    """Step with a closure, which some optimizers call several times; a step is a step all the same."""

    step: Callable[[Callable[[], Tensor]], Any] = optimizer.step  # type: ignore[assignment]  # typed for floats

    def update(batch: Batch) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = setup.loss(model, batch)
            if torch.is_grad_enabled():
                loss.backward()
            return loss

        return torch.as_tensor(step(closure), device=setup.device)

    return update


KIND = Kind(name="optim", part_kind="optimizer", run=run)
