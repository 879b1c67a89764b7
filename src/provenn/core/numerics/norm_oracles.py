"""Linear minimisation oracles of norms on weights: the step of unit length that a gradient asks for most.

For a norm on D_out × D_in matrices (a convolution's kernel counts as D_out × the rest) and a tensor B,
lmo(B) = argmax of ⟨B, Z⟩ over ‖Z‖ ≤ 1, and ⟨B, lmo(B)⟩ is the dual norm of B; an optimizer steps along −lmo.

==========  ==============================  ==============================  =======================
norm        ‖Z‖                             dual norm of B                  lmo(B)
==========  ==============================  ==============================  =======================
spectral    √(D_in/D_out) σ_max(Z)          √(D_out/D_in) Σ σ(B)            √(D_out/D_in) U Vᵀ
sign        D_in · max abs(Z_ij)            Σ abs(B_ij) / D_in              sign(B) / D_in
rms         ‖Z‖₂ / √d                       √d ‖B‖₂                         √d B / ‖B‖₂
==========  ==============================  ==============================  =======================
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer

Norm = Literal["spectral", "sign", "rms"]
Orthogonalization = Literal["newton-schulz", "svd"]

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Of Muon: steep at 0 rather than exact at 1; singular values end in about [0.7, 1.2]."""


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """Approximate U Vᵀ of a matrix's singular value decomposition U Σ Vᵀ by products alone.

    Args:
        matrix: (..., rows, columns). float16 and bfloat16 are computed in float32.
        steps: Iterations. With 5, singular values from 2 % of the Frobenius norm on end in about [0.7, 1.2].

    Returns:
        A matrix of the same shape and type; 0 for a matrix of zeros.

    Raises:
        ValueError: ``steps`` < 1, or there are fewer than two dimensions.

    Cost: 3 products a step, of the smaller side: O(steps · min² · max).

    Source: Jordan et al., "Muon" (2024), with its coefficients; Björck and Bowie, SIAM J. Numer. Anal. 8 (1971), for
    the iteration.
    """
    check_integer("steps", steps, at_least=1)
    if matrix.dim() < 2:
        raise ValueError(f"matrix must have two dimensions or more, got shape {tuple(matrix.shape)}")
    half = matrix.dtype in (torch.float16, torch.bfloat16)
    tall = matrix.shape[-2] > matrix.shape[-1]
    X = matrix.mT if tall else matrix
    X = X.float() if half else X
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(X.dtype).tiny)
    a, b, c = _QUINTIC
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    factor: Tensor = X.mT if tall else X
    return factor.to(matrix.dtype) if half else factor


def orthogonal_factor(matrix: Tensor) -> Tensor:
    """Return U Vᵀ of a matrix exactly, by its singular value decomposition; directions of singular value 0 stay 0.

    Args:
        matrix: (..., rows, columns).

    Cost: O(min² · max), many times a Newton–Schulz step's.
    """
    U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
    floor = values.amax(dim=-1, keepdim=True) * max(matrix.shape[-2:]) * torch.finfo(values.dtype).eps
    factor: Tensor = (U * (values > floor).to(values.dtype).unsqueeze(-2)) @ Vh
    return factor


def lmo(tensor: Tensor, norm: Norm, orthogonalize: Orthogonalization = "newton-schulz", steps: int = 5) -> Tensor:
    """Return the tensor of unit norm that has the largest inner product with a tensor.

    Args:
        tensor: B; a matrix or a kernel for ``spectral``.
        norm: Which norm, see the module's table. A vector's D_in under ``sign`` is its length.
        orthogonalize: How ``spectral`` finds U Vᵀ.
        steps: Of Newton–Schulz.

    Returns:
        A tensor of the same shape and type; 0 for a tensor of zeros.

    Raises:
        ValueError: ``norm`` or ``orthogonalize`` is unknown, or ``spectral`` is asked of a vector.

    Cost: O(entries); ``spectral`` as its orthogonalisation.

    Source: Pethick et al., arXiv 2502.07529, table 2.
    """
    check_choice("norm", norm, ("spectral", "sign", "rms"))
    if norm == "sign":
        return tensor.sign() / _fan_in(tensor)
    if norm == "rms":
        length = tensor.norm()
        return math.sqrt(tensor.numel()) * tensor / torch.where(length > 0, length, 1.0)
    matrix = _as_matrix(tensor)
    factor = _orthogonalized(matrix, orthogonalize, steps)
    return math.sqrt(matrix.shape[0] / matrix.shape[1]) * factor.view_as(tensor)


def dual_norm(tensor: Tensor, norm: Norm, orthogonalize: Orthogonalization = "newton-schulz", steps: int = 5) -> Tensor:
    """Return the dual norm of a tensor, ⟨B, lmo(B)⟩.

    Args:
        tensor: As in :func:`lmo`.
        norm: As in :func:`lmo`.
        orthogonalize: With ``svd``, ``spectral`` sums the singular values; with ``newton-schulz`` it takes ⟨B, lmo(B)⟩
            with the approximate factor.
        steps: Of Newton–Schulz.

    Returns:
        A scalar.

    Raises:
        ValueError: As :func:`lmo`.

    Cost: as :func:`lmo`.
    """
    if norm == "spectral" and orthogonalize == "svd":
        matrix = _as_matrix(tensor)
        total: Tensor = torch.linalg.svdvals(matrix).sum()
        return math.sqrt(matrix.shape[0] / matrix.shape[1]) * total
    return (tensor * lmo(tensor, norm, orthogonalize, steps)).sum()


def _orthogonalized(matrix: Tensor, how: str, steps: int) -> Tensor:
    check_choice("orthogonalize", how, ("newton-schulz", "svd"))
    return orthogonal_factor(matrix) if how == "svd" else newton_schulz(matrix, steps)


def _as_matrix(tensor: Tensor) -> Tensor:
    if tensor.dim() < 2:
        raise ValueError(f"tensor must be a matrix or a kernel for the spectral norm, got shape {tuple(tensor.shape)}")
    return tensor.reshape(tensor.shape[0], -1)


def _fan_in(tensor: Tensor) -> int:
    return tensor[0].numel() if tensor.dim() > 1 else tensor.numel()
