"""Minimise a smooth, strongly convex function until its gradient is small: FISTA, gradient descent, L-BFGS.

All have one signature, ``(objective, x, *, tol, mu, smoothness, max_iter) → Descent``, and count one iteration for
each gradient. For a μ-strongly convex function, ‖∇h(x)‖/μ bounds the distance from the minimiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x ↦ (value, gradient)."""

_DIVERGED = 10.0
_TRIALS = 25


class Descent(NamedTuple):
    """Where a minimisation ended.

    Args:
        x: The last point, at which the gradient was taken.
        gradient_norm: Its gradient's norm; NaN or infinite if the objective left the numbers there.
        iterations: Gradients taken.
    """

    x: Float[Tensor, "*shape"]
    gradient_norm: float
    iterations: int


class Minimizer(Protocol):
    """What the minimisers here look like, and a user's own."""

    def __call__(
        self, objective: Objective, x: Tensor, *, tol: float, mu: float, smoothness: float, max_iter: int
    ) -> Descent:
        """Minimise from x until the gradient's norm is at most ``tol``."""


def fista(
    objective: Objective,
    x: Float[Tensor, "*shape"],
    *,
    tol: float,
    mu: float,
    smoothness: float,
    max_iter: int,
) -> Descent:
    """Minimise by FISTA with the momentum of strongly convex functions.

    With q = μ/L: t ← ½(1 − q t² + √((1 − q t²)² + 4t²)), momentum (t_old − 1)(1 − t q)/(t(1 − q)). Where the gradient
    grows to ten times its first norm, L was too small: it is doubled, and the iteration starts anew.

    Args:
        objective: x ↦ (value, gradient).
        x: The start.
        tol: Stop at a gradient of this norm.
        mu: Strong convexity μ; 0 gives FISTA for convex functions.
        smoothness: Lipschitz constant L of the gradient, or an estimate.
        max_iter: Most gradients.

    Shape:
        ``x`` and the result's ``x`` any, alike.

    Returns:
        The last extrapolated point, whose gradient is the one that was tested.

    Cost: one gradient an iteration, O(√(L/μ) log(1/tol)) iterations; three vectors.

    Source: Beck & Teboulle, SIAM J. Imaging Sci. 2 (2009); Chambolle & Pock, Acta Numerica 25 (2016), algorithm 5.
    """
    start, first = x, math.inf
    q = min(mu / smoothness, 1.0)
    t, last, point = 1.0, x, x
    for count in range(1, max_iter + 1):
        gradient = objective(point)[1]
        norm = gradient.norm().item()
        first = norm if count == 1 else first
        if norm <= tol or not math.isfinite(norm) or count == max_iter:
            return Descent(point, norm, count)
        if norm > _DIVERGED * first:
            smoothness *= 2
            q = min(mu / smoothness, 1.0)
            t, last, point = 1.0, start, start
            continue
        x = point - gradient / smoothness
        ahead = _next_t(t, q)
        momentum = 0.0 if q >= 1 else _momentum(t, ahead, q)
        point = x + momentum * (x - last)
        t, last = ahead, x
    return Descent(point, math.inf, 0)


def _next_t(t: float, q: float) -> float:
    rest = 1 - q * t * t
    return 0.5 * (rest + math.sqrt(rest * rest + 4 * t * t))


def _momentum(t: float, ahead: float, q: float) -> float:
    return (t - 1) * (1 - ahead * q) / (ahead * (1 - q))


def gradient_descent(
    objective: Objective,
    x: Float[Tensor, "*shape"],
    *,
    tol: float,
    mu: float,
    smoothness: float,
    max_iter: int,
) -> Descent:
    """Minimise by gradient descent with steps of 1/L.

    Args:
        objective: x ↦ (value, gradient).
        x: The start.
        tol: Stop at a gradient of this norm.
        mu: Not needed: the step is 1/L whatever μ.
        smoothness: Lipschitz constant L of the gradient, or an estimate, doubled like :func:`fista`'s.
        max_iter: Most gradients.

    Shape:
        ``x`` and the result's ``x`` any, alike.

    Returns:
        The last point.

    Cost: one gradient an iteration, O((L/μ) log(1/tol)) iterations; two vectors.

    Source: Nesterov, Introductory Lectures on Convex Optimization (2004), section 2.1.5.
    """
    start, first = x, math.inf
    for count in range(1, max_iter + 1):
        gradient = objective(x)[1]
        norm = gradient.norm().item()
        first = norm if count == 1 else first
        if norm <= tol or not math.isfinite(norm) or count == max_iter:
            return Descent(x, norm, count)
        if norm > _DIVERGED * first:
            smoothness *= 2
            x = start
        else:
            x = x - gradient / smoothness
    return Descent(x, math.inf, 0)


def lbfgs(
    objective: Objective,
    x: Float[Tensor, "*shape"],
    *,
    tol: float,
    mu: float,
    smoothness: float,
    max_iter: int,
) -> Descent:
    """Minimise by L-BFGS with ten pairs and a strong Wolfe line search.

    The search compares values, so it stops short of tolerances below about √(L · |h| · rounding).

    Args:
        objective: x ↦ (value, gradient).
        x: The start.
        tol: Stop at a gradient of this norm.
        mu: Not needed.
        smoothness: Not needed.
        max_iter: Most gradients, the line search's included; the last search may take up to 25 more.

    Shape:
        ``x`` and the result's ``x`` any, alike.

    Returns:
        The last point.

    Cost: one value and gradient an iteration; 20 vectors.

    Source: Liu & Nocedal, Math. Programming 45 (1989); torch.optim.LBFGS.
    """
    point = x.detach().clone().requires_grad_()
    search = torch.optim.LBFGS(
        [point],
        max_iter=1,
        max_eval=_TRIALS,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    count = 0

    def closure() -> Tensor:
        nonlocal count
        count += 1
        value, point.grad = objective(point.detach())
        return value

    closure()
    while True:
        norm = _norm_at(point)
        if norm <= tol or not math.isfinite(norm) or count >= max_iter:
            return Descent(point.detach(), norm, count)
        before = point.detach().clone()
        search.step(closure)
        closure()  # the search leaves the gradient of its last trial
        if torch.equal(before, point.detach()):
            return Descent(point.detach(), _norm_at(point), count)


def _norm_at(point: Tensor) -> float:
    return math.nan if point.grad is None else point.grad.norm().item()


MINIMIZERS: dict[str, Minimizer] = {"fista": fista, "gd": gradient_descent, "lbfgs": lbfgs}
"""The minimisers by name."""
