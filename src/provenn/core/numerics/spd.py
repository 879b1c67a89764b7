"""Functions of symmetric matrices, f(A) = U f(Λ) Uᵀ, whose derivatives stay finite at equal eigenvalues.

The derivative is U (D ∘ Uᵀ dA U) Uᵀ with the divided differences D_ij = (f(λ_i) − f(λ_j)) / (λ_i − λ_j). Each function
here brings them in a form without cancellation, so that close and equal eigenvalues lose no digits; differentiating
through ``torch.linalg.eigh`` instead divides by λ_i − λ_j.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_number
from provenn.core.numerics.precision import full_precision

Scalar = Callable[[Tensor], Tensor]
DividedDifference = Callable[[Tensor, Tensor], Tensor]


def symmetric_function(
    A: Float[Tensor, "... n n"], function: Scalar, divided_difference: DividedDifference
) -> Float[Tensor, "... n n"]:
    """Apply a function to the eigenvalues of symmetric matrices.

    Args:
        A: The matrices; only the symmetric part is read.
        function: f, elementwise.
        divided_difference: (a, b) ↦ (f(a) − f(b)) / (a − b), elementwise and broadcasting, and f'(a) where a = b.

    Shape:
        A (…, n, n).

    Returns:
        f(A), symmetric.

    Raises:
        torch.linalg.LinAlgError: The eigenvalues cannot be found: A is not finite (2 × 2 and below it may give NaN).

    Cost: one eigendecomposition, O(n³), and four products in the backward pass. Differentiable once, also under
    torch.func's vmap, grad and jacrev; a second derivative is refused. Autocast does not narrow it.

    Source: Daleckii & Krein (1965); Higham, Functions of Matrices (2008), theorem 3.11.
    """
    applied: Tensor = _SymmetricFunction.apply(A, function, divided_difference)[0]  # type: ignore[no-untyped-call]
    return applied


@no_type_check
class _SymmetricFunction(torch.autograd.Function):
    """f(A), and beside it A's eigenvalues and eigenvectors, which no gradient leaves."""

    @staticmethod
    def forward(A: Tensor, function: Scalar, divided_difference: DividedDifference) -> tuple[Tensor, Tensor, Tensor]:
        with full_precision(A.device):
            eigenvalues, U = torch.linalg.eigh(0.5 * (A + A.mT))
            return _rebuild(function(eigenvalues), U), eigenvalues, U

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        A, _, ctx.divided_difference = inputs
        _, eigenvalues, U = output
        ctx.mark_non_differentiable(eigenvalues, U)
        ctx.save_for_backward(A, eigenvalues, U)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # Where nothing can be differentiated again, there is no need of a function that refuses it.
        adjoint: Any = _SymmetricAdjoint.apply if torch.is_grad_enabled() else _SymmetricAdjoint.forward
        return adjoint(grad, *ctx.saved_tensors, ctx.divided_difference), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, ...], A: Tensor, *functions: Any) -> tuple[Any, tuple[int, ...]]:
        # Matrices come in batches anyway; outside the map their eigenvalues can be checked.
        mapped = _SymmetricFunction.apply(A.movedim(in_dims[0], 0), *functions)  # type: ignore[no-untyped-call]
        return mapped, (0, 0, 0)


