"""Test systems: boxes with random obstacles, and divergences of random smooth velocities as right-hand sides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from provenn.core.physics.poisson import Cell, divergence

OBSTACLES = 3
MODES = 4


def obstacles(shape: tuple[int, ...], draws: torch.Generator) -> Tensor:
    """Return cell flags of an open box with three solid balls or boxes, of random size and place.

    Args:
        shape: The grid.
        draws: Draws the obstacles: radius 8 to 15 % of the side, centres in the middle 60 %.
    """
    places = [(torch.arange(side, dtype=torch.float64) + 0.5) / side for side in shape]
    cells = torch.stack(torch.meshgrid(*places, indexing="ij"), -1)
    flags = torch.full(shape, int(Cell.FLUID))
    for _ in range(OBSTACLES):
        centre = 0.2 + 0.6 * torch.rand(len(shape), dtype=torch.float64, generator=draws)
        radius = 0.08 + 0.07 * torch.rand(1, dtype=torch.float64, generator=draws).item()
        order = 2 if torch.rand(1, generator=draws).item() < 0.5 else math.inf
        flags[torch.linalg.vector_norm(cells - centre, ord=order, dim=-1) < radius] = int(Cell.NEUMANN)
    return flags


def right_hand_side(flags: Tensor, draws: torch.Generator) -> Tensor:
    """Return −div u in the fluid cells for a random velocity of at most four waves a side.

    Args:
        flags: The cells.
        draws: Draws the velocity: each wave k has a Gaussian amplitude over 1 + |k|², and a uniform phase.
    """
    dim = flags.dim()
    waves = torch.cartesian_prod(*[torch.arange(-MODES, MODES + 1, dtype=torch.float64)] * dim).view(-1, dim)
    velocity = []
    for axis in range(dim):
        amplitudes = torch.randn(len(waves), dtype=torch.float64, generator=draws) / (1 + waves.square().sum(1))
        phases = 2 * math.pi * torch.rand(len(waves), dtype=torch.float64, generator=draws)
        coefficients = torch.polar(amplitudes, phases).view([2 * MODES + 1] * dim)
        for along, side in enumerate(flags.shape):
            faces = torch.arange(side + (along == axis), dtype=torch.float64)
            place = (faces + (0.0 if along == axis else 0.5)) / side
            angles = 2 * math.pi * torch.arange(-MODES, MODES + 1, dtype=torch.float64)[:, None] * place
            # Each round sums over the first axis of waves and adds an axis of places at the end.
            coefficients = torch.tensordot(coefficients, torch.polar(torch.ones_like(angles), angles), dims=([0], [0]))
        velocity.append(coefficients.real)
    return -divergence(velocity, flags, spacing=[1 / side for side in flags.shape]).flatten()
