"""Compressors: each makes the same trained network smaller at several budgets, with the same fine-tuning steps.

A part is either a function ``part(model, density, train) -> model``, or a class whose instances have
``compress(model, train)``. The share of weights to keep goes to whichever of the two takes it, as ``remaining`` or
``density``, or as ``sparsity``, one minus it. A class that takes ``rounds`` gets the number in which a fifth of the
weights a round would reach the share, and its steps are shared among one training more. ``train(model)`` fine-tunes in
place.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from provenn.claims.claim import Event, Metric, Point, Progress, Settings
from provenn.compare.kind import Kind, accepted
from provenn.compare.pareto import hypervolume
from provenn.compare.task import Setup, Task
from provenn.core.experiment.seeding import seeded
from provenn.core.experiment.training import train

DENSITIES = (0.5, 0.2, 0.1, 0.05)
DENSE_LEARNING_RATE = 1e-3
PACE = 0.8
"""Share of the weights that a round keeps, for compressors that count rounds."""


class FineTuning:
    """Fine-tunes a network in place, in equal shares, until the steps of one compression are spent.

    Once they are, a call does nothing, so that no part trains longer than another.

    Args:
        setup: The run.
        lr: Learning rate of Adam.
        calls: The number of calls among which the steps are shared.
    """

    def __init__(self, setup: Setup, lr: float, calls: int) -> None:
        self._setup = setup
        self._lr = lr
        batches = math.ceil(len(setup.split.x_train) / setup.scale.batch_size)
        self.budget = setup.scale.fine_tuning_epochs * batches
        self._share = max(1, self.budget // calls)
        self._stream = self._batches()
        self.steps = 0

    def __call__(self, model: nn.Module) -> None:
        """Take the call's share of steps."""
        share = min(self._share, self.budget - self.steps)
        if share == 0:
            return
        self.steps += share
        optimizer = torch.optim.Adam(model.parameters(), lr=self._lr)
        for _ in train(model, optimizer, lambda _: self._next(share), self._setup.task.loss, epochs=1):
            pass

    def _next(self, count: int) -> Iterator[tuple[Tensor, ...]]:
        return (next(self._stream) for _ in range(count))

    def _batches(self) -> Iterator[tuple[Tensor, ...]]:
        for epoch in range(self._setup.scale.fine_tuning_epochs):
            yield from self._setup.batches(epoch, "fine-tuning")


def run(setup: Setup, part: Any, settings: Settings) -> Iterator[Event]:
    """Compress the seed's trained network to every density, and measure what is left."""
    dense = setup.model()
    dense.load_state_dict(_trained(setup))
    full = stored_bytes(dense)
    yield Metric(f"dense {setup.task.metric}", setup.measure(dense))
    points, steps = [], 0
    for index, density in enumerate(DENSITIES):
        tuning, compressed = compress(setup, part, copy.deepcopy(dense), density, settings)
        left, score = stored_bytes(compressed), setup.measure(compressed)
        steps += tuning.steps
        points.append((left, score))
        yield Progress(index + 1, len(DENSITIES))
        yield Point("front", left, score)
    sign = 1 if setup.task.maximize else -1
    gains = [(math.log10(full / left), sign * (score - setup.task.reference)) for left, score in points]
    yield Metric("steps", steps)
    yield Metric("score", hypervolume(gains))


def compress(
    setup: Setup, part: Any, model: nn.Module, density: float, settings: Settings
) -> tuple[FineTuning, nn.Module]:
    """Run a part at one density."""
    lr = float(settings.get("lr", DENSE_LEARNING_RATE))
    budget = {"remaining": density, "density": density, "sparsity": 1 - density}
    if hasattr(part, "compress"):
        rounds = math.ceil(math.log(density) / math.log(PACE))
        tuning = FineTuning(setup, lr, calls=rounds + 1 if "rounds" in inspect.signature(part).parameters else 1)
        compressor = part(**accepted(part, {**budget, "rounds": rounds}))
        result = compressor.compress(model, tuning, **accepted(compressor.compress, budget))
    else:
        tuning = FineTuning(setup, lr, calls=1)
        result = part(model, density, tuning)
    smaller = result[0] if isinstance(result, tuple) else result
    if not isinstance(smaller, nn.Module):
        raise TypeError(f"a compressor must return a module, or a module and its report, got {type(result).__name__}")
    return tuning, smaller


_TRAINED: WeakKeyDictionary[Task, dict[tuple[int, str], dict[str, Tensor]]] = WeakKeyDictionary()


def _trained(setup: Setup) -> dict[str, Tensor]:
    """Train the seed's network by Adam, once a process: every part compresses the same weights."""
    states = _TRAINED.setdefault(setup.task, {})
    key = (setup.seed, setup.device)
    if key not in states:
        model = setup.model()
        with seeded(setup.seed, "dense"):
            for _ in setup.train(model, torch.optim.Adam(model.parameters(), lr=DENSE_LEARNING_RATE)):
                pass
        states[key] = model.state_dict()
    return states[key]


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes that a model takes on disk: of each parameter the smaller of all its values, or one bit a value
    and those that are not zero; and all its buffers.
    """
    total = sum(one.numel() * one.element_size() for one in model.buffers())
    for one in model.parameters():
        packed = math.ceil(one.numel() / 8) + int(torch.count_nonzero(one)) * one.element_size()
        total += min(packed, one.numel() * one.element_size())
    return total


def _prune(
    method: type[prune.BasePruningMethod], model: nn.Module, density: float, train: Callable[..., None]
) -> nn.Module:
    weights = [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1
    ]
    prune.global_unstructured(weights, pruning_method=method, amount=1 - density)
    train(model)
    for module, name in weights:
        prune.remove(module, name)
    return model


KIND = Kind(
    name="compress",
    part_kind="compressor",
    run=run,
    references={
        "magnitude": partial(_prune, prune.L1Unstructured),
        "random": partial(_prune, prune.RandomUnstructured),
    },
    score="hypervolume (decades × gain)",
    cost="bytes",
)
