"""AF-KAN beside the authors' layer, written anew, and each layer's step beside a perceptron's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import alternate
from provenn.claims.nn.af_kan import Perceptron
from provenn.nn import (
    AFKANLayer,
    BSplineKANLayer,
    ChebyKANLayer,
    FourierKANLayer,
    RBFKANLayer,
    ReLUKANLayer,
    WavKANLayer,
)

BATCH, INPUTS, HIDDEN = 64, 784, 32


def _authors(layer: AFKANLayer, x: Tensor) -> Tensor:
    """Follow the authors' forward pass as it stands: norm of the whole tensor, then least and greatest of it."""
    G = len(layer.low)
    expanded = x[:, :, None].expand(-1, -1, G)
    low, high = (one[None].expand(x.shape[1], -1) for one in (layer.low, layer.high))
    product = F.silu(expanded - low) * F.silu(high - expanded)
    z = product**2
    z = z / z.flatten().norm().clamp(min=1e-12)
    z = (z - z.min()) / (z.max() - z.min())
    reduction = layer.reductions[0]
    scores = F.linear(z, reduction.score.weight, reduction.score.bias)
    weights = F.softmax(scores / reduction.temperature.clamp(min=1.0), dim=-2)
    h = F.layer_norm((z * weights).sum(-1), (x.shape[1],), layer.norm.weight, layer.norm.bias)
    return F.linear(F.silu(h), layer.weight)


def measure() -> dict[str, Any]:
    """Compare outputs and gradients with the authors' form, then times of a step and growth with the inputs."""
    torch.manual_seed(0)
    layer = AFKANLayer(INPUTS, HIDDEN, norm_scope="batch").double()
    x = torch.randn(BATCH, INPUTS, dtype=torch.float64)
    pair = [forward(x) for forward in (layer, partial(_authors, layer))]
    tensors = [layer.low, layer.weight, layer.norm.weight]
    gradients = [torch.autograd.grad(y.square().sum(), tensors) for y in pair]
    outputs = (pair[0] - pair[1]).abs().max().item()
    worst = max((a - b).abs().max().item() / b.abs().max().item() for a, b in zip(*gradients, strict=True))
    layer, x = layer.float(), x.float()
    peer = alternate(
        {"provenn": _step(layer, x), "authors": _step(partial(_authors, layer), x, list(layer.parameters()))}, rounds=40
    )
    kinds: dict[str, Callable[[int, int], nn.Module]] = {
        "perceptron": Perceptron,
        "AF-KAN": AFKANLayer,
        "AF-KAN, multistep": partial(AFKANLayer, method="multistep"),
        "AF-KAN, spatial": partial(AFKANLayer, method="spatial_attn"),
        "ReLU-KAN": ReLUKANLayer,
        "B-spline KAN": BSplineKANLayer,
        "RBF KAN": RBFKANLayer,
        "Chebyshev KAN": ChebyKANLayer,
        "Fourier KAN": FourierKANLayer,
        "wavelet KAN": WavKANLayer,
    }
    steps = alternate({name: _step(make(INPUTS, HIDDEN), x) for name, make in kinds.items()}, rounds=20)
    sizes = (512, 1024, 2048)
    growth = alternate({str(n): _step(AFKANLayer(n, HIDDEN), torch.randn(BATCH, n)) for n in sizes}, rounds=20)
    return {
        "peer": "the authors' layer (github.com/hoangthangta/All-KAN), written anew, with the same weights",
        "agrees": outputs < 1e-5 and worst < 1e-5,
        "largest_difference": outputs,
        "largest_relative_difference_of_gradients": worst,
        "speed_ratio": peer["authors"] / peer["provenn"],
        "step_over_perceptron": {name: steps[name] / steps["perceptron"] for name in kinds if name != "perceptron"},
        "growth": {f"inputs {a} to {b}, time ×": growth[str(b)] / growth[str(a)] for a, b in pairwise(sizes)},
    }


def _step(
    forward: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter] | None = None
) -> Callable[[], Any]:
    wanted = parameters if parameters is not None else list(forward.parameters())  # type: ignore[attr-defined]
    return lambda: torch.autograd.grad(forward(x).square().mean(), wanted)
