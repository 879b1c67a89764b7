"""Constrained weights as parametrizations for ``torch.nn.utils.parametrize``: signs, spectral norms, orthogonality.

Each maps an unconstrained tensor to one that satisfies its constraint *exactly* (to rounding), for every value of the
unconstrained one, so that no optimizer can break it. All read a weight as the matrix (out, everything else), and all
but the sign compute in float32 at least, under autocast too, so that the rounding is that of the weight's own type. For
a convolution that matrix bounds the layer's Lipschitz constant only together with :func:`convolution_bound`'s factor.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.numerics.precision import full_precision

__all__ = ["Bjorck", "Cayley", "NonNegative", "SpectralBound", "convolution_bound", "spectral_norm"]

Weight = Float[Tensor, "out *rest"]


def spectral_norm(weight: Weight) -> Float[Tensor, ""]:
    """Return the largest singular value of a weight, read as the matrix (out, everything else).

    Args:
        weight: The weight; a vector is one column.

    Shape:
        ``weight`` (out, …).

    Returns:
        The norm, in at least single precision, differentiable where the largest singular value is simple.

    Cost: an eigendecomposition of the smaller Gram side's size, O(m n min(m, n)): exact, where power iteration would
    only approach it from below.

    Source: Golub & Van Loan, Matrix Computations (2013), section 2.3.
    """
    norm: Tensor = torch.linalg.matrix_norm(_as_matrix(weight), ord=2)
    return norm


def _as_matrix(weight: Tensor) -> Tensor:
    matrix = weight.flatten(1) if weight.ndim > 1 else weight[:, None]
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def convolution_bound(kernel_size: tuple[int, ...], stride: tuple[int, ...] | int = 1) -> float:
    """Return by how much a convolution's norm can exceed that of its weight, read as a matrix.

    Args:
        kernel_size: Of the convolution.
        stride: Of the convolution; with 1 in all directions every input is read kernel-size times.

    Returns:
        The square root of the number of windows that read one input.

    Raises:
        ValueError: A size < 1.

    Cost: none.

    Source: Tsuzuku, Sato & Sugiyama, "Lipschitz-margin training", NeurIPS 2018, appendix C.
    """
    steps = (stride,) * len(kernel_size) if isinstance(stride, int) else stride
    for one in (*kernel_size, *steps):
        check_integer("kernel_size and stride", one, at_least=1)
    return math.sqrt(math.prod(-(-size // step) for size, step in zip(kernel_size, steps, strict=True)))


class NonNegative(nn.Module):
    """Weights ≥ 0, as input-convex networks need them.

    Args:
        method: ``"softplus"``, smooth and positive, or ``"relu"``, which reaches 0 and passes no gradient there.

    Shape:
        Any.

    Raises:
        ValueError: No such method.

    Cost: O(1) a weight.

    Source: Amos, Xu & Kolter, "Input convex neural networks", ICML 2017.
    """

    def __init__(self, method: str = "softplus") -> None:
        super().__init__()
        if method not in ("softplus", "relu"):
            raise ValueError(f"method must be softplus or relu, got {method!r}")
        self.method = method

    def forward(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the weight that the layer uses.

        Args:
            weight: The unconstrained one.
        """
        return F.softplus(weight) if self.method == "softplus" else weight.relu()

    def right_inverse(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return an unconstrained weight that gives this one.

        Args:
            weight: Values ≥ 0.

        Raises:
            ValueError: A value < 0: set the weight to something allowed first.
        """
        if not weight.is_meta and bool((weight < 0).any()):
            raise ValueError(f"weight must be ≥ 0, got {weight.min().item()}")
        if self.method == "relu":
            return weight
        tiny = torch.finfo(weight.dtype).tiny
        return weight + torch.log(-torch.expm1(-weight.clamp(min=tiny)))


class SpectralBound(nn.Module):
    """Weights of spectral norm ≤ bound: scaled down where they exceed it, left alone where they do not.

    Args:
        bound: k > 0.
        always: Scale to the bound also from below, so that the norm *is* k (a zero weight stays zero).

    Shape:
        Any weight, read as (out, everything else).

    Raises:
        TypeError: ``bound`` is no number.
        ValueError: ``bound`` ≤ 0.

    Cost: as :func:`spectral_norm`, at each use of the weight; inside ``parametrize.cached()`` once.

    Source: Gouk, Frank, Pfahringer & Cree, "Regularisation of neural networks by enforcing Lipschitz continuity", 2021.
    """

    def __init__(self, bound: float = 1.0, always: bool = False) -> None:
        super().__init__()
        check_number("bound", bound, above=0)
        self.bound, self.always = bound, always

    def forward(self, weight: Weight) -> Weight:
        """Return the weight that the layer uses.

        Args:
            weight: The unconstrained one.
        """
        norm = spectral_norm(weight)
        # Weights far below the bound, and zero ones, must not make the quotient's derivative infinite.
        if self.always:
            norm = torch.where(norm > 0, norm.clamp(min=torch.finfo(norm.dtype).tiny), 1.0)
        else:
            norm = norm.clamp(min=0.5 * self.bound)
        # Rounding of the quotient must not leave the norm above the bound.
        factor = self.bound / norm * (1 - 4 * torch.finfo(norm.dtype).eps)
        return weight * (factor if self.always else factor.clamp(max=1)).to(weight.dtype)

    def right_inverse(self, weight: Weight) -> Weight:
        """Return an unconstrained weight that gives this one, if it is within the bound: itself.

        Args:
            weight: The weight to start from.
        """
        return weight


class Bjorck(nn.Module):
    """Weights with orthonormal rows or columns, by Björck's iteration W ← W(I + ½(I − WᵀW)) from a scaled start.

    Args:
        iterations: How many; 15 bring generic square weights to about 1e-6, wide or tall ones earlier.
        bound: The common singular value that is wanted.

    Shape:
        Any weight, read as (out, everything else).

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: ``iterations`` < 1 or ``bound`` ≤ 0.

    Cost: ``iterations`` times two products of O(m n min(m, n)), beside a spectral norm, at each use of the weight. All
    singular values approach the bound from below, so that the norm never exceeds it by more than rounding.

    Source: Björck & Bowie, "An iterative algorithm for computing the best estimate of an orthogonal matrix", SIAM J.
    Numer. Anal. 8 (1971); Anil, Lucas & Grosse, "Sorting out Lipschitz function approximation", ICML 2019.
    """

    def __init__(self, iterations: int = 15, bound: float = 1.0) -> None:
        super().__init__()
        check_integer("iterations", iterations, at_least=1)
        check_number("bound", bound, above=0)
        self.iterations, self.bound = iterations, bound

    def forward(self, weight: Weight) -> Weight:
        """Return the weight that the layer uses.

        Args:
            weight: The unconstrained one, not zero.
        """
        matrix = _as_matrix(weight)
        tall = matrix.shape[0] >= matrix.shape[1]
        X = matrix if tall else matrix.mT
        with full_precision(X.device):
            X = X / spectral_norm(X).clamp(min=torch.finfo(X.dtype).tiny)
            for _ in range(self.iterations):
                X = 1.5 * X - 0.5 * X @ (X.mT @ X)
        return (self.bound * (X if tall else X.mT)).reshape(weight.shape).to(weight.dtype)

    def right_inverse(self, weight: Weight) -> Weight:
        """Return an unconstrained weight that gives this one, if it is orthonormal: itself.

        Args:
            weight: The weight to start from.
        """
        return weight


class Cayley(nn.Module):
    """Weights with orthonormal rows or columns, exactly, by the Cayley map of a skew matrix.

    Args:
        bound: The common singular value that is wanted.

    Shape:
        Any weight, read as (out, everything else).

    Raises:
        TypeError: ``bound`` is no number.
        ValueError: ``bound`` ≤ 0.

    Cost: one solve of size min(m, n) and products of O(m n min(m, n)) at each use. Reaches all orthonormal matrices but
    those whose square part has an eigenvalue −1. Rounding grows with the unconstrained weight: in float32 the singular
    values of one of 32 × 16 are off by 1e-6 where its entries are about 1, by up to 1e-3 where they are about 1000.

    Source: Trockman & Kolter, "Orthogonalizing convolutional layers with the Cayley transform", ICLR 2021, section 3.
    """

    def __init__(self, bound: float = 1.0) -> None:
        super().__init__()
        check_number("bound", bound, above=0)
        self.bound = bound

    def forward(self, weight: Weight) -> Weight:
        """Return the weight that the layer uses.

        Args:
            weight: The unconstrained one.
        """
        matrix = _as_matrix(weight)
        tall = matrix.shape[0] >= matrix.shape[1]
        X = matrix if tall else matrix.mT
        n = X.shape[1]
        upper, lower = X[:n], X[n:]
        with full_precision(X.device):
            # (I + Z)⁻¹(I − Z) over −2 V (I + Z)⁻¹ with Z = U − Uᵀ + VᵀV has orthonormal columns for every U, V.
            Z = upper - upper.mT + lower.mT @ lower
            eye = torch.eye(n, dtype=X.dtype, device=X.device)
            inverse = torch.linalg.solve(eye + Z, eye)
            Q = torch.cat(((eye - Z) @ inverse, -2 * lower @ inverse))
        return self.bound * (Q if tall else Q.mT).reshape(weight.shape).to(weight.dtype)
