"""Bures–Wasserstein geometry of symmetric positive definite (SPD) matrices."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.numerics.spd import lyapunov, spd_power
from provenn.nn._gbw_batchnorm_checks import check_spd, check_symmetric
from provenn.nn._gbw_batchnorm_spectral import bures_mean_step, kronecker_sum_power, semidefinite_power, symmetrized

Matrices = Float[Tensor, "... n n"]


def log(P: Matrices, Q: Matrices, metric: Matrices | None = None) -> Matrices:
    """Return the tangent vector at P whose geodesic reaches Q at time 1.

    (PQ)^½ + (QP)^½ − 2P, with (PQ)^½ = P^½ (P^½ Q P^½)^½ P^{−½}.

    Args:
        P: Where the geodesic starts.
        Q: Where it ends.
        metric: M of the generalised metric: the inputs become M^{−½} · M^{−½}, the output M^½ · M^½. ``None`` is I.

    Shape:
        P, Q and M (…, n, n), leading dimensions broadcasting.

    Returns:
        A symmetric matrix; its squared norm under the metric at P is d²(P, Q).

    Raises:
        TypeError: A matrix is neither float64 nor float32.
        ValueError: A matrix is not symmetric positive definite.

    Warns:
        UserWarning: A matrix is float32.

    Cost: three eigendecompositions, O(n³) each; two more with M.

    Source: section 3 of the paper.
    """
    P, Q = _whitened(metric, P=P, Q=Q)
    root, inverse_root = spd_power(P, 0.5), spd_power(P, -0.5)
    C = root @ semidefinite_power(root @ Q @ root, 0.5) @ inverse_root
    return _coloured(metric, C + C.mT - 2 * P)


def exp(P: Matrices, V: Matrices, metric: Matrices | None = None) -> Matrices:
    """Follow the geodesic from P in the direction V for time 1.

    P + V + L P L = (I + L) P (I + L), with L the solution of P L + L P = V.

    Args:
        P: Where the geodesic starts.
        V: A symmetric matrix. Only while I + L ⪰ 0 is this the inverse of :func:`log`.
        metric: As in :func:`log`.

    Shape:
        P, V and M (…, n, n), leading dimensions broadcasting.

    Returns:
        A positive semidefinite matrix; singular where −1 is an eigenvalue of L.

    Raises:
        TypeError: A matrix is neither float64 nor float32.
        ValueError: P or M is not symmetric positive definite, or V is not symmetric.

    Warns:
        UserWarning: A matrix is float32.

    Cost: one eigendecomposition, O(n³); two more with M.

    Source: section 3 of the paper.
    """
    check_symmetric("V", V)
    (P,) = _whitened(metric, P=P)
    L = lyapunov(P, V if metric is None else _conjugated(V, spd_power(metric, -0.5)))
    return _coloured(metric, P + P @ L + L @ P + L @ P @ L)


def dist(P: Matrices, Q: Matrices, metric: Matrices | None = None, theta: float = 1.0) -> Float[Tensor, "..."]:
    """Return the Bures–Wasserstein distance, generalised by a metric and deformed by a power.

    d² = tr P + tr Q − 2 tr (P^½ Q P^½)^½, of P^θ and Q^θ and divided by θ². It is computed as ‖P^{−½} (K − P)‖ with
    K = (P^½ Q P^½)^½, which does not cancel for close matrices.

    Args:
        P: A matrix.
        Q: Another.
        metric: M: the distance is that of M^{−½} P^θ M^{−½} and M^{−½} Q^θ M^{−½}. ``None`` is I.
        theta: θ ≠ 0.

    Shape:
        P, Q and M (…, n, n), leading dimensions broadcasting; the distance (…).

    Returns:
        d.

    Raises:
        TypeError: A matrix is neither float64 nor float32, or θ is no number.
        ValueError: A matrix is not symmetric positive definite, or θ is 0.

    Warns:
        UserWarning: A matrix is float32.

    Cost: three eigendecompositions, O(n³) each; two more with M, and two with θ ≠ 1.

    Source: section 3 of the paper.
    """
    check_theta(theta)
    P, Q = _whitened(metric, theta, P=P, Q=Q)
    root, inverse_root = spd_power(P, 0.5), spd_power(P, -0.5)
    K = semidefinite_power(root @ Q @ root, 0.5)
    return torch.linalg.matrix_norm(inverse_root @ (K - P)) / abs(theta)


def geodesic(P: Matrices, Q: Matrices, t: float, metric: Matrices | None = None) -> Matrices:
    """Return the point at time t of the geodesic from P to Q.

    (1−t)² P + t² Q + t (1−t) ((PQ)^½ + (QP)^½).

    Args:
        P: The point at time 0.
        Q: The point at time 1.
        t: The time.
        metric: As in :func:`log`.

    Shape:
        P, Q and M (…, n, n), leading dimensions broadcasting.

    Returns:
        A positive semidefinite matrix; positive definite for t in [0, 1].

    Raises:
        TypeError: A matrix is neither float64 nor float32, or ``t`` is no number.
        ValueError: A matrix is not symmetric positive definite, or ``t`` is not finite.

    Warns:
        UserWarning: A matrix is float32.

    Cost: as :func:`log`.

    Source: section 3 of the paper.
    """
    check_number("t", t)
    products = log(P, Q, metric) + 2 * P
    return (1 - t) ** 2 * P + t * t * Q + t * (1 - t) * products


def transport(P: Matrices, V: Matrices, inverse: bool = False) -> Matrices:
    """Carry a tangent vector along the geodesic between P and the identity, parallel to itself.

    U (√(2 / (λ_i + λ_j)) ∘ Uᵀ V U) Uᵀ from P = U Λ Uᵀ to I, and the inverse factors from I to P. The form is closed
    because P and I commute.

    Args:
        P: The point.
        V: A symmetric matrix, tangent at P (at I where ``inverse``).
        inverse: Whether to carry from I to P.

    Shape:
        P and V (…, n, n), leading dimensions broadcasting.

    Returns:
        A symmetric matrix, as long at its point as V at its own.

    Raises:
        TypeError: A matrix is neither float64 nor float32.
        ValueError: P is not symmetric positive definite, or V is not symmetric.

    Warns:
        UserWarning: A matrix is float32.

    Cost: one eigendecomposition and four products, O(n³). The derivative by P takes a table of n³ numbers for every P,
    and is finite at equal eigenvalues.

    Source: section 3 of the paper.
    """
    check_spd("P", P)
    check_symmetric("V", V)
    return kronecker_sum_power(P, V, 0.5 if inverse else -0.5)


def barycenter(
    X: Float[Tensor, "batch ... n n"],
    metric: Matrices | None = None,
    theta: float = 1.0,
    max_iters: int = 100,
    tol: float = 1e-13,
) -> Matrices:
    """Return the matrix whose mean squared distance to a batch is smallest.

    The fixed point B = B^{−½} (mean_k (B^½ X_k B^½)^½)² B^{−½}, iterated from the arithmetic mean. One step is exact
    for matrices that commute.

    Args:
        X: The matrices, along the first dimension.
        metric: As in :func:`dist`.
        theta: As in :func:`dist`.
        max_iters: Largest number of steps, at least 1.
        tol: Stop where mean_k (B^½ X_k B^½)^½ is within this of B, relative to B.

    Shape:
        X (N, …, n, n), M (…, n, n); the barycentre (…, n, n).

    Returns:
        The barycentre, which carries no gradient.

    Raises:
        TypeError: A matrix is neither float64 nor float32, or θ is no number.
        ValueError: A matrix is not symmetric positive definite, X is empty, θ is 0, or an option is out of bounds.

    Warns:
        UserWarning: A matrix is float32.

    Cost: N + 1 eigendecompositions a step, O(N n³). It converges linearly.

    Source: Álvarez-Esteban et al. (2016); section 4 of the paper.
    """
    check_theta(theta)
    check_integer("max_iters", max_iters, at_least=1)
    check_number("tol", tol, at_least=0)
    if not len(X):
        raise ValueError(f"X must hold at least one matrix, got the shape {tuple(X.shape)}")
    with torch.no_grad():
        (white,) = _whitened(metric, theta, X=X)
        B = white.mean(0)
        for _ in range(max_iters):
            B, residual = bures_mean_step(B, white)
            if bool((residual <= max(tol, 4 * torch.finfo(B.dtype).eps)).all()):
                break
        B = _coloured(metric, B)
        return B if theta == 1 else spd_power(B, 1 / theta)


def check_theta(theta: float) -> None:
    """Check the power of a power-deformed metric."""
    check_number("theta", theta)
    if theta == 0:
        raise ValueError("theta must not be 0, whose limit, the log-Euclidean metric, is a metric of its own; got 0")


def _conjugated(A: Tensor, by: Tensor) -> Tensor:
    return by @ A @ by


def _whitened(metric: Tensor | None, theta: float = 1.0, **matrices: Tensor) -> list[Tensor]:
    """Check the matrices, raise them to θ, and conjugate them by M^{−½}."""
    for name, matrix in matrices.items():
        check_spd(name, matrix)
    powers = [matrix if theta == 1 else spd_power(matrix, theta) for matrix in matrices.values()]
    if metric is None:
        return powers
    check_spd("metric", metric)
    inverse_root = spd_power(metric, -0.5)
    return [_conjugated(matrix, inverse_root) for matrix in powers]


def _coloured(metric: Tensor | None, A: Tensor) -> Tensor:
    """Conjugate by M^½, and make exactly symmetric."""
    A = A if metric is None else _conjugated(A, spd_power(metric, 0.5))
    return symmetrized(A)
