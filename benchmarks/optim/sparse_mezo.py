"""SparseMeZO beside MeZO's loop, written anew from its algorithm, and beside SGD: trajectories, times, peak memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import alternate
from provenn.core.experiment.accounting import TensorMemory
from provenn.core.experiment.seeding import derive_seed, generator, seeded
from provenn.optim import SparseMeZO, ZerothOrder

WIDTH, LAYERS, BATCH = 512, 100, 8
LR, EPS = 1e-6, 1e-3

Loss = Callable[[], Tensor]
Step = Callable[[], Any]
Noise = Callable[[], Sequence[Tensor]]


def measure() -> dict[str, Any]:
    """Compare dense and sparse trajectories over 30 steps, then times by turns, then bytes at the peak of a step."""
    differences = {str(sparsity): _largest_difference(sparsity) for sparsity in (0.0, 0.75)}
    methods: dict[str, Callable[[nn.Sequential, Loss], Step]] = {
        "recompute": lambda model, loss: partial(SparseMeZO.for_model(model, lr=LR).step, loss),
        "stored": lambda model, loss: partial(SparseMeZO.for_model(model, lr=LR, mask="stored").step, loss),
        "static": lambda model, loss: partial(SparseMeZO.for_model(model, lr=LR, mask="static").step, loss),
        "MeZO (ours)": lambda model, loss: partial(ZerothOrder(model.parameters(), LR).step, loss),
        "peer": _peer,
        "SGD": _first_order,
    }
    times = alternate({name: _built(make) for name, make in methods.items()}, rounds=5)
    growth = alternate({str(layers): _built(methods["recompute"], layers=layers) for layers in (10, 80)}, rounds=5)
    ahead = _peak(lambda model, loss: torch.no_grad()(loss))
    return {
        "peer": "MeZO's algorithm, dense and with masks as the paper describes them, written anew in torch with "
        "whole-tensor draws and whole masks; its repository needs transformers, which is not installed here",
        "agrees": max(differences.values()) <= 1e-9,
        "largest_difference": max(differences.values()),
        "largest_difference_by_sparsity": differences,
        "speed_ratio": times["peer"] / times["recompute"],
        "step_time_over_sgd": {name: times[name] / times["SGD"] for name in ("recompute", "stored", "MeZO (ours)")},
        "step_time_over_mezo": {name: times[name] / times["MeZO (ours)"] for name in ("recompute", "stored", "static")},
        "peak_bytes_over_forward_pass": {name: _peak(make) / ahead for name, make in methods.items()},
        "growth": {"layers ×8, time ×": growth["80"] / growth["10"]},
    }


def _network(width: int = WIDTH, layers: int = LAYERS) -> nn.Sequential:
    with seeded("sparse benchmark"):
        return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)))


def _loss(model: nn.Sequential) -> Loss:
    x = torch.randn(BATCH, next(model.parameters()).shape[1], generator=generator("sparse benchmark, batch"))
    return lambda: model(x).square().mean()


def _built(make: Callable[[nn.Sequential, Loss], Step], layers: int = 16) -> Step:
    model = _network(layers=layers)
    return make(model, _loss(model))


def _first_order(model: nn.Sequential, loss: Loss) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), LR)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def _peer(model: nn.Sequential, loss: Loss) -> Step:
    params = [one.data for one in model.parameters()]
    thresholds = _thresholds(params, 0.75)

    def noise() -> list[Tensor]:
        draws = torch.Generator().manual_seed(0)
        return [torch.randn(one.shape, generator=draws) for one in params]

    return torch.no_grad()(partial(masked_step, params, thresholds, loss, noise, LR))


def _thresholds(params: Sequence[Tensor], sparsity: float) -> list[float]:
    """Return the kept share's largest magnitude of each matrix, by sorting; infinity for what has no mask."""
    found = []
    for one in params:
        magnitudes = one.abs().flatten().sort().values
        kept = round((1 - sparsity) * len(magnitudes))
        whole = one.ndim < 2 or one.numel() < 128 or kept == len(magnitudes)
        found.append(float("inf") if whole else float(magnitudes[kept - 1]))
    return found


def masked_step(params: Sequence[Tensor], thresholds: Sequence[float], loss: Loss, noise: Noise, lr: float) -> None:
    """Take one step of MeZO along a direction masked by the magnitudes at the step's start.

    Args:
        params: Changed in place.
        thresholds: One a tensor.
        loss: Evaluates the loss without gradients.
        noise: Draws the direction anew.
        lr: Step size.
    """
    masks = [one.abs() <= threshold for one, threshold in zip(params, thresholds, strict=True)]

    def move(scale: float) -> None:
        for one, mask, z in zip(params, masks, noise(), strict=True):
            one.add_(scale * (mask * z))

    move(EPS)
    ahead = loss()
    move(-2 * EPS)
    slope = float((ahead - loss()) / (2 * EPS))
    move(EPS)
    move(-lr * slope)


def _largest_difference(sparsity: float) -> float:
    """Return the largest difference of parameters between ours and the peer's loop, fed the same directions."""
    ours, theirs = (_network(32, 3).double() for _ in range(2))
    optimizer = SparseMeZO.for_model(ours, lr=1e-2, eps=EPS, sparsity=sparsity)
    x = torch.randn(8, 32, generator=generator("agreement"), dtype=torch.float64)
    params = [one.data for one in theirs.parameters()]
    thresholds = _thresholds(params, sparsity)
    with torch.no_grad():
        for _ in range(30):
            redrawn = partial(_redrawn, params, optimizer.draw_seed(0, 0))
            masked_step(params, thresholds, lambda: theirs(x).square().mean(), redrawn, 1e-2)
            optimizer.step(lambda: ours(x).square().mean())
    pairs = zip(ours.parameters(), params, strict=True)
    return max(float((one.detach() - other).abs().max()) for one, other in pairs)


def _redrawn(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Return a direction as ``SeededDirection`` documents it: a generator a tensor, seeded by seed and index."""
    return [
        torch.empty_like(one).normal_(generator=torch.Generator().manual_seed(derive_seed(seed, index)))
        for index, one in enumerate(params)
    ]


def _peak(make: Callable[[nn.Sequential, Loss], Step]) -> int:
    """Return the bytes at the peak of two steps of a fresh optimizer, weights included, on 100 layers of 1 MiB."""
    model = _network()
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    step = make(model, _loss(model))
    with TensorMemory() as memory:
        for _ in range(2):
            step()
    peak: int = weights + memory.peak
    return peak
