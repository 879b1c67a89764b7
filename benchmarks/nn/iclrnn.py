"""The projection beside deel-torchlip's power iteration, and the layers beside torch's own ReLU network."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from deel.torchlip.normalizers import spectral_normalization
from torch import Tensor, nn

from benchmarks.timing import alternate
from provenn.nn import ICLRNN
from provenn.nn.constraints import nonnegative_spectral_

STEPS, FEATURES = 10, 8
AGREEMENT = 1e-3


def measure() -> dict[str, Any]:
    """Compare norms after the projection and outputs of the layers, then times by turns, then growth."""
    norms = max(_norms_apart(rows, seed) for rows in (16, 64) for seed in range(5))
    outputs, gradients = _outputs_apart()
    wide = {size: _layer_times(size, STEPS, 15) for size in (32, 128)}
    long = _layer_times(32, 4 * STEPS, 15)
    projection = _projection_times(64, 31)
    return {
        "peer": "deel-torchlip's spectral_normalization, clipped before (projection); torch.nn.RNN (layers)",
        "agrees": norms <= AGREEMENT and max(outputs, gradients) <= 1e-10,
        "largest_difference": max(norms, outputs, gradients),
        "largest_difference_of_norms": norms,
        "largest_difference_of_layers": outputs,
        "largest_difference_of_gradients": gradients,
        "speed_ratio": projection["peer"] / projection["ours"],
        "speed_ratio_layers": wide[32]["peer"] / wide[32]["ours"],
        "time_of_projection_over_training_step": wide[32]["projection"] / wide[32]["ours"],
        "growth": {
            "hidden units ×4, time ×": wide[128]["ours"] / wide[32]["ours"],
            "steps ×4, time ×": long["ours"] / wide[32]["ours"],
        },
    }


def _matrix(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, rows + 4, generator=torch.Generator().manual_seed(seed))


def _norms_apart(rows: int, seed: int) -> float:
    W = _matrix(rows, seed)
    results = (nonnegative_spectral_(W.clone()), spectral_normalization(W.clamp(min=0))[0])
    ours, peer = (torch.linalg.svdvals(one)[0].item() for one in results)
    return abs(ours - peer)


def _pair(hidden: int, dtype: torch.dtype) -> tuple[ICLRNN, nn.RNN]:
    """Build our two layers and torch's with the same weights."""
    ours = ICLRNN(FEATURES, hidden, expand_input=False).to(dtype)
    peer = nn.RNN(FEATURES, hidden, 2, nonlinearity="relu", batch_first=True).to(dtype)
    with torch.no_grad():
        for place, cell in enumerate(ours.cells):
            names = ("weight_ih", "weight_hh", "bias_ih")
            for name, value in zip(names, (cell.W, cell.U, cell.b.normal_()), strict=True):
                peer.get_parameter(f"{name}_l{place}").copy_(value)
            peer.get_parameter(f"bias_hh_l{place}").zero_()
    return ours, peer


def _inputs(steps: int, dtype: torch.dtype) -> Tensor:
    source = torch.Generator().manual_seed(0)
    return torch.randn(64, steps, FEATURES, generator=source, dtype=torch.float64).to(dtype).requires_grad_()


def _outputs_apart() -> tuple[float, float]:
    ours, peer = _pair(16, torch.float64)
    x = _inputs(STEPS, torch.float64)
    outputs = ours(x), peer(x)[0]
    gradients = [torch.autograd.grad(one.square().mean(), x)[0] for one in outputs]
    apart = [(one - other).abs().max().item() for one, other in (outputs, gradients)]
    return apart[0], apart[1]


def _layer_times(hidden: int, steps: int, rounds: int) -> dict[str, float]:
    ours, peer = _pair(hidden, torch.float32)
    x = _inputs(steps, torch.float32)
    return alternate(
        {
            "ours": partial(_step, ours, x),
            "peer": partial(_step, peer, x),
            "projection": ours.project_,
        },
        rounds,
    )


def _step(model: nn.Module, x: Tensor) -> None:
    y = model(x)
    first = y[0] if isinstance(y, tuple) else y
    torch.autograd.grad(first.square().mean(), list(model.parameters()))


def _projection_times(rows: int, rounds: int) -> dict[str, float]:
    W = _matrix(rows, 0)
    return alternate(
        {
            "ours": lambda: nonnegative_spectral_(W.clone()),
            "peer": lambda: spectral_normalization(W.clamp(min=0)),
        },
        rounds,
    )