@no_type_check
class _SymmetricAdjoint(torch.autograd.Function):
    """The derivative. It takes A for its name only: what depends on A must not pass for a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor, A: Tensor, eigenvalues: Tensor, U: Tensor, divided_difference: DividedDifference
    ) -> Tensor:
        with full_precision(A.device):
            D = divided_difference(eigenvalues[..., :, None], eigenvalues[..., None, :])
            inner = U.mT @ (0.5 * (grad + grad.mT)) @ U
            return U @ (D * inner) @ U.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("functions of symmetric matrices are differentiable once, and here is a second derivative")


def _rebuild(values: Tensor, U: Tensor) -> Tensor:
    product = (U * values[..., None, :]) @ U.mT
    return 0.5 * (product + product.mT)


def spd_power(A: Float[Tensor, "... n n"], exponent: float) -> Float[Tensor, "... n n"]:
    """Return A^p of symmetric positive definite matrices, for any real p.

    Args:
        A: The matrices.
        exponent: p; ½ is the square root, −½ its inverse.

    Shape:
        A (…, n, n).

    Returns:
        A^p.

    Raises:
        TypeError: ``exponent`` is no number.
        ValueError: ``exponent`` is not finite, or A has an eigenvalue ≤ 0, which the message names.

    Cost: as :func:`symmetric_function`.

    Source: as :func:`symmetric_function`.
    """
    check_number("exponent", exponent)
    return symmetric_function(
        A, partial(_power, exponent=float(exponent)), partial(_power_difference, exponent=float(exponent))
    )


def spd_log(A: Float[Tensor, "... n n"]) -> Float[Tensor, "... n n"]:
    """Return the logarithm of symmetric positive definite matrices.

    Args:
        A: The matrices.

    Shape:
        A (…, n, n).

    Returns:
        log A, symmetric.

    Raises:
        ValueError: A has an eigenvalue ≤ 0, which the message names.

    Cost: as :func:`symmetric_function`.

    Source: as :func:`symmetric_function`.
    """
    return symmetric_function(A, _log, _log_difference)


def symmetric_exp(A: Float[Tensor, "... n n"]) -> Float[Tensor, "... n n"]:
    """Return the exponential of symmetric matrices.

    Args:
        A: The matrices.

    Shape:
        A (…, n, n).

    Returns:
        exp A, positive definite.

    Raises:
        torch.linalg.LinAlgError: A is not finite (2 × 2 and below it may give NaN).

    Cost: as :func:`symmetric_function`.

    Source: as :func:`symmetric_function`.
    """
    return symmetric_function(A, torch.exp, _exp_difference)


def clamp_eigenvalues(A: Float[Tensor, "... n n"], minimum: float) -> Float[Tensor, "... n n"]:
    """Raise the eigenvalues of symmetric matrices to at least a minimum.

    Args:
        A: The matrices.
        minimum: ε; eigenvalues below it are replaced by it, and pass no gradient.

    Shape:
        A (…, n, n).

    Returns:
        U max(Λ, ε) Uᵀ.

    Raises:
        TypeError: ``minimum`` is no number.
        ValueError: ``minimum`` is not finite.

    Cost: as :func:`symmetric_function`.

    Source: as :func:`symmetric_function`.
    """
    check_number("minimum", minimum)
    return symmetric_function(A, partial(_clamp, minimum=minimum), partial(_clamp_difference, minimum=minimum))


def lyapunov(P: Float[Tensor, "... n n"], V: Float[Tensor, "... n n"]) -> Float[Tensor, "... n n"]:
    """Solve P L + L P = V for symmetric positive definite P.

    Args:
        P: The matrices.
        V: The right sides, of any symmetry.

    Shape:
        P and V (…, n, n), leading dimensions broadcasting.

    Returns:
        L.

    Raises:
        ValueError: P has an eigenvalue ≤ 0.

    Cost: one eigendecomposition and four products; the derivative is two more equations of the same kind.
    Differentiable twice and more.

    Source: Higham, Functions of Matrices (2008), section 10.
    """
    solved: Tensor = _Lyapunov.apply(P, V)  # type: ignore[no-untyped-call]
    return solved


@no_type_check
class _Lyapunov(torch.autograd.Function):
    @staticmethod
    def forward(P: Tensor, V: Tensor) -> Tensor:
        with full_precision(P.device):
            eigenvalues, U = torch.linalg.eigh(0.5 * (P + P.mT))
            _check_positive(eigenvalues)
            sums = eigenvalues[..., :, None] + eigenvalues[..., None, :]
            L: Tensor = U @ (U.mT @ V @ U / sums) @ U.mT
        return L

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        P, V = inputs
        ctx.save_for_backward(P, output)
        ctx.shape = V.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        P, L = ctx.saved_tensors
        # dL solves P dL + dL P = dV − dP L − L dP, and the operator is its own adjoint.
        by_V = lyapunov(P, grad)
        by_P = -(by_V @ L.mT + L.mT @ by_V)
        by_P = 0.5 * (by_P + by_P.mT)
        return by_P.sum_to_size(P.shape), by_V.sum_to_size(ctx.shape)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *matrices: Tensor) -> tuple[Tensor, int]:
        moved = [one if dim is None else one.movedim(dim, 0) for one, dim in zip(matrices, in_dims, strict=True)]
        deep = max(one.ndim - (dim is not None) for one, dim in zip(matrices, in_dims, strict=True))
        # A mapped operand gets as many dimensions behind the mapped one as the other has in all.
        P, V = (
            one if dim is None else one[(slice(None), *(None,) * (deep - one.ndim + 1))]
            for one, dim in zip(moved, in_dims, strict=True)
        )
        L: Tensor = _Lyapunov.apply(P, V)  # type: ignore[no-untyped-call]
        return L, 0


def _check_positive(eigenvalues: Tensor) -> None:
    if torch.compiler.is_compiling():  # a traced program cannot branch on values
        return
    if not bool((eigenvalues > 0).all()):
        raise ValueError(f"A must be positive definite, got the eigenvalue {eigenvalues.min().item()}")


def _power(x: Tensor, *, exponent: float) -> Tensor:
    _check_positive(x)
    powered: Tensor = x**exponent
    return powered


def _power_difference(a: Tensor, b: Tensor, *, exponent: float) -> Tensor:
    """(a^p − b^p) / (a − b) = (ab)^{(p−1)/2} sinh(ph) / sinh(h) with h = ½ log(a/b)."""
    p = exponent
    if p == 0.5:
        return 1 / (a.sqrt() + b.sqrt())
    h = 0.5 * (a.log() - b.log())
    near, wide = h.abs() < 1e-3, h.abs() > 1
    safe = torch.where(near | wide, torch.ones_like(h), h)
    series = p * (1 + (p * p - 1) * h * h / 6)
    product, q = a * b, (p - 1) / 2
    normal = (product >= torch.finfo(h.dtype).tiny) & (product <= torch.finfo(h.dtype).max)
    close = torch.where(normal, product**q, a**q * b**q) * torch.where(
        near, series, torch.sinh(p * safe) / torch.sinh(safe)
    )
    # Numbers that far apart cancel nothing in the plain quotient.
    return torch.where(wide, (a**p - b**p) / torch.where(wide, a - b, torch.ones_like(h)), close)


def _log(x: Tensor) -> Tensor:
    _check_positive(x)
    return x.log()


def _log_difference(a: Tensor, b: Tensor) -> Tensor:
    """(log a − log b) / (a − b) = 2 artanh(z) / (z (a + b)) with z = (a − b) / (a + b)."""
    z = (a - b) / (a + b)
    near = z.abs() < 1e-3
    safe = torch.where(near, torch.full_like(z, 0.5), z)
    # artanh loses z ≈ ±1, where the plain quotient is exact.
    plain = (a.log() - b.log()) / torch.where(near, torch.ones_like(z), a - b)
    ratio = torch.where(near, 1 + z * z / 3, torch.atanh(safe.clamp(-0.9, 0.9)) / safe)
    return torch.where(z.abs() > 0.9, plain, 2 * ratio / (a + b))


def _exp_difference(a: Tensor, b: Tensor) -> Tensor:
    """(eᵃ − eᵇ) / (a − b) = e^b expm1(a − b) / (a − b), from the larger of the two."""
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    gap = low - high
    near = gap.abs() < 1e-8
    safe = torch.where(near, torch.ones_like(gap), gap)
    return high.exp() * torch.where(near, 1 + 0.5 * gap, torch.expm1(safe) / safe)


def _clamp(x: Tensor, *, minimum: float) -> Tensor:
    return x.clamp(min=minimum)


def _clamp_difference(a: Tensor, b: Tensor, *, minimum: float) -> Tensor:
    """0 below, 1 above, and across the bend the share of the way that lies above."""
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    gap = torch.where(high > low, high - low, torch.ones_like(high))
    across = (high - minimum) / gap
    return torch.where(low >= minimum, torch.ones_like(a), across.clamp(0, 1) * (high > minimum))
