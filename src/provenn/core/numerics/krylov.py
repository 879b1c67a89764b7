"""Krylov methods for symmetric matrices: conjugate gradients, plain, preconditioned or deflated, and Lanczos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer
from provenn.core.numerics.sparse import as_csr

Operator = Callable[[Tensor], Tensor]
"""A linear map of vectors."""


class NotPositiveDefiniteError(ValueError):
    """A direction d with dᵀA d ≤ 0 was met: A is not positive definite.

    Args:
        message: What was seen.
        iteration: The iteration at which it was seen, from 0.
    """

    def __init__(self, message: str, iteration: int) -> None:
        super().__init__(message)
        self.iteration = iteration

    def __reduce__(self) -> tuple[type[NotPositiveDefiniteError], tuple[str, int]]:
        return type(self), (str(self), self.iteration)


def positive_curvature(curvature: Tensor, iteration: int) -> float:
    """Return dᵀA d as a number.

    Raises:
        NotPositiveDefiniteError: It is not above 0; the message names the iteration.
    """
    value = curvature.item()
    if not value > 0:
        raise NotPositiveDefiniteError(
            f"A must be positive definite, but dᵀA d = {value:.3g} at iteration {iteration}", iteration
        )
    return value


@dataclass(frozen=True)
class KrylovTrace:
    """What an iteration left: the solution, ‖b − A x_k‖ for k = 0, 1, …, and how far each step lowered ½xᵀA x − bᵀx."""

    x: Tensor
    residual_norms: tuple[float, ...]
    energy_drops: tuple[float, ...]


@dataclass(frozen=True)
class Deflation:
    """A subspace that conjugate gradients leave to a direct solve: rows W that are A-orthogonal.

    Args:
        basis: W, one vector a row.
        energies: wᵀA w of each, all above 0.
    """

    basis: Float[Tensor, "count n"]
    energies: Float[Tensor, " count"]

    def solve(self, v: Tensor) -> Tensor:
        """Return Wᵀ (W A Wᵀ)⁻¹ W v, the A-projection of A⁻¹v to the subspace."""
        return self.basis.T @ ((self.basis @ v) / self.energies)


def conjugate_gradient(
    apply: Operator,
    b: Float[Tensor, " n"],
    *,
    tol: float,
    max_iter: int,
    precondition: Operator | None = None,
    deflation: Deflation | None = None,
) -> KrylovTrace:
    """Solve A x = b by conjugate gradients from x = 0 until ‖r‖ < tol · ‖b‖.

    Args:
        apply: v ↦ A v, symmetric positive definite on the space that b spans with A.
        b: The right-hand side.
        tol: Relative tolerance.
        max_iter: Most iterations.
        precondition: r ↦ M⁻¹r, symmetric positive definite; ``None`` for the identity.
        deflation: The start solves in this subspace, and directions are kept A-orthogonal to it.

    Returns:
        The trace. Norms are those of the updated residual, except the last, which is computed from x.

    Raises:
        NotPositiveDefiniteError: A direction has dᵀA d ≤ 0.

    Cost: one product with A, one preconditioning and O(n) an iteration (two products with deflation); 4 vectors.

    Source: Hestenes & Stiefel, J. Res. NBS 49 (1952); deflation as in Saad, Yeung, Erhel & Guyomarc'h, SIAM J. Sci.
    Comput. 21 (2000), algorithm 3.5.
    """
    x, r = torch.zeros_like(b), b.clone()
    drops: list[float] = []
    if deflation is not None:
        x = deflation.solve(b)
        r = b - apply(x)
    norms = [r.norm().item()]
    goal = tol * b.norm().item()
    d, previous = None, 1.0
    while norms[-1] > 0 and norms[-1] >= goal and len(drops) < max_iter:
        z = r if precondition is None else precondition(r)
        slope = r.dot(z).item()
        d = z.clone() if d is None else d.mul_(slope / previous).add_(z)
        if deflation is not None:
            d.sub_(deflation.solve(apply(z)))
        Ad = apply(d)
        step = slope / positive_curvature(d.dot(Ad), len(drops))
        x.add_(d, alpha=step)
        r.sub_(Ad, alpha=step)
        previous = slope
        norms.append(r.norm().item())
        drops.append(0.5 * step * slope)
    norms[-1] = (b - apply(x)).norm().item()
    return KrylovTrace(x, tuple(norms), tuple(drops))


@dataclass(frozen=True)
class Lanczos:
    """A tridiagonal picture of A: W A Wᵀ = T with W Wᵀ = I.

    Args:
        vectors: W, one Lanczos vector a row.
        diagonal: Of T.
        off_diagonal: Of T.
    """

    vectors: Float[Tensor, "count n"]
    diagonal: Float[Tensor, " count"]
    off_diagonal: Float[Tensor, " count_minus_1"]

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return the Ritz values, ascending, and the matrix whose columns are T's eigenvectors y_j.

        The Ritz vectors are q_j = Wᵀ y_j; mixtures Σ c_j q_j are cheaper as Wᵀ (Y c).

        Cost: O(count³).
        """
        T = torch.diag(self.diagonal) + torch.diag(self.off_diagonal, 1) + torch.diag(self.off_diagonal, -1)
        values, vectors = torch.linalg.eigh(T)
        return values, vectors


