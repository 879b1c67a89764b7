"""Gradient-Normalized Smoothness for Optimization with Approximate Hessians.

Semenov, Jaggi, Doikov, ICLR 2026. https://arxiv.org/abs/2506.13710

Newton's method for a Hessian that is only approximate, damped by the gradient's norm over a length that a search finds:

    x⁺ = x − (H + λB)⁻¹ ∇f(x),    λ = ‖∇f(x)‖_* / γ

γ is halved until f(x) − f(x⁺) ≥ ‖∇f(x⁺)‖_*²/(8λ), and doubled after. The largest length over which H predicts the
gradient, the Gradient-Normalized Smoothness γ(x), can also be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice
from provenn.core.numerics.curvature import Batch, CurvatureOperator, SampleLoss
from provenn.optim._gradient_normalized_smoothness_baselines import (
    AcceleratedGradient,
    AdaptiveGradient,
    CubicNewton,
    SuperUniversalNewton,
)
from provenn.optim._gradient_normalized_smoothness_closure import Closure, ClosureFunction, Evaluated
from provenn.optim._gradient_normalized_smoothness_oracles import (
    Chebyshev,
    HessianChoice,
    LogisticRegression,
    LogSumExp,
    Oracle,
    PowerResidual,
    Rosenbrock,
    check_hessian,
    curvature_at,
)
from provenn.optim._gradient_normalized_smoothness_probe import GNSReport, estimate_gns
from provenn.optim._gradient_normalized_smoothness_search import (
    Counted,
    Iterate,
    Minimizer,
    MinimumCertificate,
    Outcome,
    Point,
    SolveResult,
    check_search,
    search_gamma,
    warn_exhausted,
)
from provenn.optim._gradient_normalized_smoothness_systems import (
    SOLVERS,
    Curvature,
    DampedSystem,
    LinearSolver,
    Metric,
    RankOne,
)

__all__ = [
    "AcceleratedGradient",
    "AdaptiveGradient",
    "Chebyshev",
    "CubicNewton",
    "GNSReport",
    "GaussNewton",
    "GradientNormalizedNewton",
    "Iterate",
    "LogSumExp",
    "LogisticRegression",
    "MinimumCertificate",
    "Oracle",
    "PowerResidual",
    "RankOne",
    "Rosenbrock",
    "SolveResult",
    "SuperUniversalNewton",
    "estimate_gns",
    "minimize_gns",
]

_NAMES = ("exact", "gauss-newton", "zero")


class GradientNormalizedNewton(torch.optim.Optimizer):
    """Newton's method with an approximate Hessian, damped by ‖g‖_*/γ, for losses without noise.

    ``step(closure)`` takes one iteration of the paper's Algorithm 1. The closure returns the full loss at the
    parameters as they are, the same at every call; it is called several times a step. It may call ``backward()`` on the
    loss, as closures for :class:`torch.optim.LBFGS` do, or leave that to the optimizer; either way no ``zero_grad`` is
    needed. With ``hessian="gauss-newton"`` it returns the loss and the outputs that the loss is a function of::

        optimizer = GradientNormalizedNewton(model.parameters())
        loss = optimizer.step(lambda: cross_entropy(model(x), y))

    Args:
        params: Parameters, or one group of them, of one type on one device.
        hessian: H: ``"exact"``, by autograd; ``"gauss-newton"``, JᵀKJ with J the outputs' Jacobian and K the loss'
            Hessian by the outputs; ``"zero"``, which makes the method gradient descent; or a function x ↦ H of the
            parameters laid end to end, that returns a symmetric matrix, a :class:`RankOne`, a product v ↦ H v, or
            ``None`` for zero, such as :class:`GaussNewton`.
        gamma0: γ to begin with.
        gamma_min: The least γ that a step ends with.
        metric: B, symmetric positive definite; ``None``: the identity.
        solver: ``"cholesky"``; ``"cg"``, conjugate gradients to a relative residual of 1e-10, with products in place of
            H; or ``"wsm"``, Sherman and Morrison's formula, for a :class:`RankOne`.
        max_trials: Trials a step.

    Shape:
        Parameters of any shape, n numbers in all; ``metric`` (n, n).

    Raises:
        ValueError: ``gamma0`` ≤ 0, ``gamma_min`` ≤ 0, ``max_trials`` < 1; ``hessian`` or ``solver`` is unknown;
            ``metric`` is not symmetric positive definite; ``params`` are complex, in more than one group, or of
            several types or devices.
        RuntimeError: In :meth:`step`: the closure's value at one point changes from call to call (noticed in the first
            step, and wherever a search fails), it returns no graph, or a gradient is sparse.

    An H that is not positive semidefinite makes λ grow until H + λB is positive definite. After ``max_trials``
    rejections a step warns with scikit-learn's ``ConvergenceWarning`` and leaves the parameters as they were; γ stays
    at what it was halved to, but for ``gamma_min``.

    Cost: a step evaluates the closure once, and once more for each trial, two on average; the first step once or twice
    more. Exact H: n backward passes in batches of 256, n² numbers, and O(n³) a trial; by conjugate gradients a backward
    pass for each product.

    Source: the paper's Algorithm 1; constants as in the authors' code.
    """

    def __init__(
        self,
        params: Iterable[Any],
        hessian: Literal["exact", "gauss-newton", "zero"] | Callable[[Tensor], Curvature] = "exact",
        gamma0: float = 1.0,
        gamma_min: float = 1e-9,
        metric: Float[Tensor, "n n"] | None = None,
        solver: LinearSolver = "cholesky",
        max_trials: int = 40,
    ) -> None:
        check_search(gamma0, gamma_min, max_trials)
        check_hessian(hessian, _NAMES)
        check_choice("solver", solver, SOLVERS)
        self._hessian, self._metric = hessian, Metric(metric)
        defaults = {"gamma0": gamma0, "gamma_min": gamma_min, "solver": solver, "max_trials": max_trials}
        super().__init__(params, defaults)
        check_search(*(self.param_groups[0][name] for name in ("gamma0", "gamma_min", "max_trials")))
        ClosureFunction(self._params, _no_closure)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_hessian": self._hessian, "_metric": self._metric}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the only group of parameters.

        Args:
            param_group: Parameters and their options.

        Raises:
            ValueError: There is one already: H couples all parameters.
        """
        if self.param_groups:
            raise ValueError("params must be one group, since one step is found for all of them, got a second group")
        super().add_param_group(param_group)

    @property
    def _params(self) -> list[Tensor]:
        params: list[Tensor] = self.param_groups[0]["params"]
        return params

    @property
    def gamma(self) -> float:
        """γ that the next step begins with."""
        return float(self._progress()["gamma"])

    @property
    def trials(self) -> int:
        """Trials of all steps: systems that were solved."""
        return int(self._progress()["trials"])

    def _progress(self) -> dict[str, Any]:
        state: dict[str, Any] = self.state[self._params[0]]
        if not state:
            state.update(gamma=self.param_groups[0]["gamma0"], steps=0, trials=0, calls_backward=False)
        return state

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor | float:  # type: ignore[override]
        """Take one iteration: a Hessian, and trials until one lowers the loss enough.

        Args:
            closure: Returns the loss, with or without having called ``backward()`` on it; for Gauss–Newton, the loss
                and the outputs.

        Returns:
            The loss before the step.

        Raises:
            RuntimeError: As in the class.
            ValueError: H is not symmetric, not finite, or of another size than the parameters; the loss or its gradient
                is not finite.
        """
        group, progress = self.param_groups[0], self._progress()
        function = ClosureFunction(self._params, closure, progress["calls_backward"])
        named = self._hessian in ("exact", "gauss-newton")
        first = function.evaluate(graph=named)
        progress["calls_backward"] = function.calls_backward
        here = first.point
        loss = first.loss.detach() if isinstance(first.loss, Tensor) else first.loss
        if not (torch.tensor(here.f).isfinite() and here.g.isfinite().all()):
            raise ValueError(f"closure must give a finite loss and gradient, got the loss {here.f}")
        if progress["steps"] == 0:
            _check_repeats(function, here)
        progress["steps"] += 1
        metric = self._metric.to(here.x)
        if not here.g.any():
            return loss
        system = DampedSystem(self._curvature(function, first), here.g, metric, group["solver"])
        outcome = search_gamma(
            function.at, here, system, metric, progress["gamma"], group["gamma_min"], group["max_trials"]
        )
        progress.update(gamma=outcome.state, trials=progress["trials"] + outcome.trials)
        if not outcome.accepted:
            function.move(here.x)
            _check_repeats(function, here)
            warn_exhausted(group["max_trials"], stacklevel=3)
        return loss

    def _curvature(self, function: ClosureFunction, first: Evaluated) -> Curvature:
        by_products = self.param_groups[0]["solver"] == "cg"
        if callable(self._hessian):
            curvature = self._hessian(first.point.x)
            if curvature is None or isinstance(curvature, (Tensor, RankOne)) or not by_products:
                return curvature
            # A product may read the model, which trials move.
            return function.at_home(curvature)
        if self._hessian == "zero":
            return None
        if self._hessian == "exact":
            return (function.hessian_product if by_products else function.hessian)(first.loss)
        if first.outputs is None:
            raise ValueError("closure must return the loss and the outputs with hessian 'gauss-newton', got the loss")
        return (function.gauss_newton_product if by_products else function.gauss_newton)(first.loss, first.outputs)


