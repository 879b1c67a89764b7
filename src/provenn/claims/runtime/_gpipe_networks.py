"""The networks of GPipe's claim: a stack of mixer blocks, and stages of a fixed cost."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 8


class Embed(nn.Module):
    """Rows of an image as tokens, each mapped to the width of the stack."""

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(pixels // TOKENS, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, pixels) to (batch, tokens, width)."""
        tokens: Tensor = self.layer(x.unflatten(1, (TOKENS, -1)))
        return tokens


class MixerBlock(nn.Module):
    """A perceptron across tokens, then one across channels, each around a skip.

    Source: Tolstikhin et al., "MLP-Mixer", NeurIPS 2021.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_tokens, self.before_channels = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(TOKENS, 2 * TOKENS), nn.GELU(), nn.Linear(2 * TOKENS, TOKENS))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same."""
        x = x + self.tokens(self.before_tokens(x).mT).mT
        mixed: Tensor = x + self.channels(self.before_channels(x))
        return mixed


class Head(nn.Module):
    """The mean token's scores of the classes."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to (batch, classes)."""
        scores: Tensor = self.layer(x.mean(1))
        return scores


def mixer(blocks: int, width: int, pixels: int = 64, classes: int = 10) -> nn.Sequential:
    """Build a stack of mixer blocks between an embedding and a head: ``blocks + 2`` layers."""
    return nn.Sequential(Embed(pixels, width), *(MixerBlock(width) for _ in range(blocks)), Head(width, classes))


class _Cost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return gradient, None


class FixedCost(nn.Module):
    """A layer that takes a fixed time forward and as much backward, and needs no processor for it."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted input, after that time."""
        y: Tensor = _Cost.apply(x * self.weight, self.seconds)  # type: ignore[no-untyped-call]
        return y