def lanczos(A: Tensor | Operator, v0: Float[Tensor, " n"], k: int, reorthogonalize: bool = True) -> Lanczos:
    """Run k steps of Lanczos' method on a symmetric matrix.

    Args:
        A: Symmetric: a matrix, dense or sparse, (n, n), or a map v ↦ A v.
        v0: The start, any length but zero.
        k: Steps, at most n.
        reorthogonalize: Whether each new vector is made orthogonal to all before it, twice. Without, orthogonality is
            lost once Ritz values converge, and copies of them appear.

    Shape:
        ``v0`` (n,). The result's ``vectors`` (k, n), ``diagonal`` (k,), ``off_diagonal`` (k − 1,).

    Returns:
        The decomposition; of fewer than k vectors if those span an invariant subspace, as with repeated eigenvalues.

    Raises:
        ValueError: A is not square, v0 is zero or of another length, or k is out of 1 … n.
        TypeError: A is no floating-point tensor.

    Cost: k products with A; O(n k²) time with reorthogonalisation, O(n k) without; n k numbers of memory.

    Source: Lanczos, J. Res. NBS 45 (1950); Parlett, The Symmetric Eigenvalue Problem (1998), ch. 13; Kaneda et al.,
    arXiv 2205.10763, section on the training data, for its use here.
    """
    if isinstance(A, Tensor):
        matrix = as_csr("A", A)
        if v0.shape != (len(matrix),):
            raise ValueError(f"v0 must have shape ({len(matrix)},), got {tuple(v0.shape)}")
        v0 = v0.to(matrix.device, matrix.dtype)
        apply: Operator = matrix.matmul
    else:
        apply = A
    size = len(v0)
    check_integer("k", k, at_least=1, at_most=size)
    length = v0.norm().item()
    if not 0 < length < float("inf"):
        raise ValueError(f"v0 must be finite and not zero, got one of norm {length}")
    W = torch.zeros(k, size, dtype=v0.dtype, device=v0.device)
    W[0] = v0 / length
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    scale = 0.0
    for j in range(k):
        w = apply(W[j])
        alphas.append(W[j].dot(w))
        scale = max(scale, w.norm().item())
        if j + 1 == k:
            break
        w = w - alphas[j] * W[j]
        if j > 0:
            w = w - betas[j - 1] * W[j - 1]
        if reorthogonalize:
            for _ in range(2):  # once leaves errors of the order of what was removed
                w = w - W[: j + 1].T @ (W[: j + 1] @ w)
        beta = w.norm()
        if beta.item() <= size * torch.finfo(v0.dtype).eps * scale:
            break
        betas.append(beta)
        W[j + 1] = w / beta
    count = len(alphas)
    off_diagonal = torch.stack(betas) if betas else W.new_zeros(0)
    return Lanczos(W[:count], torch.stack(alphas), off_diagonal)
