"""A Tutorial on Bayesian Optimization.

Frazier, 2018. https://arxiv.org/abs/1807.02811

Gaussian-process regression, the acquisitions of the tutorial, and a search by ask and tell that is built of them. The
Gaussian process is provenn's own plain Cholesky one, not GPyTorch's: at the hundreds of observations of an expensive
function, time goes to overhead; and slopes observed, rows added and draws of hyperparameters are direct there. A model
fitted elsewhere plays no part, so nothing beyond torch and SciPy is needed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.experiment.seeding import derive_seed
from provenn.core.experiment.seeding import generator as seeded_generator
from provenn.core.numerics.covariance_functions import Matern, PowerExponential
from provenn.search._bayesian_optimization_entropy import entropy_search, predictive_entropy_search
from provenn.search._bayesian_optimization_improvement import (
    constrained_ei,
    expected_improvement,
    noisy_expected_improvement,
    probability_of_improvement,
    q_expected_improvement,
    ucb,
)
from provenn.search._bayesian_optimization_knowledge import (
    ascend_knowledge_gradient,
    knowledge_gradient,
    q_knowledge_gradient,
)
from provenn.search._bayesian_optimization_models import Models
from provenn.search._bayesian_optimization_normal import expected_max_affine
from provenn.search._bayesian_optimization_process import GaussianProcess
from provenn.search._bayesian_optimization_proposals import propose
from provenn.search._bayesian_optimization_scores import CHOICES, GLOBAL, IMPROVEMENTS, JOINT
from provenn.search._bayesian_optimization_targets import Environment

__all__ = [
    "BayesianOptimizer",
    "Environment",
    "GaussianProcess",
    "Matern",
    "PowerExponential",
    "ascend_knowledge_gradient",
    "constrained_ei",
    "entropy_search",
    "expected_improvement",
    "expected_max_affine",
    "knowledge_gradient",
    "noisy_expected_improvement",
    "predictive_entropy_search",
    "probability_of_improvement",
    "q_expected_improvement",
    "q_knowledge_gradient",
    "ucb",
]

Cost = Callable[[Tensor], Tensor]


class Best(NamedTuple):
    """A point and its worth."""

    point: Tensor
    value: float


class BayesianOptimizer:
    """Maximise an expensive function of a few continuous variables by ask and tell.

    The first 2 (d + 1) points come from a Sobol sequence; then a Gaussian process (Matérn 5/2) is fitted to all that
    was told and an acquisition maximised, by L-BFGS from the best of a few hundred points. Points that were asked for
    and not yet told are stood in for by a lie, the mean of what was told. A value that is NaN or infinite marks a
    failed evaluation: it is left out of the model and listed in :attr:`failures`.

    Args:
        bounds: Lower above upper bounds. With an environment its coordinates come last; with a fidelity, s does.
        acquisition: ``"ei"`` (plug-in: over the best posterior mean; without noise, the best value), ``"ei_observed"``
            (over the best observed value), ``"noisy_ei"`` (with noise known to be 0 by its closed form, ``"ei"``),
            ``"pi"``, ``"ucb"``, ``"kg"`` (discrete), ``"kg_simulation"``, ``"kg_sgd"``, ``"es"`` or ``"pes"``.
        q: Points to choose jointly, with ``"ei"`` or ``"kg"``.
        fidelity: c(x, s), the cost of points (n, d + 1) as (n,); the last coordinate s is 0 where f is exact. What is
            sought is the maximum of f(·, 0), and the acquisition, one of ``"kg"``, ``"kg_simulation"``, ``"es"``,
            ``"pes"``, is divided by the cost.
        constraints: How many g_j(x) ≤ 0 are told beside each value; with ``"ei"``, ``"ei_observed"``, ``"noisy_ei"``,
            ``"pi"``.
        environment: Nodes and weights of w; sought is the maximum of Σ_k p_k f(x, w_k), with the acquisitions as for
            fidelity, and each evaluation is at one of the nodes.
        noise: λ, the variance of the noise on values: ``"infer"``, or a number.
        seed: Draws everything.
        hyperparameters: ``"map"``, ``"mle"``, or ``"slice"``: the acquisition is averaged over eight draws.
        refit_every: Evaluations between searches for hyperparameters.

    Raises:
        ValueError: Bounds are reversed or not finite, a choice is unknown or does not go with another, noise is
            below 0; in :meth:`tell`, points, values, constraints or gradients do not fit each other.
        RuntimeError: ``best`` is asked for before a value was told.

    Cost: O(n³) a search for hyperparameters, O(n²) a point scored; some 100 ms an ask at n = 40, d = 6.

    Source: Frazier, arXiv 1807.02811, algorithm 1 and sections 3 to 5.
    """

    def __init__(
        self,
        bounds: Float[Tensor, "2 d"],
        acquisition: str = "ei",
        q: int = 1,
        fidelity: Cost | None = None,
        constraints: int = 0,
        environment: Environment | None = None,
        noise: str | float = "infer",
        seed: int = 0,
        *,
        hyperparameters: str = "map",
        refit_every: int = 1,
    ) -> None:
        self.bounds = _checked_bounds(bounds)
        check_choice("acquisition", acquisition, CHOICES)
        check_integer("q", q, at_least=1)
        check_integer("constraints", constraints, at_least=0)
        check_choice("hyperparameters", hyperparameters, ("map", "mle", "slice"))
        check_integer("refit_every", refit_every, at_least=1)
        if isinstance(noise, str):
            check_choice("noise", noise, ("infer",))
        else:
            check_number("noise", noise, at_least=0)
        if q > 1 and acquisition not in JOINT:
            raise ValueError(f"q > 1 goes with acquisition {' or '.join(JOINT)}, got {acquisition!r}")
        self.acquisition, self.q, self.seed = acquisition, q, seed
        self.fidelity, self.environment = fidelity, environment
        self._check_exotic(constraints)
        self._models = Models(self.bounds, noise, constraints, hyperparameters, refit_every, seed)
        self._asked = 0
        self._pending: list[Tensor] = []
        self.failures: list[Tensor] = []

    def _check_exotic(self, constraints: int) -> None:
        unusual = [name for name in ("fidelity", "environment") if getattr(self, name) is not None]
        if len(unusual) + (constraints > 0) > 1 or (self.q > 1 and (constraints or self.fidelity is not None)):
            raise ValueError("fidelity, environment and constraints do not go together, nor with q > 1")
        if constraints and (self.acquisition not in IMPROVEMENTS or self.acquisition == "ucb"):
            raise ValueError(f"constraints go with improvements, got acquisition {self.acquisition!r}")
        if unusual and (self.acquisition not in GLOBAL or self.acquisition == "kg_sgd"):
            raise ValueError(f"{unusual[0]} goes with kg, kg_simulation, es and pes, got {self.acquisition!r}")
        if self.fidelity is not None and not self.bounds[0, -1] <= 0 <= self.bounds[1, -1]:
            raise ValueError(f"bounds of the fidelity must contain 0, got {self.bounds[:, -1].tolist()}")
        if self.environment is not None:
            nodes, weights = self.environment
            if nodes.ndim != 2 or len(nodes) != len(weights) or not 0 < nodes.shape[1] < self.bounds.shape[1]:
                raise ValueError(f"environment must be (k, w) nodes and k weights, got {nodes.shape}, {weights.shape}")

    @property
    def initial(self) -> int:
        """How many points come from the Sobol sequence."""
        return 2 * (self.bounds.shape[1] + 1)

    def ask(self, n: int | None = None) -> Float[Tensor, "n d"]:
        """Return points to evaluate.

        Args:
            n: How many; default ``q``. They are chosen ``q`` at a time.

        Raises:
            ValueError: ``n`` < 1.
        """
        count = self.q if n is None else n
        check_integer("n", count, at_least=1)
        points: list[Tensor] = []
        while len(points) < count:
            points += self._next(min(self.q, count - len(points)))
        return torch.stack(points)

    def _next(self, count: int) -> list[Tensor]:
        if self._asked < self.initial or self._models.usable < 2:
            count = min(count, max(1, self.initial - self._asked))
            found = self._space_filling(count)
        else:
            draws = seeded_generator(self.seed, "ask", self._asked)
            problem = self._models.problem(self._pending, self._unit_environment(), draws, count)
            found = propose(self.acquisition, problem, self._cost(), fixed_nodes=self.environment is not None)
            found = self._real(found)
        self._asked += count
        self._pending += [point.clone() for point in found]
        return list(found)

    def _space_filling(self, count: int) -> Tensor:
        dims = self.bounds.shape[1]
        sequence = torch.quasirandom.SobolEngine(dims, scramble=True, seed=derive_seed(self.seed, "sobol") % 2**31)
        shares = sequence.fast_forward(self._asked).draw(count, dtype=torch.float64).to(self.bounds)
        points = self._real(shares)
        if self.environment is not None:
            nodes = self.environment.nodes.to(points)
            turns = (torch.arange(count) + self._asked) % len(nodes)
            points = torch.cat([points[:, : dims - nodes.shape[1]], nodes[turns.to(points.device)]], 1)
        return points

    def _real(self, shares: Tensor) -> Tensor:
        low, high = self.bounds
        return (low + (high - low) * shares.to(low)).clamp(low, high)

    def _unit_environment(self) -> Environment | None:
        """Return the environment in the unit cube; of a fidelity, its exact end."""
        if self.environment is not None:
            nodes, weights = self.environment
        elif self.fidelity is not None:
            nodes, weights = self.bounds.new_zeros(1, 1), self.bounds.new_ones(1)
        else:
            return None
        low, high = self.bounds[:, -nodes.shape[1] :]
        return Environment((nodes.to(low) - low) / (high - low), weights.to(low))

    def _cost(self) -> Cost | None:
        fidelity = self.fidelity
        return None if fidelity is None else lambda shares: fidelity(self._real(shares))

    def tell(
        self,
        points: Float[Tensor, "n d"] | Sequence[Tensor],
        values: Sequence[float] | Float[Tensor, " n"],
        constraints: Float[Tensor, "n constraints"] | Sequence[Sequence[float]] | None = None,
        gradients: Float[Tensor, "n d"] | None = None,
    ) -> None:
        """Take what points are worth; any points, in any order.

        Args:
            points: Points within the bounds.
            values: Their values; NaN or infinite where the evaluation failed.
            constraints: g_j of each point, ≤ 0 where it is feasible; needed if the search has constraints.
            gradients: Gradients of the function at the points, if they are observed too.
        """
        rows = torch.stack([torch.as_tensor(point) for point in points]) if len(points) else self.bounds.new_zeros(0, 0)
        told = [float(value) for value in values]
        if rows.shape != (len(told), self.bounds.shape[1]) or not told:
            raise ValueError(f"points and values must be as many, got shape {tuple(rows.shape)} and {len(told)} values")
        if not rows.isfinite().all():
            raise ValueError(f"points must be finite, got {rows.tolist()}")
        limits = self._models.checked_constraints(constraints, len(told))
        slopes = self._models.checked_gradients(gradients, len(told))
        for place, (point, value) in enumerate(zip(rows.detach().clone(), told, strict=True)):
            self._settle(point)
            sound = math.isfinite(value) and bool(limits[place].isfinite().all() and slopes[place].isfinite().all())
            if sound:
                self._models.add(point, value, limits[place], slopes[place])
            else:
                self.failures.append(point)

    def _settle(self, point: Tensor) -> None:
        """Take a point off those that are waited for."""
        for place, waiting in enumerate(self._pending):
            if torch.equal(waiting, point.to(waiting)):
                del self._pending[place]
                return

    @property
    def best(self) -> Best:
        """The best point told, with the value told; with constraints, the best feasible one.

        Where values are not those of the target (a fidelity, an environment), what :meth:`recommend` gives.
        """
        if self._unit_environment() is not None:
            return self.recommend()
        place = self._models.best_place()
        return Best(self._models.points[place].clone(), self._models.values[place])

    def recommend(self, over: str = "evaluated") -> Best:
        """Return where the posterior mean of the target is largest, with that mean, in the units told.

        Args:
            over: ``"evaluated"``: among the (feasible) decisions evaluated; ``"domain"``: over the whole box.
        """
        check_choice("over", over, ("evaluated", "domain"))
        if self._models.usable < 2:
            place = self._models.best_place()
            return Best(self._models.points[place].clone(), self._models.values[place])
        problem = self._models.problem([], self._unit_environment(), seeded_generator(self.seed, "recommend"), 1)
        share, value = self._models.best_mean(problem, over)
        width = len(share)
        if over == "evaluated":
            return Best(self._models.points[int(value.place)][:width].clone(), value.mean)
        low, high = self.bounds[:, :width]
        return Best(low + (high - low) * share, value.mean)


def _checked_bounds(bounds: Tensor) -> Tensor:
    bounds = torch.as_tensor(bounds)
    if bounds.ndim != 2 or bounds.shape[0] != 2 or bounds.shape[1] == 0:
        raise ValueError(f"bounds must be lower above upper bounds, (2, d), got shape {tuple(bounds.shape)}")
    if not bounds.isfinite().all() or not (bounds[0] < bounds[1]).all():
        raise ValueError(f"bounds must be finite, each lower one below its upper one, got {bounds.tolist()}")
    if bounds.shape[1] > 20:
        warnings.warn(
            f"bounds have {bounds.shape[1]} dimensions; beyond 20 a Gaussian process learns little", stacklevel=3
        )
    return bounds.detach().clone().double()
