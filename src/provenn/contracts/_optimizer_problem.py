"""What the suite of optimizers steps on: a convex quadratic and Rosenbrock's function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from provenn.contracts.case import OptimizerCase
from provenn.contracts.suite import expect
from provenn.contracts.watch import generator, seeded, tensors_in

SHAPES = ((4, 3), (5,))
"""Shapes of the parameters that most checks step."""


class Problem:
    """A convex quadratic, ½ Σ c (p − t)², with curvatures c from 1 to 10, over a few parameters."""

    def __init__(self, shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64) -> None:
        source = generator(0)
        draw = torch.float64 if not dtype.is_complex else torch.complex128
        self.targets = [torch.randn(shape, generator=source, dtype=draw).to(dtype) for shape in shapes]
        self.curvatures = [torch.linspace(1, 10, t.numel(), dtype=torch.float64).view(t.shape) for t in self.targets]
        starts = [torch.randn(shape, generator=source, dtype=draw).to(dtype) for shape in shapes]
        self.parameters = [nn.Parameter(start + 2) for start in starts]

    def loss(self) -> Tensor:
        """Return the value at the parameters."""
        terms = zip(self.parameters, self.targets, self.curvatures, strict=True)
        pieces = [(curvature.to(p.device) * (p - t.to(p.device)).abs().square()).sum() for p, t, curvature in terms]
        total: Tensor = torch.stack(pieces).sum() / 2
        return total

    def value(self) -> float:
        """Return the value at the parameters as a number."""
        return float(self.loss().detach())

    def closure(self) -> Any:
        """Evaluate the loss, and the gradients where gradients are enabled."""
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.loss()
        if loss.requires_grad:
            loss.backward()
        return loss

    def values(self) -> list[Tensor]:
        """Return copies of the parameters."""
        return [parameter.detach().clone() for parameter in self.parameters]


def advance(case: OptimizerCase, problem: Problem, optimizer: Optimizer, count: int) -> None:
    """Take steps on a problem."""
    for _ in range(count):
        if case.closure == "required":
            optimizer.step(problem.closure)
        else:
            problem.closure()
            optimizer.step()


def take_steps(case: OptimizerCase, problem: Problem, optimizer: Optimizer, count: int, seed: int = 0) -> None:
    """Take steps on a problem, with torch's generator seeded."""
    with seeded(seed):
        advance(case, problem, optimizer, count)


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """Return every tensor of the optimizer's state."""
    return [tensor for state in optimizer.state.values() for tensor in tensors_in(state)]


class Rosenbrock(Problem):
    """Rosenbrock's banana, (1 − x)² + 100 (y − x²)², from (-1.2, 1)."""

    def __init__(self) -> None:
        self.parameters = [nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))]

    def loss(self) -> Tensor:
        """Return the value at the parameters."""
        x, y = self.parameters[0]
        value: Tensor = (1 - x) ** 2 + 100 * (y - x**2) ** 2
        return value


def default_step_size(case: OptimizerCase) -> float:
    """Return the step size that the case's optimizer has."""
    group = case.make(Problem().parameters).param_groups[0]
    expect(case.step_size in group, f"groups have no option {case.step_size!r}, only {sorted(group)}")
    return float(group[case.step_size])
