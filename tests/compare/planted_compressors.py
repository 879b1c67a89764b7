"""A tiny task for compressors, and compressors that note what they were given."""

from __future__ import annotations

import math

import torch
from compare import planted
from torch import nn

from provenn.compare.task import LogUniform, Scale, Task

SEEN: dict[str, list[tuple]] = {}
LOSS_CALLS = [0]


def counted_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    LOSS_CALLS[0] += 1
    return nn.functional.cross_entropy(model(x), y)


TASK = Task(
    "tiny",
    "tiny",
    {"compress": {"lr": LogUniform(1e-3, 1e-2)}},
    {"cpu": Scale(lambda: nn.Linear(4, 2), planted.data, planted.BATCH, planted.EPOCHS, fine_tuning_epochs=2)},
    loss=counted_loss,
    reference=0.25,
)
FINE_STEPS = 2 * math.ceil(planted.SAMPLES / planted.BATCH)


def note(name: str, model: nn.Module, density: float, train: object) -> None:
    SEEN.setdefault(name, []).append(({k: v.clone() for k, v in model.state_dict().items()}, density, train))


def first(model, density, train):
    """Trains three times, then blanks the network that it was given."""
    note("first", model, density, train)
    for _ in range(3):
        train(model)
    with torch.no_grad():
        for one in model.parameters():
            one.zero_()
    return model


def second(model, density, train):
    note("second", model, density, train)
    train(model)
    return model, "a report"


class Sparsifier:
    """Takes its budget at construction, as a sparsity."""

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity

    def compress(self, model, train_fn):
        note("Sparsifier", model, self.sparsity, train_fn)
        train_fn(model)
        return model, None


class Rounds:
    """Takes rounds at construction and its budget at the call."""

    def __init__(self, rounds: int = 99) -> None:
        self.rounds = rounds

    def compress(self, model, train_fn, remaining=None):
        note("Rounds", model, remaining, train_fn)
        spent = []
        for _ in range(self.rounds + 1):
            before = train_fn.steps
            train_fn(model)
            spent.append(train_fn.steps - before)
        SEEN.setdefault("spent", []).append((spent, self.rounds, None))
        return model


def wrong(model, density, train):
    return "no module"
