"""What a search has been told, and the Gaussian processes fitted to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from provenn.core.experiment.seeding import generator
from provenn.core.numerics.covariance_functions import Matern
from provenn.core.numerics.gaussian_processes import GaussianPosterior
from provenn.search._bayesian_optimization_fitting import Observations, fit, maximise
from provenn.search._bayesian_optimization_process import basis_of, constant, fitted_posterior, one_draw
from provenn.search._bayesian_optimization_scores import Problem, alternatives_of, single
from provenn.search._bayesian_optimization_targets import Environment, Target


class Found(NamedTuple):
    """Which evaluated point has the largest posterior mean, if that was asked, and the mean in the units told."""

    place: int
    mean: float


class Models:
    """Observations and the models of objective and constraints, fitted anew when they are asked for and out of date.

    Args:
        bounds: Lower above upper bounds.
        noise: ``"infer"`` or a variance.
        constraints: How many constraints there are.
        hyperparameters: How hyperparameters are found.
        refit_every: Evaluations between searches for them.
        seed: Draws.
    """

    def __init__(
        self, bounds: Tensor, noise: str | float, constraints: int, hyperparameters: str, refit_every: int, seed: int
    ) -> None:
        self.bounds, self.noise, self.constraints = bounds, noise, constraints
        self.hyperparameters, self.refit_every, self.seed = hyperparameters, refit_every, seed
        self.points: list[Tensor] = []
        self.values: list[float] = []
        self.limits: list[Tensor] = []
        self.slopes: list[Tensor] = []
        self._thetas: list[Tensor] = []
        self._fitted_at = 0

    @property
    def usable(self) -> int:
        """How many evaluations did not fail."""
        return len(self.values)

    def add(self, point: Tensor, value: float, limits: Tensor, slopes: Tensor) -> None:
        """Keep one evaluation; slopes are empty where no gradient was observed."""
        self.points.append(point)
        self.values.append(value)
        self.limits.append(limits)
        self.slopes.append(slopes)

    def checked_constraints(self, constraints: Any, count: int) -> Tensor:
        """Return constraint values (count, constraints).

        Raises:
            ValueError: They are missing, or were not to come, or of another shape.
        """
        if constraints is None:
            if self.constraints:
                raise ValueError(f"constraints: {self.constraints} values a point are needed, got None")
            return torch.zeros(count, 0, dtype=torch.float64)
        limits = torch.as_tensor(constraints, dtype=torch.float64).detach().clone()
        if limits.shape != (count, self.constraints):
            raise ValueError(f"constraints must be ({count}, {self.constraints}), got shape {tuple(limits.shape)}")
        return limits

    def checked_gradients(self, gradients: Tensor | None, count: int) -> Tensor:
        """Return gradients (count, d), or (count, 0) where there are none.

        Raises:
            ValueError: They are of another shape.
        """
        if gradients is None:
            return torch.zeros(count, 0, dtype=torch.float64)
        slopes = torch.as_tensor(gradients, dtype=torch.float64).detach().clone()
        if slopes.shape != (count, self.bounds.shape[1]):
            raise ValueError(f"gradients must be ({count}, {self.bounds.shape[1]}), got shape {tuple(slopes.shape)}")
        return slopes

    def best_place(self) -> int:
        """Return which evaluation is the best feasible one.

        Raises:
            RuntimeError: There is none.
        """
        feasible = [place for place, limits in enumerate(self.limits) if bool((limits <= 0).all())]
        if not feasible:
            raise RuntimeError(
                "nothing feasible was told yet" if self.values else "nothing was told yet that has a value"
            )
        return max(feasible, key=self.values.__getitem__)

    def shares(self, points: Sequence[Tensor]) -> Tensor:
        """Return points in the unit cube."""
        low, high = self.bounds
        return (torch.stack(list(points)).to(low) - low) / (high - low)

    def problem(
        self, pending: Sequence[Tensor], environment: Environment | None, draws: torch.Generator, q: int
    ) -> Problem:
        """Return what an acquisition needs, with a lie for every pending point: the mean of what was told."""
        X = self.shares(self.points)
        self._refit(X)
        posteriors = [self._posterior(X, number) for number in range(1 + self.constraints)]
        limits = [self._units(number) for number in range(1, 1 + self.constraints)]
        if pending:
            waiting = self.shares(pending)
            lies = torch.zeros(len(waiting), dtype=X.dtype, device=X.device)
            posteriors = [posterior.condition(waiting, lies) for posterior in posteriors]
        shift, unit = self._units(0)
        try:
            best = torch.tensor((self.values[self.best_place()] - shift) / unit).to(X)
        except RuntimeError:
            best = None
        return Problem(
            posteriors[0],
            tuple((posterior, -level / size) for posterior, (level, size) in zip(posteriors[1:], limits, strict=True)),
            X,
            best,
            self.noise == 0,
            environment,
            draws,
            q,
        )

    def best_mean(self, problem: Problem, over: str) -> tuple[Tensor, Found]:
        """Return the decision, in the unit cube, of the largest posterior mean of the target."""
        target = Target(problem.posterior, problem.environment)

        def mean(decisions: Tensor) -> Tensor:
            found = target.mean(decisions)
            return found.mean(0) if found.ndim == 2 else found

        shift, unit = self._units(0)
        whole = 1.0 if problem.environment is None else problem.environment.weights.sum().item()
        with torch.no_grad():
            values = mean(problem.decisions)
            feasible = torch.tensor([bool((limits <= 0).all()) for limits in self.limits]).to(values.device)
            if feasible.any():
                values = values.masked_fill(~feasible, -torch.inf)
        place = int(values.argmax())
        decision, best = problem.decisions[place], values[place]
        if over == "domain":
            alternatives = alternatives_of(single(problem))
            with torch.no_grad():
                starts = alternatives[mean(alternatives).topk(min(4, len(alternatives))).indices]
            box = torch.stack([torch.zeros_like(decision), torch.ones_like(decision)])
            ends, heights = maximise(mean, starts, box)
            decision, best = ends[heights.argmax()], heights.max()
        return decision, Found(place, shift * whole + unit * best.item())

    def _units(self, number: int) -> tuple[float, float]:
        """Return mean and standard deviation of the objective's values (0) or a constraint's."""
        told = self._column(number)
        spread = told.std(correction=0).item()
        return told.mean().item(), spread if spread > 0 else 1.0

    def _column(self, number: int) -> Tensor:
        if number == 0:
            return torch.tensor(self.values, dtype=torch.float64)
        return torch.stack(self.limits)[:, number - 1]

    def _refit(self, X: Tensor) -> None:
        if self._thetas and len(self.values) - self._fitted_at < self.refit_every:
            return
        old = self._thetas or [None] * (1 + self.constraints)
        self._thetas = [
            fit(
                Matern(2.5),
                self._observations(X, number),
                self.hyperparameters,
                generator(self.seed, "hyperparameters", number, len(self.values)),
                start=start if start is None or start.ndim == 1 else start[0],
            )
            for number, start in enumerate(old)
        ]
        self._fitted_at = len(self.values)

    def _observations(self, X: Tensor, number: int) -> Observations:
        shift, unit = self._units(number)
        y = (self._column(number).to(X) - shift) / unit
        orders = None
        if number == 0 and any(len(slopes) for slopes in self.slopes):
            X, y, orders = self._with_slopes(X, y, unit)
        noises = None
        if not isinstance(self.noise, str):
            variance = self.noise / unit**2 if number == 0 else 0.0
            noises = torch.full_like(y, variance)
        return Observations(X, y, orders, noises, basis_of(constant, X, orders))

    def _with_slopes(self, X: Tensor, y: Tensor, unit: float) -> tuple[Tensor, Tensor, Tensor]:
        dims = X.shape[1]
        known = torch.tensor([place for place, slopes in enumerate(self.slopes) if len(slopes)])
        slopes = torch.stack([self.slopes[place] for place in known]).to(X) * (self.bounds[1] - self.bounds[0]) / unit
        rows = torch.cat([X, X[known.to(X.device)].repeat(dims, 1)])
        orders = [torch.zeros(len(X), dtype=torch.long), torch.arange(1, dims + 1).repeat_interleave(len(known))]
        return rows, torch.cat([y, slopes.T.flatten()]), torch.cat(orders).to(X.device)

    def _posterior(self, X: Tensor, number: int) -> GaussianPosterior:
        theta = self._thetas[number]
        posterior = fitted_posterior(Matern(2.5), self._observations(X, number), theta, constant)
        return one_draw(posterior, 0) if number and theta.ndim == 2 else posterior
