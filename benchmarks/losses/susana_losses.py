"""The ICNN and proto-triplet losses beside the authors' formulas, written anew, and how their time grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import alternate
from provenn.losses import ICNNLoss, ProtoTripletLoss, icnn_score

WAY, SHOT, QUERIES, DIM = 20, 5, 15, 64
TINY = 1e-7


def measure() -> dict[str, Any]:
    """Compare values and gradients, then time a loss with its gradient, by turns."""
    cases = {f"score, {n} embeddings": _score_difference(n, k) for n, k in ((12, 4), (60, 4), (300, 8))}
    cases["score, gradient"] = _gradient_difference()
    cases["triplet"] = _triplet_difference()
    x, y = _embeddings(WAY * (SHOT + QUERIES))
    times = alternate(
        {"ours": _backward(lambda z: ICNNLoss()(z, y), x), "peer": _backward(lambda z: -peer_score(z, y, 4).log(), x)},
        rounds=21,
    )
    prototypes = _embeddings(WAY)[0]
    triplets = alternate(
        {
            "ours": _backward(lambda z: ProtoTripletLoss()(z, y, prototypes), x),
            "peer": _backward(lambda z: peer_triplet(z, y, prototypes), x),
        },
        rounds=21,
    )
    grown = alternate({str(n): _step(n) for n in (200, 400)}, rounds=15)
    return {
        "peer": "the authors' algorithms/icnn_loss.py, written anew; pytorch-metric-learning is not installed here, so "
        "the triplet is held against torch's triplet margin loss of the hardest prototype",
        "agrees": max(cases.values()) <= 1e-5,
        "largest_difference": max(cases.values()),
        "differences": cases,
        "speed_ratio": times["peer"] / times["ours"],
        "speed_ratio_triplet": triplets["peer"] / triplets["ours"],
        "growth": {"embeddings ×2, time ×": grown["400"] / grown["200"]},
    }


def peer_score(x: Tensor, y: Tensor, k: int) -> Tensor:
    """Return the authors' score of a set with itself, with their additions of 10⁻⁷ to divisors."""
    n = len(x)
    far = ((x[:, None].expand(n, n, -1) - x[None].expand(n, n, -1)) ** 2).sum(2)
    near, index = (far + 1e-6).sqrt().topk(k + 2, largest=False)
    near, same = near[:, 1:], (y[index[:, 1:]] == y[:, None]).to(x.dtype)
    rival = torch.where(same == 1, torch.inf, near).min(1).values
    ratio = (near / (rival[:, None] + TINY))[:, :k]
    ratio = ratio / ratio.max(1, keepdim=True).values.clamp_min(1)
    same, near = same[:, :k], near[:, :k]
    own = (ratio * same).sum(1) / (same.sum(1) + TINY)
    compact = 1 - own.sum() / (torch.count_nonzero(same.sum(1)) + TINY)
    apart = near * (1 - same)
    apart = apart / (apart.max() + TINY)
    spread = (apart.sum(1) / ((1 - same).sum(1) + TINY)).sum() / (torch.count_nonzero((1 - same).sum(1)) + TINY)
    return ((compact + spread) / 2 + same.mean()) / 2


def peer_triplet(queries: Tensor, labels: Tensor, prototypes: Tensor) -> Tensor:
    """Return torch's triplet margin loss with the nearest prototype of another class as the negative."""
    to_all = torch.cdist(queries, prototypes)
    to_all = to_all.masked_fill(nn.functional.one_hot(labels, len(prototypes)).bool(), torch.inf)
    hardest = prototypes[to_all.argmin(1)]
    return nn.functional.triplet_margin_loss(queries, prototypes[labels], hardest, margin=0.5, eps=0.0)


def _embeddings(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(count)
    y = torch.arange(count) % WAY
    centres = torch.randn(WAY, DIM, generator=draws, dtype=dtype)
    return centres[y] + torch.randn(count, DIM, generator=draws, dtype=dtype), y


def _score_difference(count: int, k: int) -> float:
    x, y = _embeddings(count, torch.float64)
    y = y % 3 if count == 12 else y
    return abs((icnn_score(x, y, k=k) - peer_score(x, y, k)).item())


def _gradient_difference() -> float:
    x, y = _embeddings(60, torch.float64)
    slopes = []
    for score in (lambda z: icnn_score(z, y), lambda z: peer_score(z, y, 4)):
        z = x.clone().requires_grad_()
        slopes.append(torch.autograd.grad(score(z), z)[0])
    return float(((slopes[0] - slopes[1]).norm() / slopes[1].norm()).item())


def _triplet_difference() -> float:
    x, y = _embeddings(100, torch.float64)
    prototypes = _embeddings(WAY, torch.float64)[0]
    return abs((ProtoTripletLoss()(x, y, prototypes) - peer_triplet(x, y, prototypes)).item())


def _backward(loss: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    def step() -> None:
        loss(x.clone().requires_grad_()).backward()

    return step


def _step(count: int) -> Callable[[], None]:
    x, y = _embeddings(count)
    return _backward(lambda z: ICNNLoss()(z, y), x)
