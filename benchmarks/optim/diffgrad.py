"""DiffGrad's step against the peer package and torch's Adam, on 100 tensors of 1e5 elements."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytorch_optimizer
import torch

from benchmarks.timing import alternate
from provenn.optim import DiffGrad

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def measure() -> dict[str, Any]:
    """Compare trajectories over 50 steps, then times over steps that take turns."""
    makers: dict[str, Make] = {
        "DiffGrad": DiffGrad,
        "peer": lambda params: pytorch_optimizer.DiffGrad(params, weight_decouple=False),
        "Adam (foreach)": lambda params: torch.optim.Adam(params, foreach=True),
        "Adam": torch.optim.Adam,
    }
    # The peer adds ε before the bias correction and the paper after it, which shows where a gradient is near ε.
    difference = _largest_difference(
        lambda params: DiffGrad(params, eps=0.0),
        lambda params: pytorch_optimizer.DiffGrad(params, eps=0.0, weight_decouple=False),
    )
    times = alternate({name: _stepper(make, tensors=100, size=100_000) for name, make in makers.items()}, rounds=30)
    sizes = (10, 20, 40, 80)
    growth = alternate({str(count): _stepper(DiffGrad, tensors=count, size=100_000) for count in sizes}, rounds=15)
    return {
        "peer": f"pytorch_optimizer {version('pytorch_optimizer')}",
        "agrees": difference <= 1e-6,
        "largest_difference": difference,
        "speed_ratio": times["peer"] / times["DiffGrad"],
        "time_over_adam_foreach": times["DiffGrad"] / times["Adam (foreach)"],
        "time_over_adam": times["DiffGrad"] / times["Adam"],
        "state_tensors_per_parameter": _state_tensors(),
        "growth": {"parameters ×8, time ×": growth["80"] / growth["10"]},
    }


def _parameters(tensors: int, size: int, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    draws = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size, generator=draws, dtype=dtype)) for _ in range(tensors)]
    for param in params:
        param.grad = torch.randn(size, generator=draws, dtype=dtype)
    return params


def _stepper(make: Make, tensors: int, size: int) -> Callable[[], Any]:
    return make(_parameters(tensors, size)).step


def _largest_difference(first: Make, second: Make) -> float:
    lists = [_parameters(3, 1000, torch.float64) for _ in range(2)]
    optimizers = [make(params) for make, params in zip((first, second), lists, strict=True)]
    draws = torch.Generator().manual_seed(1)
    for _ in range(50):
        for pair in zip(*lists, strict=True):
            gradient = torch.randn(1000, generator=draws, dtype=torch.float64)
            for param in pair:
                param.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    return max((one - other).abs().max().item() for one, other in zip(*lists, strict=True))


def _state_tensors() -> int:
    params = _parameters(1, 1000)
    optimizer = DiffGrad(params)
    optimizer.step()
    return sum(value.numel() == 1000 for value in optimizer.state[params[0]].values())
