"""Multiplicative score matching against ordinary denoising score matching of log-data; growth of the sampler."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import alternate
from provenn.core.experiment.networks import mlp
from provenn.generative import AdditiveScoreBaseline, DaleLangevinSampler, GeometricBrownianSDE, MultiplicativeScoreLoss

WIDTH = 64


class _Score(nn.Module):
    """A perceptron of log x and time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp([WIDTH + 1, 256, WIDTH], nn.SiLU)

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.layers(torch.cat([y, t[:, None]], dim=1))
        return output


def measure() -> dict[str, Any]:
    """Compare loss and gradients with the ordinary ones, then time a training step and the sampler's growth."""
    torch.manual_seed(0)
    sde, model = GeometricBrownianSDE(sigma=(0.1, 2.0)), _Score()
    loss = MultiplicativeScoreLoss(sde)
    x, noise, t = torch.rand(512, WIDTH) + 0.5, torch.randn(512, WIDTH), 0.01 + 0.99 * torch.rand(512)

    def ours() -> list[Tensor]:
        value = loss(model(sde.marginal(x, t, noise).log(), t), noise, t)
        return [value, *torch.autograd.grad(value, list(model.parameters()))]

    def ordinary() -> list[Tensor]:
        # σ = 0.1 · 20^t on log x, whose score is 1 + s; its variance in closed form.
        rate = math.log(20)
        level = (0.01 * (torch.exp(2 * rate * t) - 1) / (2 * rate)).sqrt()[:, None]
        score = 1 + model(x.log() + level * noise, t)
        value = (level * score + noise).square().sum(1).mean()
        return [value, *torch.autograd.grad(value, list(model.parameters()))]

    pairs = list(zip(ours(), ordinary(), strict=True))
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    times = alternate({"ours": ours, "ordinary": ordinary}, rounds=30)
    growth = _growth(model, sde)
    return {
        "peer": "ordinary denoising score matching of log-data, with the score 1 + s",
        "agrees": difference <= 1e-4,
        "largest_difference": difference,
        "speed_ratio": times["ordinary"] / times["ours"],
        "growth": growth,
    }


def _growth(model: nn.Module, sde: GeometricBrownianSDE) -> dict[str, float]:
    """Time the sampler for four times the steps and four times the samples, and against the additive one."""
    baseline = AdditiveScoreBaseline(model)

    def sample(steps: int, count: int) -> Tensor:
        return DaleLangevinSampler(model, sde, (WIDTH,), steps).sample(count)

    times = alternate(
        {
            "few": lambda: sample(25, 256),
            "steps": lambda: sample(100, 256),
            "samples": lambda: sample(25, 1024),
            "additive": lambda: baseline.sample(model, (256, WIDTH), steps=25),
        },
        rounds=9,
    )
    return {
        "steps ×4, time ×": times["steps"] / times["few"],
        "samples ×4, time ×": times["samples"] / times["few"],
        "sampling against the additive baseline's, time ×": times["few"] / times["additive"],
    }
