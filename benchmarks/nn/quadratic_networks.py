"""Quadratic layers beside the authors' formula with three of torch's layers, and beside the linear layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import alternate
from provenn.core.experiment.accounting import saved_bytes
from provenn.nn import QuadraticConv2d, QuadraticLinear


class Formula(nn.Module):
    """What the authors' residual blocks compute: r(x) · g(x) + b(x²), or compactly r(x) + b(x²)."""

    def __init__(self, make: Callable[[], nn.Module], compact: bool) -> None:
        super().__init__()
        self.r, self.b = make(), make()
        self.g = None if compact else make()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(x.pow(2))
        return y + (self.r(x) if self.g is None else self.r(x) * self.g(x))


def measure() -> dict[str, Any]:
    """Compare outputs and gradients with shared weights, then times by turns, then growth with the channels."""
    difference = max(_largest_difference(kind, compact) for kind in (_conv, _linear) for compact in (False, True))
    conv, linear = _times(_conv, 16, 15), _times(_linear, 256, 31)
    grown = {wide: _times(_conv, wide, 5)["ours"] for wide in (16, 64)}
    ours, formula = _pair(_conv, 16, False)
    x = _inputs(_conv, 16)
    return {
        "peer": "the authors' formula with torch's convolutions and linear layers, written anew "
        "(github.com/FengleiFan/ReLinear)",
        "agrees": difference <= 1e-10,
        "largest_difference": difference,
        "speed_ratio": conv["formula"] / conv["ours"],
        "speed_ratio_linear": linear["formula"] / linear["ours"],
        "time_over_linear_convolution": conv["ours"] / conv["plain"],
        "time_of_compact_over_linear_convolution": conv["compact"] / conv["plain"],
        "saved_memory_over_formula": saved_bytes(partial(ours, x)) / saved_bytes(partial(formula, x)),
        "growth": {"channels ×4, time ×": grown[64] / grown[16]},
    }


def _conv(wide: int) -> tuple[Callable[..., nn.Module], Callable[[], nn.Module], tuple[int, ...]]:
    return partial(QuadraticConv2d, wide, wide, 3, 1, 1), partial(nn.Conv2d, wide, wide, 3, 1, 1), (64, wide, 16, 16)


def _linear(wide: int) -> tuple[Callable[..., nn.Module], Callable[[], nn.Module], tuple[int, ...]]:
    return partial(QuadraticLinear, wide, wide), partial(nn.Linear, wide, wide), (256, wide)


def _inputs(kind: Callable[..., Any], wide: int, dtype: torch.dtype = torch.float32) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(kind(wide)[2], generator=draws, dtype=dtype).requires_grad_()


def _pair(
    kind: Callable[..., Any], wide: int, compact: bool, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Formula]:
    """Build our layer and the formula with the same weights, all at work."""
    make, plain, _ = kind(wide)
    ours, formula = make(compact=compact).to(dtype), Formula(plain, compact).to(dtype)
    with torch.no_grad():
        for name in ("r", "g", "b"):
            one, other = getattr(ours, name), getattr(formula, name)
            if one is not None:
                one.weight.copy_(other.weight)
                one.bias.copy_(other.bias - 1 if name == "g" else other.bias)
    return ours, formula


def _largest_difference(kind: Callable[..., Any], compact: bool) -> float:
    ours, formula = _pair(kind, 8, compact, torch.float64)
    x = _inputs(kind, 8, torch.float64)
    results = []
    for model in (ours, formula):
        output = model(x)
        parts = [getattr(model, name) for name in ("r", "g", "b") if getattr(model, name) is not None]
        weights = [parameter for part in parts for parameter in part.parameters()]
        results.append([output, *torch.autograd.grad(output.square().mean(), [x, *weights])])
    return max((one - other).abs().max().item() for one, other in zip(*results, strict=True))


def _times(kind: Callable[..., Any], wide: int, rounds: int) -> dict[str, float]:
    """Return medians of forward and backward, by turns."""
    ours, formula = _pair(kind, wide, False)
    models = {"ours": ours, "formula": formula, "compact": _pair(kind, wide, True)[0], "plain": kind(wide)[1]()}
    x = _inputs(kind, wide)
    return alternate({name: partial(_step, model, x) for name, model in models.items()}, rounds)


def _step(model: nn.Module, x: Tensor) -> None:
    torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
