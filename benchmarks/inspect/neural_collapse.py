"""Neural-collapse metrics against the usual definitions, sample by sample, and memory as samples grow."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.timing import alternate
from provenn.core.experiment.accounting import TensorMemory
from provenn.inspect import NeuralCollapse, neural_collapse_metrics

CLASSES, WIDTH = 10, 64


def measure() -> dict[str, Any]:
    """Compare values on the same features, then time, and the probe's memory for ever more batches."""
    features, labels, weight = _problem(2000)
    ours, theirs = neural_collapse_metrics(features, labels, weight), _sample_by_sample(features, labels, weight)
    difference = max(abs(ours[name] - theirs[name]) / max(1.0, abs(theirs[name])) for name in theirs)
    times = alternate(
        {
            "ours": lambda: neural_collapse_metrics(features, labels, weight),
            "sample by sample": lambda: _sample_by_sample(features, labels, weight),
        },
        rounds=5,
    )
    few, many = _probe_memory(10), _probe_memory(80)
    sizes = {str(count): _problem(count) for count in (10_000, 80_000)}
    growth = alternate({name: lambda one=one: neural_collapse_metrics(*one) for name, one in sizes.items()}, rounds=7)
    return {
        "peer": "the usual definitions of the ETF metrics, one sample at a time",
        "agrees": difference <= 1e-5,
        "largest_difference": difference,
        "speed_ratio": times["sample by sample"] / times["ours"],
        "probe_peak_bytes": {"10 batches": few, "80 batches": many},
        "growth": {
            "samples ×8, time ×": growth["80000"] / growth["10000"],
            "batches ×8, probe's peak memory ×": many / few,
        },
    }


def _problem(count: int) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    means = torch.randn(CLASSES, WIDTH, generator=draws)
    features = means[labels] + 0.3 * torch.randn(count, WIDTH, generator=draws)
    return features, labels, torch.randn(CLASSES, WIDTH, generator=draws)


def _sample_by_sample(features: Tensor, labels: Tensor, weight: Tensor) -> dict[str, float]:
    h, y, w = features.double().numpy(), labels.numpy(), weight.double().numpy()
    centre = h.mean(0)
    means = np.stack([h[y == label].mean(0) for label in range(CLASSES)])
    within = np.zeros((WIDTH, WIDTH))
    for one, label in zip(h, y, strict=True):
        within += np.outer(one - means[label], one - means[label]) / len(h)
    between = (means - centre).T @ (means - centre) / CLASSES
    frame = (np.eye(CLASSES) - 1 / CLASSES) / np.sqrt(CLASSES - 1)

    def apart(matrix: np.ndarray) -> float:
        return float(np.linalg.norm(matrix / np.linalg.norm(matrix) - frame))

    return {
        "nc1": float(np.trace(within @ np.linalg.pinv(between, rcond=1e-8)) / CLASSES),
        "nc2_weight": apart(w @ w.T),
        "nc3": apart(w @ (means - centre).T),
    }


def _probe_memory(batches: int) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES))
    loader = ((torch.randn(256, 32), torch.arange(256) % CLASSES) for _ in range(batches))
    with TensorMemory() as memory:
        NeuralCollapse()(model, loader)
    return memory.peak
