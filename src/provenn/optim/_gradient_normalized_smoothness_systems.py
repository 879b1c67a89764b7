"""Damped Newton systems (H + λB) h = −g, for one H and many λ: by Cholesky, conjugate gradients or a formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_choice
from provenn.core.numerics.krylov import NotPositiveDefiniteError, conjugate_gradient

LinearSolver = Literal["cholesky", "cg", "wsm"]
SOLVERS = ("cholesky", "cg", "wsm")
CG_TOLERANCE = 1e-10


@dataclass(frozen=True)
class RankOne:
    """The matrix α v vᵀ, kept as its number and its vector.

    Args:
        alpha: α.
        vector: v.

    Shape:
        ``vector`` (n,).

    Raises:
        ValueError: ``alpha`` or ``vector`` is not finite.

    Cost: O(n) for a product, and for a damped system by Sherman and Morrison's formula.

    Source: Sherman & Morrison, Ann. Math. Stat. 21 (1950); in the paper's experiments for the Fisher term.
    """

    alpha: float
    vector: Float[Tensor, " n"]

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be finite, got {self.alpha}")
        if not self.vector.isfinite().all():
            raise ValueError("vector must be finite, got NaN or infinite entries")

    def __call__(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return α v₀ ⟨v₀, v⟩, v₀ the kept vector."""
        return self.alpha * self.vector.dot(v) * self.vector

    def dense(self) -> Float[Tensor, "n n"]:
        """Return the matrix itself."""
        return self.alpha * torch.outer(self.vector, self.vector)


Curvature = Tensor | RankOne | Callable[[Tensor], Tensor] | None
"""An approximation H at one point: a matrix, α v vᵀ, a product v ↦ H v, or ``None`` for zero."""


class Metric:
    """The norms ‖h‖² = ⟨Bh, h⟩ and ‖g‖_*² = ⟨g, B⁻¹g⟩ of a symmetric positive definite B; ``None``: the identity."""

    def __init__(self, B: Float[Tensor, "n n"] | None = None) -> None:
        self.B: Tensor | None = None
        self._factor: Tensor | None = None
        if B is None:
            return
        check_symmetric("metric", B)
        self._factor, info = torch.linalg.cholesky_ex(B)
        if info.item():
            raise ValueError(f"metric must be positive definite, but its leading minor {info.item()} is not")
        self.B = B

    def to(self, like: Tensor) -> Metric:
        """Return the metric for vectors of another type or device; names those of another length."""
        if self.B is None:
            return self
        if len(self.B) != len(like):
            raise ValueError(f"metric must be {len(like)} × {len(like)}, as there are variables, got {len(self.B)}")
        if self.B.dtype == like.dtype and self.B.device == like.device:
            return self
        return Metric(self.B.to(like))

    def apply(self, h: Tensor) -> Tensor:
        """Return B h."""
        return h if self.B is None else self.B @ h

    def solve(self, g: Tensor) -> Tensor:
        """Return B⁻¹ g."""
        return g if self._factor is None else torch.cholesky_solve(g.unsqueeze(-1), self._factor).squeeze(-1)

    def norm(self, h: Tensor) -> Tensor:
        """Return ‖h‖ over the last dimension."""
        return _lengths(h if self._factor is None else h @ self._factor)

    def dual_norm(self, g: Tensor) -> Tensor:
        """Return ‖g‖_* over the last dimension."""
        if self._factor is None:
            return _lengths(g)
        return _lengths(torch.linalg.solve_triangular(self._factor, g.unsqueeze(-1), upper=False).squeeze(-1))

    def unit(self, z: Tensor) -> Tensor:
        """Map vectors of normal draws, one a row, to directions that are uniform on the sphere ‖d‖ = 1."""
        z = z / _lengths(z).unsqueeze(-1)
        if self._factor is None:
            return z
        units: Tensor = torch.linalg.solve_triangular(self._factor.mT, z.unsqueeze(-1), upper=True)
        return units.squeeze(-1)


def _lengths(vectors: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return lengths


def check_symmetric(name: str, matrix: Tensor) -> None:
    """Check that an argument is a finite, symmetric matrix.

    Raises:
        ValueError: It is not; what products of matrices leave of asymmetry by rounding is none.
    """
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name} must be a square matrix, got shape {tuple(matrix.shape)}")
    if not matrix.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    if matrix.numel() == 0:
        return
    off, largest = (matrix - matrix.mT).abs().max().item(), matrix.abs().max().item()
    if off > 1e4 * torch.finfo(matrix.dtype).eps * largest:
        raise ValueError(f"{name} must be symmetric, but entries differ from their mirror images by {off:.3g}")


