"""Large sparse symmetric systems: the problem, the solution with its certificate, and the classical solvers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy.sparse
import scipy.sparse.csgraph
import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.numerics.incomplete_cholesky import IncompleteCholesky
from provenn.core.numerics.krylov import Deflation, KrylovTrace, Operator, conjugate_gradient, lanczos
from provenn.core.numerics.sparse import as_csr, check_symmetric, entries


class LinearProblem:
    """A x = b with A symmetric positive definite, but for cells without an unknown and floating regions.

    Rows of zeros are cells without an unknown: x is 0 there. In a region with Neumann walls all around, x is known up
    to a constant; a solution then exists if b sums to zero over the region.

    Args:
        A: The matrix, dense or sparse, (n, n); held in CSR and float64.
        b: The right-hand side, (n,); held in float64 on A's device.
        grid_shape: The grid whose cells, in C order, are the unknowns; ``None`` for none, which only the classical
            solvers take.

    Shape:
        ``A`` (n, n), ``b`` (n,), n the product of ``grid_shape``.

    Raises:
        ValueError: A is not square or not symmetric, b or the grid is of another size, b is not finite, or b is
            inconsistent with A's null space: its sum over a floating region is not zero.
        TypeError: A is no floating-point tensor.

    Cost: two products with A and a search for connected regions, O(entries), once for a problem.

    Source: Kaneda et al., arXiv 2205.10763, section on the model problem; its rows of zeros as in the authors' code.
    """

    def __init__(self, A: Tensor, b: Float[Tensor, " n"], grid_shape: tuple[int, ...] | None = None) -> None:
        self.A = as_csr("A", A).double()
        size = self.A.shape[0]
        if b.shape != (size,):
            raise ValueError(f"b must have shape ({size},), got {tuple(b.shape)}")
        if not b.isfinite().all():
            raise ValueError("b must be finite, got NaN or infinite entries")
        if grid_shape is not None and math.prod(grid_shape) != size:
            raise ValueError(f"grid_shape must have {size} cells, got {tuple(grid_shape)}")
        self.b = b.detach().to(self.A)
        self.grid_shape = None if grid_shape is None else tuple(grid_shape)
        check_symmetric("A", self.A)
        self._check_consistent()

    @property
    def diagonal(self) -> Float[Tensor, " n"]:
        """The diagonal of A."""
        rows, columns, values = entries(self.A)
        on = rows == columns
        return torch.zeros_like(self.b).index_add(0, rows[on], values[on])

    @property
    def active(self) -> Tensor:
        """Whether a cell holds an unknown: its row is not zero."""
        rows, _, values = entries(self.A)
        return torch.zeros_like(self.b).index_add(0, rows, values.abs()) > 0

    def apply(self, x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return A x."""
        return self.A @ x

    def _check_consistent(self) -> None:
        """The constant of a region is in the null space where A maps it to zero; b must be orthogonal to it."""
        size = self.A.shape[0]
        rows, columns, values = entries(self.A)
        linked = values != 0
        graph = scipy.sparse.coo_matrix(
            (linked.cpu().numpy()[linked.cpu().numpy()], (rows[linked].cpu().numpy(), columns[linked].cpu().numpy())),
            shape=(size, size),
        )
        regions, labels = scipy.sparse.csgraph.connected_components(graph, directed=False)
        label = torch.from_numpy(labels).long().to(self.A.device)
        leak = self.b.new_zeros(regions).index_add(0, label, (self.A @ torch.ones_like(self.b)).abs())
        scale = self.b.new_zeros(regions).index_add(0, label[rows], values.abs())
        floating = leak <= 1e-12 * scale
        total = self.b.new_zeros(regions).index_add(0, label, self.b)
        magnitude = self.b.new_zeros(regions).index_add(0, label, self.b.abs())
        # b often comes from sums that cancel in single precision.
        bad = (floating & (total.abs() > 1e-6 * magnitude)).nonzero()
        if len(bad):
            one = int(bad[0].item())
            cells = int((label == one).sum().item())
            raise ValueError(
                f"b is inconsistent: A's null space holds the constant on a region of {cells} of {size} cells, over "
                f"which b sums to {total[one].item():.3g} instead of 0"
            )


@dataclass(frozen=True)
class Certificate:
    """What shows how good a solution is.

    Args:
        residual_norms: ‖b − A x_k‖ of every iterate, from the start; the last is that of the solution.
        energy_gap: ½‖x_k − x*‖²_A − ½‖x − x*‖²_A of every iterate: how much further above the minimum of
            ½xᵀA x − bᵀx it stands than the solution x, and so a lower bound of its own error. Never increases; the last
            is 0.
        iterations: Iterations taken.
        converged: Whether the last residual is below the tolerance.
    """

    residual_norms: tuple[float, ...]
    energy_gap: tuple[float, ...]
    iterations: int
    converged: bool

    @property
    def residual_norm(self) -> float:
        """The solution's own ‖b − A x‖."""
        return self.residual_norms[-1]

    @classmethod
    def of(cls, trace: KrylovTrace, goal: float) -> Certificate:
        """Certify a trace of iterates; converged where the last residual's norm is below the goal, or zero."""
        gaps = [0.0]
        for drop in reversed(trace.energy_drops):
            gaps.append(gaps[-1] + drop)
        last = trace.residual_norms[-1]
        # Rounding between the updated residual and the computed one is no failure.
        converged = last == 0 or last < goal * (1 + 1e-6)
        return cls(trace.residual_norms, tuple(reversed(gaps)), len(trace.energy_drops), converged)


