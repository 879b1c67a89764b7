"""A problem with a closed form, and optimizers that spend a budget in known ways."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from provenn.compare.counted_task import CountedTask, LossProblem
from provenn.compare.task import LogUniform

BUDGET = 40.0
PROBLEMS: list[LossProblem] = []
STEPS: list[int] = []


def slope(seed: int, device: str, tuning: bool) -> LossProblem:
    """½ (w − 1)², from a start that the seed decides; the metric is the weight itself."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(-float(seed))

    def batch(step: int) -> tuple[torch.Tensor]:
        STEPS.append(step)
        return (torch.ones(1, 1),)

    PROBLEMS.append(LossProblem(model, lambda m, x: (m(x) - 1).square().sum() / 2, batch, lambda m: m.weight.item()))
    return PROBLEMS[-1]


class Guessing(torch.optim.Optimizer):
    """Evaluates the loss twice a step without gradients, as zeroth-order methods do."""

    def __init__(self, params, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure):
        closure()
        return closure()


class Idle(Guessing):
    """Never looks at the loss."""

    def step(self, closure=None):
        return None


BOUND = partial(torch.optim.SGD, momentum=0.0)
SLOPE = CountedTask(
    "slope", "slope", {"optim": {"lr": LogUniform(0.05, 0.5)}}, slope, BUDGET, "weight", True, {"plain": BOUND}
)
