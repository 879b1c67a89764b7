"""Optimizers: every one trains the task's network from the same weights on the same batches.

A part is ``part(parameters, **settings)``, a class or a function that makes one. One whose first parameter is an
``optimizer`` wraps SGD with momentum, which then takes the learning rate.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from provenn.claims.claim import Event, Metric, Point, Progress, Settings
from provenn.compare.kind import Kind, accepted
from provenn.compare.task import Setup
from provenn.core.experiment.training import Batch, Update


def run(setup: Setup, part: Any, settings: Settings) -> Iterator[Event]:
    """Train with an optimizer."""
    model = setup.model()
    optimizer = make(part, model, settings)
    update = _closure_step(setup, model, optimizer) if _needs_closure(optimizer) else None
    steps = 0
    for epoch in setup.train(model, optimizer, update):
        steps = epoch.step
        yield Progress(epoch.index + 1, setup.scale.epochs)
        yield Point("training loss", epoch.step, epoch.loss)
    yield Metric("steps", steps)
    yield Metric("score", setup.measure(model))


def make(part: Any, model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Build an optimizer over a network's parameters, or around one."""
    if next(iter(inspect.signature(part).parameters), "") == "optimizer":
        wrapped = torch.optim.SGD(model.parameters(), momentum=0.9, **accepted(torch.optim.SGD, settings))
        wrapper: torch.optim.Optimizer = part(wrapped, **accepted(part, settings))
        return wrapper
    optimizer: torch.optim.Optimizer = part(model.parameters(), **accepted(part, settings))
    return optimizer


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


KIND = Kind(
    name="optim",
    part_kind="optimizer",
    run=run,
    references={"sgd": partial(torch.optim.SGD, momentum=0.9), "adam": torch.optim.Adam, "adamw": torch.optim.AdamW},
)
