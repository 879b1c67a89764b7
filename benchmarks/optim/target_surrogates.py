"""SSO beside the authors' SGD_FMDOpt and SLS_FMDOpt, written anew from their formulas, and beside SGD."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.timing import alternate
from provenn.core.experiment.seeding import generator, seeded
from provenn.optim import SSO, ArmijoGD, search_target_step

ROWS, FEATURES, CLASSES, OUTER, INNER = 64, 20, 5, 6, 8
THEIR_ETA, FIRST, C, SHRINK, GROWTH, BATCHES = 3.0, 10.0, 0.5, 0.9, 1.8, 4

Batch = tuple[Tensor, Tensor]


def measure() -> dict[str, Any]:
    """Compare parameters after every outer step and searched step sizes, then times by turns."""
    difference = _largest_difference()
    searched = _searched_difference()
    times = alternate({"ours": _ours_stepper(), "peer": _peer_stepper()}, rounds=31)
    single = alternate({"SSO": _single(True), "SGD": _single(False)}, rounds=101)
    growth = alternate({str(m): _ours_stepper(m) for m in (10, 100)}, rounds=9)
    return {
        "peer": "the authors' SGD_FMDOpt with LSOpt, and the search of SLS_FMDOpt, whose repository is no package and "
        "asks for CUDA, written anew in torch from their formulas; η = 1/(2η of theirs)",
        "agrees": difference <= 1e-9 and searched <= 1e-12,
        "largest_difference": difference,
        "largest_difference_of_searched_steps": searched,
        "speed_ratio": times["peer"] / times["ours"],
        "step_time_over_sgd, one inner step of SGD": single["SSO"] / single["SGD"],
        "growth": {"inner steps ×10, time ×": growth["100"] / growth["10"]},
    }


def _network(hidden: int = 16) -> nn.Sequential:
    with seeded("target surrogates benchmark"):
        return nn.Sequential(nn.Linear(FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES)).double()


def _batch(index: int) -> Batch:
    draws = generator("target surrogates benchmark", index)
    x = torch.randn(ROWS, FEATURES, generator=draws, dtype=torch.float64)
    return x, torch.randint(CLASSES, (ROWS,), generator=draws)


def _loss(y: Tensor, z: Tensor) -> Tensor:
    return cross_entropy(z, y, reduction="sum")


def _inner(params: Sequence[Tensor]) -> ArmijoGD:
    # Their surrogate is ours over η'·(numbers in the targets), and so are their gradients; they grow before each step.
    scale = THEIR_ETA * ROWS * CLASSES
    first = FIRST * GROWTH ** (1 / BATCHES) / scale
    return ArmijoGD(params, lr=first, c=C, shrink=SHRINK, growth=GROWTH, n_batches=BATCHES)


def _ours(model: nn.Module, steps: int = INNER) -> SSO:
    return SSO(model.parameters(), 1 / (2 * THEIR_ETA), steps, _inner, reduction="sum")


def _ours_step(model: nn.Module, optimizer: SSO, batch: Batch) -> None:
    x, y = batch
    optimizer.step(lambda: (partial(model, x), partial(_loss, y)))


def peer_step(model: nn.Module, batch: Batch, steps: int = INNER) -> None:
    """Take one outer step as the authors' code does: backtracking on mean(g f/η' + (f − f_t)²).

    Args:
        model: Changed in place.
        batch: Inputs and labels.
        steps: Inner steps.
    """
    x, y = batch
    params = list(model.parameters())
    before = model(x)
    slope = torch.autograd.functional.jacobian(partial(_loss, y), before).detach()
    before = before.detach()

    def surrogate() -> Tensor:
        f = model(x)
        value: Tensor = (slope * f / THEIR_ETA + (f - before).square()).mean()
        return value

    alpha = FIRST
    for _ in range(steps):
        alpha *= GROWTH ** (1 / BATCHES)
        model.zero_grad()
        value = surrogate()
        value.backward()
        current = copy.deepcopy(params)
        gradients = [copy.deepcopy(one.grad) for one in params]
        norm = torch.cat([one.flatten() for one in gradients if one is not None]).norm()
        with torch.no_grad():
            for _ in range(100):
                for one, start, gradient in zip(params, current, gradients, strict=True):
                    assert gradient is not None
                    one.data = start - alpha * gradient
                if surrogate() <= value - alpha * C * norm**2:
                    break
                alpha *= SHRINK
        if norm <= 1e-6:
            break


def _largest_difference() -> float:
    ours, theirs = _network(), _network()
    optimizer, found = _ours(ours), 0.0
    for index in range(OUTER):
        _ours_step(ours, optimizer, _batch(index))
        peer_step(theirs, _batch(index))
        pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
        found = max(found, *(float((a - b).detach().abs().max()) for a, b in pairs))
    return found


def _searched_difference() -> float:
    """Compare the target step sizes over several batches, each search starting from the one before."""
    model, last, theirs, found = _network(), 1.0, 1.0, 0.0
    for index in range(OUTER):
        x, y = _batch(index)
        z = model(x).detach()
        slope = torch.autograd.functional.jacobian(partial(_loss, y), z)
        loss = _loss(y, z)
        last, _ = search_target_step(partial(_loss, y), z, slope, loss.item(), last, C)
        trial = GROWTH / theirs
        for _ in range(100):
            if _loss(y, z - trial * slope) <= loss - trial * C * slope.norm() ** 2:
                break
            trial *= SHRINK
        theirs = min(max(1 / trial, 1e-4), 1e4)
        found = max(found, math.fabs(last - 1 / theirs))
    return found


def _ours_stepper(steps: int = INNER) -> Callable[[], None]:
    start, model, batch = _network(), _network(), _batch(0)
    optimizer = _ours(model, steps)

    def step() -> None:
        model.load_state_dict(start.state_dict())
        _ours_step(model, optimizer, batch)

    return step


def _peer_stepper() -> Callable[[], None]:
    start, model, batch = _network(), _network(), _batch(0)

    def step() -> None:
        model.load_state_dict(start.state_dict())
        peer_step(model, batch)

    return step


def _single(surrogate: bool) -> Callable[[], None]:
    """A step of SGD on a wide network, through SSO or plain."""
    model, (x, y) = _network(256), _batch(0)
    if surrogate:
        optimizer = SSO(model.parameters(), 1.0, 1, partial(torch.optim.SGD, lr=1e-6))
        return lambda: _ours_step(model, optimizer, (x, y))
    plain = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        plain.zero_grad()
        _loss(y, model(x)).backward()
        plain.step()

    return step