def _no_closure() -> Any:
    raise RuntimeError("no closure was given")


def _check_repeats(function: ClosureFunction, here: Point) -> None:
    """Evaluate once more where the parameters are, and compare beyond the rounding of another order of sums."""
    again = function.evaluate(graph=False).point.f
    slack = 1000 * torch.finfo(here.x.dtype).eps * max(1.0, abs(here.f))
    if not abs(again - here.f) <= slack:
        raise RuntimeError(
            f"closure must return the same loss at the same parameters, got {here.f} and {again}: switch off what "
            "brings randomness (dropout, augmentation, new batches), or use an optimizer for noisy losses"
        )


class GaussNewton:
    """The Gauss–Newton matrix of a model's mean loss, as an approximation x ↦ H for the optimizer.

    H = mean of JᵀKJ over the samples, with J the Jacobian of the model's outputs and K the loss' Hessian by them: for
    cross-entropy on logits and for squared error it is the Fisher matrix. It is positive semidefinite where the loss is
    convex in the outputs.

    Args:
        model: The model, whose trainable parameters, in their order, are what the optimizer steps.
        loss: ``loss(outputs, targets)`` → one value a sample.
        batches: Inputs and targets.

    Shape:
        As in :class:`~provenn.core.numerics.curvature.CurvatureOperator`.

    Raises:
        ValueError: ``batches`` are empty, or ``model`` has no trainable parameter.

    Cost: about four forward passes over the batches for a product; as a matrix n of them, vectorised.

    Source: Schraudolph, Neural Computation 14 (2002); in the paper's section on approximations.
    """

    def __init__(self, model: nn.Module, loss: SampleLoss, batches: Sequence[Batch]) -> None:
        self._operator = CurvatureOperator(model, loss, batches, "gauss-newton")

    def __call__(self, x: Float[Tensor, " n"]) -> _Products:
        """Return H where the model's parameters are, which is where an optimizer over them has put x.

        Args:
            x: The parameters, of which only the number is looked at.

        Raises:
            ValueError: ``x`` is of another length.
        """
        if len(x) != self._operator.dim:
            raise ValueError(f"x must hold {self._operator.dim} numbers, as the model's parameters, got {len(x)}")
        return _Products(self._operator, x)


