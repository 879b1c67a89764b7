"""Batch statistics of symmetric positive definite matrices, and the geodesics along which running means move."""

from __future__ import annotations

import torch
from torch import Tensor

from provenn.core.numerics.spd import spd_log, symmetric_exp
from provenn.nn._gbw_batchnorm_spectral import bures_mean_step, eigen_roots, semidefinite_power, symmetrized


@torch.no_grad()
def bures_mean(X: Tensor, steps: int) -> Tensor:
    """Return the Bures–Wasserstein barycentre, by steps of its fixed point from the arithmetic mean."""
    B = X.mean(0)
    for _ in range(steps):
        B, _ = bures_mean_step(B, X)
    return B


def bures_variance(X: Tensor, B: Tensor, K: Tensor, about: str) -> Tensor:
    """Return the mean squared distance from B, or from I, where the root of the product is that of X."""
    point = B
    if about == "identity":
        point, K = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device), semidefinite_power(X, 0.5)
    squared = (X + point - 2 * K).diagonal(dim1=-2, dim2=-1).sum(-1)
    return squared.clamp(min=0).mean(0)


@torch.no_grad()
def bures_geodesic(P: Tensor, Q: Tensor, t: float) -> Tensor:
    """Return the point at the share t of the Bures–Wasserstein geodesic from P to Q."""
    root, inverse_root = eigen_roots(P)
    products = root @ semidefinite_power(root @ Q @ root, 0.5) @ inverse_root
    return symmetrized((1 - t) ** 2 * P + t * t * Q + t * (1 - t) * (products + products.mT))


@torch.no_grad()
def karcher_mean(X: Tensor, steps: int) -> Tensor:
    """Return the affine-invariant barycentre, by steps of the Karcher flow from the arithmetic mean."""
    B = X.mean(0)
    for _ in range(steps):
        root, inverse_root = eigen_roots(B)
        flow = spd_log(inverse_root @ X @ inverse_root).mean(0)
        B = symmetrized(root @ symmetric_exp(flow) @ root)
    return B


@torch.no_grad()
def affine_geodesic(P: Tensor, Q: Tensor, t: float) -> Tensor:
    """Return the point at the share t of the affine-invariant geodesic from P to Q."""
    root, inverse_root = eigen_roots(P)
    return symmetrized(root @ semidefinite_power(inverse_root @ Q @ inverse_root, t) @ root)
