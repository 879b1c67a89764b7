"""Learn weight and smoothing of total-variation denoising: bilevel methods against optimizers fed hypergradients."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from provenn.claims.optim._maid_bilevel_tasks import denoising, exact_value
from provenn.compare.counted_task import CountedTask
from provenn.compare.task import LogUniform
from provenn.core.numerics.smooth_convex import fista
from provenn.optim import HOAG, MAID, TVDenoising, hypergradient

IMAGES, SIDE = 2, 32
TOLERANCE = 1e-2
"""Error of a lower solution, and residual of its adjoint system, for optimizers that do not choose their own."""
MOST = 2000
"""Iterations of a solve, at most."""


class Hyperparameters(nn.Module):
    """θ = (log weight, log smoothing), and the problem that they belong to, for methods that need more than gradients.

    Args:
        tv: The problem.
    """

    def __init__(self, tv: TVDenoising) -> None:
        super().__init__()
        self.tv = tv
        self.theta = nn.Parameter(tv.theta0.clone())
        self.methods: list[MAID | HOAG] = []


class DenoisingProblem:
    """The task's problem: a loss counts its lower-level iterations, a gradient those of conjugate gradients too.

    Args:
        tv: The bilevel problem.
    """

    def __init__(self, tv: TVDenoising) -> None:
        self.model = Hyperparameters(tv)
        self._tv, self._x, self._own = tv, tv.x0, 0.0

    @property
    def spent(self) -> float:
        """Iterations of both levels so far."""
        return self._own + sum(method.problem.work for method in self.model.methods)

    def evaluate(self, step: int) -> Tensor:
        """Return the upper loss at θ, up to the tolerance, with its hypergradient where gradients are enabled."""
        theta = self.model.theta
        if not bool(theta.isfinite().all()):
            return theta.sum()
        here = theta.detach()
        mu, smoothness = self._tv.mu(here), max(self._tv.smoothness(here), 1.0)

        def lower(x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                value = self._tv.lower(leaf, here)
                return value.detach(), torch.autograd.grad(value, leaf)[0]

        found = fista(lower, self._x, tol=TOLERANCE * mu, mu=mu, smoothness=smoothness, max_iter=MOST)
        self._x = found.x.detach()
        self._own += found.iterations
        if torch.is_grad_enabled():
            slope = hypergradient(self._tv.lower, self._tv.upper, self._x, here, TOLERANCE, max_iter=MOST)
            self._own += slope.iterations
            theta.grad = slope.gradient
        return self._tv.upper(self._x)

    def measure(self) -> float:
        """Return the upper loss at θ, by an accurate lower solution."""
        theta = self.model.theta.detach()
        if not bool(theta.isfinite().all()):
            return math.nan
        value: float = exact_value(self._tv, theta, self._x, max_iter=MOST)
        return value


class Bilevel(torch.optim.Optimizer):
    """Steps of a bilevel method, which solves the lower level itself.

    Args:
        model: The hyperparameters.
        method: The method, set up for their problem.
    """

    def __init__(self, model: Hyperparameters, method: MAID | HOAG) -> None:
        super().__init__(model.parameters(), {})
        self._model, self._method = model, method
        model.methods.append(method)

    def step(self, closure: Any = None) -> None:
        """Take one outer iteration; the closure is not needed."""
        self._method.step()
        with torch.no_grad():
            self._model.theta.copy_(self._method.theta)


def maid(model: Hyperparameters, lr: float = 0.1) -> Bilevel:
    """Make MAID, whose first trial step is the learning rate."""
    return Bilevel(model, MAID.for_problem(model.tv, step0=lr))


def hoag(model: Hyperparameters, lr: float = 0.1) -> Bilevel:
    """Make HOAG with its adaptive step, which starts at the learning rate."""
    return Bilevel(model, HOAG.for_problem(model.tv, step0=lr))


def problem(seed: int, device: str, tuning: bool) -> DenoisingProblem:
    """Return the problem on images that the seed draws."""
    tv = denoising(seed, IMAGES, SIDE)
    return DenoisingProblem(TVDenoising(tv.noisy.to(device), tv.clean.to(device)))


TASK = CountedTask(
    name="bilevel-tv",
    summary=(
        "weight and smoothing of total-variation denoising on two simulated images of 32 × 32, 3000 iterations of the "
        "lower level and of conjugate gradients; MAID and HOAG choose their accuracy, others get 1e-2"
    ),
    kinds={"optim": {"lr": LogUniform(1e-3, 1e1)}},
    problem=problem,
    evaluations=3000,
    metric="upper-level loss",
    maximize=False,
    references={"maid": maid, "hoag": hoag},
    over="iterations of both levels",
)
