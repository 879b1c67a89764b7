"""GradientNoise's variance beside optax's formula, and what a step costs over the wrapped optimizer's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.timing import alternate, peak_memory
from provenn.optim import GradientNoise, noise_std

TENSORS, SIZE = 100, 100_000
ETA, GAMMA = 0.3, 0.55

Step = Callable[[], Any]
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def measure() -> dict[str, Any]:
    """Compare standard deviations for 1 001 steps, then time steps that take turns."""
    difference = _largest_difference()
    sgd = partial(torch.optim.SGD, lr=1e-3)
    adam = partial(torch.optim.Adam, lr=1e-3)
    large = alternate(
        {
            "SGD": _step(sgd, TENSORS, SIZE),
            "GradientNoise(SGD)": _step(lambda params: GradientNoise(sgd(params)), TENSORS, SIZE),
            "SGD, loop of draws": _looped(sgd, TENSORS, SIZE),
            "Adam": _step(adam, TENSORS, SIZE),
            "GradientNoise(Adam)": _step(lambda params: GradientNoise(adam(params)), TENSORS, SIZE),
        },
        rounds=15,
    )
    # The deep network of the paper has 42 parameters, of 1 300 elements on average.
    small = alternate(
        {
            "SGD": _step(sgd, 42, 1300),
            "GradientNoise(SGD)": _step(lambda params: GradientNoise(sgd(params)), 42, 1300),
            "clipped": _step(lambda params: GradientNoise(sgd(params), clip_norm=10.0), 42, 1300),
            "loop of draws": _looped(sgd, 42, 1300),
        },
        rounds=201,
    )
    growth = alternate(
        {str(count): _step(lambda params: GradientNoise(sgd(params)), count, SIZE) for count in (10, 80)}, rounds=15
    )
    return {
        "peer": "the formula of optax.add_noise (JAX, not installed here), written anew in NumPy; "
        "time: one draw a parameter in a Python loop before SGD",
        "agrees": difference <= 1e-12,
        "largest_difference": difference,
        "speed_ratio": large["SGD, loop of draws"] / large["GradientNoise(SGD)"],
        "speed_ratio_small_parameters": small["loop of draws"] / small["GradientNoise(SGD)"],
        "step_time_over_inner": {
            "SGD": large["GradientNoise(SGD)"] / large["SGD"],
            "Adam": large["GradientNoise(Adam)"] / large["Adam"],
            "SGD, small parameters": small["GradientNoise(SGD)"] / small["SGD"],
            "SGD, small parameters, clipped": small["clipped"] / small["SGD"],
        },
        "bytes_per_parameter": {"state": _state_bytes() / SIZE, "peak of a step": _peak_bytes_per_parameter()},
        "growth": {"parameters ×8, time ×": growth["80"] / growth["10"]},
    }


def _largest_difference() -> float:
    """Return the largest relative error of the deviation over steps 0 to 1 000 and the η that the paper tries."""
    steps = np.arange(1001)
    found = 0.0
    for eta in (0.01, ETA, 1.0):
        formula = np.sqrt(eta / np.power(steps + 1.0, GAMMA))
        ours = np.array([noise_std(step, eta, GAMMA) for step in steps.tolist()])
        found = max(found, float(np.abs(ours / formula - 1).max()))
    return found


def _parameters(tensors: int, size: int) -> list[torch.nn.Parameter]:
    draws = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size, generator=draws)) for _ in range(tensors)]
    for param in params:
        param.grad = torch.randn(size, generator=draws)
    return params


def _step(make: Make, tensors: int, size: int) -> Step:
    return make(_parameters(tensors, size)).step


def _looped(make: Make, tensors: int, size: int) -> Step:
    params = _parameters(tensors, size)
    optimizer = make(params)

    def step() -> None:
        for param in params:
            if param.grad is not None:
                param.grad.add_(torch.randn_like(param), alpha=math.sqrt(ETA))
        optimizer.step()

    return step


def _peak_bytes_per_parameter() -> float:
    """Return by how much the noise's peak memory grows with the parameters; what the first step loads cancels."""
    few, many = (_peak_of_noise(tensors) for tensors in (TENSORS, 4 * TENSORS))
    return max(0, many - few) / (3 * TENSORS * SIZE)


def _peak_of_noise(tensors: int) -> int:
    plain, noisy = (peak_memory(partial(_steps, tensors, noise)) for noise in (False, True))
    return noisy - plain


def _steps(tensors: int, noise: bool) -> None:
    optimizer: torch.optim.Optimizer = torch.optim.SGD(_parameters(tensors, SIZE), lr=1e-3)
    if noise:
        optimizer = GradientNoise(optimizer)
    for _ in range(3):
        optimizer.step()


def _state_bytes() -> int:
    params = _parameters(1, SIZE)
    optimizer = GradientNoise(torch.optim.SGD(params, lr=1e-3))
    optimizer.step()
    state = optimizer.state_dict()["state"].values()
    return sum(value.numel() * value.element_size() for kept in state for value in kept.values() if value is not None)
