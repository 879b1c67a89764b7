"""Integration from noise to class in continuous time, by Euler's or Heun's steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.training._noprop_data import normal_like

Field = Callable[[Tensor, Tensor], Tensor]
Solver = Literal["euler", "heun"]
STEPS = {"euler": 1000, "heun": 40}
"""The paper's numbers of steps."""


def integrate(
    field: Field,
    z: Float[Tensor, "batch embed"],
    steps: int,
    solver: Solver,
    diffusion: Callable[[Tensor], Tensor] | None = None,
    noise: torch.Generator | None = None,
) -> Float[Tensor, "batch embed"]:
    """Integrate dz = field(z, t) dt + √diffusion(t) dW over t from 0 to 1.

    Args:
        field: Maps z and the times, one a sample, to velocities.
        z: Where the paths start.
        steps: Steps of equal length.
        solver: Heun's method evaluates the field twice a step.
        diffusion: Variance of the noise per unit of time; ``None`` for an ordinary differential equation.
        noise: Draws the noise.

    Shape: (batch, d) → (batch, d).
    """
    length = 1 / steps
    for step in range(steps):
        t = z.new_full((len(z),), step / steps)
        slope = field(z, t)
        if solver == "heun":
            slope = 0.5 * (slope + field(z + length * slope, z.new_full((len(z),), (step + 1) / steps)))
        z = z + length * slope
        if diffusion is not None:
            z = z + (length * diffusion(t)).sqrt()[:, None] * normal_like(z, noise)
    return z
