"""LANTON's step against torch's Muon and AdamW, on the matrices of eight transformer blocks of width 256."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import alternate
from provenn.core.experiment.accounting import TensorMemory
from provenn.optim import LANTON

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
WIDTH = 256
SIDES = ((1, 1), (1, 1), (1, 1), (1, 1), (4, 1), (1, 4))
"""Queries, keys, values, output, and the perceptron's two maps, in units of the width."""


def _lanton(**options: Any) -> Make:
    return lambda params: LANTON([{"params": params, "norm": "spectral"}], **options)


def measure() -> dict[str, Any]:
    """Compare directions over 10 steps, then times over steps that take turns, then state and memory."""
    makers: dict[str, Make] = {
        "LANTON": _lanton(),
        "fixed rate": _lanton(noise_adaptive=False),
        "Muon": torch.optim.Muon,
        "AdamW (foreach)": lambda params: torch.optim.AdamW(params, foreach=True),
    }
    times = alternate({name: make(_parameters(8)).step for name, make in makers.items()}, rounds=7)
    # Many small matrices are where stacks pay: a loop's calls cost as much as its products.
    small = {name: make(_parameters(16, width=32)).step for name, make in makers.items()}
    small_times = alternate(small, rounds=31)
    sizes = {str(count): _lanton()(_parameters(count)).step for count in (1, 2, 4, 8)}
    growth = alternate(sizes, rounds=7)
    difference = _largest_angle()
    return {
        "peer": f"torch.optim.Muon {torch.__version__}",
        "agrees": difference <= 1e-2,
        "largest_difference": difference,
        "difference_is": "1 − cosine of steps on 10 gradients, or the relative error of their lengths",
        "precision": "Muon multiplies in bfloat16, LANTON in float32; processors with bfloat16 products favour Muon",
        "speed_ratio": times["Muon"] / times["fixed rate"],
        "speed_ratio_with_noise": times["Muon"] / times["LANTON"],
        "speed_ratio_small_matrices": small_times["Muon"] / small_times["fixed rate"],
        "speed_ratio_small_matrices_with_noise": small_times["Muon"] / small_times["LANTON"],
        "time_over_adamw_foreach": times["LANTON"] / times["AdamW (foreach)"],
        "noise_over_fixed_rate": times["LANTON"] / times["fixed rate"],
        "state_numbers_per_parameter": {name: _state_numbers(make) for name, make in makers.items()},
        "bytes_of_a_step_per_parameter": {name: _step_bytes(make) for name, make in makers.items()},
        "growth": {"blocks ×8, time ×": growth["8"] / growth["1"]},
    }


def _parameters(blocks: int, width: int = WIDTH) -> list[torch.nn.Parameter]:
    draws = torch.Generator().manual_seed(0)
    params = []
    for _ in range(blocks):
        for rows, columns in SIDES:
            param = torch.nn.Parameter(torch.randn(rows * width, columns * width, generator=draws))
            param.grad = torch.randn(param.shape, generator=draws)
            params.append(param)
    return params


def _largest_angle() -> float:
    """Return the largest disagreement of steps, Muon's factor √max(1, D_out/D_in) brought to √(D_out/D_in)."""
    lists = [_parameters(1, width=48) for _ in range(2)]
    ours = LANTON([{"params": lists[0], "norm": "spectral"}], lr=0.1, betas=(0.9, 0.9), noise_adaptive=False)
    muon = torch.optim.Muon(lists[1], lr=0.1, momentum=0.9, nesterov=False)
    draws = torch.Generator().manual_seed(1)
    worst = 0.0
    for _ in range(10):
        for one, other in zip(*lists, strict=True):
            one.data.zero_()
            other.data.zero_()
            one.grad = torch.randn(one.shape, generator=draws)
            other.grad = one.grad.clone()
        ours.step()
        muon.step()
        for one, other in zip(*lists, strict=True):
            aspect = one.shape[0] / one.shape[1]
            length = one.norm() * math.sqrt(max(1, aspect) / aspect) / other.norm()
            cosine = torch.cosine_similarity(one.detach().flatten(), other.detach().flatten(), dim=0)
            worst = max(worst, 1 - cosine.item(), abs(length.item() - 1))
    return worst


def _state_numbers(make: Make) -> float:
    params = _parameters(1, width=16)
    optimizer = make(params)
    optimizer.step()
    held = sum(value.numel() for state in optimizer.state.values() for value in state.values())
    each: float = held / sum(param.numel() for param in params)
    return each


def _step_bytes(make: Make) -> float:
    """Return the most bytes that a step holds beside parameters, gradients and state."""
    params = _parameters(4, width=64)
    optimizer = make(params)
    for _ in range(2):
        optimizer.step()
    with TensorMemory() as memory:
        optimizer.step()
    bytes_each: float = memory.peak / sum(param.numel() for param in params)
    return bytes_each
