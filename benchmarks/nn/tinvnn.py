"""Invariant coordinates beside scikit-learn's classical scaling and principal components."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from sklearn.decomposition import PCA
from sklearn.manifold import ClassicalMDS
from torch import Tensor

from benchmarks.timing import alternate
from provenn.nn import InvariantMDS, PointNetBackbone, TinvWrapper


def measure() -> dict[str, Any]:
    """Compare coordinates up to signs, then times of a batch of clouds, and growth with the number of points."""
    clouds = _clouds(32, 128)
    agreement = {
        "gram": _largest(InvariantMDS(scale=False, method="gram")(clouds), _scaled(clouds)),
        "covariance": _largest(InvariantMDS(scale=False, method="covariance")(clouds), _components(clouds)),
    }
    single = clouds.float()
    gram, covariance = InvariantMDS(method="gram"), InvariantMDS(method="covariance")
    times = alternate(
        {
            "gram": lambda: gram(single),
            "covariance": lambda: covariance(single),
            "ClassicalMDS": lambda: _scaled(single),
            "PCA": lambda: _components(single),
        },
        rounds=15,
    )
    backbone = PointNetBackbone(3, 8).eval()
    wrapped = TinvWrapper(backbone, covariance).eval()
    with torch.no_grad():
        forward = alternate({"raw": lambda: backbone(single), "wrapped": lambda: wrapped(single)}, rounds=15)
    growth: dict[str, float] = {}
    for name, layer, sizes in (("gram", gram, (64, 128, 256)), ("covariance", covariance, (1024, 4096, 16384))):
        taken = alternate({str(n): partial(layer, _clouds(8, n).float()) for n in sizes}, rounds=9)
        for small, large in pairwise(sizes):
            growth[f"{name}, points {small} to {large}, time ×"] = taken[str(large)] / taken[str(small)]
    return {
        "peer": "scikit-learn's ClassicalMDS and PCA, cloud by cloud",
        "agrees": max(agreement.values()) < 1e-9,
        "largest_difference": max(agreement.values()),
        "speed_ratio": times["ClassicalMDS"] / times["gram"],
        "speed_ratio_covariance_against_PCA": times["PCA"] / times["covariance"],
        "gram_over_covariance": times["gram"] / times["covariance"],
        "wrapped_over_raw_forward": forward["wrapped"] / forward["raw"],
        "growth": growth,
    }


def _clouds(batch: int, points: int) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    X = torch.randn(batch, points, 3, generator=draws, dtype=torch.float64)
    return (X + 0.4 * X.square()) * torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)


def _scaled(clouds: Tensor) -> Tensor:
    return torch.stack([torch.from_numpy(ClassicalMDS(n_components=3).fit_transform(one)) for one in clouds.numpy()])


def _components(clouds: Tensor) -> Tensor:
    return torch.stack([torch.from_numpy(PCA().fit_transform(one)) for one in clouds.numpy()])


def _largest(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference once every column has the sign of the other's."""
    signs = (ours * theirs).sum(1, keepdim=True).sign()
    return (ours - signs * theirs).abs().max().item()
