"""What the functions and layers of SPD matrices ask of their inputs."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

PRECISE = (torch.float32, torch.float64)


def check_symmetric(name: str, matrices: Tensor) -> None:
    """Check that a tensor holds symmetric matrices of float32 (which warns) or float64."""
    if not isinstance(matrices, Tensor) or matrices.dtype not in PRECISE:
        found = matrices.dtype if isinstance(matrices, Tensor) else type(matrices).__name__
        raise TypeError(f"{name} must be a tensor of float64 or float32, which have eigendecompositions, got {found}")
    if matrices.dim() < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"{name} must hold square matrices in its last two dimensions, got {tuple(matrices.shape)}")
    if torch.compiler.is_compiling():  # a traced program cannot branch on values
        return
    if matrices.dtype == torch.float32:
        message = f"{name} is float32: SPD matrices of condition number above 1e6 lose all digits there, use float64"
        warnings.warn(message, UserWarning, stacklevel=4)
    asymmetry = (matrices - matrices.mT).abs().amax((-2, -1)) if matrices.numel() else matrices.new_zeros(())
    largest = matrices.abs().amax((-2, -1)) if matrices.numel() else matrices.new_zeros(())
    # Far above the rounding of a product W X Wᵀ, and NaN fails too.
    if not bool((asymmetry <= 1e3 * matrices.shape[-1] * torch.finfo(matrices.dtype).eps * largest).all()):
        raise ValueError(f"{name} must be symmetric, got a matrix that differs from its transpose by "
                         f"{asymmetry.max().item():.3g}")  # fmt: skip


def check_spd(name: str, matrices: Tensor) -> None:
    """Check that a tensor holds symmetric positive definite matrices; an error names the smallest eigenvalue."""
    check_symmetric(name, matrices)
    if torch.compiler.is_compiling() or not matrices.numel():
        return
    # Cholesky's factorisation is several times cheaper than eigenvalues; they settle what it refuses.
    if bool(torch.linalg.cholesky_ex(matrices.detach()).info.any()):
        smallest = torch.linalg.eigvalsh(matrices.detach()).min().item()
        if not smallest > 0:
            raise ValueError(f"{name} must be positive definite, got the smallest eigenvalue {smallest:.6g}")


def check_channels(name: str, matrices: Tensor, channels: int, n: int, dtype: torch.dtype) -> None:
    """Check that a tensor is a batch (N, C, n, n) as a layer of that dtype was built for."""
    if not isinstance(matrices, Tensor) or matrices.dtype != dtype:
        found = matrices.dtype if isinstance(matrices, Tensor) else type(matrices).__name__
        raise TypeError(f"{name} must be of the layer's {dtype}, got {found}")
    if matrices.dim() != 4 or tuple(matrices.shape[1:]) != (channels, n, n):
        raise ValueError(f"{name} must have the shape (N, {channels}, {n}, {n}), got {tuple(matrices.shape)}")
