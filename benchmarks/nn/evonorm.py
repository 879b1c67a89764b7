"""EvoNorm against the six layers derived a second time, in the operations of timm's layers, for numbers and speed.

timm does not install here, as it brings torchvision. Its computation is derived anew: statistics by ``var``, expanded
to the input's size before they are used, and the running variance by the weighted sum of old and new.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import alternate
from provenn.core.experiment.accounting import TensorMemory
from provenn.nn import EvoNorm2d, NormActGraph

KINDS = ("B0", "B1", "B2", "S0", "S1", "S2")
EPS, MOMENTUM, GROUPS = 1e-5, 0.1, 8


def measure() -> dict[str, Any]:
    """Compare outputs, gradients and running variances, then times that take turns at (32, 32, 32, 32), then growth."""
    difference = max(_largest_difference(kind) for kind in KINDS)
    ratios = {}
    for kind in KINDS:
        x, layer, peer = _images(32), _layer(kind), Peer(_layer(kind))
        times = alternate({"ours": partial(_step, layer, x), "peer": partial(_step, peer, x)}, rounds=9)
        ratios[kind] = times["peer"] / times["ours"]
    rivals = {
        "B0": partial(_step, _layer("B0"), _images(32)),
        "S0": partial(_step, _layer("S0"), _images(32)),
        "BN-ReLU": partial(_step, nn.Sequential(nn.BatchNorm2d(32), nn.ReLU()), _images(32)),
        "GN-ReLU": partial(_step, nn.Sequential(nn.GroupNorm(GROUPS, 32), nn.ReLU()), _images(32)),
        "B0 as a graph": partial(_step, NormActGraph.named("B0").to_module(32), _images(32)),
    }
    times = alternate(rivals, rounds=9)
    growth = alternate({str(batch): partial(_step, _layer("B0"), _images(batch)) for batch in (8, 64)}, rounds=7)
    return {
        "peer": f"timm's EvoNorm2dB0 to S2, derived anew (it does not install here), torch {torch.__version__}",
        "agrees": difference <= 1e-6,
        "largest_difference": difference,
        "speed_ratio": sorted(ratios.values())[len(ratios) // 2],
        "speed_ratio_by_kind": ratios,
        "time_over_bn_relu": {name: times[name] / times["BN-ReLU"] for name in rivals},
        "growth": {
            "batch ×8, time ×": growth["64"] / growth["8"],
            "batch 8 → 64, memory ×": _memory("B0", 64) / _memory("B0", 8),
        },
        "tensor_megabytes_a_step": {kind: _memory(kind, 32) / 2**20 for kind in KINDS},
    }


class Peer(nn.Module):
    """A layer derived anew, with another's parameters."""

    running_var: Tensor

    def __init__(self, layer: EvoNorm2d) -> None:
        super().__init__()
        self.kind = layer.kind
        self.weight, self.bias = layer.weight, layer.bias
        self.v = layer.weight.new_ones(layer.num_features) if layer.v is None else layer.v
        self.register_buffer("running_var", layer.weight.detach().new_ones(layer.num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        v, gamma, beta = (one.view(1, -1, 1, 1) for one in (self.v, self.weight, self.bias))
        if self.kind[0] == "S":
            by_group = x.reshape(len(x), GROUPS, -1)
            square = by_group.square().mean(2, keepdim=True) if self.kind == "S2" else _variance(by_group, 2)
            root = (square + EPS).sqrt().expand(by_group.shape).reshape(x.shape)
            return x * torch.sigmoid(v * x if self.kind == "S0" else x) / root * gamma + beta
        if self.training:
            batch = _variance(x, (0, 2, 3)).flatten()
            count = x.numel() / x.shape[1]
            newest = batch.detach() * (count / (count - 1))
            self.running_var.copy_((1 - MOMENTUM) * self.running_var + MOMENTUM * newest)
        else:
            batch = self.running_var
        left = (batch + EPS).sqrt().view(1, -1, 1, 1).expand(x.shape)
        own = _variance(x, (2, 3)) if self.kind == "B0" else x.square().mean((2, 3), keepdim=True)
        root = (own + EPS).sqrt().expand(x.shape)
        right = {"B0": lambda: x * v + root, "B1": lambda: (x + 1) * root, "B2": lambda: root - x}[self.kind]()
        return x / left.max(right) * gamma + beta


def _variance(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    return x.var(dims, unbiased=False, keepdim=True)


def _images(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(batch, 32, 32, 32, generator=draws).to(dtype).requires_grad_()


def _layer(kind: str, dtype: torch.dtype = torch.float32) -> EvoNorm2d:
    return EvoNorm2d(32, kind, groups=GROUPS, dtype=dtype)


def _step(layer: Callable[[Tensor], Tensor], x: Tensor) -> None:
    layer(x).square().mean().backward()  # type: ignore[no-untyped-call, unused-ignore]


def _largest_difference(kind: str) -> float:
    """Of outputs in training and eval mode, gradients and running variances, after two batches, in float64."""
    layer = _layer(kind, torch.float64)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=draws, dtype=torch.float64))
    results = []
    for one in (Peer(layer), layer):
        one.train()
        x = _images(4, torch.float64)
        found = [one(x), one(2 * x + 1)]
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        given = [x, *(p for p in layer.parameters())]
        found += torch.autograd.grad((sum(found) * weights).sum(), given)
        found += [one.eval()(x)]
        results.append([*found, one.running_var] if kind[0] == "B" else found)
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True))


def _memory(kind: str, batch: int) -> int:
    """Return the most bytes of tensors alive in a step, beside input and parameters."""
    layer, x = _layer(kind), _images(batch)
    with TensorMemory() as memory:
        _step(layer, x)
    return memory.peak
