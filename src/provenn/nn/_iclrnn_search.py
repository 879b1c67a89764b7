"""Projected gradients for many starts at once, each with its own steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Objective = Callable[[Tensor], Tensor]
"""(starts, unknowns) to (starts,), each row on its own."""
MEMORY, DECREASE, SHORTEST = 10, 1e-4, 1e-12


def value_and_gradient(
    objective: Objective, u: Float[Tensor, "starts unknowns"]
) -> tuple[Float[Tensor, " starts"], Float[Tensor, "starts unknowns"]]:
    """Return an objective and its gradient at every row."""
    with torch.enable_grad():
        free = u.detach().requires_grad_()
        value = objective(free)
        (gradient,) = torch.autograd.grad(value.sum(), free)
    return value.detach(), gradient


def projected_gradient(
    u: Float[Tensor, "starts unknowns"],
    gradient: Float[Tensor, "starts unknowns"],
    lower: Float[Tensor, " unknowns"],
    upper: Float[Tensor, " unknowns"],
) -> Float[Tensor, "starts unknowns"]:
    """Return u − Π(u − ∇): zero where no direction inside the box leads downhill."""
    return u - torch.clamp(u - gradient, lower, upper)


def spectral_projected_gradient(
    objective: Objective,
    u: Float[Tensor, "starts unknowns"],
    lower: Float[Tensor, " unknowns"],
    upper: Float[Tensor, " unknowns"],
    tol: float,
    max_iter: int,
) -> Float[Tensor, "starts unknowns"]:
    """Minimise over a box from every row of u, with Barzilai–Borwein steps and a line search that looks back 10 values.

    Args:
        objective: Evaluated at all rows at once.
        u: The starts.
        lower: Lower bounds.
        upper: Upper bounds.
        tol: Largest norm of the projected gradient at which a row rests.
        max_iter: Evaluations.

    Returns:
        The best point of each row.

    Cost: an evaluation with its gradient each, and O(starts · unknowns).

    Source: Birgin, Martínez & Raydan, "Nonmonotone spectral projected gradient methods on convex sets", SIAM J. Optim.
    10 (2000).
    """
    u = torch.clamp(u, lower, upper)
    value, gradient = value_and_gradient(objective, u)
    past = value.expand(MEMORY, -1).clone()
    best, least = u, value
    length = 1 / projected_gradient(u, gradient, lower, upper).norm(dim=1, keepdim=True).clamp(min=1e-10)
    share = torch.ones_like(length)
    for count in range(max_iter):
        rests = projected_gradient(u, gradient, lower, upper).norm(dim=1) <= tol
        if bool((rests | (share[:, 0] < SHORTEST)).all()):
            break
        direction = torch.clamp(u - length * gradient, lower, upper) - u
        trial = u + share * direction
        found, slope = value_and_gradient(objective, trial)
        allowed = past.amax(0) + DECREASE * share[:, 0] * (gradient * direction).sum(1)
        taken = (found <= allowed)[:, None]
        moved, turned = trial - u, slope - gradient
        curvature = (moved * turned).sum(1, keepdim=True)
        spectral = (moved.square().sum(1, keepdim=True) / curvature.clamp(min=1e-300)).clamp(1e-8, 1e8)
        length = torch.where(taken, torch.where(curvature > 0, spectral, 1e8), length)
        u, gradient = torch.where(taken, trial, u), torch.where(taken, slope, gradient)
        value = torch.where(taken[:, 0], found, value)
        share = torch.where(taken, 1.0, share / 2)
        past[count % MEMORY] = value
        better = value < least
        best, least = torch.where(better[:, None], u, best), torch.where(better, value, least)
    return best
