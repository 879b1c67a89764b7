"""TrAct beside the formula of the authors' code, written anew, and what a step costs over the plain layer's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from benchmarks.timing import alternate
from provenn.core.experiment.accounting import TensorMemory
from provenn.core.experiment.networks import resnet
from provenn.optim import TrActConv2d, apply_tract_first_layer, tract

LAMBDA = 0.1


def measure() -> dict[str, Any]:
    """Compare gradients, then time steps of a layer and of a ResNet-18 that take turns."""
    differences = {name: _difference(*case) for name, case in CASES.items()}
    layers = {
        "plain": _layer_step(nn.Conv2d(3, 64, 3, padding=1)),
        "ours": _layer_step(TrActConv2d(3, 64, 3, padding=1)),
        "peer": _layer_step(_Inverse(nn.Conv2d(3, 64, 3, padding=1))),
    }
    layer = alternate(layers, rounds=31)
    network = alternate(
        {"plain": _network_step(False), "ours": _network_step(True)},
        rounds=9,
    )
    sizes = alternate({str(size): _layer_step(TrActConv2d(3, 64, 3, padding=1), size) for size in (8, 64)}, rounds=15)
    inputs = alternate({str(n): _patch_step(n) for n in (8, 16)}, rounds=15)
    return {
        "peer": "the authors' torch_tract (not installed here): its default, an explicit inverse, written anew",
        "agrees": max(differences.values()) <= 1e-5,
        "largest_difference": max(differences.values()),
        "differences": differences,
        "speed_ratio": layer["peer"] / layer["ours"],
        "step_time_over_plain": {
            "the layer alone": layer["ours"] / layer["plain"],
            "ResNet-18 on 32 × 32 images": network["ours"] / network["plain"],
        },
        "peak_memory_of_a_step_over_plain": {
            "the layer alone": _peak(layers["ours"]) / _peak(layers["plain"]),
        },
        "growth": {
            "images ×8, time ×": sizes["64"] / sizes["8"],
            "patch side ×2, entries ×4, time ×": inputs["16"] / inputs["8"],
        },
    }


def _peak(step: Callable[[], None]) -> int:
    with TensorMemory() as memory:
        step()
    return memory.peak


def _difference(layer: nn.Conv2d | nn.Linear, *shape: int) -> float:
    """Return the largest relative error of the weight gradient against the formula with an explicit inverse."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draws)
    wrapped = tract(layer, LAMBDA)
    output = wrapped(x)
    g = torch.randn(output.shape, generator=draws)
    output.backward(g)
    rows = x if isinstance(layer, nn.Linear) else unfold(x, layer.kernel_size, 1, layer.padding, layer.stride)
    a = (rows if isinstance(layer, nn.Linear) else rows.mT.flatten(0, 1)).double()
    flat = (g if isinstance(layer, nn.Linear) else g.flatten(2).mT.flatten(0, 1)).double()
    formula = flat.T @ a @ torch.linalg.inv(a.T @ a / len(a) + LAMBDA * torch.eye(a.shape[1], dtype=a.dtype))
    return float(((layer.weight.grad.flatten(1) - formula).norm() / formula.norm()).item())


CASES: dict[str, tuple[Any, ...]] = {
    "linear": (nn.Linear(48, 16), 100, 48),
    "linear, few rows": (nn.Linear(48, 16), 20, 48),
    "convolution": (nn.Conv2d(3, 16, 3, padding=1), 20, 3, 16, 16),
    "patches": (nn.Conv2d(3, 32, 8, stride=8), 20, 3, 32, 32),
}


class _Inverse(nn.Module):
    """The authors' convolution: unfold everything, invert the Gram matrix."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)

        def keep(gradient: Tensor) -> Tensor:
            a = unfold(x, self.layer.kernel_size, 1, self.layer.padding, self.layer.stride).mT.flatten(0, 1)
            gram = a.T @ a / len(a)
            inverse = torch.inverse(gram + LAMBDA * torch.eye(len(gram)))
            return (gradient.flatten(1) @ inverse).reshape(gradient.shape)

        if not self.layer.weight._backward_hooks:
            self.layer.weight.register_hook(keep)
        return output


def _layer_step(layer: nn.Module, images: int = 64) -> Callable[[], None]:
    x = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        layer.zero_grad()
        layer(x).square().mean().backward()

    return step


def _patch_step(side: int) -> Callable[[], None]:
    layer = TrActConv2d(3, 64, side, stride=side)
    x = torch.randn(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        layer.zero_grad()
        layer(x).square().mean().backward()

    return step


def _network_step(with_tract: bool) -> Callable[[], None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = resnet((64, 128, 256, 512), 2, 3)
    if with_tract:
        model = apply_tract_first_layer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 3, 32, 32, generator=draws), torch.randint(10, (16,), generator=draws)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step