@dataclass(frozen=True)
class Solution:
    """A solution with its certificate.

    Args:
        x: The solution, float64.
        certificate: Its certificate.
    """

    x: Float[Tensor, " n"]
    certificate: Certificate

    @property
    def converged(self) -> bool:
        """Whether the tolerance was met."""
        return self.certificate.converged


class ConjugateGradient:
    """Solve by conjugate gradients.

    Args:
        tol: Stop at ‖r‖ < tol · ‖b‖.
        max_iter: Most iterations.

    Raises:
        ValueError: ``tol`` is not above 0, or ``max_iter`` < 1; in :meth:`solve` a ``NotPositiveDefiniteError``, which
            is a ``ValueError``, where a direction has dᵀA d ≤ 0.

    Cost: one product with A and O(n) an iteration; O(√κ) iterations, the side of a grid, for a condition number κ.

    Source: Hestenes & Stiefel, J. Res. NBS 49 (1952).
    """

    def __init__(self, tol: float = 1e-4, max_iter: int = 1000) -> None:
        check_number("tol", tol, above=0)
        check_integer("max_iter", max_iter, at_least=1)
        self.tol = tol
        self.max_iter = max_iter

    def solve(self, problem: LinearProblem) -> Solution:
        """Solve a problem from x = 0.

        Args:
            problem: The problem.

        Returns:
            The solution and its certificate.
        """
        return self._solve(problem)

    def _solve(
        self, problem: LinearProblem, precondition: Operator | None = None, deflation: Deflation | None = None
    ) -> Solution:
        trace = conjugate_gradient(
            problem.apply,
            problem.b,
            tol=self.tol,
            max_iter=self.max_iter,
            precondition=precondition,
            deflation=deflation,
        )
        return Solution(trace.x, Certificate.of(trace, self.tol * problem.b.norm().item()))


class DeflatedCG(ConjugateGradient):
    """Solve by conjugate gradients, preconditioned by A's diagonal, and deflated by Ritz vectors of b.

    Args:
        n_ritz: Ritz vectors, from as many steps of Lanczos' method on b.
        tol: As in :class:`ConjugateGradient`.
        max_iter: As in :class:`ConjugateGradient`.

    Raises:
        ValueError: ``n_ritz`` < 1, or as :class:`ConjugateGradient`.

    Cost: ``n_ritz`` products with A before, two products with A and O(n · n_ritz) an iteration.

    Source: Saad, Yeung, Erhel & Guyomarc'h, SIAM J. Sci. Comput. 21 (2000), algorithm 3.5; with the authors' choice of
    vectors in arXiv 2205.10763.
    """

    def __init__(self, n_ritz: int = 16, tol: float = 1e-4, max_iter: int = 1000) -> None:
        super().__init__(tol, max_iter)
        check_integer("n_ritz", n_ritz, at_least=1)
        self.n_ritz = n_ritz

    def solve(self, problem: LinearProblem) -> Solution:
        """Solve a problem from the exact solution within the Ritz vectors, which is not counted as an iteration.

        Args:
            problem: The problem.

        Returns:
            The solution and its certificate.
        """
        diagonal = problem.diagonal
        scale = torch.where(diagonal > 0, 1 / diagonal, 1.0)
        if not problem.b.any():
            return super().solve(problem)
        found = lanczos(problem.A, problem.b, min(self.n_ritz, len(problem.b)))
        energies, mixing = found.ritz()
        kept = energies > 1e-12 * energies.abs().max()
        deflation = Deflation((found.vectors.T @ mixing[:, kept]).T.contiguous(), energies[kept])
        return self._solve(problem, lambda r: scale * r, deflation)


class ICPreconditionedCG(ConjugateGradient):
    """Solve by conjugate gradients, preconditioned by incomplete Cholesky factors without fill-in.

    Args:
        tol: As in :class:`ConjugateGradient`.
        max_iter: As in :class:`ConjugateGradient`.

    Raises:
        ValueError: As :class:`ConjugateGradient`; in :meth:`solve` a ``NotPositiveDefiniteError`` also where the
            factorisation meets a negative pivot.

    Cost: a factorisation for each new A (the last one is kept), two triangular solves and one product with A an
    iteration. See :class:`~provenn.core.numerics.incomplete_cholesky.IncompleteCholesky`.

    Source: Meijerink & van der Vorst, Math. Comp. 31 (1977).
    """

    def __init__(self, tol: float = 1e-4, max_iter: int = 1000) -> None:
        super().__init__(tol, max_iter)
        self._factors: tuple[Tensor, IncompleteCholesky] | None = None

    def solve(self, problem: LinearProblem) -> Solution:
        """Solve a problem from x = 0.

        Args:
            problem: The problem.

        Returns:
            The solution and its certificate.
        """
        return self._solve(problem, self.factors(problem.A).solve)

    def factors(self, A: Tensor) -> IncompleteCholesky:
        """Return the factors of a CSR matrix, the kept ones where they are of the same matrix.

        Args:
            A: A problem's matrix.
        """
        if self._factors is None or not _equal(self._factors[0], A):
            self._factors = (A, IncompleteCholesky(A))
        return self._factors[1]


def _equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    return (
        one.shape == other.shape
        and one.device == other.device
        and torch.equal(one.crow_indices(), other.crow_indices())
        and torch.equal(one.col_indices(), other.col_indices())
        and torch.equal(one.values(), other.values())
    )
