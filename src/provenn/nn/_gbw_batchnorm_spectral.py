"""Functions of eigenvalues that the Bures–Wasserstein normalisation adds to those of ``core``."""

from __future__ import annotations

import math
from typing import Any, no_type_check

import torch
from torch import Tensor

from provenn.core.numerics.spd import spd_power, symmetric_function


def symmetrized(A: Tensor) -> Tensor:
    """Return the symmetric part."""
    return 0.5 * (A + A.mT)


def semidefinite_power(A: Tensor, exponent: float) -> Tensor:
    """Return A^p of matrices that are positive semidefinite but for rounding.

    Their eigenvalues rise by the size of the rounding, a few n ε tr A, so that none of them is negative.
    """
    trace = A.detach().diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    floor = 4 * torch.finfo(A.dtype).eps * trace + torch.finfo(A.dtype).tiny
    return spd_power(A + floor * eye, exponent)


def absolute(A: Tensor) -> Tensor:
    """Return (A²)^½ = U |Λ| Uᵀ of symmetric matrices, with a derivative also at equal eigenvalues."""
    return symmetric_function(A, torch.abs, _absolute_difference)


def _absolute_difference(a: Tensor, b: Tensor) -> Tensor:
    """(|a| − |b|) / (a − b): the sign of both, or where the signs differ (a + b) / (a − b) with that of a."""
    apart = a * b < 0
    return torch.where(
        apart, torch.sign(a) * (a + b) / torch.where(apart, a - b, torch.ones_like(a + b)), torch.sign(a + b)
    )


def eigen_roots(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return A^½ and A^{−½} from one decomposition; of matrices that need no gradient."""
    eigenvalues, U = torch.linalg.eigh(A.detach())
    scale = eigenvalues[..., -1:].clamp(min=torch.finfo(A.dtype).tiny)
    roots = eigenvalues.clamp(min=torch.finfo(A.dtype).eps * scale).sqrt()[..., None, :]
    return (U * roots) @ U.mT, (U / roots) @ U.mT


def bures_mean_step(B: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step of the barycentre's fixed point; also return how far B was from it, relative to B.

    At the barycentre the mean of K_k = (B^½ X_k B^½)^½ over the first dimension is B.
    """
    root, inverse_root = eigen_roots(B)
    mean = semidefinite_power(root @ X @ root, 0.5).mean(0)
    residual = torch.linalg.matrix_norm(mean - B) / torch.linalg.matrix_norm(B)
    half = inverse_root @ mean
    return symmetrized(half @ half.mT), residual


def kronecker_sum_power(P: Tensor, V: Tensor, exponent: float) -> Tensor:
    """Return S^p V for the operator S V = (P V + V P) / 2 and p = ½ or −½, of symmetric V.

    In the eigenbasis of P it multiplies V_ij by ((λ_i + λ_j) / 2)^p: the parallel transport between P and I.
    Differentiable once; the gradient is finite at equal eigenvalues.
    """
    P = P.expand(torch.broadcast_shapes(P.shape, V.shape[-P.dim() :]))  # V may have more leading dimensions
    applied: Tensor = _KroneckerSumPower.apply(P, V, exponent)  # type: ignore[no-untyped-call]
    return applied


@no_type_check
class _KroneckerSumPower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, P: Tensor, V: Tensor, exponent: float) -> Tensor:
        eigenvalues, U = torch.linalg.eigh(symmetrized(P))
        factors = (0.5 * (eigenvalues[..., :, None] + eigenvalues[..., None, :])) ** exponent
        inner = U.mT @ symmetrized(V) @ U
        ctx.save_for_backward(eigenvalues, U, factors, inner)
        ctx.exponent, ctx.shape = exponent, V.shape
        return symmetrized(U @ (factors * inner) @ U.mT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        eigenvalues, U, factors, inner = ctx.saved_tensors
        G = U.mT @ symmetrized(grad) @ U
        by_P = by_V = None
        if ctx.needs_input_grad[0]:
            by_P = _by_operator(G, inner, eigenvalues, U, ctx.exponent)
        if ctx.needs_input_grad[1]:
            by_V = (U @ (factors * G) @ U.mT).sum_to_size(ctx.shape)
        return by_P, by_V, None


def _by_operator(G: Tensor, V: Tensor, eigenvalues: Tensor, U: Tensor, exponent: float) -> Tensor:
    """The gradient by P: Σ_j G_ij V_kj D_ikj with the divided differences of μ^p between μ_ij and μ_kj.

    μ_ij = (λ_i + λ_j) / 2 are the eigenvalues of S, and dP enters S as (dP V + V dP) / 2.
    """
    shape = torch.broadcast_shapes(G.shape, V.shape)
    # Summed over what P is shared by before the table of n³ numbers is made.
    lead = shape[: len(shape) - eigenvalues.dim() - 1]
    flat = (math.prod(lead), *eigenvalues.shape, eigenvalues.shape[-1])
    table = torch.einsum("b...ij,b...kj->...ikj", G.expand(shape).reshape(flat), V.expand(shape).reshape(flat))
    roots = (0.5 * (eigenvalues[..., :, None] + eigenvalues[..., None, :])).sqrt()
    first, second = roots[..., :, None, :], roots[..., None, :, :]
    D = 1 / (first + second)
    if exponent < 0:
        D = -D / (first * second)
    E = (table * D).sum(-1)
    return U @ symmetrized(E) @ U.mT
