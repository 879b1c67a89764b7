"""Equiangular basis vectors: the search against the authors' algorithm, the heads against a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import alternate
from provenn.nn import CosineHead, EBVHead, EBVLoss, equiangular_basis

CLASSES, DIM, ALPHA, LR = 200, 200, 0.002, 1e-3


def _authors_search(V: Tensor, alpha: float, steps: int, slice_size: int = 130) -> tuple[Tensor, int]:
    """Follow the authors' generator as described: autograd over row slices, a step of SGD, rows scaled in place."""
    free = nn.Parameter(V.clone())
    optimizer = torch.optim.SGD([free], lr=LR)
    taken = 0
    while True:
        with torch.no_grad():
            free.copy_(F.normalize(free))
        worst = alpha
        optimizer.zero_grad()
        for start in range(0, len(V), slice_size):
            rows = torch.arange(start, min(start + slice_size, len(V)))
            excess = (free[rows] @ free.T).abs() - F.one_hot(rows, len(V))
            worst = max(worst, excess.max().item())
            F.relu(excess - alpha).sum().backward()
        if worst <= alpha + 1e-4 or taken == steps:
            return free.detach(), taken
        optimizer.step()
        taken += 1


def measure() -> dict[str, Any]:
    """Compare steps and vectors of the two searches, then times: a search, the heads, and growth with N."""
    start = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, report = equiangular_basis(CLASSES, DIM, ALPHA, initial=start)
    theirs, steps = _authors_search(start, ALPHA, 2000)
    difference = (ours - theirs).abs().max().item()
    cosine = _cosine_difference()
    single = start.float()
    search = alternate(
        {
            "provenn": lambda: equiangular_basis(CLASSES, DIM, ALPHA, steps=20, initial=single),
            "authors": lambda: _authors_search(single, ALPHA, 20),
        },
        rounds=15,
    )
    heads = alternate({name: _step(head) for name, head in _heads().items()}, rounds=40)
    growth = alternate(
        {str(n): (lambda n=n: equiangular_basis(n, 64, 0.1, steps=3)) for n in (256, 512, 1024)}, rounds=9
    )
    return {
        "peer": "the authors' generator, written anew with autograd and SGD; pytorch-metric-learning's formula of "
        "NormalizedSoftmaxLoss for the cosine head",
        "agrees": difference < 1e-9 and report.steps == steps and cosine < 1e-12,
        "largest_difference": difference,
        "largest_difference_of_cosine_logits": cosine,
        "steps_to_0.002": report.steps,
        "largest_cosine": report.max_cosine,
        "speed_ratio": search["authors"] / search["provenn"],
        "step_over_linear": {name: heads[name] / heads["linear"] for name in heads if name != "linear"},
        "growth": {
            "classes ×2 (256 to 512), time ×": growth["512"] / growth["256"],
            "classes ×2 (512 to 1024), time ×": growth["1024"] / growth["512"],
        },
    }


def _cosine_difference() -> float:
    """Normalised weights and inputs, their products over the temperature: what the peer's loss takes the softmax of."""
    head = CosineHead(16, 10, tau=0.05).double()
    x = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    W = head.weight / head.weight.square().sum(1, keepdim=True).sqrt()
    theirs = (x / x.square().sum(1, keepdim=True).sqrt()) @ W.T / 0.05
    return (head(x) - theirs).abs().max().item()


def _heads() -> dict[str, nn.Module]:
    return {
        "linear": nn.Linear(512, 1000),
        "cosine": CosineHead(512, 1000),
        "EBV, d = 250": EBVHead(512, 1000, 250, basis=F.normalize(torch.randn(1000, 250))),
        "EBV, d = 1000": EBVHead(512, 1000, 1000, basis=torch.eye(1000)),
    }


def _step(head: nn.Module) -> Callable[[], Any]:
    x = torch.randn(128, 512, generator=torch.Generator().manual_seed(0))
    y = torch.arange(128) * 7 % 1000
    parameters = list(head.parameters())
    if isinstance(head, EBVHead):
        loss = EBVLoss()
        return lambda: torch.autograd.grad(loss(head.embed(x), y, head.basis), parameters)
    return lambda: torch.autograd.grad(F.cross_entropy(head(x), y), parameters)
