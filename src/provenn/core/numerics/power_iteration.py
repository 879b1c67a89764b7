"""Power iteration: the largest eigenvalue of a positive semidefinite map, and the norm of any linear map."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer
from provenn.core.numerics.krylov import Operator


def largest_eigenvalue(
    apply: Operator, start: Float[Tensor, " n"], steps: int = 10
) -> tuple[float, Float[Tensor, " n"]]:
    """Estimate the largest eigenvalue of a symmetric positive semidefinite map from below.

    Args:
        apply: v ↦ A v.
        start: First direction, of any length; the result of an earlier call on a nearby map starts closer.
        steps: Products with A.

    Shape:
        ``start`` and the direction returned (n,).

    Returns:
        The Rayleigh quotient vᵀA v of the last direction but one, which never exceeds the largest eigenvalue, and the
        last direction, of length 1. A v = 0 ends the iteration: 0 and v.

    Raises:
        ValueError: ``steps`` < 1.

    Cost: ``steps`` products and O(n) each; the error falls by (λ₂/λ₁)² a step.

    Source: Golub & Van Loan, Matrix Computations (2013), section 8.2.
    """
    check_integer("steps", steps, at_least=1)
    length = start.norm()
    v = start / length if length > 0 else torch.full_like(start, len(start) ** -0.5)
    quotient = 0.0
    for _ in range(steps):
        Av = apply(v)
        quotient, length = v.dot(Av).item(), Av.norm()
        if not length > 0:
            break
        v = Av / length
    return quotient, v


def operator_norm(
    apply: Operator, transposed: Operator, start: Float[Tensor, " n"], steps: int = 10
) -> tuple[float, Float[Tensor, " n"]]:
    """Estimate the spectral norm of a linear map from below, by power iteration on AᵀA.

    Args:
        apply: v ↦ A v.
        transposed: u ↦ Aᵀu.
        start: First direction, in A's domain.
        steps: Products with A, and as many with Aᵀ.

    Shape:
        ``start`` and the direction returned (n,).

    Returns:
        The estimate, and the last direction.

    Raises:
        ValueError: ``steps`` < 1.

    Cost: ``steps`` products with A and with Aᵀ.

    Source: Golub & Van Loan, Matrix Computations (2013), section 8.2.
    """
    square, v = largest_eigenvalue(lambda v: transposed(apply(v)), start, steps)
    return max(square, 0.0) ** 0.5, v
