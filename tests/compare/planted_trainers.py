"""Trainers that learn nothing and note what they are given, and an easy task that every real trainer learns."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from compare import planted
from torch import nn

from provenn.compare.task import LogUniform, Scale, Split, Task
from provenn.core.experiment.networks import mlp
from provenn.core.experiment.training import accuracy

SEEN: list[SimpleNamespace] = []


class Constant:
    """Runs over the loader as often as it should, twice an epoch, and predicts class 1 whatever comes."""

    def __init__(self, model: nn.Module, epochs: int, seed: int, lr: float = 0.5) -> None:
        SEEN.append(SimpleNamespace(lr=lr, seed=seed, weight=model.weight.detach().clone(), batches=[], epochs=epochs))
        self.epochs = epochs

    def fit(self, loader, progress) -> None:
        for epoch in range(self.epochs):
            for _ in range(2):
                SEEN[-1].batches += [x.clone() for x, _ in loader]
            progress(SimpleNamespace(loss=1.0 / (1 + epoch)))

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(x), dtype=torch.int32)


class Unlearned(Constant):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, epochs=1, seed=-1)


TASK = Task(
    "planted-training", "planted", {"training": {"lr": LogUniform(1e-3, 1.0)}}, planted.scales(), measure=accuracy
)


def clusters() -> Split:
    """Four classes around points far apart in eight dimensions."""
    generator = torch.Generator().manual_seed(3)
    centres = 2 * torch.randn(4, 8, generator=generator)

    def part(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.arange(count) % 4
        return centres[y] + 0.2 * torch.randn(count, 8, generator=generator), y

    return Split(*part(256), *part(64), *part(128))


EASY = Task(
    "easy",
    "easy",
    {"training": {"lr": LogUniform(1e-3, 1.0)}},
    {"cpu": Scale(lambda: mlp([8, 32, 16, 4]), clusters, batch_size=32, epochs=15, fine_tuning_epochs=1)},
)
