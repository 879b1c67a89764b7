"""The search for γ, and the loop around it: shared by the optimizer, the solver and what they are compared with.

Source: arXiv 2506.13710, Algorithm 1.
"""

from __future__ import annotations

import math
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number
from provenn.optim._gradient_normalized_smoothness_oracles import Oracle
from provenn.optim._gradient_normalized_smoothness_systems import DampedSystem, Metric

SMALLEST, LARGEST = sys.float_info.min, sys.float_info.max / 4


class Point(NamedTuple):
    """A point with the value and the gradient there."""

    x: Float[Tensor, " n"]
    f: float
    g: Float[Tensor, " n"]


Evaluate = Callable[[Tensor], Point]


class Outcome(NamedTuple):
    """What one iteration left: the point, the search's state, the systems solved, and whether a trial was accepted."""

    point: Point
    state: Any
    trials: int
    accepted: bool


def search_gamma(
    evaluate: Evaluate,
    here: Point,
    system: DampedSystem,
    metric: Metric,
    gamma: float,
    gamma_min: float,
    max_trials: int,
) -> Outcome:
    """Take one step of Algorithm 1: halve γ until the value falls enough, then double it.

    Trial: λ = ‖g‖_*/γ, h = −(H + λB)⁻¹g, accepted where f(x) − f(x + h) ≥ ‖∇f(x + h)‖_*²/(8λ).

    Args:
        evaluate: Gives value and gradient at a point.
        here: The point.
        system: The systems of H and g at it.
        metric: B.
        gamma: γ to begin with.
        gamma_min: The least γ to go on with.
        max_trials: Trials before giving up, which leaves the point.

    Returns:
        The outcome; its state is the next γ.

    Cost: for each trial one system and one evaluation.

    Source: Algorithm 1.
    """
    slope = metric.dual_norm(here.g).item()
    for trial in range(1, max_trials + 1):
        damping = max(slope / gamma, SMALLEST)
        h = system.solve(damping)
        if h is not None and h.isfinite().all():
            there = evaluate(here.x + h)
            # A value or a gradient that is not finite compares as false.
            if here.f - there.f >= metric.dual_norm(there.g).item() ** 2 / (8 * damping):
                return Outcome(there, max(min(2 * gamma, LARGEST), gamma_min), trial, True)
        gamma = max(gamma / 2, SMALLEST)
    return Outcome(here, max(gamma, gamma_min), max_trials, False)


def warn_exhausted(max_trials: int, stacklevel: int) -> None:
    """Warn that no trial was accepted."""
    warnings.warn(
        f"none of max_trials={max_trials} steps lowered the value enough; the point is kept",
        ConvergenceWarning,
        stacklevel=stacklevel + 1,
    )


@dataclass(frozen=True)
class Iterate:
    """One line of a run's history.

    Args:
        f: The value.
        grad_norm: ‖∇f‖_*.
        scale: The search's length or constant that the next iteration begins with: γ, H or L.
        trials: Linear systems (or steps, for methods without) tried so far.
        calls: Points that the oracle was evaluated at so far.
    """

    f: float
    grad_norm: float
    scale: float
    trials: int
    calls: int


@dataclass(frozen=True)
class MinimumCertificate:
    """What shows how good a minimiser is.

    Args:
        f: The value.
        grad_norm: ‖∇f‖_*.
        gap: f − f*, NaN where f* is not known.
        iterations: Steps taken.
        trials: Linear systems solved, or steps tried; by Cholesky as many factorisations.
        calls: Points that the oracle was evaluated at.
        converged: Whether the gap or the gradient is below its tolerance.
        status: ``"gap"``, ``"gradient"``, ``"iterations"``, ``"calls"`` or ``"search"``: what ended the run.
    """

    f: float
    grad_norm: float
    gap: float
    iterations: int
    trials: int
    calls: int
    converged: bool
    status: str


@dataclass(frozen=True)
class SolveResult:
    """A minimiser with its history.

    Args:
        x: The last point.
        f: The value there.
        grad_norm: ‖∇f‖_* there.
        history: A line for the start and after every iteration.
        certificate: What shows how good it is.

    Shape:
        ``x`` (n,).
    """

    x: Float[Tensor, " n"]
    f: float
    grad_norm: float
    history: tuple[Iterate, ...]
    certificate: MinimumCertificate

    @property
    def converged(self) -> bool:
        """Whether a tolerance was met."""
        return self.certificate.converged


