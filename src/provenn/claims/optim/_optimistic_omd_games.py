"""The streams of the claim of optimistic mirror descent, and the rounds that are played against them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from provenn.core.experiment.seeding import generator
from provenn.optim import SEAStream, Trajectory

DIM = 5
Maker = Callable[[nn.Parameter], torch.optim.Optimizer]


def starting_point(seed: int, player: str) -> nn.Parameter:
    """Return a point of length ½ in a direction drawn by seed and player."""
    x = torch.randn(DIM, generator=generator(seed, "start", player), dtype=torch.float64)
    return nn.Parameter(x / (2 * x.norm()))


def self_play(stream: SEAStream, seed: int, make: Maker) -> Trajectory:
    """Let x and y play a stream of matrices against each other, each by a method of its own.

    Args:
        stream: The matrices' law.
        seed: Draws starting points and noise.
        make: Builds a method on a player's point.
    """
    draws = stream.sample(1, generator(seed, "noise"))[0]
    x, y = starting_point(seed, "x"), starting_point(seed, "y")
    of_x, of_y = make(x), make(y)
    points, opponents = torch.empty(2, stream.rounds, DIM, dtype=torch.float64)
    for t, matrix in enumerate(draws):
        here, there = x.detach(), y.detach()
        points[t], opponents[t] = here, there
        x.grad, y.grad = matrix @ there, -(here @ matrix)
        of_x.step()
        of_y.step()
    return Trajectory(points, draws, opponents)


def against(stream: SEAStream, seed: int, make: Maker) -> Trajectory:
    """Play a stream of vectors.

    Args:
        stream: The vectors' law.
        seed: Draws starting point and noise.
        make: Builds the method on the player's point.
    """
    draws = stream.sample(1, generator(seed, "noise"))[0]
    x = starting_point(seed, "x")
    method = make(x)
    points = torch.empty(stream.rounds, DIM, dtype=torch.float64)
    for t, draw in enumerate(draws):
        points[t] = x.detach()
        x.grad = stream.gradient(points[t], draw).clone()
        method.step()
    return Trajectory(points, draws)


def jumping_directions(rounds: int, path: float, seed: int) -> Tensor:
    """Return unit vectors θ_t in equal pieces, between which −θ_t moves by ``path`` in all, in the fewest jumps.

    Args:
        rounds: Number of vectors.
        path: Path length: at most 2, the diameter, for one jump; else an even number, for jumps across the ball.
        seed: Draws the plane of the jumps.
    """
    basis = torch.linalg.qr(torch.randn(DIM, 2, generator=generator(seed, "jumps"), dtype=torch.float64)).Q
    jumps = max(1, round(path / 2))
    turn = 2 * math.asin(path / jumps / 2)
    angles = turn * (torch.arange(rounds) * (jumps + 1) // rounds).double()
    return torch.outer(angles.cos(), basis[:, 0]) + torch.outer(angles.sin(), basis[:, 1])


def dynamic_regret(directions: Tensor, sigma: float, seed: int, make: Maker) -> float:
    """Play ⟨θ_t + ξ_t, x⟩ on the unit ball, and return Σ ⟨θ_t, x_t⟩ + 1, the regret against −θ_t throughout.

    Args:
        directions: θ_t, of length 1 (T, d).
        sigma: Length of ξ_t.
        seed: Draws starting point and noise.
        make: Builds the method on the player's point.
    """
    noise = torch.randn(directions.shape, generator=generator(seed, "noise"), dtype=torch.float64)
    draws = directions + sigma * noise / noise.norm(dim=-1, keepdim=True)
    x = starting_point(seed, "x")
    method = make(x)
    points = torch.empty_like(directions)
    for t, draw in enumerate(draws):
        points[t] = x.detach()
        x.grad = draw
        method.step()
    return float((directions * points).sum() + len(points))
