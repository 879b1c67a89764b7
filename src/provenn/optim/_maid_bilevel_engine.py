"""What MAID and HOAG share: lower solves, hypergradients, their count against a budget, and results."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.numerics.power_iteration import largest_eigenvalue
from provenn.core.numerics.smooth_convex import MINIMIZERS, Minimizer
from provenn.optim._maid_bilevel_hypergradient import (
    Estimates,
    Linearization,
    LipschitzConstants,
    Lower,
    Upper,
    hypergradient_bound,
    solve_adjoint,
    upper_gradient,
)

Status = Literal["converged", "budget", "steps", "stalled"]
OfTheta = float | Callable[[Tensor], float]


class BudgetExhaustedError(Exception):
    """The work allowed is done."""


@dataclass(frozen=True)
class BilevelStep:
    """One outer iteration, as it ended.

    Args:
        step: Its number; 0 is the start.
        lower_iterations: Lower-level iterations so far.
        cg_iterations: Iterations of conjugate gradients so far.
        value: g(x̃) + r(θ).
        epsilon: ε for the next iteration.
        delta: δ for the next iteration.
        step_size: The step β that was taken, or 0.
        gradient_norm: ‖z‖.
        error_bound: ω; NaN where it is not computed.
        accepted: Whether θ moved.

    Source: arXiv 2308.10098, algorithm 2.
    """

    step: int
    lower_iterations: int
    cg_iterations: int
    value: float
    epsilon: float
    delta: float
    step_size: float
    gradient_norm: float
    error_bound: float
    accepted: bool


@dataclass(frozen=True)
class BilevelCertificate:
    """What is known of a result: all bounds hold at its own θ and x.

    Args:
        epsilon: ‖∇_x h(x, θ)‖/μ ≥ ‖x − x̂(θ)‖.
        delta: Residual of the adjoint system.
        gradient_norm: ‖z‖.
        error_bound: ω ≥ ‖z − ∇f(θ)‖, as far as estimated constants hold.
        lower_bound: At most f(θ).
        upper_bound: At least f(θ).
        lower_iterations: Lower-level iterations taken.
        cg_iterations: Iterations of conjugate gradients taken.

    Source: arXiv 2308.10098, section 3, bounds of inexact values and hypergradients.
    """

    epsilon: float
    delta: float
    gradient_norm: float
    error_bound: float
    lower_bound: float
    upper_bound: float
    lower_iterations: int
    cg_iterations: int


@dataclass(frozen=True)
class BilevelResult:
    """Where a bilevel solver ended.

    Args:
        theta: θ.
        x: The approximate lower minimiser at θ.
        hypergradient: z at θ.
        certificate: Error bounds at θ.
        history: One record an outer iteration, from the start.
        status: ``"converged"``: ‖z‖ + ω ≤ tol; ``"budget"`` or ``"steps"``: all were spent; ``"stalled"``: the
            arithmetic or the caps allow no higher accuracy.

    Shape:
        ``theta`` and ``hypergradient`` alike, ``x`` any.

    Source: arXiv 2308.10098, section 3.
    """

    theta: Float[Tensor, "*theta"]
    x: Float[Tensor, "*x"]
    hypergradient: Float[Tensor, "*theta"]
    certificate: BilevelCertificate
    history: tuple[BilevelStep, ...]
    status: Status

    @property
    def converged(self) -> bool:
        """Whether the tolerance was met."""
        return self.status == "converged"

    @property
    def value_bounds(self) -> tuple[float, float]:
        """An interval that holds f(θ)."""
        return self.certificate.lower_bound, self.certificate.upper_bound

    @property
    def error_bound(self) -> float:
        """ω of the hypergradient."""
        return self.certificate.error_bound


class UpperValue(NamedTuple):
    """g(x) + r(θ), and ∇g(x)."""

    value: float
    gradient: Tensor

    def norm(self) -> float:
        """Return ‖∇g(x)‖."""
        return self.gradient.norm().item()


class Direction(NamedTuple):
    """An inexact hypergradient: z, the residual δ of its adjoint, and what ω needs."""

    z: Tensor
    norm: float
    residual: float
    q: Tensor
    point: Linearization
    upper: UpperValue


class Bilevel:
    """A bilevel problem with the tools to evaluate it inexactly, and the count of the work."""

    def __init__(
        self,
        lower: Lower,
        upper: Upper,
        mu: OfTheta,
        *,
        solver: str | Minimizer,
        lipschitz: LipschitzConstants | Callable[[Tensor], LipschitzConstants] | None,
        smoothness: OfTheta | None,
        regularizer: Callable[[Tensor], Tensor] | None,
        convex_upper: bool,
        lower_max_iter: int,
        cg_max_iter: int,
    ) -> None:
        if not callable(mu):
            check_number("mu", mu, above=0)
        if smoothness is not None and not callable(smoothness):
            check_number("smoothness", smoothness, above=0)
        if not callable(solver):
            check_choice("solver", solver, MINIMIZERS)
        if not (lipschitz is None or callable(lipschitz) or isinstance(lipschitz, LipschitzConstants)):
            raise TypeError(f"lipschitz must be LipschitzConstants, or return them from theta, got {lipschitz!r}")
        check_integer("lower_max_iter", lower_max_iter, at_least=1)
        check_integer("cg_max_iter", cg_max_iter, at_least=1)
        self.lower, self.upper, self.convex_upper = lower, upper, convex_upper
        self._mu, self._smoothness, self._lipschitz, self._regularizer = mu, smoothness, lipschitz, regularizer
        self._minimize: Any = solver if callable(solver) else MINIMIZERS[solver]
        self._lower_max_iter, self._cg_max_iter = lower_max_iter, cg_max_iter
        self.estimates = Estimates(lower, upper, cg_max_iter)
        self._hessian_direction: Tensor | None = None
        self.lower_iterations = self.cg_iterations = 0
        self.allowed = math.inf

    @property
    def work(self) -> int:
        """Lower-level iterations plus those of conjugate gradients."""
        return self.lower_iterations + self.cg_iterations

    def mu(self, theta: Tensor) -> float:
        """Return μ at θ, checked."""
        mu = self._mu(theta) if callable(self._mu) else self._mu
        check_number("mu", mu, above=0)
        return mu

    def solve_lower(self, theta: Tensor, x: Tensor, epsilon: float, trial: bool = False) -> tuple[Tensor, float]:
        """Minimise h(·, θ) from x to ε; return the point and the bound of its error that holds: ε, or what was reached.

        Where h leaves the numbers the bound is infinite. A trial of a line search, which may go too far, does that
        without a word.

        Raises:
            ValueError: μ(θ) is not above 0, and it is no trial.
            BudgetExhaustedError: The work allowed ended the solve.
        """
        if trial and not self._within_numbers(theta):
            return x, math.inf
        mu = self.mu(theta)
        cap = min(self._lower_max_iter, self._left())
        found = self._minimize(
            lambda at: self._lower_gradient(at, theta),
            x,
            tol=epsilon * mu,
            mu=mu,
            smoothness=self._smoothness_at(theta, x),
            max_iter=int(cap),
        )
        self.lower_iterations += found.iterations
        if not math.isfinite(found.gradient_norm):
            return x, math.inf
        reached = found.gradient_norm / mu
        if reached <= epsilon:
            return found.x.detach(), epsilon
        if cap < self._lower_max_iter:
            raise BudgetExhaustedError
        if not trial:
            warnings.warn(
                f"the lower solver missed ε = {epsilon:.3g} in {found.iterations} iterations; ε = {reached:.3g}, which "
                "it reached, is used instead",
                ConvergenceWarning,
                stacklevel=4,
            )
        return found.x.detach(), reached

    def evaluate(self, theta: Tensor, x: Tensor) -> UpperValue:
        """Return g(x) + r(θ), and ∇g(x)."""
        value, gradient = upper_gradient(self.upper, x)
        if self._regularizer is not None:
            with torch.no_grad():
                value = value + self._regularizer(theta)
        return UpperValue(value.item(), gradient)

    def direction(self, theta: Tensor, x: Tensor, delta: float, start: Tensor | None = None) -> Direction:
        """Compute z = −Jᵀq + ∇r with a residual of q of at most δ.

        Raises:
            RuntimeError: A level's value or gradient is not finite here.
            BudgetExhaustedError: The work allowed ended the solve.
        """
        upper = self.evaluate(theta, x)
        if not (math.isfinite(upper.value) and math.isfinite(upper.norm())):
            raise RuntimeError(f"the upper level's objective or its gradient is not finite: value {upper.value}")
        point = Linearization(self.lower, x, theta)
        self.check_lower(point.gradient.norm().item())
        cap = min(self._cg_max_iter, self._left())
        found = solve_adjoint(point, upper.gradient.flatten(), delta, start, int(cap))
        self.cg_iterations += found.iterations
        if found.residual > delta and cap < self._cg_max_iter:
            raise BudgetExhaustedError
        z = (-point.jacobian_transposed(found.q)).view_as(theta) + self._regularizer_gradient(theta)
        return Direction(z, z.norm().item(), found.residual, found.q, point, upper)

    def bound(self, direction: Direction, epsilon: float, delta: float) -> tuple[float, LipschitzConstants]:
        """Return ω, and the constants that it rests on."""
        theta = direction.point.theta.detach()
        given = self.given(theta)
        norm = self.estimates.jacobian_norm(direction.point, direction.z)
        b = direction.upper.gradient.flatten()
        constants, spent = self.estimates.fill(given, direction.point, direction.q, b, epsilon)
        self.cg_iterations += spent
        omega = hypergradient_bound(epsilon, delta, self.mu(theta), norm, direction.upper.norm(), constants)
        return omega, constants

    def given(self, theta: Tensor) -> LipschitzConstants:
        """Return the constants that the user gives at θ."""
        constants = self._lipschitz(theta) if callable(self._lipschitz) else self._lipschitz
        return constants or LipschitzConstants()

    def certify(
        self, theta: Tensor, x: Tensor, delta: float, start: Tensor | None
    ) -> tuple[Tensor, BilevelCertificate]:
        """Compute z, ω and the bounds of f at θ and x, with the error that x has; the work may pass the allowance."""
        allowed, self.allowed = self.allowed, math.inf
        direction = self.direction(theta, x, delta, start)
        epsilon = direction.point.gradient.norm().item() / self.mu(theta)
        omega, constants = self.bound(direction, epsilon, direction.residual)
        self.allowed = allowed
        low, high = self.value_bounds(direction.upper, epsilon, constants.upper or 0.0)
        certificate = BilevelCertificate(
            epsilon=epsilon,
            delta=direction.residual,
            gradient_norm=direction.norm,
            error_bound=omega,
            lower_bound=low,
            upper_bound=high,
            lower_iterations=self.lower_iterations,
            cg_iterations=self.cg_iterations,
        )
        return direction.z, certificate

    def value_bounds(self, upper: UpperValue, epsilon: float, L_g: float) -> tuple[float, float]:
        """Return an interval that holds f where ‖x − x̂‖ ≤ ε; a convex g lies above its tangent."""
        slope, curved = upper.norm() * epsilon, 0.5 * L_g * epsilon * epsilon
        return upper.value - slope - (0.0 if self.convex_upper else curved), upper.value + slope + curved

    def check_lower(self, reached: float) -> None:
        """Raise where the lower level left the numbers.

        Raises:
            RuntimeError: ``reached`` is not finite.
        """
        if not math.isfinite(reached):
            raise RuntimeError(f"the lower level's objective has a gradient that is not finite: norm {reached}")

    def _within_numbers(self, theta: Tensor) -> bool:
        constants = [one(theta) for one in (self._mu, self._smoothness) if callable(one)]
        return bool(theta.isfinite().all()) and all(0 < value < math.inf for value in constants)

    def _left(self) -> float:
        left = self.allowed - self.work
        if left < 1:
            raise BudgetExhaustedError
        return left

    def _lower_gradient(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = self.lower(leaf, theta)
            (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach(), gradient

    def _smoothness_at(self, theta: Tensor, x: Tensor) -> float:
        if self._smoothness is None:
            start = self._hessian_direction
            if start is None:
                start = self.estimates.random_direction(x)
            L, self._hessian_direction = largest_eigenvalue(Linearization(self.lower, x, theta).hessian, start)
            # A quotient that is not above 0 or not a number leaves the verdict to the solve itself.
            return L if L > 0 and math.isfinite(L) else self.mu(theta)
        L = self._smoothness(theta) if callable(self._smoothness) else self._smoothness
        return max(L, self.mu(theta))

    def _regularizer_gradient(self, theta: Tensor) -> Tensor:
        if self._regularizer is None:
            return torch.zeros_like(theta)
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self._regularizer(leaf), leaf)
        return gradient


def check_start(theta: Any, x0: Any) -> tuple[Tensor, Tensor]:
    """Return copies of both levels' starts.

    Raises:
        TypeError: One is no floating-point tensor.
        ValueError: One has entries that are not finite.
    """
    for name, value in (("theta", theta), ("x0", x0)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {value!r}")
        if not value.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    return theta.detach().clone(), x0.detach().clone()