class Counted:
    """An oracle whose evaluations are counted."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self.calls = 0

    def evaluate(self, x: Tensor) -> Point:
        """Return value and gradient at a point."""
        self.calls += 1
        f, g = self.oracle.evaluate(x)
        return Point(x, float(f), g)

    def value(self, x: Tensor) -> float:
        """Return the value at a point."""
        self.calls += 1
        return float(self.oracle.value(x))


class Minimizer(ABC):
    """A method that goes from point to point until a tolerance or a limit is met."""

    max_trials: int
    _metric: Metric

    @abstractmethod
    def _begin(self, start: Point) -> Any:
        """Return the search's first state."""

    @abstractmethod
    def _advance(self, oracle: Counted, here: Point, state: Any, metric: Metric) -> Outcome:
        """Take one iteration."""

    def _scale(self, state: Any) -> float:
        """Return the number of a state that the history shows."""
        return float(state)

    def minimize(
        self,
        oracle: Oracle,
        x0: Float[Tensor, " n"],
        *,
        max_iter: int = 1000,
        max_calls: int | None = None,
        grad_tol: float | None = 1e-8,
        f_star: float | None = None,
        gap_tol: float = 1e-8,
        callback: Callable[[Tensor, Iterate], object] | None = None,
    ) -> SolveResult:
        """Minimise from a start.

        Args:
            oracle: The function.
            x0: The start.
            max_iter: Most iterations.
            max_calls: Stop once the oracle was evaluated at so many points.
            grad_tol: Stop at ‖g‖_* below it; ``None``: only where it is 0.
            f_star: The minimum, if it is known.
            gap_tol: Stop at f − f* below it.
            callback: Called with every point and its line of the history.

        Shape:
            ``x0`` (n,).

        Returns:
            The result.

        Raises:
            ValueError: A limit or tolerance is out of range; x0 is no finite vector; value or gradient at x0 are not
                finite.
        """
        self._check(x0, max_iter, max_calls, grad_tol, gap_tol)
        counted, metric = Counted(oracle), self._metric.to(x0)
        here = counted.evaluate(x0.detach().clone())
        if not (math.isfinite(here.f) and here.g.isfinite().all()):
            raise ValueError(f"x0 must have a finite value and gradient, got f = {here.f}")
        state, trials, history = self._begin(here), 0, []
        status = ""
        while True:
            slope = metric.dual_norm(here.g).item()
            history.append(Iterate(here.f, slope, self._scale(state), trials, counted.calls))
            if callback is not None:
                callback(here.x.clone(), history[-1])
            if f_star is not None and here.f - f_star < gap_tol:
                status = "gap"
            elif slope == 0 or (grad_tol is not None and slope < grad_tol):
                status = "gradient"
            elif len(history) > max_iter:
                status = "iterations"
            elif max_calls is not None and counted.calls >= max_calls:
                status = "calls"
            if status:
                break
            outcome = self._advance(counted, here, state, metric)
            here, state, trials = outcome.point, outcome.state, trials + outcome.trials
            if not outcome.accepted:
                warn_exhausted(self.max_trials, stacklevel=2)
                status = "search"
                break
        slope = metric.dual_norm(here.g).item()
        gap = math.nan if f_star is None else here.f - f_star
        converged = status in ("gap", "gradient")
        certificate = MinimumCertificate(here.f, slope, gap, len(history) - 1, trials, counted.calls, converged, status)
        return SolveResult(here.x, here.f, slope, tuple(history), certificate)

    @staticmethod
    def _check(x0: Tensor, max_iter: int, max_calls: int | None, grad_tol: float | None, gap_tol: float) -> None:
        check_integer("max_iter", max_iter, at_least=0)
        if max_calls is not None:
            check_integer("max_calls", max_calls, at_least=1)
        if grad_tol is not None:
            check_number("grad_tol", grad_tol, at_least=0)
        check_number("gap_tol", gap_tol, above=0)
        if x0.dim() != 1 or not x0.is_floating_point() or not x0.isfinite().all():
            raise ValueError(f"x0 must be a finite vector of floating-point numbers, got {x0}")


def check_search(gamma0: float, gamma_min: float, max_trials: int) -> None:
    """Check the arguments of the search for γ."""
    check_number("gamma0", gamma0, above=0)
    check_number("gamma_min", gamma_min, above=0)
    check_integer("max_trials", max_trials, at_least=1)


def gradient_of(oracle: Oracle, points: Float[Tensor, "count n"]) -> Float[Tensor, "count n"]:
    """Return the gradients at many points, as one batch."""
    return torch.func.vmap(oracle.gradient)(points)
