"""The minimiser of deep linear networks with free features, in closed form but for a scalar root a class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.experiment.reports import Report

Loss = Literal["mse", "ce"]


@dataclass(frozen=True)
class CollapseSolution(Report):
    r"""The global minimum of the regularised problem, up to rotations of the hidden layers.

    The class part of the product is :math:`U\,\mathrm{diag}(s)\,Q^\top D^{-1/2}` with D the class counts.

    Attributes:
        counts: Samples of each class.
        dims: Width of the features and of each hidden layer.
        lambdas: λ_H, λ_{W_1}, …, λ_{W_M}.
        singular_values: s, one a direction; 0 where the direction is lost.
        left: U, one row a class.
        right: Q, one row a class.
        row_norms: Norm of each row of W_M.
        feature_norms: Norm of the features of each class.
        objective: The smallest value of the objective.
        lost_classes: Classes whose row of W_M is zero.
        unique: Whether the frame is determined; not when the width cuts through equal singular values.
    """

    counts: tuple[int, ...]
    dims: tuple[int, ...]
    lambdas: tuple[float, ...]
    singular_values: tuple[float, ...]
    left: tuple[tuple[float, ...], ...]
    right: tuple[tuple[float, ...], ...]
    row_norms: tuple[float, ...]
    feature_norms: tuple[float, ...]
    objective: float
    lost_classes: tuple[int, ...]
    unique: bool

    def targets(self, layer: int) -> dict[str, Float[Tensor, "classes classes"]]:
        """Return what the theory predicts at a layer.

        Args:
            layer: j from 1 to M, the linear layer whose inputs and whose partial product W_M⋯W_j are meant.

        Returns:
            ``features``: the Gram matrix of the class means; ``weight``: that of the rows of the partial product;
            ``product``: the partial product times the class means. Each is (K, K), float64.

        Raises:
            ValueError: There is no such layer.
        """
        check_integer("layer", layer, at_least=1, at_most=len(self.dims))
        s, left, right = (
            torch.tensor(one, dtype=torch.float64) for one in (self.singular_values, self.left, self.right)
        )
        shrink = torch.tensor(self.counts, dtype=torch.float64).rsqrt()
        shared = _shared(s, self.lambdas)
        below = torch.stack([shared / one for one in self.lambdas[:layer]]).prod(0)
        above = torch.stack([shared / one for one in self.lambdas[layer:]]).prod(0)
        return {
            "features": shrink[:, None] * (right * below) @ right.T * shrink,
            "weight": (left * above) @ left.T,
            "product": (left * s) @ right.T * shrink,
        }


def _shared(s: Tensor, lambdas: Sequence[float]) -> Tensor:
    """(Λ s²)^{1/p}: λ_j times the squared singular value of factor j, the same for all p factors."""
    return (math.prod(lambdas) * s**2) ** (1 / len(lambdas))


def check_problem(counts: Sequence[int], dims: Sequence[int], lambdas: Sequence[float], loss: str, bias: bool) -> None:
    """Check the arguments that :func:`collapse_solution` and :class:`UnconstrainedFeatures` share."""
    if len(counts) < 2:
        raise ValueError(f"counts must name at least 2 classes, got {tuple(counts)}")
    for place, count in enumerate(counts):
        check_integer(f"counts[{place}]", count, at_least=1)
    if not dims:
        raise ValueError("dims must name the width of the features, got none")
    for place, width in enumerate(dims):
        check_integer(f"dims[{place}]", width, at_least=1)
    if len(lambdas) != len(dims) + 1:
        raise ValueError(f"lambdas must be λ_H and one for each of the {len(dims)} layers, got {len(lambdas)}")
    for place, strength in enumerate(lambdas):
        check_number(f"lambdas[{place}]", strength, above=0)
    check_choice("loss", loss, ("mse", "ce"))
    if loss == "ce" and not bias:
        raise ValueError("bias must be True with loss='ce', whose theory has a last-layer bias, got False")


def collapse_solution(
    counts: Sequence[int], dims: Sequence[int], lambdas: Sequence[float], loss: Loss = "mse", bias: bool = False
) -> CollapseSolution:
    r"""Predict the global minimum of a deep linear network over free features.

    .. math::
        \min \tfrac{1}{2N} \lVert W_M \cdots W_1 H_1 + b 1^\top - Y \rVert_F^2
        + \sum_j \tfrac{\lambda_{W_j}}{2} \lVert W_j \rVert_F^2 + \tfrac{\lambda_H}{2} \lVert H_1 \rVert_F^2

    or the same with mean cross-entropy. The best factorisation of a product with singular values s into p = M + 1
    factors costs (p/2) Σ (Λ s_i²)^{1/p} with Λ = λ_H Π λ_{W_j}, so the problem splits into one scalar problem for
    each singular value a of the target (√n_k without bias): minimise (s − a)²/(2N) + (p/2)(Λ s²)^{1/p} over s ≥ 0.

    Args:
        counts: Samples of each class, n_1 … n_K.
        dims: Width of the features, then of every hidden layer: (d_1, …, d_M) for M linear layers.
        lambdas: λ_H, λ_{W_1}, …, λ_{W_M}.
        loss: ``"mse"`` or ``"ce"``.
        bias: Whether the last layer has a bias, which is not regularised. Cross-entropy needs one.

    Returns:
        Singular values, frames, norms and objective of the minimum, and the classes that are lost.

    Raises:
        ValueError: A count, width or λ that is not positive, a number of lambdas other than M + 1, an unknown loss;
            with cross-entropy also unequal counts, no bias, or a width below K − 1, whose minimisers are not known.

    Cost: O(K³) for a bias with unequal counts, O(K) else.

    Source: Theorems 3.1 to 4.1 of the paper and their bottleneck cases; M = 1 is in closed form there.
    """
    check_problem(counts, dims, lambdas, loss, bias)
    n = np.asarray(counts, dtype=np.float64)
    classes, rank = len(counts), min(*dims, len(counts))
    left, target, right = _target(n, bias)
    if loss == "ce":
        s, value = _cross_entropy(n, dims, lambdas)
        s = np.where(target > 1e-9, s, 0.0)
    else:
        s = np.array([_best_scale(one, n.sum(), lambdas) for one in target])
        gains = np.array(
            [
                _scalar(0, a, n.sum(), lambdas) - _scalar(one, a, n.sum(), lambdas)
                for one, a in zip(s, target, strict=True)
            ]
        )
        order = np.argsort(-gains, kind="stable")
        s[order[rank:]] = 0
        value = sum(_scalar(one, a, n.sum(), lambdas) for one, a in zip(s, target, strict=True))
    shared = _shared(torch.from_numpy(s), lambdas).numpy()
    row_norms = np.sqrt((left**2 * shared).sum(1) / lambdas[-1])
    feature_norms = np.sqrt((right**2 * shared).sum(1) / (lambdas[0] * n))
    return CollapseSolution(
        counts=tuple(counts),
        dims=tuple(dims),
        lambdas=tuple(lambdas),
        singular_values=tuple(s.tolist()),
        left=tuple(map(tuple, left.tolist())),
        right=tuple(map(tuple, right.tolist())),
        row_norms=tuple(row_norms.tolist()),
        feature_norms=tuple(feature_norms.tolist()),
        objective=float(value),
        lost_classes=tuple(np.flatnonzero(row_norms < 1e-12).tolist()),
        unique=_determined(target, s, classes),
    )


def _target(n: np.ndarray, bias: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decompose the class part of the target; a bias takes its mean away, which leaves K − 1 directions."""
    if not bias:
        return np.eye(len(n)), np.sqrt(n), np.eye(len(n))
    root = np.sqrt(n)
    left, values, right = np.linalg.svd(np.diag(root) @ (np.eye(len(n)) - np.outer(root, root) / n.sum()))
    values[-1] = 0
    return left, values, right.T


