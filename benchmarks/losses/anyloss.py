"""AnyLoss's values and time per step against the authors' formulas, and its time against cross entropy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import alternate
from provenn.losses import AnyLoss

SLOPE = 73.0


def _label(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-SLOPE * (torch.sigmoid(z) - 0.5)))


def _sums(z: Tensor, y: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
    """Return n, Σy, Σŷ and Σyŷ, of which the authors make every loss."""
    soft = _label(z)
    return len(y), y.sum(), soft.sum(), (y * soft).sum()


def _accuracy(z: Tensor, y: Tensor) -> Tensor:
    n, sy, syh, syhy = _sums(z, y)
    return 1 - (n - sy - syh + 2 * syhy) / n


def _fbeta(beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        _, sy, syh, syhy = _sums(z, y)
        return 1 - (1 + beta**2) * syhy / (beta**2 * sy + syh)

    return loss


def _gmean(z: Tensor, y: Tensor) -> Tensor:
    n, sy, syh, syhy = _sums(z, y)
    return 1 - (syhy * (n - syh - sy + syhy) / (sy * (n - sy))).sqrt()


def _balanced_accuracy(z: Tensor, y: Tensor) -> Tensor:
    n, sy, syh, syhy = _sums(z, y)
    return 1 - (n * (syhy + sy) - sy * (syh + sy)) / (2 * sy * (n - sy))


def _precision(z: Tensor, y: Tensor) -> Tensor:
    _, _, syh, syhy = _sums(z, y)
    return 1 - syhy / syh


def _recall(z: Tensor, y: Tensor) -> Tensor:
    _, sy, _, syhy = _sums(z, y)
    return 1 - syhy / sy


FORMULAS: dict[str, tuple[AnyLoss, Callable[[Tensor, Tensor], Tensor]]] = {
    "accuracy": (AnyLoss("accuracy"), _accuracy),
    "f1": (AnyLoss("f1"), _fbeta(1.0)),
    "f2": (AnyLoss("fbeta", beta=2.0), _fbeta(2.0)),
    "gmean": (AnyLoss("gmean"), _gmean),
    "balanced_accuracy": (AnyLoss("balanced_accuracy"), _balanced_accuracy),
    "precision": (AnyLoss("precision"), _precision),
    "recall": (AnyLoss("recall"), _recall),
}


def measure() -> dict[str, Any]:
    """Compare values and gradients on several batches, then times of a step: loss and gradient by the logits."""
    warnings.filterwarnings("ignore", "slope 73")
    values, gradients = _largest_differences()
    small = alternate({name: _step(loss, 1000) for name, loss in _losses().items()}, rounds=60)
    large = alternate({name: _step(loss, 1_000_000) for name, loss in _losses().items()}, rounds=9)
    growth = alternate({str(n): _step(AnyLoss("f1"), n) for n in (10_000, 80_000, 640_000)}, rounds=15)
    return {
        "peer": "the authors' formulas, written anew in float64 (github.com/doheonhan/anyloss)",
        "agrees": values <= 1e-6,
        "largest_difference": values,
        "largest_difference_of_gradients": gradients,
        "speed_ratio": small["formula"] / small["AnyLoss"],
        "speed_ratio_at_1e6_samples": large["formula"] / large["AnyLoss"],
        "time_over_cross_entropy": small["AnyLoss"] / small["BCE"],
        "time_over_cross_entropy_at_1e6_samples": large["AnyLoss"] / large["BCE"],
        "growth": {
            "samples ×8 (1e4 to 8e4), time ×": growth["80000"] / growth["10000"],
            "samples ×8 (8e4 to 6.4e5), time ×": growth["640000"] / growth["80000"],
        },
    }


def _losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {"AnyLoss": AnyLoss("f1"), "formula": _fbeta(1.0), "BCE": torch.nn.BCEWithLogitsLoss()}


def _batch(size: int, seed: int, scale: float) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(size, generator=draws, dtype=torch.float64)
    y = (torch.rand(size, generator=draws) < 0.2).double()
    y[0], y[1] = 1, 0
    return z.requires_grad_(), y


def _step(loss: Callable[[Tensor, Tensor], Tensor], size: int) -> Callable[[], Any]:
    z, y = _batch(size, seed=0, scale=1.0)
    return lambda: torch.autograd.grad(loss(z, y), z)


def _largest_differences() -> tuple[float, float]:
    values, gradients = [0.0], [0.0]
    for seed in range(20):
        z, y = _batch(200, seed, scale=0.05 * 1.4**seed)
        for ours, theirs in FORMULAS.values():
            pair = ours(z, y), theirs(z, y)
            first, second = (torch.autograd.grad(one, z)[0] for one in pair)
            values.append(abs(pair[0].item() - pair[1].item()))
            gradients.append((first - second).abs().max().item())
    return max(values), max(gradients)
