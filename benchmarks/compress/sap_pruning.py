"""The PQ Index on 1e7 weights against the formula with torch's norms; lottery tickets against torch's pruning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from benchmarks.timing import alternate
from provenn.compress import FixedRatio, IterativePruner, pq_index
from provenn.core.experiment.accounting import TensorMemory


def measure() -> dict[str, Any]:
    """Compare values on layers of a network, then times and memory as the number of weights grows."""
    draws = torch.Generator().manual_seed(0)
    layers = [torch.randn(shape, generator=draws) ** 3 for shape in ((100, 784), (64, 32, 3, 3), (10, 300))]
    pairs = [(0.5, 1.0), (1.0, 2.0), (0.2, 1.4)]
    difference = max(
        abs(pq_index(layer, p, q).item() - _by_norms(layer.double(), p, q).item()) for layer in layers for p, q in pairs
    )
    weights = torch.randn(10_000_000, generator=draws)
    times = alternate({"ours": lambda: pq_index(weights), "norms": lambda: _by_norms(weights, 0.5, 1.0)}, rounds=9)
    sizes = {str(count): weights[:count] for count in (1_250_000, 2_500_000, 5_000_000, 10_000_000)}
    growth = alternate({name: lambda part=part: pq_index(part) for name, part in sizes.items()}, rounds=7)
    return {
        "peer": f"torch {torch.__version__.split('+')[0]}: norms and nn.utils.prune",
        "agrees": difference <= 1e-6 and _masks_agree(),
        "largest_difference": difference,
        "speed_ratio": times["norms"] / times["ours"],
        "extra_bytes_per_weight": _extra_bytes(lambda: pq_index(weights)) / len(weights),
        "extra_bytes_per_weight_norms": _extra_bytes(lambda: _by_norms(weights, 0.5, 1.0)) / len(weights),
        "growth": {"weights ×8, time ×": growth["10000000"] / growth["1250000"]},
    }


def _by_norms(weights: Tensor, p: float, q: float) -> Tensor:
    flat = weights.reshape(-1)
    return 1 - len(flat) ** (1 / q - 1 / p) * torch.linalg.vector_norm(flat, p) / torch.linalg.vector_norm(flat, q)


def _extra_bytes(call: Any) -> int:
    with TensorMemory() as memory:
        call()
    return memory.peak


def _masks_agree() -> bool:
    """Whether one round of lottery-ticket pruning keeps the weights that torch's global pruning keeps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 80), nn.ReLU(), nn.Linear(80, 10))
    state = next(IterativePruner(FixedRatio(0.3), rounds=1).iterate(model, lambda trained: None))
    tensors = [(model[0], "weight"), (model[2], "weight")]
    prune.global_unstructured(tensors, prune.L1Unstructured, amount=int(0.3 * state.masks.total))
    ours = (state.pruned["0.weight"], state.pruned["2.weight"])
    return all(torch.equal(layer.weight_mask.bool(), mask) for (layer, _), mask in zip(tensors, ours, strict=True))
