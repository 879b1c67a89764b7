"""What the method is compared with: other adaptive Newton methods with the exact Hessian, and gradient methods."""

from __future__ import annotations

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number
from provenn.optim._gradient_normalized_smoothness_search import Counted, Minimizer, Outcome, Point
from provenn.optim._gradient_normalized_smoothness_systems import DampedSystem, Metric


class _Adaptive(Minimizer):
    """A method with one constant that a search raises on failure and lowers on success."""

    def __init__(self, first: float, least: float, metric: Tensor | None, max_trials: int) -> None:
        check_integer("max_trials", max_trials, at_least=1)
        self._first, self._least, self._metric, self.max_trials = first, least, Metric(metric), max_trials

    def _begin(self, start: Point) -> float:
        return self._first


class SuperUniversalNewton(_Adaptive):
    """Newton's method damped by λ = H‖g‖_*^α, with H found by a search on the slope.

    A trial is accepted where ⟨∇f(x⁺), x − x⁺⟩ ≥ ‖∇f(x⁺)‖_*²/(4λ); then H falls to a quarter, else it grows fourfold.

    Args:
        H0: H to begin with.
        alpha: α, the power of the gradient's norm.
        H_min: Least H to go on with.
        metric: B (n, n), symmetric positive definite; ``None``: the identity.
        max_trials: Trials an iteration.

    Shape:
        Points (n,).

    Raises:
        ValueError: ``H0`` ≤ 0, ``H_min`` ≤ 0, ``alpha`` < 0, ``max_trials`` < 1, or the metric is not positive
            definite; in ``minimize`` as there.

    Returns:
        ``minimize`` returns a :class:`SolveResult`.

    Cost: an iteration takes one Hessian, and for each trial one Cholesky factorisation and one evaluation.

    Source: Doikov, Mishchenko & Nesterov, "Super-universal regularized Newton method", arXiv 2208.05888; the constants
    are those of the authors' experiments.
    """

    def __init__(
        self,
        H0: float = 1.0,
        alpha: float = 1.0,
        H_min: float = 1e-5,
        metric: Float[Tensor, "n n"] | None = None,
        max_trials: int = 40,
    ) -> None:
        check_number("H0", H0, above=0)
        check_number("alpha", alpha, at_least=0)
        check_number("H_min", H_min, above=0)
        super().__init__(H0, H_min, metric, max_trials)
        self.alpha = alpha

    def _advance(self, oracle: Counted, here: Point, state: float, metric: Metric) -> Outcome:
        system = DampedSystem(oracle.oracle.hessian(here.x), here.g, metric, "cholesky")
        slope = metric.dual_norm(here.g).item()
        for trial in range(1, self.max_trials + 1):
            damping = state * slope**self.alpha
            h = system.solve(damping)
            if h is not None:
                there = oracle.evaluate(here.x + h)
                if -there.g.dot(h).item() >= metric.dual_norm(there.g).item() ** 2 / (4 * damping):
                    return Outcome(there, max(state / 4, self._least), trial, True)
            state *= 4
        return Outcome(here, state, self.max_trials, False)


class CubicNewton(_Adaptive):
    """Newton's method with a cubic term, H‖h‖³/6, with H found by a search on the model's value.

    A trial is accepted where the value is at most the model's; then H halves, else it doubles.

    Args:
        H0: H to begin with.
        H_min: Least H to go on with.
        metric: B (n, n), symmetric positive definite; ``None``: the identity.
        max_trials: Trials an iteration.

    Shape:
        Points (n,).

    Raises:
        ValueError: ``H0`` ≤ 0, ``H_min`` ≤ 0, ``max_trials`` < 1, or the metric is not positive definite; in
            ``minimize`` as there.

    Returns:
        ``minimize`` returns a :class:`SolveResult`.

    Cost: as :class:`SuperUniversalNewton`, with some ten factorisations a trial, each of which counts.

    Source: Nesterov & Polyak, Math. Program. 108 (2006); the constants are those of the authors' experiments.
    """

    def __init__(
        self,
        H0: float = 1.0,
        H_min: float = 1e-5,
        metric: Float[Tensor, "n n"] | None = None,
        max_trials: int = 40,
    ) -> None:
        check_number("H0", H0, above=0)
        check_number("H_min", H_min, above=0)
        super().__init__(H0, H_min, metric, max_trials)

    def _advance(self, oracle: Counted, here: Point, state: float, metric: Metric) -> Outcome:
        hessian = oracle.oracle.hessian(here.x)
        system, solved = DampedSystem(hessian, here.g, metric, "cholesky"), 0
        for _ in range(self.max_trials):
            h, systems = cubic_step(system, metric, state / 2)
            solved += systems
            length = metric.norm(h).item()
            model = (here.g.dot(h) + h.dot(hessian @ h) / 2).item() + state * length**3 / 6
            there = oracle.evaluate(here.x + h)
            if there.f <= here.f + model:
                return Outcome(there, max(state / 2, self._least), solved, True)
            state *= 2
        return Outcome(here, state, solved, False)


