"""A tiny task of layers, and layers whose effect on its network is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from provenn.compare.layer_task import LayerTask
from provenn.compare.task import LogUniform, Split


def data() -> Split:
    x = torch.arange(1.0, 13.0)[:, None]
    return Split(x, 2 * x, x, 2 * x + 100, x, 2 * x)


class Layer(nn.Module):
    """Width × 3 trained numbers, and one that is not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, 3))
        self.fixed = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.mean()


class Bounded(Layer):
    """Holds its numbers at 1.5 or less, by projection after every step."""

    def project_(self) -> None:
        with torch.no_grad():
            self.weight.clamp_(max=1.5)


class Wide(Layer):
    """Width × (width + 3) trained numbers."""

    def __init__(self, width: int) -> None:
        super().__init__(1)
        self.weight = nn.Parameter(torch.ones(width, width + 3))


class Paired(Layer):
    """Takes even widths alone, and says so when it is built or when it runs."""

    def __init__(self, width: int, late: bool = False) -> None:
        super().__init__(width)
        self.odd = width % 2 == 1
        if self.odd and not late:
            raise ValueError("width must be even")

    def forward(self, x: Tensor) -> Tensor:
        if self.odd:
            raise RuntimeError("an odd width has no pairs")
        return super().forward(x)


def late(width: int) -> Paired:
    return Paired(width, late=True)


class Huge(Layer):
    """Too many numbers at every width."""

    def __init__(self, width: int) -> None:
        super().__init__(1)
        self.weight = nn.Parameter(torch.ones(1000 * width))


class Counting(Layer):
    """Notes whether each of its calls was in training mode."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.calls: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(self.training)
        return super().forward(x)


class Fades(Layer):
    """Works once, and no second time."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.grad is not None or not torch.equal(self.weight, torch.ones_like(self.weight)):
            raise RuntimeError("planted fault")
        return super().forward(x)


class Refuses(nn.Module):
    def __init__(self, width: int) -> None:
        raise ValueError("width must be planted\nand more")


def build(part, width: int) -> nn.Module:
    return part(width)


def squared(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return squared(model, x, y).item()


TASK = LayerTask(
    "planted-layers",
    "planted",
    {"nn": {"lr": LogUniform(0.01, 0.1)}},
    build,
    data,
    epochs=2,
    batch_size=4,
    parameters=100,
    loss=squared,
    measure=error,
    metric="error",
    maximize=False,
    references={"planted": Layer},
    place="planted ones",
)
