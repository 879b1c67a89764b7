"""A Deep Conjugate Direction Method for Iteratively Solving Linear Systems.

Kaneda, Akar, Chen, Kala, Hyde, Teran, ICML 2023. https://arxiv.org/abs/2205.10763

Search directions for A x = b from a small convolutional network that has learned to imitate A⁻¹ up to length; an exact
line search and A-orthogonality to the last two directions make every step safe, whatever the network says.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.recording import evaluating
from provenn.core.numerics.krylov import KrylovTrace, NotPositiveDefiniteError, lanczos, positive_curvature
from provenn.core.numerics.linear_solvers import (
    Certificate,
    ConjugateGradient,
    DeflatedCG,
    ICPreconditionedCG,
    LinearProblem,
    Solution,
)
from provenn.core.physics.poisson import poisson_matrix
from provenn.science._deep_conjugate_direction_network import DCDMNet, InverseDirectionLoss
from provenn.science._deep_conjugate_direction_training import DCDMTrainer, RitzVectorDataset

__all__ = [
    "ConjugateGradient",
    "DCDMNet",
    "DCDMSolver",
    "DCDMTrainer",
    "DeflatedCG",
    "ICPreconditionedCG",
    "InverseDirectionLoss",
    "LinearProblem",
    "NotPositiveDefiniteError",
    "RitzVectorDataset",
    "lanczos",
    "poisson_matrix",
]


class DCDMSolver:
    r"""Solve by directions that a network proposes, each made A-orthogonal to the last few, with exact line searches.

    .. math:: q = f(r / \lVert r \rVert), \quad
        d = q - \sum_j \frac{q^\top A d_j}{d_j^\top A d_j} d_j, \quad
        x \leftarrow x + \frac{r^\top d}{d^\top A d} d, \quad r = b - A x

    The error in the A-norm never grows. With the identity for a network this is the method of conjugate gradients.
    Cells without an unknown take no part.

    Args:
        net: (1, 1, *grid) to the same shape, run in evaluation mode and its own precision, on its own device.
        n_orthogonal: Directions that each new one is made A-orthogonal to.
        tol: Stop at ‖r‖ < tol · ‖b‖.
        max_iter: Most iterations.

    Raises:
        ValueError: An argument is out of bounds; in :meth:`solve`, the problem has no grid, the network's output does
            not fit, or a direction has dᵀA d ≤ 0 (a ``NotPositiveDefiniteError``, with the iteration).

    Cost: one run of the network, two products with A and O(n · n_orthogonal) an iteration; 2 · n_orthogonal + 4
    vectors.

    Source: Kaneda et al., arXiv 2205.10763, algorithm 1.
    """

    def __init__(
        self, net: Callable[[Tensor], Tensor], n_orthogonal: int = 2, tol: float = 1e-4, max_iter: int = 100
    ) -> None:
        check_integer("n_orthogonal", n_orthogonal, at_least=0)
        check_number("tol", tol, above=0)
        check_integer("max_iter", max_iter, at_least=1)
        self.net = net
        self.n_orthogonal = n_orthogonal
        self.tol = tol
        self.max_iter = max_iter

    def solve(self, problem: LinearProblem) -> Solution:
        """Solve a problem from x = 0.

        Args:
            problem: The problem; it needs its ``grid_shape``.

        Returns:
            The solution and its certificate.
        """
        if problem.grid_shape is None:
            raise ValueError("problem must have a grid_shape for a network to work on, got None")
        trace = self._iterate(problem)
        return Solution(trace.x, Certificate.of(trace, self.tol * problem.b.norm().item()))

    @torch.no_grad()
    def _iterate(self, problem: LinearProblem) -> KrylovTrace:
        active = problem.active
        past: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=self.n_orthogonal)
        x, r = torch.zeros_like(problem.b), problem.b
        norms, drops = [r.norm().item()], []
        goal = self.tol * norms[0]
        silent: list[int] = []
        while norms[-1] > 0 and norms[-1] >= goal and len(drops) < self.max_iter:
            d = _conjugated(self._propose(problem, r / norms[-1], active), past)
            if d is None:
                silent.append(len(drops))
                d = _conjugated(r, past)
                d = r if d is None else d
            Ad = problem.apply(d)
            curvature = positive_curvature(d.dot(Ad), len(drops))
            slope = d.dot(r).item()
            x = x + (slope / curvature) * d
            r = problem.b - problem.apply(x)  # not by recurrence: directions that a network gives let errors build up
            past.append((d, Ad, curvature))
            norms.append(r.norm().item())
            drops.append(0.5 * slope**2 / curvature)
        if silent:
            warnings.warn(
                f"net gave no new direction in {len(silent)} of {len(drops)} iterations, first at iteration "
                f"{silent[0]}; the residual stood in",
                stacklevel=3,
            )
        return KrylovTrace(x, tuple(norms), tuple(drops))

    def _propose(self, problem: LinearProblem, unit: Tensor, active: Tensor) -> Tensor:
        """Run the network on a unit residual; what it says of cells without an unknown is dropped."""
        grid = unit.view(1, 1, *problem.grid_shape)
        if isinstance(self.net, nn.Module):
            weight = next(self.net.parameters(), unit)
            with evaluating(self.net):
                q = self.net(grid.to(weight.device, weight.dtype))
        else:
            q = self.net(grid)
        if q.shape != grid.shape:
            raise ValueError(f"net must keep the shape {tuple(grid.shape)}, got {tuple(q.shape)}")
        if not q.isfinite().all():
            raise ValueError("net must give finite directions, got NaN or infinite entries")
        return torch.where(active, q.flatten().to(unit), 0.0)


def _conjugated(q: Tensor, past: deque[tuple[Tensor, Tensor, float]]) -> Tensor | None:
    """Make q A-orthogonal to past directions, all coefficients from q itself; ``None`` if nothing is left of it."""
    length = q.norm()
    if length == 0:
        return None
    q = q / length  # the step undoes it; without, tiny directions underflow
    d = q
    for direction, image, curvature in past:
        d = d - (q.dot(image) / curvature) * direction
    # What is left after cancellation of all but the last few digits is rounding, not a direction.
    return None if d.norm() <= 1e-8 else d
