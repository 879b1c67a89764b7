"""The projection that follows every step of the optimizer: non-negative weights at a given spectral norm."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from provenn.core.experiment.checks import check_number

TOLERANCE = 1e-3
"""Change of the singular vector that ends the power iteration, and what is added to the norm that it finds."""
ITERATIONS = 10


@torch.no_grad()
def nonnegative_spectral_(
    W: Float[Tensor, "rows columns"], k: float = 1.0, generator: torch.Generator | None = None
) -> Float[Tensor, "rows columns"]:
    """Set negative entries of a matrix to zero, then scale it to the spectral norm k, in place.

    The norm σ of the clipped matrix is that of at most 10 steps of power iteration from a uniform start; the matrix is
    multiplied by k / (σ + 1e-3), also where σ is below 1, so that it ends *on* the set of norm k, up to 1e-3. Power
    iteration approaches the norm from below: where its two largest singular values nearly agree, the result may exceed
    k by a few thousandths. ``sequence_gain`` of a layer uses the true norms.

    Args:
        W: The matrix; a parameter stays the same object.
        k: The norm that is wanted.
        generator: Draws the start; ``None`` is torch's global one.

    Shape:
        ``W`` (rows, columns).

    Returns:
        ``W``.

    Raises:
        TypeError: ``W`` is no floating-point tensor, or ``k`` no number.
        ValueError: ``W`` is no matrix, or ``k`` ≤ 0.

    Cost: at most 20 products with a vector, O(rows · columns) each; no value is waited for on a GPU.

    Source: Wang, Pravin & Wu, arXiv 2401.07494, section on the constraint; ε and the number of steps as in the authors'
    code, which ends the iteration early where this one stops the vector.
    """
    if not W.is_floating_point():
        raise TypeError(f"W must be a floating-point tensor, got {W.dtype}")
    if W.ndim != 2:
        raise ValueError(f"W must be a matrix, got shape {tuple(W.shape)}")
    check_number("k", k, above=0)
    W.clamp_(min=0)
    wide = W.to(torch.promote_types(W.dtype, torch.float32))
    device = W.device if generator is None else generator.device
    start = torch.rand(W.shape[1], generator=generator, device=device, dtype=wide.dtype).to(W.device)
    W.copy_(wide * (k / (_norm(wide, start) + TOLERANCE)))
    return W


def _norm(W: Float[Tensor, "rows columns"], start: Float[Tensor, " columns"]) -> Float[Tensor, ""]:
    """Return ‖Wu‖ for the vector u that power iteration on WᵀW ends with."""
    u = F.normalize(start, dim=0)
    moving = torch.ones((), dtype=torch.bool, device=W.device)
    for _ in range(ITERATIONS):
        new = F.normalize(W.mT @ (W @ u), dim=0)
        settled = (new - u).norm() < TOLERANCE
        u = torch.where(moving, new, u)
        moving = moving & ~settled
    norm: Tensor = (W @ u).norm()
    return norm
