"""An adaptively inexact first-order method for bilevel optimization with application to hyperparameter learning.

Salehi, Mukherjee, Roberts, Ehrhardt, SIAM J. Mathematics of Data Science, 2025. https://arxiv.org/abs/2308.10098

    min_θ f(θ) = g(x̂(θ)) + r(θ),    x̂(θ) = argmin_x h(x, θ)

Gradient descent on θ with inexact lower solutions and hypergradients. A computable bound of the hypergradient's error
decides when accuracy must rise; a line search on bounds of inexact values picks the step; both relax after a success.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.numerics.smooth_convex import Minimizer
from provenn.optim._maid_bilevel_engine import (
    Bilevel,
    BilevelCertificate,
    BilevelResult,
    BilevelStep,
    BudgetExhaustedError,
    Direction,
    OfTheta,
    Status,
    check_start,
)
from provenn.optim._maid_bilevel_hoag import HOAG
from provenn.optim._maid_bilevel_hypergradient import (
    ConvexityError,
    Hypergradient,
    LipschitzConstants,
    Lower,
    Upper,
    hypergradient,
    hypergradient_bound,
)
from provenn.optim._maid_bilevel_problems import (
    BilevelProblem,
    BilevelQuadratic,
    FoEDenoising,
    TVDenoising,
    WeightedLogistic,
)

__all__ = [
    "HOAG",
    "MAID",
    "BilevelCertificate",
    "BilevelProblem",
    "BilevelQuadratic",
    "BilevelResult",
    "BilevelStep",
    "ConvexityError",
    "FoEDenoising",
    "Hypergradient",
    "LipschitzConstants",
    "TVDenoising",
    "WeightedLogistic",
    "hypergradient",
    "hypergradient_bound",
]

_GROWTH = 10 / 9
_ROUNDS = 3


class MAID:
    """Method of Adaptive Inexact Descent.

    An outer iteration first takes a hypergradient z whose error bound ω is at most (1 − η)‖z‖, so that −z is a descent
    direction; until it is, ε and δ shrink by τ. Then it tries β, βρ, βρ², … and takes the first step for which the
    upper bound of the new value lies below the lower bound of the old one by η²β‖z‖², each with a new lower solve to
    ε. After a success β grows by 10/9, ε and δ by ν; after a failure ε and δ shrink by τ and the next search may be
    longer by one trial, until there is a success.

    Args:
        theta: Start of θ.
        lower: (x, θ) ↦ h(x, θ), twice differentiable by torch, μ-strongly convex in x.
        upper: x ↦ g(x), with a Lipschitz gradient.
        mu: μ, or θ ↦ μ.
        solver: Lower solver: ``"fista"``, ``"gd"``, ``"lbfgs"``, or a callable like those in
            :mod:`provenn.core.numerics.smooth_convex`. Every solve starts at the last x.
        eps0: First ε, the tolerance of lower solves: ‖∇_x h‖/μ ≤ ε.
        delta0: First δ, the residual of the adjoint system.
        step0: First trial step β₀.
        eta: η, in the accuracy test and the line search.
        rho: ρ, shortens the step in a line search.
        tau: τ, shrinks ε and δ.
        nu: ν, grows ε and δ.
        max_backtracks: Trials of a line search.
        lipschitz: Constants of the bound, or θ ↦ constants; those not given are estimated as running maxima.
        x0: Start of x.
        smoothness: Lipschitz constant L of ∇_x h, or θ ↦ L, for the lower solver; ``None``: ten power iterations on
            the Hessian at the start of each solve, not counted as iterations.
        regularizer: θ ↦ r(θ), smooth.
        convex_upper: Whether g is convex, which tightens the lower bound of the old value.
        adaptive: ``False`` keeps ε and δ as they are, and skips the accuracy test: fixed accuracy.
        warm_start: Whether conjugate gradients start at the last q.
        lower_max_iter: Most iterations of a lower solve; past them the accuracy reached is used, with a
            ``ConvergenceWarning``.
        cg_max_iter: Most iterations of conjugate gradients.

    Shape:
        ``theta`` and ``x0`` any.

    Raises:
        ValueError: ``mu`` ≤ 0, ``eta``, ``rho`` or ``tau`` outside (0, 1), ``nu`` < 1, ``eps0``, ``delta0`` or
            ``step0`` ≤ 0, ``max_backtracks`` < 1, an unknown ``solver``, a start that is not finite; in
            :meth:`step` a ``ConvexityError``, which is a ``ValueError``.
        TypeError: A start is no floating-point tensor, or ``lipschitz`` is of another type.
        RuntimeError: In :meth:`step`, a level's value or gradient is not finite at the current θ; the message names
            the level. A trial of a line search that leaves the numbers is only rejected.

    Cost: an outer iteration takes some lower solves (one and one a trial), a solve of the adjoint system, six products
    with J and Jᵀ (20 at first), and, for constants to estimate, a linearisation at a second point with a short solve
    there. Memory:
    a few x, and the graph of one second derivative.

    Source: arXiv 2308.10098, algorithms 1 and 2; growth by 10/9, η² and three rounds as in the authors' code.
    """

    def __init__(
        self,
        theta: Float[Tensor, "*theta"],
        lower: Lower,
        upper: Upper,
        mu: OfTheta,
        solver: str | Minimizer = "fista",
        eps0: float = 0.1,
        delta0: float = 0.1,
        step0: float = 0.1,
        eta: float = 1e-4,
        rho: float = 0.9,
        tau: float = 0.5,
        nu: float = 1.05,
        max_backtracks: int = 10,
        lipschitz: LipschitzConstants | Callable[[Tensor], LipschitzConstants] | None = None,
        *,
        x0: Float[Tensor, "*x"],
        smoothness: OfTheta | None = None,
        regularizer: Callable[[Tensor], Tensor] | None = None,
        convex_upper: bool = True,
        adaptive: bool = True,
        warm_start: bool = False,
        lower_max_iter: int = 2000,
        cg_max_iter: int = 2000,
    ) -> None:
        for name, value in (("eps0", eps0), ("delta0", delta0), ("step0", step0)):
            check_number(name, value, above=0)
        for name, value in (("eta", eta), ("rho", rho), ("tau", tau)):
            check_number(name, value, above=0, below=1)
        check_number("nu", nu, at_least=1)
        check_integer("max_backtracks", max_backtracks, at_least=1)
        self.theta, self.x = check_start(theta, x0)
        self.problem = Bilevel(
            lower,
            upper,
            mu,
            solver=solver,
            lipschitz=lipschitz,
            smoothness=smoothness,
            regularizer=regularizer,
            convex_upper=convex_upper,
            lower_max_iter=lower_max_iter,
            cg_max_iter=cg_max_iter,
        )
        self.epsilon, self.delta, self.step_size = float(eps0), float(delta0), float(step0)
        self._eta, self._rho, self._tau, self._nu = eta, rho, tau, nu
        self._max_backtracks, self._adaptive, self._warm_start = max_backtracks, adaptive, warm_start
        self._failures = 0
        self._tol = 0.0
        self._status: Status | None = None
        self._adjoint: Tensor | None = None
        self._L_g = 0.0
        value = self.problem.evaluate(self.theta, self.x).value
        self.history = [BilevelStep(0, 0, 0, value, self.epsilon, self.delta, 0.0, math.nan, math.nan, False)]

    @classmethod
    def for_problem(cls, problem: BilevelProblem, **options: Any) -> MAID:
        """Set up for a problem with its own start and constants.

        Args:
            problem: The problem.
            **options: As of :class:`MAID`.
        """
        return cls(problem.theta0, problem.lower, problem.upper, problem.mu, **{**problem.constants(), **options})

    def step(self) -> BilevelStep:
        """Run one outer iteration: up to three rounds of hypergradient and line search.

        Returns:
            Its record, also in ``history``.
        """
        norm = omega = math.nan
        taken = 0.0
        for _ in range(_ROUNDS):
            direction, epsilon, omega = self._descent_direction()
            norm = direction.norm
            if self._status is not None:
                break
            taken = self._line_search(direction, epsilon)
            if taken > 0:
                break
        value = self.problem.evaluate(self.theta, self.x).value
        counts = self.problem.lower_iterations, self.problem.cg_iterations
        record = BilevelStep(len(self.history), *counts, value, self.epsilon, self.delta, taken, norm, omega, taken > 0)
        self.history.append(record)
        return record

    def solve(self, budget: int = 1_000_000, max_steps: int = 1000, tol: float = 1e-6) -> BilevelResult:
        """Iterate until ‖z‖ + ω ≤ tol, the budget is spent, or there were enough outer iterations.

        An iteration that the budget ends leaves θ as it was. The certificate's hypergradient is taken at the last θ,
        if need be beyond the budget.

        Args:
            budget: Most lower-level iterations plus iterations of conjugate gradients, over all calls.
            max_steps: Most outer iterations of this call.
            tol: Tolerance.

        Returns:
            The result with its certificate.

        Raises:
            ValueError: ``budget`` < 1, ``max_steps`` < 0 or ``tol`` < 0; or as :meth:`step`.
            RuntimeError: As :meth:`step`.
        """
        check_integer("budget", budget, at_least=1)
        check_integer("max_steps", max_steps, at_least=0)
        check_number("tol", tol, at_least=0)
        self._tol, self._status, self.problem.allowed = tol, None, budget
        try:
            for _ in range(max_steps):
                self.step()
                if self._status is not None:
                    break
        except BudgetExhaustedError:
            self._status = "budget"
        finally:
            self._tol, self.problem.allowed = 0.0, math.inf
        status: Status = self._status or "steps"
        self._status = None
        start = self._adjoint if self._warm_start else None
        z, certificate = self.problem.certify(self.theta, self.x, self.delta, start)
        return BilevelResult(self.theta.clone(), self.x.clone(), z, certificate, tuple(self.history), status)

    def _descent_direction(self) -> tuple[Direction, float, float]:
        """Raise the accuracy until ω ≤ (1 − η)‖z‖; return z with its point, the ε that x has, and ω."""
        before = (math.inf, math.inf)
        while True:
            x, epsilon = self.problem.solve_lower(self.theta, self.x, self.epsilon)
            self.problem.check_lower(epsilon)
            direction = self.problem.direction(self.theta, x, self.delta, self._adjoint if self._warm_start else None)
            delta = max(self.delta, direction.residual)
            omega, constants = self.problem.bound(direction, epsilon, delta)
            self.x, self._adjoint, self._L_g = x, direction.q, constants.upper or 0.0
            if direction.norm + omega <= self._tol:
                self._status = "converged"
            elif self._adaptive and omega > (1 - self._eta) * direction.norm:
                if _stuck(epsilon, self.epsilon, before[0]) or _stuck(delta, self.delta, before[1]):
                    self._status = "stalled"
                else:
                    before = (epsilon, delta)
                    self._shrink()
                    continue
            return direction, epsilon, omega

    def _line_search(self, direction: Direction, epsilon: float) -> float:
        """Try steps; move and return the step of the first success, or return 0."""
        low, _ = self.problem.value_bounds(direction.upper, epsilon, self._L_g)
        for i in range(self._max_backtracks + self._failures):
            step = self.step_size * self._rho**i
            theta = self.theta - step * direction.z
            x, reached = self.problem.solve_lower(theta, self.x, self.epsilon, trial=True)
            if not math.isfinite(reached):
                continue
            _, high = self.problem.value_bounds(self.problem.evaluate(theta, x), reached, self._L_g)
            if high - low <= -(self._eta**2) * step * direction.norm**2:
                self.theta, self.x = theta, x
                self.step_size = _GROWTH * step
                self._failures = 0
                if self._adaptive:
                    self.epsilon, self.delta = self._nu * self.epsilon, self._nu * self.delta
                return step
        self._failures += 1
        if self._adaptive:
            self._shrink()
        return 0.0

    def _shrink(self) -> None:
        self.epsilon, self.delta = self._tau * self.epsilon, self._tau * self.delta


def _stuck(reached: float, asked: float, before: float) -> bool:
    """Whether an accuracy was missed and is hardly better than the last one: asking for more is no use."""
    return reached > asked and reached > 0.9 * before
