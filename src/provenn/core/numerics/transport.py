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
_NEGLIGIBLE = -60.0
"""An exponent whose exponential no sum near 1 notices, in float64 either; smaller ones would cost time as denormals."""


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
    relaxation: float = 1.0,
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
        relaxation: Factor ω in (0, 2) on every change of a potential. Near the solution ω > 1 takes fewer iterations,
            the more so the smaller ε; far from it the iteration may fail to converge.

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

    Source: Cuturi, NeurIPS 2013; Peyré and Cuturi, "Computational Optimal Transport" (2019), sections 4.4 and 9.1;
    relaxation: Thibault et al., Algorithms 14 (2021).
    """
    check_number("epsilon", epsilon, above=0)
    check_number("tol", tol, above=0)
    check_integer("max_iter", max_iter, at_least=1)
    check_number("scaling", scaling, above=0, at_most=1)
    check_number("relaxation", relaxation, above=0, below=2)
    _check_costs(C)
    a, b = (as_weights(name, one, C, size) for name, one, size in (("a", a, C.shape[0]), ("b", b, C.shape[1])))
    f, g, error, iterations = _iterate(C.detach(), a.detach(), b.detach(), epsilon, tol, max_iter, scaling, relaxation)
    return _solution(C, a, b, f, g, epsilon, tol, error, iterations)


def symmetric_sinkhorn(
    C: Float[Tensor, "n n"],
    a: Float[Tensor, " n"] | None = None,
    *,
    epsilon: float,
    tol: float = 1e-3,
    max_iter: int = 2000,
) -> Transport:
    """Solve entropic optimal transport of a measure to itself by averaged updates of one potential, f = g.

    The averaged iteration takes a handful of steps where :func:`sinkhorn` takes tens.

    Args:
        C: Costs, symmetric.
        a: Weights of rows and columns, as in :func:`sinkhorn`.
        epsilon: As in :func:`sinkhorn`.
        tol: As in :func:`sinkhorn`.
        max_iter: As in :func:`sinkhorn`.

    Shape:
        C (n, n), a (n,).

    Returns:
        The solution, with the gradients of :func:`sinkhorn`'s.

    Raises:
        ValueError: As :func:`sinkhorn`; or C is not symmetric.

    Warns:
        RuntimeWarning: The marginals were not met within ``max_iter``; the message has the error.

    Cost: O(n²) time an iteration and O(n²) memory.

    Source: Feydy et al., AISTATS 2019, equation 25.
    """
    check_number("epsilon", epsilon, above=0)
    check_number("tol", tol, above=0)
    check_integer("max_iter", max_iter, at_least=1)
    _check_costs(C)
    off = math.inf if C.shape[0] != C.shape[1] else (C - C.T).abs().max().item()
    if off > 1e-4 * C.abs().max().item():
        raise ValueError(f"C must be symmetric, got shape {tuple(C.shape)} with C − Cᵀ up to {off:.2g}")
    a = as_weights("a", a, C, C.shape[0])
    costs, log_a, f = C.detach(), a.detach().log(), torch.zeros_like(a)
    iterations = 0
    while True:
        iterations += 1
        full = _update(costs, f, log_a, epsilon)
        # exp(f / ε) over exp(full / ε) is the row's sum over its weight, so the check costs nothing.
        error = (a.detach() * torch.expm1((f - full) / epsilon)).abs().sum().item()
        if error <= tol or iterations == max_iter:
            return _solution(C, a, a, f, f.clone(), epsilon, tol, error, iterations)
        f = (f + full) / 2


def _check_costs(C: Tensor) -> None:
    if C.dim() != 2 or 0 in C.shape:
        raise ValueError(f"C must be a matrix with rows and columns, got shape {tuple(C.shape)}")
    if not C.isfinite().all():
        raise ValueError("C must be finite, got NaN or infinite costs")


def _solution(
    C: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: float, tol: float, error: float, iterations: int
) -> Transport:
    if error > tol:
        warnings.warn(
            f"Sinkhorn's marginals are off by {error:.2g} > {tol:g} after {iterations} iterations",
            RuntimeWarning,
            stacklevel=3,
        )
    f, g = _Potentials.apply(C, a, b, f, g, epsilon)  # type: ignore[no-untyped-call]
    value = _Value.apply(C, a, b, f.detach(), g.detach(), epsilon)  # type: ignore[no-untyped-call]
    return Transport(f, g, _plan(C, f, g, epsilon), value, error, error <= tol, iterations)


def as_weights(name: str, weights: Tensor | None, like: Tensor, size: int) -> Float[Tensor, " size"]:
    """Return a measure's weights, checked; equal ones for ``None``.

    Args:
        name: The argument's name, for errors.
        weights: Above 0, adding up to 1.
        like: A tensor whose type and device they take.
        size: How many there must be.

    Raises:
        ValueError: They are not above 0, do not add up to 1, or are too many or too few.
    """
    if weights is None:
        return like.new_full((size,), 1 / size)
    if weights.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {tuple(weights.shape)}")
    if not weights.isfinite().all() or not (weights > 0).all():
        raise ValueError(f"{name} must be above 0 (leave out points of weight 0), got {weights.min().item()}")
    if abs(weights.sum().item() - 1) > 1e-4:
        raise ValueError(f"{name} must add up to 1, got a sum of {weights.sum().item():.6g}")
    return weights.to(like)


def _iterate(
    C: Tensor, a: Tensor, b: Tensor, epsilon: float, tol: float, max_iter: int, scaling: float, relaxation: float
) -> tuple[Tensor, Tensor, float, int]:
    log_a, log_b = a.log(), b.log()
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    current = max(epsilon, (C.max() - C.min()).item()) if scaling < 1 else epsilon
    error = math.inf
    for iteration in range(1, max_iter + 1):
        at_target = current == epsilon
        look = iteration == max_iter or (at_target and (iteration % _CHECK_EVERY == 0 or iteration < _CHECK_EVERY))
        f = torch.lerp(f, _update(C, g, log_a, current), relaxation)
        # Before a look at the rows, the columns are met exactly, whatever the relaxation.
        g = torch.lerp(g, _update(C.T, f, log_b, current), 1.0 if look else relaxation)
        if look:
            error = _row_error(C, f, g, a, epsilon)
            if error <= tol:
                break
        current = max(epsilon, current * scaling)
    shift = (a.dot(f) - b.dot(g)) / 2
    return f - shift, g + shift, error, iteration


def _row_error(C: Tensor, f: Tensor, g: Tensor, a: Tensor, epsilon: float) -> float:
    """Return how far the rows are off: the columns are met exactly, by the update that came last."""
    exponents = (f[:, None] + g).sub_(C).div_(epsilon)
    return (exponents.clamp_min_(_NEGLIGIBLE).exp_().sum(dim=1) - a).abs().sum().item()


def _update(C: Tensor, other: Tensor, log_weights: Tensor, epsilon: float) -> Tensor:
    """Return the potential of the rows that meets their marginal exactly."""
    exponents = (other - C).div_(epsilon)
    largest = exponents.amax(dim=1)
    sums = exponents.sub_(largest[:, None]).clamp_min_(_NEGLIGIBLE).exp_().sum(dim=1)
    return epsilon * (log_weights - largest - sums.log_())


def _plan(C: Tensor, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
    return torch.exp((f[:, None] + g - C) / epsilon)


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, C: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
        plan = _plan(C, f, g, epsilon)
        ctx.save_for_backward(plan, f, g)
        # The dual's value: equal to the plan's at the solution, and off by a square where the plan's is off linearly.
        return a.dot(f) + b.dot(g) + epsilon * (1 - plan.sum())

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