def _determined(target: np.ndarray, s: np.ndarray, classes: int) -> bool:
    """Whether no two equal directions of the target were treated differently."""
    same = np.abs(target[:, None] - target[None, :]) < 1e-9
    return not bool((same & ((s[:, None] > 0) != (s[None, :] > 0))).any())


def _scalar(s: float, a: float, samples: float, lambdas: Sequence[float]) -> float:
    p = len(lambdas)
    return float((s - a) ** 2 / (2 * samples) + p / 2 * (math.prod(lambdas) * s**2) ** (1 / p))


def _best_scale(a: float, samples: float, lambdas: Sequence[float]) -> float:
    """Minimise the scalar problem: its outer stationary point, or 0 where that is no better."""
    p, slope = len(lambdas), samples * math.prod(lambdas) ** (1 / len(lambdas))
    if a <= 0:
        return 0.0
    if p == 2:
        return max(0.0, a - slope)
    # The derivative, times N, is s − a + slope · s^{2/p − 1}: convex, smallest where the next line says.
    turn = (slope * (1 - 2 / p)) ** (1 / (2 - 2 / p))
    derivative = lambda s: s - a + slope * s ** (2 / p - 1)  # noqa: E731
    if turn >= a or derivative(turn) >= 0:
        return 0.0
    s = a
    for _ in range(100):  # Newton from the right of a convex function's larger root falls onto it monotonically
        step = derivative(s) / (1 + slope * (2 / p - 1) * s ** (2 / p - 2))
        s -= step
        if abs(step) <= 1e-15 * a:
            break
    return s if _scalar(s, a, samples, lambdas) < _scalar(0, a, samples, lambdas) else 0.0


def _cross_entropy(n: np.ndarray, dims: Sequence[int], lambdas: Sequence[float]) -> tuple[float, float]:
    """Minimise log(1 + (K − 1)e^{−ρ}) + (p/2)(K − 1)(Λ n ρ²)^{1/p}; return s = ρ√n and the value."""
    classes, p = len(n), len(lambdas)
    if (n != n[0]).any():
        raise ValueError(f"counts must be equal with loss='ce', got {tuple(n.astype(int).tolist())}")
    if min(dims) < classes - 1:
        raise ValueError(f"dims must be ≥ K − 1 = {classes - 1} with loss='ce', got {tuple(dims)}")
    strength = math.prod(lambdas) * n[0]

    def value(rho: float) -> float:
        penalty = p / 2 * (classes - 1) * (strength * rho**2) ** (1 / p)
        return math.log1p((classes - 1) * math.exp(-rho)) + penalty

    grid = np.concatenate([[0.0], np.geomspace(1e-6, 200, 4000)])
    values = np.array([value(rho) for rho in grid])
    best = int(values.argmin())
    if best == 0:
        return 0.0, value(0.0)
    bounds = (grid[best - 1], grid[min(best + 1, len(grid) - 1)])
    found = minimize_scalar(value, bounds=bounds, method="bounded", options={"xatol": 1e-12})
    return float(found.x * math.sqrt(n[0])), float(found.fun)
