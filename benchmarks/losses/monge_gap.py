"""The Monge gap and the Sinkhorn divergence against ott-jax's formulas and a linear program, and times of a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from benchmarks.timing import alternate
from provenn.losses import MongeGap, SinkhornDivergence

CHECK_EVERY = 10
"""The peer's iterations between looks at the error."""


def _solve(C: Tensor, epsilon: float, tol: float) -> Tensor:
    """Return the KL-regularised cost by the dual's formula, as the peer evaluates it, differentiable by C."""
    n, m = C.shape
    costs, a, b = C.detach(), C.new_full((n,), 1 / n), C.new_full((m,), 1 / m)
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for iteration in range(1, 20_001):
        g = g + epsilon * (b.log() - torch.logsumexp((f[:, None] + g - costs) / epsilon, dim=0))
        f = f + epsilon * (a.log() - torch.logsumexp((f[:, None] + g - costs) / epsilon, dim=1))
        if iteration % CHECK_EVERY == 0:
            columns = torch.exp((f[:, None] + g - costs) / epsilon).sum(dim=0)
            if float((columns - b).abs().sum()) < tol:
                break
    mass = torch.exp((f[:, None] + g - C) / epsilon).sum()
    return a.dot(f - epsilon * a.log()) + b.dot(g - epsilon * b.log()) + epsilon * (1 - mass)


def _costs(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y).square().sum(dim=2)


def gap_formula(x: Tensor, y: Tensor, tol: float = 1e-3) -> Tensor:
    """Return the peer's gap: displacement less the cost with Shannon's entropy, at ε = 0.01 of the mean cost."""
    C = _costs(x, y)
    epsilon, n = 0.01 * float(C.detach().mean()), len(x)
    shannon = _solve(C, epsilon, tol) - epsilon * 2 * np.log(n)
    return (x - y).square().sum(dim=1).mean() - shannon


def divergence_formula(x: Tensor, y: Tensor, tol: float = 1e-3) -> Tensor:
    """Return the peer's Sinkhorn divergence, at ε = 0.1 of the mean cost within the target."""
    epsilon = 0.1 * float(_costs(y, y).detach().mean())
    between, one, other = (_solve(_costs(u, v), epsilon, tol) for u, v in ((x, y), (x, x), (y, y)))
    return between - (one + other) / 2


def _clouds(n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, n, d, generator=draws, dtype=torch.float64)
    turn = torch.randn(d, d, generator=draws, dtype=torch.float64)
    return x, (x @ turn / d**0.5 + 0.3 * noise + 1).requires_grad_()


def measure() -> dict[str, Any]:
    """Compare values and gradients, then times of a step: the loss, and its gradient by the map's images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return _measure()


def _measure() -> dict[str, Any]:
    loose, tight, gradients = _differences()
    steps = {
        "MongeGap": _step(lambda x, y: MongeGap()(x, y), 256, 8),
        "formula": _step(gap_formula, 256, 8),
        "relaxed": _step(lambda x, y: MongeGap(scaling=0.5, relaxation=1.7)(x, y), 256, 8),
        "unrolled": _step(lambda x, y: MongeGap(gradient="unrolled")(x, y), 256, 8),
        "assignment": _step(lambda x, y: MongeGap(epsilon=0)(x, y), 256, 8),
    }
    gap = alternate(steps, rounds=9)
    fit = alternate(
        {
            "SinkhornDivergence": _step(lambda x, y: SinkhornDivergence()(x, y), 256, 8),
            "formula": _step(divergence_formula, 256, 8),
        },
        rounds=9,
    )
    growth = alternate({str(n): _step(lambda x, y: SinkhornDivergence()(x, y), n, 8) for n in (128, 256, 512)}, 7)
    return {
        "peer": "ott-jax's formulas, written anew in torch and float64 (github.com/ott-jax/ott)",
        "agrees": loose <= 1e-3 and tight <= 1e-6,
        "largest_difference": loose,
        "largest_difference_at_tol_1e-8": tight,
        "largest_difference_of_gradients_at_tol_1e-8": gradients,
        "largest_difference_of_assignment_to_linear_program": _largest_difference_to_program(),
        "speed_ratio": gap["formula"] / gap["MongeGap"],
        "speed_ratio_of_divergence": fit["formula"] / fit["SinkhornDivergence"],
        "speed_ratio_with_scaling_and_relaxation": gap["formula"] / gap["relaxed"],
        "time_of_unrolled_over_envelope": gap["unrolled"] / gap["MongeGap"],
        "time_of_assignment_over_envelope": gap["assignment"] / gap["MongeGap"],
        "growth": {
            "points ×2 (128 to 256), time of the divergence ×": growth["256"] / growth["128"],
            "points ×2 (256 to 512), time of the divergence ×": growth["512"] / growth["256"],
        },
    }


def _differences() -> tuple[float, float, float]:
    """Return the largest differences of values, relative to the mean cost or the value, and of tight gradients."""
    loose, tight, gradients = [], [], []
    for seed, (n, d) in enumerate(((16, 1), (40, 2), (64, 5), (100, 20))):
        x, y = _clouds(n, d, seed)
        scale = float(_costs(x, y).detach().mean())
        for ours, theirs in ((MongeGap, gap_formula), (SinkhornDivergence, divergence_formula)):
            loose.append(float((ours()(x, y) - theirs(x, y)).detach().abs()) / scale)
            pair = ours(tol=1e-8, max_iters=20_000)(x, y), theirs(x, y, 1e-8)
            tight.append(float((pair[0] - pair[1]).detach().abs()) / scale)
            first, second = (torch.autograd.grad(one, y)[0] for one in pair)
            gradients.append(float((first - second).abs().max() / second.abs().max()))
    return max(loose), max(tight), max(gradients)


def _largest_difference_to_program() -> float:
    """Return by how much the gap without entropy differs from that by a linear program over plans."""
    differences = []
    for seed in range(3):
        x, y = (part.detach() for part in _clouds(12, 3, seed))
        C, n = _costs(x, y).numpy(), 12
        rows, columns = np.kron(np.eye(n), np.ones(n)), np.kron(np.ones(n), np.eye(n))
        program = scipy.optimize.linprog(C.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.full(2 * n, 1 / n))
        wanted = np.trace(C) / n - program.fun
        differences.append(abs(float(MongeGap(epsilon=0)(x, y)) - wanted))
    return max(differences)


def _step(loss: Callable[[Tensor, Tensor], Tensor], n: int, d: int) -> Callable[[], Any]:
    x, y = _clouds(n, d, seed=0)
    return lambda: torch.autograd.grad(loss(x, y), y)
