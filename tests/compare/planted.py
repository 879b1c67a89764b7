"""A task and parts whose outcome is known beforehand, and a log of what each run saw.

The network is one linear map. Planted optimizers write the score they are to get into its bias, and the measure reads
it back, so that a ranking can be foretold to the last digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from provenn.compare.task import LogUniform, Scale, Split, Task

SAMPLES, BATCH, EPOCHS = 20, 8, 3
STEPS = EPOCHS * math.ceil(SAMPLES / BATCH)


@dataclass
class Run:
    """What one run saw: its first weights, its batches and the data that it was judged by."""

    name: str
    lr: float
    weights: Tensor
    batches: list[Tensor] = field(default_factory=list)
    judged_by: list[int] = field(default_factory=list)


LOG: list[Run] = []


def data() -> Split:
    generator = torch.Generator().manual_seed(5)

    def part(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 4, generator=generator)
        return x, (x[:, 0] > 0).long()

    return Split(*part(SAMPLES), *part(7), *part(11))


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    if LOG:
        LOG[-1].batches.append(x.clone())
    return nn.functional.cross_entropy(model(x), y)


def measure(model: nn.Module, x: Tensor, y: Tensor) -> float:
    if LOG:
        LOG[-1].judged_by.append(len(x))
    return model.bias[0].item()


def disturb(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=generator)


def scales() -> dict[str, Scale]:
    return {"cpu": Scale(lambda: nn.Linear(4, 2), data, BATCH, EPOCHS, fine_tuning_epochs=2)}


def task(maximize: bool = True) -> Task:
    kinds = {"optim": {"lr": LogUniform(1e-4, 1.0)}}
    return Task("planted", "planted", kinds, scales(), disturb, loss, measure, "bias", maximize)


UP = task()
DOWN = task(maximize=False)


def made() -> Task:
    """A task that is made by a call."""
    return UP


class Planted(torch.optim.Optimizer):
    """Writes ``score(lr, first weight)`` into the last parameter's first entry at every step."""

    def __init__(self, params, lr: float, name: str, score: Callable[[float, float], float]) -> None:
        super().__init__(params, {"lr": lr})
        weight = self.param_groups[0]["params"][0]
        LOG.append(Run(name, lr, weight.detach().clone()))
        self.score = score(lr, weight[0, 0].item())

    @torch.no_grad()
    def step(self, closure=None) -> None:
        self.param_groups[0]["params"][1][0] = self.score


def good(params, lr: float = 0.5) -> Planted:
    return Planted(params, lr, "good", lambda lr, weight: 3.0)


def twin(params, lr: float = 0.5) -> Planted:
    return Planted(params, lr, "twin", lambda lr, weight: 3.0)


def poor(params, lr: float = 0.5) -> Planted:
    return Planted(params, lr, "poor", lambda lr, weight: 1.0)


def seedy(params, lr: float = 0.5) -> Planted:
    """Its score is the seed's first weight, which lies between −½ and ½."""
    return Planted(params, lr, "seedy", lambda lr, weight: weight)


def peaked(params, lr: float = 0.5) -> Planted:
    """Best at lr = 0.03."""
    return Planted(params, lr, "peaked", lambda lr, weight: -abs(math.log10(lr / 0.03)))


def asking(params, horizon, lr: float = 0.5) -> Planted:
    raise AssertionError("it asks for what no task gives")


def rateless(params) -> Planted:
    return Planted(params, 0.25, "rateless", lambda lr, weight: 2.0)


def raising(params, lr: float = 0.5) -> Planted:
    raise RuntimeError("planted <b>fault</b>")


class Stumbling(Planted):
    """Takes one step, and no second."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        if len(LOG[-1].batches) > 1:
            raise RuntimeError("planted second step")


def stumbling(params, lr: float = 0.5) -> Planted:
    return Stumbling(params, lr, "stumbling", lambda lr, weight: 0.0)


def diverging(params, lr: float = 0.5) -> Planted:
    return Planted(params, lr, "diverging", lambda lr, weight: math.nan)


def fragile(params, lr: float = 0.5) -> Planted:
    """Diverges where lr > 0.02."""
    return Planted(params, lr, "fragile", lambda lr, weight: math.nan if lr > 0.02 else 2.5)


def unlucky(params, lr: float = 0.5) -> Planted:
    """Diverges where the seed's first weight is positive; the tuning seed's is not."""
    return Planted(params, lr, "unlucky", lambda lr, weight: math.nan if weight > 0 else 2.5)


class Closing(Planted):
    """Calls its closure twice with gradients and once without; scores 1 if that shows in the gradient."""

    @torch.no_grad()
    def step(self, closure) -> Tensor:
        weight, bias = self.param_groups[0]["params"]
        with torch.enable_grad():
            closure()
            closure()
        seen = weight.grad is not None and bool(weight.grad.any())
        value = closure()
        bias[0] = float(seen and not value.requires_grad)
        return value


def closing(params, lr: float = 0.5) -> Closing:
    return Closing(params, lr, "closing", lambda lr, weight: 0.0)


class Wrapping(torch.optim.Optimizer):
    """Wraps an optimizer over the parameters that it is given, and scores 3 if that has momentum."""

    def __init__(self, optimizer: torch.optim.Optimizer, lr: float = 0.5) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert isinstance(self.optimizer, torch.optim.SGD)
        self.param_groups[0]["params"][1][0] = 3.0 if self.optimizer.param_groups[0]["momentum"] == 0.9 else 0.0


wrapping = Wrapping
NOT_A_TASK = 3
