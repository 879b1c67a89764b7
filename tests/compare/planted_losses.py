"""Two tiny networks, and losses whose effect on them is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from provenn.compare.loss_task import Learning, LossTask
from provenn.compare.task import LogUniform

SEEN: list[tuple[int, int]] = []
"""Epoch and network of every pass over the batches."""


def learnings(seed: int, device: str, tuning: bool) -> list[Learning]:
    return [_learning(place, seed, tuning) for place in range(2)]


def _learning(place: int, seed: int, tuning: bool) -> Learning:
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.fill_(float(seed))

    def batches(epoch: int):
        SEEN.append((epoch, place))
        yield torch.ones(4, 1), torch.zeros(4)

    return Learning(model, batches, lambda m: m.weight.mean().item() + (100 if tuning else 0) + place, {"width": 2})


class Pull(nn.Module):
    """Pulls the outputs towards a centre of its own, which it may not move."""

    def __init__(self, width: int, centre: float = 7.0) -> None:
        super().__init__()
        self.register_buffer("centre", torch.full((width,), centre))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - self.centre).square().mean()


class Learned(nn.Module):
    """Outputs are pulled to a learned centre, which is pulled to them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.randn(width))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.detach() - self.centre).square().mean() + 0 * outputs.sum()


class Unasked(nn.Module):
    """Does not take the width."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum()


class Choosy(nn.Module):
    """Refuses the task's batches."""

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise ValueError("targets must be planted\nand more")


TASK = LossTask(
    "planted-losses", "planted", {"losses": {"lr": LogUniform(0.01, 1.0)}}, learnings, 3, "weight", asks=("width",)
)
