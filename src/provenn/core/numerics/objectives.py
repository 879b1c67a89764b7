"""Standard test functions of global optimisation: bounded, to be maximised, in units of their own spread."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer

_SPREAD_POINTS = 2**14


class Objective:
    """A published function f, to be maximised as (mean f − f) / deviation f, so that noise and regret have one unit.

    Mean and standard deviation are those of f over its box, from 16384 Sobol points.

    Args:
        name: Its name.
        published: f as published, to be minimised: (..., d) to (...).
        lower: Lower bounds.
        upper: Upper bounds.
        minimizers: All points where f is smallest, one a row.
        minimum: f there.

    Cost: 16384 evaluations when it is built; calls cost O(n d), Hartmann's functions four times that.
    """

    def __init__(
        self,
        name: str,
        published: Callable[[Tensor], Tensor],
        lower: list[float],
        upper: list[float],
        minimizers: list[list[float]],
        minimum: float,
    ) -> None:
        self.name = name
        self.published = published
        self.bounds: Float[Tensor, "2 dimensions"] = torch.tensor([lower, upper], dtype=torch.float64, device="cpu")
        self.optimum: Float[Tensor, "optima dimensions"] = torch.tensor(minimizers, dtype=torch.float64, device="cpu")
        self.minimum = minimum
        cube = torch.quasirandom.SobolEngine(len(lower)).draw(_SPREAD_POINTS, dtype=torch.float64)
        values = published(self.bounds[0] + (self.bounds[1] - self.bounds[0]) * cube)
        self.mean, self.deviation = values.mean().item(), values.std().item()

    @property
    def maximum(self) -> float:
        """The largest value of the scaled function."""
        return (self.mean - self.minimum) / self.deviation

    def __call__(self, points: Float[Tensor, "*n dimensions"]) -> Float[Tensor, "*n"]:
        """Return the scaled function's values.

        Args:
            points: Points within the bounds.

        Shape:
            (n, d) to (n,), in standard deviations of f.

        Raises:
            ValueError: The points have another number of coordinates.
        """
        if points.shape[-1] != self.bounds.shape[1]:
            raise ValueError(f"points of {self.name} must have {self.bounds.shape[1]} coordinates, got {points.shape}")
        return (self.mean - self.published(points)) / self.deviation


def branin() -> Objective:
    """Return Branin's function on [−5, 10] × [0, 15]: three optima.

    Source: Dixon, Szegö, "Towards Global Optimisation 2" (1978).
    """

    def published(x: Tensor) -> Tensor:
        first, second = x.unbind(-1)
        bowl = second - 5.1 / (4 * math.pi**2) * first**2 + 5 / math.pi * first - 6
        return bowl**2 + 10 * (1 - 1 / (8 * math.pi)) * first.cos() + 10

    optima = [[-math.pi, 12.275], [math.pi, 2.275], [3 * math.pi, 2.475]]
    return Objective("branin", published, [-5, 0], [10, 15], optima, 10 / (8 * math.pi))


_HARTMANN_WEIGHTS = [1.0, 1.2, 3.0, 3.2]
_HARTMANN = {
    3: (
        [[3, 10, 30], [0.1, 10, 35], [3, 10, 30], [0.1, 10, 35]],
        [[3689, 1170, 2673], [4699, 4387, 7470], [1091, 8732, 5547], [381, 5743, 8828]],
        [[0.11458887, 0.55564889, 0.85254698]],
        -3.8627797873327,
    ),
    6: (
        [[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]],
        [
            [1312, 1696, 5569, 124, 8283, 5886],
            [2329, 4135, 8307, 3736, 1004, 9991],
            [2348, 1451, 3522, 2883, 3047, 6650],
            [4047, 8828, 8732, 5743, 1091, 381],
        ],
        [[0.20168951, 0.15001069, 0.47687397, 0.27533243, 0.31165162, 0.65730053]],
        -3.3223680114155,
    ),
}


def hartmann(dim: int = 6) -> Objective:
    """Return Hartmann's function on the unit cube of 3 or 6 dimensions: four bumps, one optimum.

    Args:
        dim: 3 or 6.

    Source: Dixon, Szegö, "Towards Global Optimisation 2" (1978).
    """
    check_choice("dim", dim, _HARTMANN)
    scales, centres, optimum, minimum = _HARTMANN[dim]

    def published(x: Tensor) -> Tensor:
        away = (x.unsqueeze(-2) - 1e-4 * torch.tensor(centres, dtype=x.dtype, device=x.device)).square()
        exponents = (torch.tensor(scales, dtype=x.dtype, device=x.device) * away).sum(-1)
        return -(torch.tensor(_HARTMANN_WEIGHTS, dtype=x.dtype, device=x.device) * (-exponents).exp()).sum(-1)

    return Objective(f"hartmann{dim}", published, [0.0] * dim, [1.0] * dim, optimum, minimum)


def ackley(dim: int = 2) -> Objective:
    """Return Ackley's function on [−32.768, 32.768]^dim: one funnel covered with ripples.

    Args:
        dim: Its dimension.

    Source: Ackley, "A Connectionist Machine for Genetic Hillclimbing" (1987).
    """
    check_integer("dim", dim, at_least=1)

    def published(x: Tensor) -> Tensor:
        length = x.square().mean(-1).sqrt()
        return -20 * (-0.2 * length).exp() - (2 * math.pi * x).cos().mean(-1).exp() + 20 + math.e

    return Objective("ackley", published, [-32.768] * dim, [32.768] * dim, [[0.0] * dim], 0.0)


def levy(dim: int = 2) -> Objective:
    """Return Levy's function on [−10, 10]^dim: many ripples along each axis.

    Args:
        dim: Its dimension.

    Source: Laguna, Martí, J. Glob. Optim. 33 (2005), their Levy function.
    """
    check_integer("dim", dim, at_least=1)

    def published(x: Tensor) -> Tensor:
        w = 1 + (x - 1) / 4
        inner = ((w - 1).square() * (1 + 10 * (math.pi * w + 1).sin().square()))[..., :-1].sum(-1)
        last = w[..., -1]
        end = (last - 1).square() * (1 + (2 * math.pi * last).sin().square())
        return (math.pi * w[..., 0]).sin().square() + inner + end

    return Objective("levy", published, [-10.0] * dim, [10.0] * dim, [[1.0] * dim], 0.0)


def rosenbrock(dim: int = 2) -> Objective:
    """Return Rosenbrock's function on [−5, 10]^dim: a curved valley.

    Args:
        dim: Its dimension, at least 2.

    Source: Rosenbrock, Comput. J. 3 (1960).
    """
    check_integer("dim", dim, at_least=2)

    def published(x: Tensor) -> Tensor:
        here, following = x[..., :-1], x[..., 1:]
        return (100 * (following - here.square()).square() + (here - 1).square()).sum(-1)

    return Objective("rosenbrock", published, [-5.0] * dim, [10.0] * dim, [[1.0] * dim], 0.0)


def six_hump_camel() -> Objective:
    """Return the six-hump camel function on [−3, 3] × [−2, 2]: two optima.

    Source: Dixon, Szegö, "Towards Global Optimisation 2" (1978).
    """

    def published(x: Tensor) -> Tensor:
        first, second = x.unbind(-1)
        own = (4 - 2.1 * first**2 + first**4 / 3) * first**2
        return own + first * second + (4 * second**2 - 4) * second**2

    optima = [[0.0898420131, -0.7126564032], [-0.0898420131, 0.7126564032]]
    return Objective("six-hump camel", published, [-3, -2], [3, 2], optima, -1.0316284534898774)