def cubic_step(system: DampedSystem, metric: Metric, weight: float) -> tuple[Tensor, int]:
    """Return h = −(A + w r B)⁻¹g with r = ‖h‖, and the systems that were solved for it.

    r is found by Newton's method on r ↦ 1/r − 1/‖h(r)‖, within a bracket that halves where that leaves it.

    Args:
        system: The systems of A and g.
        metric: B.
        weight: w.

    Source: the root is that of Nesterov & Polyak, section 5; the reciprocal as for trust regions, in Conn, Gould &
    Toint, "Trust-Region Methods" (2000), section 7.3.
    """
    low, r, high = 0.0, 1.0, math.inf
    h, systems = system.solve(weight * r), 1
    while systems <= 100:
        length = math.inf if h is None else metric.norm(h).item()
        if abs(r - length) <= 1e-10 * r:
            break
        low, high = (r, high) if length > r else (low, r)
        guess = math.nan
        if h is not None and math.isfinite(length):
            # ‖h(r)‖ ≈ c/(r + s) near the root, so that its reciprocal is nearly a line.
            slope = system.reciprocal_slope(weight * r, h) * weight
            systems += 1
            guess = r - (1 / length - 1 / r) / (slope + 1 / r**2)
        inside = low < guess < high
        r = guess if inside else (2 * r if math.isinf(high) else (low + high) / 2)
        h, systems = system.solve(weight * r), systems + 1
    if h is None:
        raise RuntimeError(f"no cubic step was found with {systems} systems")
    return h, systems


class AdaptiveGradient(_Adaptive):
    """Gradient descent x − B⁻¹g/L, with L found by a search on the quadratic upper bound.

    Args:
        L0: L to begin with.
        L_min: Least L to go on with.
        metric: B (n, n), symmetric positive definite; ``None``: the identity.
        max_trials: Trials an iteration.

    Shape:
        Points (n,).

    Raises:
        ValueError: ``L0`` ≤ 0, ``L_min`` ≤ 0, ``max_trials`` < 1, or the metric is not positive definite; in
            ``minimize`` as there.

    Returns:
        ``minimize`` returns a :class:`SolveResult`.

    Cost: an evaluation a trial.

    Source: Nesterov, "Gradient methods for minimizing composite functions", Math. Program. 140 (2013); the constants
    are those of the authors' experiments.
    """

    def __init__(
        self,
        L0: float = 1.0,
        L_min: float = 1e-5,
        metric: Float[Tensor, "n n"] | None = None,
        max_trials: int = 30,
    ) -> None:
        check_number("L0", L0, above=0)
        check_number("L_min", L_min, above=0)
        super().__init__(L0, L_min, metric, max_trials)

    def _advance(self, oracle: Counted, here: Point, state: float, metric: Metric) -> Outcome:
        direction = metric.solve(here.g)
        decrease = here.g.dot(direction).item()
        for trial in range(1, self.max_trials + 1):
            there = oracle.evaluate(here.x - direction / state)
            # ⟨g, h⟩ + L‖h‖²/2 with h = −B⁻¹g/L.
            if there.f <= here.f - decrease / (2 * state):
                return Outcome(there, max(state / 2, self._least), trial, True)
            state *= 2
        return Outcome(here, state, self.max_trials, False)


class _Momentum(NamedTuple):
    v: Tensor
    weight: float
    L: float


class AcceleratedGradient(_Adaptive):
    """Nesterov's fast gradient method, with L found by a search on the quadratic upper bound.

    Args:
        L0: L to begin with.
        L_min: Least L to go on with.
        metric: B (n, n), symmetric positive definite; ``None``: the identity.
        max_trials: Trials an iteration.

    Shape:
        Points (n,).

    Raises:
        ValueError: ``L0`` ≤ 0, ``L_min`` ≤ 0, ``max_trials`` < 1, or the metric is not positive definite; in
            ``minimize`` as there.

    Returns:
        ``minimize`` returns a :class:`SolveResult`.

    Cost: two evaluations a trial.

    Source: Nesterov, "Lectures on Convex Optimization" (2018), section 2.2; the search is that of the authors'
    experiments.
    """

    def __init__(
        self,
        L0: float = 1.0,
        L_min: float = 1e-5,
        metric: Float[Tensor, "n n"] | None = None,
        max_trials: int = 30,
    ) -> None:
        check_number("L0", L0, above=0)
        check_number("L_min", L_min, above=0)
        super().__init__(L0, L_min, metric, max_trials)

    def _begin(self, start: Point) -> _Momentum:  # type: ignore[override]
        return _Momentum(start.x, 0.0, self._first)

    def _scale(self, state: _Momentum) -> float:
        return state.L

    def _advance(self, oracle: Counted, here: Point, state: _Momentum, metric: Metric) -> Outcome:
        L, weight = state.L, state.weight
        for trial in range(1, self.max_trials + 1):
            share = (1 + math.sqrt(1 + 4 * weight * L)) / (2 * L)
            between = oracle.evaluate((share * state.v + weight * here.x) / (share + weight))
            direction = metric.solve(between.g)
            there = oracle.evaluate(between.x - direction / L)
            if there.f <= between.f - between.g.dot(direction).item() / (2 * L):
                v = there.x + weight / share * (there.x - here.x)
                return Outcome(there, _Momentum(v, weight + share, max(L / 2, self._least)), trial, True)
            L *= 2
        return Outcome(here, _Momentum(state.v, weight, L), self.max_trials, False)
