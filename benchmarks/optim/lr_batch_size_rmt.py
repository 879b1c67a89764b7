"""Top eigenvalues and spectral density against power iteration and Lanczos by double backward, and growth of cost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.timing import alternate
from provenn.core.experiment.networks import mlp
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.numerics.curvature import CurvatureOperator
from provenn.core.numerics.spectra import stochastic_lanczos
from provenn.optim import BatchHessianProbe

SAMPLES, STEPS = 512, 30

Batch = tuple[Tensor, Tensor]


def measure() -> dict[str, Any]:
    """Compare the largest eigenvalue and the quadrature with the peer's ways, then time them by turns."""
    model, data = _problem(SAMPLES)
    probe = _probe(model, data)
    report = probe.report((SAMPLES,))
    theirs = _power_iteration(model, data, iterations=2000, tolerance=1e-12)
    nodes, weights, start = _double_backward_lanczos(model, data, STEPS)
    operator = CurvatureOperator(model, _each, [data])
    ours = stochastic_lanczos(operator, start, STEPS, generator=generator("benchmark", "start"))
    moments = [
        abs(ours.moment(power).item() - float((weights * nodes**power).sum()))
        / float((weights * np.abs(nodes) ** power).sum())
        for power in (1, 2, 3)
    ]
    top = abs(report.largest - theirs) / abs(theirs)
    quadrature = max(*moments, abs(ours.nodes[-1].item() - nodes[-1]) / abs(nodes[-1]))
    times = alternate(
        {
            "ours": lambda: stochastic_lanczos(operator, start, STEPS),
            "double backward": lambda: _double_backward_lanczos(model, data, STEPS),
        },
        rounds=7,
    )
    small, large = _problem(256), _problem(2048)
    growth = alternate(
        {
            "256": lambda: _probe(*small).report((256,)),
            "2048": lambda: _probe(*large).report((2048,)),
        },
        rounds=3,
    )
    return {
        "peer": "pyhessian's power iteration and MLRG_DeepCurvature's Lanczos quadrature (not installed here), written "
        "anew: Hessian products by double backward, Lanczos with full reorthogonalisation in NumPy",
        "agrees": top <= 1e-3 and quadrature <= 1e-3,
        "largest_difference": max(top, quadrature),
        "differences": {"largest eigenvalue": top, "quadrature": quadrature},
        "speed_ratio": times["double backward"] / times["ours"],
        "growth": {"samples ×8, time of a report ×": growth["2048"] / growth["256"]},
    }


def _problem(samples: int) -> tuple[nn.Module, Batch]:
    draws = generator("benchmark", "data")
    x = torch.randn(samples, 64, generator=draws, dtype=torch.float64)
    with seeded("benchmark", "weights"):
        model = mlp((64, 32, 10), nn.Tanh).double().eval()
    return model, (x, x[:, :10].argmax(dim=1))


def _probe(model: nn.Module, data: Batch) -> BatchHessianProbe:
    return BatchHessianProbe(model, nn.functional.cross_entropy, TensorDataset(*data), lanczos_steps=60, batches=1)


def _each(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


class _DoubleBackward:
    """Hessian products by differentiating gᵀv; the graph of g is built once and kept."""

    def __init__(self, model: nn.Module, data: Batch) -> None:
        self.parameters = list(model.parameters())
        loss = nn.functional.cross_entropy(model(data[0]), data[1])
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=True)
        self.gradient = torch.cat([one.flatten() for one in gradients])

    def __call__(self, v: Tensor) -> Tensor:
        products = torch.autograd.grad(self.gradient @ v, self.parameters, retain_graph=True)
        return torch.cat([one.flatten() for one in products])


def _power_iteration(model: nn.Module, data: Batch, iterations: int, tolerance: float) -> float:
    """Return the largest eigenvalue: of the Hessian shifted by its largest magnitude, so that the top one leads."""
    product = _DoubleBackward(model, data)

    def dominant(shift: float) -> float:
        v = torch.randn(len(product.gradient), dtype=torch.float64, generator=generator("benchmark", "power"))
        v, value = v / v.norm(), math.inf
        for _ in range(iterations):
            moved = product(v) + shift * v
            before, value = value, (v @ moved).item()
            v = moved / moved.norm()
            if abs(value - before) <= tolerance * abs(value):
                break
        return value

    shift = abs(dominant(0.0))
    return dominant(shift) - shift


def _double_backward_lanczos(model: nn.Module, data: Batch, steps: int) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Return nodes and weights of the quadrature from one random vector, and zeros of its shape."""
    product = _DoubleBackward(model, data)
    size = len(product.gradient)
    start = torch.randn(size, dtype=torch.float64, generator=generator("benchmark", "start"))
    basis = np.zeros((steps, size))
    basis[0] = (start / start.norm()).numpy()
    matrix = np.zeros((steps, steps))
    for step in range(steps):
        w = product(torch.from_numpy(basis[step])).numpy()
        coefficients = basis[: step + 1] @ w
        matrix[step, step] = coefficients[step]
        w = w - basis[: step + 1].T @ coefficients
        w = w - basis[: step + 1].T @ (basis[: step + 1] @ w)
        if step + 1 < steps:
            matrix[step, step + 1] = matrix[step + 1, step] = np.linalg.norm(w)
            basis[step + 1] = w / matrix[step, step + 1]
    nodes, vectors = np.linalg.eigh(matrix)
    return nodes, vectors[0] ** 2, torch.zeros(size, dtype=torch.float64)