class _Products:
    """v ↦ H v, with the matrix by one vectorised product."""

    def __init__(self, operator: CurvatureOperator, x: Tensor) -> None:
        self._operator, self._x = operator, x

    def __call__(self, v: Tensor) -> Tensor:
        return self._operator(v)

    def dense(self) -> Tensor:
        unit = torch.eye(self._operator.dim, dtype=self._x.dtype, device=self._x.device)
        matrix: Tensor = torch.func.vmap(self._operator, chunk_size=256)(unit)
        return (matrix + matrix.mT) / 2


class _GradientNormalized(Minimizer):
    """Algorithm 1 on an oracle."""

    def __init__(
        self,
        hessian: HessianChoice,
        gamma0: float,
        gamma_min: float,
        metric: Tensor | None,
        solver: LinearSolver,
        max_trials: int,
    ) -> None:
        check_search(gamma0, gamma_min, max_trials)
        check_hessian(hessian, ("exact", "approximate", "zero"))
        check_choice("solver", solver, SOLVERS)
        self._hessian, self._gamma0, self._gamma_min = hessian, gamma0, gamma_min
        self._metric, self._solver, self.max_trials = Metric(metric), solver, max_trials

    def _begin(self, start: Point) -> float:
        return self._gamma0

    def _advance(self, oracle: Counted, here: Point, state: float, metric: Metric) -> Outcome:
        curvature = curvature_at(oracle.oracle, here.x, self._hessian)
        system = DampedSystem(curvature, here.g, metric, self._solver)
        return search_gamma(oracle.evaluate, here, system, metric, state, self._gamma_min, self.max_trials)


