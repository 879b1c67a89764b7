"""Costs between point clouds, as matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from provenn.core.experiment.checks import check_choice, check_number

Cost = str | Callable[[Tensor, Tensor], Tensor]
"""A name of :data:`COSTS`, or a function of points (n, d) and (m, d) that returns their costs (n, m)."""


def _distances(x: Tensor, y: Tensor, p: float = 2.0) -> Tensor:
    """Return the p-norms of differences, with gradient 0 where points coincide."""
    return torch.cdist(x, y, p=p, compute_mode="donot_use_mm_for_euclid_dist")


def _squared(x: Tensor, y: Tensor) -> Tensor:
    # ‖x‖² + ‖y‖² − 2⟨x, y⟩ cancels less around the common mean, which changes no difference.
    middle = (x.detach().mean(dim=0) + y.detach().mean(dim=0)) / 2
    x, y = x - middle, y - middle
    return x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T


def _half_squared(x: Tensor, y: Tensor) -> Tensor:
    return _squared(x, y) / 2


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return 1 - F.normalize(x, dim=1) @ F.normalize(y, dim=1).T


def _geodesic(x: Tensor, y: Tensor) -> Tensor:
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    # Kahan's form of the angle keeps its digits, and a finite gradient, where arccos ⟨x, y⟩ loses both.
    return 2 * torch.atan2(_distances(x, y), _distances(x, -y))


COSTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sqeuclidean": _squared,
    "half_sqeuclidean": _half_squared,
    "euclidean": _distances,
    "cosine": _cosine,
    "geodesic": _geodesic,
}
"""‖x − y‖², half of it, ‖x − y‖, and on the sphere, to which points are scaled, 1 − cos and the angle."""


@dataclass(frozen=True)
class PNormCost:
    """The cost c(x, y) = Σ |x − y|^p over coordinates.

    Args:
        p: Exponent, at least 1.

    Shape:
        (n, d) and (m, d) → (n, m).

    Raises:
        ValueError: ``p`` < 1, where the cost is not convex.

    Cost: O(n m d) time, O(n m) memory.

    Source: arXiv 2302.04953, section 2.
    """

    p: float

    def __post_init__(self) -> None:
        check_number("p", self.p, at_least=1)

    def __call__(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
        """Return the costs between two clouds of points.

        Args:
            x: Points.
            y: Points.
        """
        return _distances(x, y, self.p) ** self.p


@dataclass(frozen=True)
class ElasticCost:
    """The cost c(x, y) = τ ‖x − y‖₁ + ½ ‖x − y‖², whose optimal displacements are sparse.

    Args:
        tau: τ, at least 0.

    Shape:
        (n, d) and (m, d) → (n, m).

    Raises:
        ValueError: ``tau`` < 0.

    Cost: O(n m d) time, O(n m) memory.

    Source: Cuturi, Klein and Ablin, ICML 2023 (arXiv 2302.04065), section 4.
    """

    tau: float

    def __post_init__(self) -> None:
        check_number("tau", self.tau, at_least=0)

    def __call__(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
        """Return the costs between two clouds of points.

        Args:
            x: Points.
            y: Points.
        """
        return self.tau * _distances(x, y, 1.0) + _half_squared(x, y)


def check_cost(cost: Cost) -> None:
    """Check that a cost is a known name or can be called."""
    if isinstance(cost, str):
        check_choice("cost", cost, COSTS)
    elif not callable(cost):
        raise TypeError(f"cost must be a name or a function, got {cost!r}")


def check_clouds(x: Tensor, y: Tensor, names: tuple[str, str] = ("x", "y")) -> None:
    """Check two clouds of points of one space."""
    for name, points in zip(names, (x, y), strict=True):
        if not points.is_floating_point():
            raise TypeError(f"{name} must be floating-point numbers, got {points.dtype}")
        if points.dim() != 2 or 0 in points.shape:
            raise ValueError(f"{name} must be (points, coordinates) and not empty, got shape {tuple(points.shape)}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{names[1]} must have {names[0]}'s {x.shape[1]} coordinates, got {y.shape[1]}")


def cost_matrix(cost: Cost, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Return C_ij = c(x_i, y_j), checked.

    Args:
        cost: A name of :data:`COSTS`, or a function.
        x: Points.
        y: Points.

    Raises:
        ValueError: An unknown name, costs of a wrong shape, or costs that are not finite.
        TypeError: ``cost`` is neither a name nor a function, or returned no tensor.
    """
    check_cost(cost)
    C = (COSTS[cost] if isinstance(cost, str) else cost)(x, y)
    if not isinstance(C, Tensor):
        raise TypeError(f"cost must return a tensor, got {C!r}")
    if C.shape != (len(x), len(y)):
        raise ValueError(f"cost must return the shape {(len(x), len(y))}, got {tuple(C.shape)}")
    if not C.isfinite().all():
        raise ValueError("cost must be finite, got NaN or infinite costs")
    return C
