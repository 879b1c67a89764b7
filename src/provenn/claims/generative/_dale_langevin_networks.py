"""The networks of Dale–Langevin's claim: the same bodies for multiplicative and additive noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from provenn.core.experiment.networks import mlp


class ScoreNetwork(nn.Module):
    """A body that predicts the noise, made a score: ``offset − body(scaled x, log level) / level``.

    Args:
        body: ``body(x, log_level)`` → the shape of x.
        level: The noise's standard deviation at times.
        center: Subtracted from the input.
        spread: The data's standard deviation, for an input of unit variance.
        offset: −1 for x ∘ ∇log p, 0 for ∇log p.
    """

    center: Tensor

    def __init__(
        self, body: nn.Module, level: Callable[[Tensor], Tensor], center: Tensor, spread: float, offset: float
    ) -> None:
        super().__init__()
        self.body, self.level, self.spread, self.offset = body, level, spread, offset
        self.register_buffer("center", center)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = self.level(t).to(x).view(-1, *[1] * (x.dim() - 1))
        scaled = (x - self.center) / (self.spread**2 + level.square()).sqrt()
        score: Tensor = self.offset - self.body(scaled, level.flatten().log()) / level
        return score


class PlaneBody(nn.Module):
    """A perceptron of three hidden layers for points of the plane."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = mlp([3, width, width, width, 2], nn.SiLU)

    def forward(self, x: Tensor, log_level: Tensor) -> Tensor:
        output: Tensor = self.layers(torch.cat([x, log_level[:, None] / 4], dim=1))
        return output


class ImageBody(nn.Module):
    """Residual convolutions that keep the image's size, with a scale and a shift a channel from the noise level."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.level = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, 2 * width * blocks))
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.into = nn.ModuleList(nn.Conv2d(width, width, 3, padding=2**k, dilation=2**k) for k in range(blocks))
        self.out_of = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, log_level: Tensor) -> Tensor:
        scales = self.level(log_level[:, None] / 4).chunk(2 * len(self.into), dim=1)
        h = self.first(x)
        for k, (into, out_of) in enumerate(zip(self.into, self.out_of, strict=True)):
            scale, shift = scales[2 * k][:, :, None, None], scales[2 * k + 1][:, :, None, None]
            h = h + out_of(nn.functional.silu(into(h) * (1 + scale) + shift))
        output: Tensor = self.last(nn.functional.silu(h))
        return output