def minimize_gns(
    oracle: Oracle,
    x0: Float[Tensor, " n"],
    hessian: HessianChoice = "exact",
    *,
    gamma0: float = 1.0,
    gamma_min: float = 1e-9,
    metric: Float[Tensor, "n n"] | None = None,
    solver: LinearSolver = "cholesky",
    max_trials: int = 40,
    max_iter: int = 1000,
    max_calls: int | None = None,
    grad_tol: float | None = 1e-8,
    f_star: float | None = None,
    gap_tol: float = 1e-8,
    callback: Callable[[Tensor, Iterate], object] | None = None,
) -> SolveResult:
    """Minimise a function by the paper's Algorithm 1, with the exact Hessian or an approximation.

    Args:
        oracle: The function, an :class:`Oracle`.
        x0: The start.
        hessian: H: ``"exact"``, ``"approximate"`` (the oracle's own), ``"zero"``, or x ↦ H as in
            :class:`GradientNormalizedNewton`.
        gamma0: γ to begin with.
        gamma_min: The least γ that an iteration ends with.
        metric: B, symmetric positive definite; ``None``: the identity.
        solver: As in :class:`GradientNormalizedNewton`.
        max_trials: Trials an iteration; after as many rejections the run ends with a ``ConvergenceWarning``.
        max_iter: Most iterations.
        max_calls: Stop once the oracle was evaluated at so many points.
        grad_tol: Stop at ‖g‖_* below it; ``None``: only where it is 0.
        f_star: The minimum, if it is known.
        gap_tol: Stop at f − f* below it.
        callback: Called with every point and its line of the history.

    Shape:
        ``x0`` (n,), ``metric`` (n, n).

    Returns:
        The result, with history and certificate.

    Raises:
        ValueError: ``gamma0`` ≤ 0, ``gamma_min`` ≤ 0, ``max_trials`` < 1, a limit or tolerance out of range;
            ``hessian`` or ``solver`` is unknown; H is not symmetric or not finite; ``metric`` is not symmetric positive
            definite; ``x0`` is not finite, or f is not finite there.

    Cost: an iteration takes one H, and for each trial, two on average, one system and one evaluation.

    Source: the paper's Algorithm 1.
    """
    method = _GradientNormalized(hessian, gamma0, gamma_min, metric, solver, max_trials)
    return method.minimize(
        oracle,
        x0,
        max_iter=max_iter,
        max_calls=max_calls,
        grad_tol=grad_tol,
        f_star=f_star,
        gap_tol=gap_tol,
        callback=callback,
    )
