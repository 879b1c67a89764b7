"""Hyperparameter optimization with approximate gradient: accuracy by a sequence that is fixed beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.numerics.smooth_convex import Minimizer
from provenn.optim._maid_bilevel_engine import (
    Bilevel,
    BilevelResult,
    BilevelStep,
    BudgetExhaustedError,
    OfTheta,
    Status,
    check_start,
)
from provenn.optim._maid_bilevel_hypergradient import LipschitzConstants, Lower, Upper
from provenn.optim._maid_bilevel_problems import BilevelProblem

SEQUENCES: dict[str, Callable[[int], float]] = {
    "geometric": lambda k: 0.9**k,
    "quadratic": lambda k: (k + 1.0) ** -2,
    "cubic": lambda k: (k + 1.0) ** -3,
}
_FLOOR = 1e-12
_SLACK = 0.25


class HOAG:
    """Hyperparameter optimization with approximate gradient, the method that MAID is compared to.

    The k-th lower solve and adjoint system go to ε_k = ε₀ · 0.9^k, ε₀/(k + 1)² or ε₀/(k + 1)³, whatever the gradient.
    With the adaptive step 1/L: where the value fell as far as L predicts, up to the inexactness, L shrinks by 0.95;
    where it rose by a fifth or left the numbers, θ goes back, L doubles, and all later ε are halved.

    Args:
        theta: Start of θ.
        lower: As in :class:`MAID`.
        upper: As in :class:`MAID`.
        mu: As in :class:`MAID`.
        solver: As in :class:`MAID`.
        sequence: ``"geometric"``, ``"quadratic"`` or ``"cubic"``.
        eps0: ε₀.
        step: ``"adaptive"`` or ``"fixed"``.
        step0: First step; ``None``: √dim θ/‖z₀‖, or 1 where ‖z₀‖ ≤ 10⁻³.
        lipschitz: As in :class:`MAID`; only the certificate needs it.
        x0: Start of x.
        smoothness: As in :class:`MAID`.
        regularizer: As in :class:`MAID`.
        convex_upper: As in :class:`MAID`; only the certificate needs it.
        lower_max_iter: As in :class:`MAID`.
        cg_max_iter: As in :class:`MAID`.

    Shape:
        ``theta`` and ``x0`` any.

    Raises:
        ValueError: ``mu``, ``eps0`` or ``step0`` ≤ 0, an unknown ``sequence``, ``step`` or ``solver``, a start that is
            not finite; in :meth:`step` a ``ConvexityError``, which is a ``ValueError``.
        TypeError: As in :class:`MAID`.
        RuntimeError: As in :class:`MAID`; with the adaptive step only at the start, to which it can always go back.

    Cost: a lower solve and a solve of the adjoint system an outer iteration.

    Source: Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016, algorithm 1; the step rule
    as in the code of arXiv 2308.10098, which however leaves θ where the value rose: going back, as here, cannot get
    stuck there.
    """

    def __init__(
        self,
        theta: Float[Tensor, "*theta"],
        lower: Lower,
        upper: Upper,
        mu: OfTheta,
        solver: str | Minimizer = "fista",
        sequence: Literal["geometric", "quadratic", "cubic"] = "geometric",
        eps0: float = 0.1,
        step: Literal["adaptive", "fixed"] = "adaptive",
        step0: float | None = None,
        lipschitz: LipschitzConstants | Callable[[Tensor], LipschitzConstants] | None = None,
        *,
        x0: Float[Tensor, "*x"],
        smoothness: OfTheta | None = None,
        regularizer: Callable[[Tensor], Tensor] | None = None,
        convex_upper: bool = True,
        lower_max_iter: int = 2000,
        cg_max_iter: int = 2000,
    ) -> None:
        check_choice("sequence", sequence, SEQUENCES)
        check_choice("step", step, ("adaptive", "fixed"))
        check_number("eps0", eps0, above=0)
        if step0 is not None:
            check_number("step0", step0, above=0)
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
        self._sequence, self._adaptive = SEQUENCES[sequence], step == "adaptive"
        self._scale, self._count = float(eps0), 0
        self._L = None if step0 is None else 1 / step0
        self._last: _Kept | None = None
        self._status: Status | None = None
        self._tol = -1.0
        value = self.problem.evaluate(self.theta, self.x).value
        self.history = [BilevelStep(0, 0, 0, value, self.epsilon, self.epsilon, 0.0, math.nan, math.nan, False)]

    @classmethod
    def for_problem(cls, problem: BilevelProblem, **options: Any) -> HOAG:
        """Set up for a problem with its own start and constants.

        Args:
            problem: The problem.
            **options: As of :class:`HOAG`.
        """
        return cls(problem.theta0, problem.lower, problem.upper, problem.mu, **{**problem.constants(), **options})

    @property
    def epsilon(self) -> float:
        """The tolerance of the next lower solve and adjoint system."""
        return max(self._scale * self._sequence(self._count), _FLOOR)

    def step(self) -> BilevelStep:
        """Run one outer iteration: evaluate at θ, judge the step that led there, and take the next.

        Returns:
            Its record, also in ``history``; its value is that at the θ that was judged.
        """
        epsilon = self.epsilon
        judged = self._evaluate(epsilon)
        if judged is None:
            self._go_back()
        else:
            self._go_on(judged, epsilon)
        kept = self._last
        assert kept is not None
        assert self._L is not None
        counts = self.problem.lower_iterations, self.problem.cg_iterations
        record = BilevelStep(
            len(self.history),
            *counts,
            kept.value,
            self.epsilon,
            self.epsilon,
            1 / self._L,
            kept.z.norm().item(),
            math.nan,
            judged is not None,
        )
        self.history.append(record)
        return record

    def _evaluate(self, epsilon: float) -> _Kept | None:
        """Evaluate at θ; None where the value rose too far."""
        back = self._adaptive and self._last is not None
        x, reached = self.problem.solve_lower(self.theta, self.x, epsilon, trial=back)
        if back and (not math.isfinite(reached) or self._rose(self.problem.evaluate(self.theta, x).value)):
            return None
        self.problem.check_lower(reached)
        direction = self.problem.direction(self.theta, x, epsilon)
        return _Kept(self.theta, x, direction.z, direction.upper.value)

    def _rose(self, value: float) -> bool:
        return self._last is not None and not value < 1.2 * self._last.value

    def _go_back(self) -> None:
        """Return to the last θ, and take a step of half the length from it."""
        assert self._last is not None
        assert self._L is not None
        self._L *= 2
        self._scale *= 0.5
        self.x = self._last.x
        self.theta = self._last.theta - self._last.z / self._L

    def _go_on(self, here: _Kept, epsilon: float) -> None:
        size = here.z.norm().item()
        if size <= self._tol and epsilon <= self._tol:
            self._status = "converged"
        if self._L is None:
            self._L = size / math.sqrt(here.z.numel()) if size > 1e-3 else 1.0
        self._count += 1
        if self._adaptive and self._fell(here, size / self._L, epsilon):
            self._L *= 0.95
        self._last, self.x = here, here.x
        if self._status is None:
            self.theta = here.theta - here.z / self._L

    def _fell(self, here: _Kept, length: float, epsilon: float) -> bool:
        """Whether the value fell as far as L predicts; ``length`` is the next step's, as in the published code."""
        assert self._L is not None
        if self._last is None:
            return True
        slack = _SLACK * self.epsilon + epsilon * (_SLACK + 1) * length
        return here.value <= self._last.value + slack - self._L * length**2

    def solve(self, budget: int = 1_000_000, max_steps: int = 1000, tol: float = 1e-6) -> BilevelResult:
        """Iterate until ‖z‖ and ε_k are at most tol, the budget is spent, or there were enough outer iterations.

        The result is the last θ that was evaluated and kept.

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
            self._tol, self.problem.allowed = -1.0, math.inf
        status: Status = self._status or "steps"
        self._status = None
        theta, x = (self.theta, self.x) if self._last is None else (self._last.theta, self._last.x)
        z, certificate = self.problem.certify(theta, x, self.epsilon, None)
        return BilevelResult(theta.clone(), x.clone(), z, certificate, tuple(self.history), status)


class _Kept:
    """An evaluation that was kept: θ, x, z and the value."""

    def __init__(self, theta: Tensor, x: Tensor, z: Tensor, value: float) -> None:
        self.theta, self.x, self.z, self.value = theta, x, z, value
