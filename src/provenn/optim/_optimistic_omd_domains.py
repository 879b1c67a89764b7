"""Convex sets that online methods play in: what they project on, and how wide they are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_number
from provenn.optim._optimistic_omd_projections import project_ball, project_box, project_simplex


class Domain(ABC):
    """A closed convex set of ℝ^d."""

    @abstractmethod
    def project(self, x: Tensor, metric: Tensor | None = None) -> Tensor:
        """Return the nearest points of the set in a metric."""

    @abstractmethod
    def diameter(self, size: int) -> float:
        """Return the largest Euclidean distance of two of its points in ``size`` dimensions."""

    def check(self, size: int) -> None:  # noqa: B027 - a set that lies in any dimension has nothing to check
        """Check that the set lies in ``size`` dimensions.

        Raises:
            ValueError: It lies in others.
        """

    def contains(self, x: Tensor) -> bool:
        """Whether a point is in the set, to a thousand roundings."""
        distance = torch.linalg.vector_norm(x - self.project(x))
        scale = max(1.0, float(torch.linalg.vector_norm(x)))
        return float(distance) <= 1e3 * torch.finfo(x.dtype).eps * scale

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items() if k[0] != '_')})"


class Ball(Domain):
    """The ball ‖x − center‖₂ ≤ radius.

    Args:
        radius: Its radius.
        center: Its centre (d,); ``None``: the origin, in any dimension.

    Raises:
        ValueError: ``radius`` ≤ 0, ``center`` is no vector, or, in an optimizer, of another size.
        TypeError: ``radius`` is no number.

    Cost: as :func:`project_ball`.

    Source: arXiv 2302.04552, the bounded domain 𝒳.
    """

    def __init__(self, radius: float = 1.0, center: Float[Tensor, " d"] | None = None) -> None:
        check_number("radius", radius, above=0)
        if center is not None and center.dim() != 1:
            raise ValueError(f"center must be a vector, got the shape {tuple(center.shape)}")
        self.radius, self.center = float(radius), center

    def project(self, x: Tensor, metric: Tensor | None = None) -> Tensor:
        """Return the nearest points of the ball; see :func:`project_ball`."""
        return project_ball(x, self.radius, self.center, metric)

    def diameter(self, size: int) -> float:
        """Return twice the radius."""
        return 2 * self.radius

    def check(self, size: int) -> None:
        """Check the size of ``center``."""
        _check_size("center", self.center, size)


class Box(Domain):
    """The box low ≤ x ≤ high.

    Args:
        low: Least value, of all coordinates or of each (d,).
        high: Largest value, likewise.

    Raises:
        ValueError: ``low`` > ``high``, one is not finite, or, in an optimizer, of another size.

    Cost: as :func:`project_box`.

    Source: arXiv 2302.04552, the bounded domain 𝒳.
    """

    def __init__(self, low: float | Float[Tensor, " d"] = 0.0, high: float | Float[Tensor, " d"] = 1.0) -> None:
        lows, highs = torch.as_tensor(low), torch.as_tensor(high)
        for name, bound in (("low", lows), ("high", highs)):
            if not bool(bound.isfinite().all()) or bound.dim() > 1:
                raise ValueError(f"{name} must be a finite number or vector, got {bound}")
        if bool((lows > highs).any()):
            raise ValueError(f"low must be at most high, got {low} and {high}")
        self.low, self.high = low, high

    def project(self, x: Tensor, metric: Tensor | None = None) -> Tensor:
        """Return the nearest points of the box; see :func:`project_box`."""
        return project_box(x, self.low, self.high, metric)

    def diameter(self, size: int) -> float:
        """Return the length of the diagonal."""
        sides = (torch.as_tensor(self.high) - torch.as_tensor(self.low)).double().expand(size)
        return float(torch.linalg.vector_norm(sides))

    def check(self, size: int) -> None:
        """Check the sizes of ``low`` and ``high``."""
        _check_size("low", self.low, size)
        _check_size("high", self.high, size)


class Simplex(Domain):
    """The simplex x ≥ 0, Σ x = total.

    Args:
        total: The sum of the coordinates.

    Raises:
        ValueError: ``total`` ≤ 0.
        TypeError: ``total`` is no number; or, in an optimizer, several tensors are to be on one simplex.

    Cost: as :func:`project_simplex`.

    Source: arXiv 2302.04552, the bounded domain 𝒳.
    """

    def __init__(self, total: float = 1.0) -> None:
        check_number("total", total, above=0)
        self.total = float(total)

    def project(self, x: Tensor, metric: Tensor | None = None) -> Tensor:
        """Return the nearest points of the simplex; see :func:`project_simplex`."""
        return project_simplex(x, self.total, metric)

    def diameter(self, size: int) -> float:
        """Return the distance of two corners."""
        return math.sqrt(2) * self.total if size > 1 else 0.0


class AffineBall(Domain):
    """The points of a ball that satisfy linear equations, A x = b.

    In coordinates of the affine space it is a ball again, which is how it is projected on.

    Args:
        A: The equations' rows, linearly independent.
        b: Their right-hand sides.
        radius: Radius of the ball.
        center: Centre of the ball; ``None``: the origin.

    Shape:
        ``A`` (m, d) with m < d, ``b`` (m,), ``center`` (d,).

    Raises:
        ValueError: ``radius`` ≤ 0; ``A``, ``b`` or ``center`` do not fit, or the rows of ``A`` depend on each other;
            the space misses the ball.
        TypeError: ``radius`` is no number.

    Cost: O(d² m) at construction, O(d²) a projection; in a metric O(d³).

    Source: arXiv 2302.04552, the bounded domain 𝒳.
    """

    def __init__(
        self,
        A: Float[Tensor, "m d"],
        b: Float[Tensor, " m"],
        radius: float = 1.0,
        center: Float[Tensor, " d"] | None = None,
    ) -> None:
        check_number("radius", radius, above=0)
        if A.dim() != 2 or A.shape[0] >= A.shape[1]:
            raise ValueError(f"A must have fewer rows than columns, got the shape {tuple(A.shape)}")
        if b.shape != A.shape[:1]:
            raise ValueError(f"b must have the shape ({A.shape[0]},), got {tuple(b.shape)}")
        _check_size("center", center, A.shape[1])
        rows, right = A.double(), b.double()
        _, values, vectors = torch.linalg.svd(rows)
        if float(values[-1]) <= 1e-12 * float(values[0]):
            raise ValueError("A must have independent rows, got dependent ones")
        origin = rows.new_zeros(A.shape[1]) if center is None else center.double()
        nearest = origin + torch.linalg.pinv(rows) @ (right - rows @ origin)
        gap = float(torch.linalg.vector_norm(nearest - origin))
        if gap >= radius:
            raise ValueError(f"radius must be above {gap:.6g}, the distance of A x = b from the center, got {radius}")
        self.A, self.b, self.radius, self.center = A, b, float(radius), center
        self._nearest, self._basis = nearest, vectors[len(values) :].mT.contiguous()
        self._inner = math.sqrt(radius * radius - gap * gap)

    def project(self, x: Tensor, metric: Tensor | None = None) -> Tensor:
        """Return the nearest points of the set.

        Args:
            x: The points (..., d).
            metric: A diagonal (d,) or a matrix (d, d), symmetric positive definite; ``None``: the identity.
        """
        basis, nearest = self._basis.to(x), self._nearest.to(x)
        if metric is None:
            return nearest + project_ball((x - nearest) @ basis, self._inner) @ basis.mT
        H = torch.diag(metric) if metric.dim() == 1 else metric
        reduced = basis.mT @ H @ basis
        inside = torch.linalg.solve(reduced, ((x - nearest) @ H @ basis).unsqueeze(-1)).squeeze(-1)
        return nearest + project_ball(inside, self._inner, metric=reduced) @ basis.mT

    def diameter(self, size: int) -> float:
        """Return the diameter of the cut through the ball."""
        return 2 * self._inner

    def check(self, size: int) -> None:
        """Check the number of unknowns."""
        if self.A.shape[1] != size:
            raise ValueError(f"A must have {size} columns, one an entry of the parameters, got {self.A.shape[1]}")


def _check_size(name: str, value: Any, size: int) -> None:
    if isinstance(value, Tensor) and value.dim() and value.shape != (size,):
        raise ValueError(f"{name} must have {size} entries, one an entry of the parameters, got {tuple(value.shape)}")
