"""Optimizers: every one trains the task's network from the same weights on the same batches.

A part is ``part(parameters, **settings)``, a class or a function that makes one. One whose first parameter is an
``optimizer`` wraps SGD with momentum, which then takes the learning rate; one whose first is a ``model`` gets the
network itself, as does one that takes a ``model`` by name.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from provenn.claims.claim import Event, Metric, Point, Progress, Settings
from provenn.compare.counted_task import CountedSetup
from provenn.compare.kind import Kind, accepted
from provenn.compare.task import AnyTask, Setup
from provenn.core.experiment.training import Batch, Update

MARKS = 20
"""Places on the way through a budget of evaluations at which the metric is taken."""


def run(setup: Setup | CountedSetup, part: Any, settings: Settings) -> Iterator[Event]:
    """Train with an optimizer, for the task's epochs or with its budget of evaluations."""
    if isinstance(setup, CountedSetup):
        yield from _run_counted(setup, part, settings)
        return
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


def _run_counted(setup: CountedSetup, part: Any, settings: Settings) -> Iterator[Event]:
    problem, budget = setup.problem, setup.task.evaluations
    optimizer = make(part, problem.model, settings)
    step: Callable[[Callable[[], Tensor]], Any] = optimizer.step  # type: ignore[assignment]  # typed for floats
    marks = [budget * (place + 1) / MARKS for place in range(MARKS)]
    passed = steps = 0
    seconds, score = 0.0, problem.measure()
    while passed < MARKS:
        before, start = problem.spent, time.perf_counter()
        step(partial(problem.evaluate, steps))
        seconds, steps = seconds + time.perf_counter() - start, steps + 1
        if problem.spent <= before:
            raise ValueError("the part took a step without evaluating its closure")
        if problem.spent < marks[passed]:
            continue
        score = problem.measure()
        while passed < MARKS and problem.spent >= marks[passed]:
            yield Point("course", marks[passed], score)
            yield Point("front", seconds, score)
            passed += 1
        yield Progress(passed, MARKS)
    yield Metric("steps", steps)
    yield Metric("score", score)


def make(part: Any, model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Build an optimizer over a network's parameters or the network, or around an optimizer."""
    takes = inspect.signature(part).parameters
    first: Any = next(iter(takes), "")
    options = accepted(part, settings)
    given: Any = model.parameters()
    if first == "optimizer":
        given = torch.optim.SGD(model.parameters(), momentum=0.9, **accepted(torch.optim.SGD, settings))
    elif first == "model":
        given = model
    elif "model" in takes:
        options["model"] = model
    optimizer: torch.optim.Optimizer = part(given, **options)
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


def unfit(task: AnyTask, part: Any) -> str | None:
    """Say why a part cannot run on a task: by what it takes beside parameters and what the task tunes, or by a step."""
    first, *others = inspect.signature(part).parameters.values()
    if first.name not in ("params", "parameters", "optimizer", "model"):
        return f"takes {first.name} first, not parameters or a model"
    asked = [one.name for one in others if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    lacking = [name for name in asked if name not in {*task.kinds["optim"], "model"}]
    if lacking:
        return f"needs {', '.join(lacking)}"
    try:
        _first_step(task.setup(0, "cpu", tuning=True), part)
    except Exception as error:
        return f"cannot take a step: {str(error).partition(chr(10))[0] or type(error).__name__}"
    return None


def _first_step(setup: Setup | CountedSetup, part: Any) -> None:
    """Take one step, with the part's own settings."""
    if isinstance(setup, CountedSetup):
        optimizer = make(part, setup.problem.model, {})
        optimizer.step(partial(setup.problem.evaluate, 0))  # type: ignore[arg-type]  # typed for floats
        return
    model = setup.model()
    optimizer = make(part, model, {})
    batch = next(iter(setup.batches(0)))
    if _needs_closure(optimizer):
        _closure_step(setup, model, optimizer)(batch)
    else:
        setup.loss(model, batch).backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()


KIND = Kind(
    name="optim",
    part_kind="optimizer",
    run=run,
    references={"sgd": partial(torch.optim.SGD, momentum=0.9), "adam": torch.optim.Adam, "adamw": torch.optim.AdamW},
    unfit=unfit,
)
