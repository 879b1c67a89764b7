"""Entropic optimal transport between discrete measures: Sinkhorn's iteration in the log domain, with gradients."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number

_CHECK_EVERY = 5
"""Iterations between looks at the marginals, each of which costs half an iteration."""


class Transport(NamedTuple):
    """A solution of min ⟨P, C⟩ − ε H(P) over plans P with marginals a and b, where H(P) = −Σ P log P.

    Args:
        f: Potential of the rows.
        g: Potential of the columns; P = exp((f + g − C)/ε).
        plan: P.
        value: The minimum, ⟨P, C⟩ − ε H(P).
        error: Largest sum of absolute deviations from a marginal.
        converged: Whether ``error`` is within the tolerance.
        iterations: Sinkhorn iterations taken.
    """

    f: Float[Tensor, " n"]
    g: Float[Tensor, " m"]
    plan: Float[Tensor, "n m"]
    value: Float[Tensor, ""]
    error: float
    converged: bool
    iterations: int


def sinkhorn(
    C: Float[Tensor, "n m"],
    a: Float[Tensor, " n"] | None = None,
    b: Float[Tensor, " m"] | None = None,
    *,
    epsilon: float,
    tol: float = 1e-3,
    max_iter: int = 2000,
    scaling: float = 1.0,
) -> Transport:
    """Solve entropic optimal transport, differentiably.

    ``value`` has the gradient of the envelope theorem, ∂value/∂C = P, ∂value/∂a = f, ∂value/∂b = g. Potentials and
    plan have implicit gradients: those of the solution itself, however many iterations found it. No gradient runs
    through the iterations.

    Args:
        C: Costs.
        a: Weights of the rows, above 0, which add up to 1; ``None``: equal.
        b: Weights of the columns; ``None``: equal.
        epsilon: ε, in the unit of C.
        tol: The iteration ends once both marginals are met to this sum of absolute deviations.
        max_iter: Most iterations.
        scaling: Factor < 1 by which ε falls to its value from the range of C in the first iterations; 1: no scaling.
            It saves iterations where ε is small beside C.

    Shape:
        C (n, m), a (n,), b (m,). The potentials' free constant is set so that ⟨a, f⟩ = ⟨b, g⟩.

    Returns:
        The solution.

    Raises:
        ValueError: A cost is not finite, weights are not above 0, do not add up to 1 or have another length, or a
            number is out of range.

    Warns:
        RuntimeWarning: The marginals were not met within ``max_iter``; the message has the error.

    Cost: O(n m) time an iteration and O(n m) memory; gradients by potentials or plan O((n + m)³), a dense solve.

    Source: Cuturi, NeurIPS 2013; Peyré and Cuturi, "Computational Optimal Transport" (2019), sections 4.4 and 9.1.
    """
    check_number("epsilon", epsilon, above=0)
    check_number("tol", tol, above=0)
    check_integer("max_iter", max_iter, at_least=1)
    check_number("scaling", scaling, above=0, at_most=1)
    if C.dim() != 2 or 0 in C.shape:
        raise ValueError(f"C must be a matrix with rows and columns, got shape {tuple(C.shape)}")
    if not C.isfinite().all():
        raise ValueError("C must be finite, got NaN or infinite costs")
    a, b = (_weights(name, one, C, size) for name, one, size in (("a", a, C.shape[0]), ("b", b, C.shape[1])))
    f, g, error, iterations = _iterate(C.detach(), a.detach(), b.detach(), epsilon, tol, max_iter, scaling)
    if error > tol:
        warnings.warn(
            f"Sinkhorn's marginals are off by {error:.2g} > {tol:g} after {iterations} iterations",
            RuntimeWarning,
            stacklevel=2,
        )
    f, g = _Potentials.apply(C, a, b, f, g, epsilon)  # type: ignore[no-untyped-call]
    value = _Value.apply(C, a, b, f.detach(), g.detach(), epsilon)  # type: ignore[no-untyped-call]
    return Transport(f, g, _plan(C, f, g, epsilon), value, error, error <= tol, iterations)


def _weights(name: str, weights: Tensor | None, C: Tensor, size: int) -> Tensor:
    if weights is None:
        return C.new_full((size,), 1 / size)
    if weights.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {tuple(weights.shape)}")
    if not weights.isfinite().all() or not (weights > 0).all():
        raise ValueError(f"{name} must be above 0 (leave out points of weight 0), got {weights.min().item()}")
    if abs(weights.sum().item() - 1) > 1e-4:
        raise ValueError(f"{name} must add up to 1, got a sum of {weights.sum().item():.6g}")
    return weights.to(C)


def _iterate(
    C: Tensor, a: Tensor, b: Tensor, epsilon: float, tol: float, max_iter: int, scaling: float
) -> tuple[Tensor, Tensor, float, int]:
    log_a, log_b = a.log(), b.log()
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    current = max(epsilon, (C.max() - C.min()).item()) if scaling < 1 else epsilon
    error = math.inf
    for iteration in range(1, max_iter + 1):
        f = _update(C, g, log_a, current)
        g = _update(C.T, f, log_b, current)
        if current > epsilon:
            current = max(epsilon, current * scaling)
        elif iteration % _CHECK_EVERY == 0 or iteration < _CHECK_EVERY:
            error = _row_error(C, f, g, a, epsilon)
            if error <= tol:
                break
    else:
        error = _row_error(C, f, g, a, epsilon)
    shift = (a.dot(f) - b.dot(g)) / 2
    return f - shift, g + shift, error, iteration


def _row_error(C: Tensor, f: Tensor, g: Tensor, a: Tensor, epsilon: float) -> float:
    """Return how far the rows are off: the columns are met exactly, by the update that came last."""
    return (_plan(C, f, g, epsilon).sum(dim=1) - a).abs().sum().item()


def _update(C: Tensor, other: Tensor, log_weights: Tensor, epsilon: float) -> Tensor:
    """Return the potential of the rows that meets their marginal exactly."""
    return epsilon * (log_weights - torch.logsumexp((other - C) / epsilon, dim=1))


def _plan(C: Tensor, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
    return torch.exp((f[:, None] + g - C) / epsilon)


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, C: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
        plan = _plan(C, f, g, epsilon)
        ctx.save_for_backward(plan, f, g)
        return (plan * (f[:, None] + g)).sum()  # since ε log P = f + g − C

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        plan, f, g = ctx.saved_tensors
        return gradient * plan, gradient * f, gradient * g, None, None, None


class _Potentials(torch.autograd.Function):
    """Differentiates P(f, g, C) 1 = a, P(f, g, C)ᵀ 1 = b, ⟨a, f⟩ = ⟨b, g⟩ implicitly."""

    @staticmethod
    def forward(
        ctx: Any, C: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(C, a, b, f, g)
        ctx.epsilon = epsilon
        return f.clone(), g.clone()

    @staticmethod
    def backward(ctx: Any, by_f: Tensor, by_g: Tensor) -> tuple[Tensor | None, ...]:
        C, a, b, f, g = ctx.saved_tensors
        plan = _plan(C, f, g, ctx.epsilon)
        rows, columns = plan.sum(dim=1), plan.sum(dim=0)
        full, n = torch.diag(torch.cat([rows, columns])), len(f)
        full[:n, n:], full[n:, :n] = plan, plan.T
        # The matrix is singular along (1, −1), the potentials' free constant, which the last equation fixes.
        free = torch.cat([torch.ones_like(f), -torch.ones_like(g)])
        gauge = torch.cat([a, -b])
        wanted = torch.cat([by_f, by_g])
        along = wanted.dot(free) / gauge.dot(free)
        adjoint = torch.linalg.solve(full + torch.outer(free, free), wanted - along * gauge)
        adjoint = adjoint - free * adjoint.dot(free) / free.dot(free)
        u, v = adjoint[:n], adjoint[n:]
        to_weights_a = ctx.epsilon * u - along * f
        to_weights_b = ctx.epsilon * v + along * g
        return (u[:, None] + v) * plan, to_weights_a, to_weights_b, None, None, None
