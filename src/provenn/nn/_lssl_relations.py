"""What linear state spaces have in common with gated and with nonlinear recurrences."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.sequences.scans import linear_recurrence
from provenn.core.sequences.state_space import generalized_bilinear


def gated_recurrence(
    z: Float[Tensor, "batch time features"],
    u: Float[Tensor, "batch time features"],
    initial: Float[Tensor, "batch features"] | None = None,
) -> Float[Tensor, "batch time features"]:
    """Return h_t = (1 − σ(z_t)) h_{t−1} + σ(z_t) u_t as ẋ = −x + u by backward Euler with steps Δ_t = e^{z_t}.

    Args:
        z: The gates' arguments: the logarithms of the steps.
        u: The inputs.
        initial: h_0; zero without it.

    Shape:
        All (batch, time, features), ``initial`` (batch, features).

    Returns:
        h.

    Raises:
        ValueError: The shapes differ.

    Cost: O(time) work, in parallel over time as in ``linear_recurrence``.

    Source: Gu et al., NeurIPS 2021, lemma 3.1 and appendix C.
    """
    if z.shape != u.shape:
        raise ValueError(f"z must have the shape of u, {tuple(u.shape)}, got {tuple(z.shape)}")
    # σ is 1 or 0 to rounding before e^z overflows or vanishes.
    limit = math.log(torch.finfo(z.dtype).max) / 2
    A, B = -z.new_ones(1, 1), z.new_ones(1)
    moving, entering = generalized_bilinear(A, B, z.clamp(-limit, limit).exp(), alpha=1.0)
    return linear_recurrence(moving[..., 0, 0], entering[..., 0] * u, initial, dim=1)


def picard_iteration(
    f: Callable[[Tensor, Tensor], Tensor],
    u: Float[Tensor, "batch time inputs"],
    initial: Float[Tensor, "batch features"],
    dt: float,
    depth: int,
) -> Float[Tensor, "batch time features"]:
    """Approach the solution of the nonlinear ẋ = −x + f(u, x) by a stack of linear systems, one an iteration.

    Layer l solves the linear ẋ = −x + f(u, x^{(l−1)}), as a gated recurrence with a constant gate; in between, f acts
    on each time alone. The fixed point is the backward Euler solution of the nonlinear equation.

    Args:
        f: Acts on the last dimension: (u, x) → (…, features).
        u: The inputs.
        initial: x(0), and the first iterate at all times.
        dt: Δ > 0, the time between inputs.
        depth: Number of layers, at least 1.

    Shape:
        u (batch, time, inputs), ``initial`` (batch, features); the result (batch, time, features).

    Returns:
        x^{(depth)}.

    Raises:
        ValueError: ``dt`` ≤ 0 or ``depth`` < 1.

    Cost: ``depth`` calls of f on all times and as many linear recurrences. On a span of time T and with a Lipschitz
    constant κ of f the error of layer l falls at least like (κT)^l / l!.

    Source: Gu et al., NeurIPS 2021, theorem 1 and appendix C (Picard iteration).
    """
    check_number("dt", dt, above=0)
    check_integer("depth", depth, at_least=1)
    x = initial[:, None].expand(-1, u.shape[1], -1)
    gate = torch.full_like(x, math.log(dt))
    for _ in range(depth):
        x = gated_recurrence(gate, f(u, x), initial)
    return x