class DampedSystem:
    """(H + λB) h = −g for one H and g.

    Args:
        curvature: H.
        g: g.
        metric: B.
        solver: ``"cholesky"``; ``"cg"``, to a residual of 1e-10 of ‖g‖; or ``"wsm"``, Sherman and Morrison's formula,
            for a rank-one H. A zero H needs none of them.

    Raises:
        ValueError: H is not symmetric, not finite, or of another size; or ``"wsm"`` meets an H that is not rank-one.

    Cost: for each λ O(n³) by Cholesky, O(√κ) products by conjugate gradients, O(n) by the formula (O(n²) with a B).
    """

    def __init__(self, curvature: Curvature, g: Float[Tensor, " n"], metric: Metric, solver: LinearSolver) -> None:
        check_choice("solver", solver, SOLVERS)
        self._g, self._metric, self._solver = g, metric, solver
        self._curvature = self._prepared(curvature)

    def _prepared(self, curvature: Curvature) -> Curvature:
        """Check H, and turn it into what the solver needs."""
        if curvature is None:
            return None
        if self._solver == "wsm":
            if not isinstance(curvature, RankOne):
                raise ValueError(f"solver 'wsm' needs a RankOne hessian, got a {type(curvature).__name__}")
            return RankOne(curvature.alpha, self._sized(curvature.vector))
        if isinstance(curvature, Tensor):
            curvature = curvature.to(self._g)
        elif self._solver == "cholesky":
            curvature = dense(curvature, self._g)
        if isinstance(curvature, Tensor):
            check_symmetric("hessian", curvature)
            self._sized(curvature)
        return curvature

    def _sized(self, tensor: Tensor) -> Tensor:
        if len(tensor) != len(self._g):
            raise ValueError(f"hessian must be of size {len(self._g)}, as there are variables, got {len(tensor)}")
        return tensor.to(self._g)

    def solve(self, damping: float) -> Float[Tensor, " n"] | None:
        """Return h for one λ; ``None`` where H + λB is not positive definite."""
        if self._curvature is None:
            return -self._metric.solve(self._g) / damping
        if isinstance(self._curvature, RankOne) and self._solver == "wsm":
            return self._by_formula(self._curvature, damping)
        if self._solver == "cg":
            return self._by_conjugate_gradients(damping)
        return self._by_cholesky(self._curvature, damping)

    def reciprocal_slope(self, damping: float, h: Float[Tensor, " n"]) -> float:
        """Return the derivative of 1/‖h(λ)‖ by λ, where h is the solution for that λ."""
        turned = DampedSystem(self._curvature, -self._metric.apply(h), self._metric, self._solver).solve(damping)
        assert turned is not None
        return (self._metric.apply(h).dot(turned) / self._metric.norm(h) ** 3).item()

    def _by_cholesky(self, curvature: Curvature, damping: float) -> Tensor | None:
        assert isinstance(curvature, Tensor)
        damped = curvature.clone()
        if self._metric.B is None:
            damped.diagonal().add_(damping)
        else:
            damped.add_(self._metric.B, alpha=damping)
        factor, info = torch.linalg.cholesky_ex(damped)
        if info.item():
            return None
        return -torch.cholesky_solve(self._g.unsqueeze(-1), factor).squeeze(-1)

    def _by_formula(self, curvature: RankOne, damping: float) -> Tensor | None:
        step = -self._metric.solve(self._g) / damping
        turned = self._metric.solve(curvature.vector) / damping
        denominator = 1 + curvature.alpha * curvature.vector.dot(turned)
        if not denominator > 0:
            return None
        return step - curvature.alpha * curvature.vector.dot(step) / denominator * turned

    def _by_conjugate_gradients(self, damping: float) -> Tensor | None:
        product = self._curvature.matmul if isinstance(self._curvature, Tensor) else self._curvature
        assert callable(product)

        def damped(v: Tensor) -> Tensor:
            return product(v) + damping * self._metric.apply(v)

        try:
            # In exact arithmetic n iterations are enough; rounding may need some more.
            trace = conjugate_gradient(
                damped, -self._g, tol=CG_TOLERANCE, max_iter=4 * len(self._g) + 20, precondition=self._metric.solve
            )
        except NotPositiveDefiniteError:
            return None
        return trace.x


def dense(curvature: Curvature, like: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
    """Return H as a matrix, by its own ``dense()`` where it has one, else by its products with unit vectors."""
    size = len(like)
    if curvature is None:
        return like.new_zeros(size, size)
    if isinstance(curvature, Tensor):
        return curvature.to(like)
    if hasattr(curvature, "dense"):
        return curvature.dense().to(like)  # type: ignore[no-any-return]
    unit = torch.eye(size, dtype=like.dtype, device=like.device)
    columns = torch.stack([curvature(one) for one in unit])
    if columns.shape != (size, size):
        raise ValueError(
            f"hessian must map vectors of {size} to such, got a result of shape {tuple(columns.shape[1:])}"
        )
    return (columns + columns.mT) / 2
