"""Model predictive control with a recurrent network as the model."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.seeding import generator
from provenn.nn._iclrnn_search import projected_gradient, spectral_projected_gradient, value_and_gradient

ROUNDS = 30
"""Most updates of the multipliers."""


@dataclass(frozen=True)
class MPCCertificate:
    """What a solution's quality can be read from.

    Args:
        objective: Σ_t ‖ŷ_t‖² + ‖u_t‖² at the answer.
        projected_gradient_norm: ‖u − Π(u − ∇L(u))‖ there, L the Lagrangian. Where the minimum lies on a kink of a ReLU
            it need not vanish; the spread then tells.
        spread: (largest − smallest) / max(1e-12, |smallest|) of the objective over the starts.
        violation: By how much the largest V(ŷ_t) exceeds the level, 0 without one.
        multipliers: Of the bound at every step (horizon), 0 without one.
        objectives: What each start ended with.
    """

    objective: float
    projected_gradient_norm: float
    spread: float
    violation: float
    multipliers: Float[Tensor, " horizon"]
    objectives: tuple[float, ...]


@dataclass(frozen=True)
class MPCSolution:
    """Inputs that a controller chose.

    Args:
        x: The inputs of every step (horizon, inputs), in float64.
        predicted: The model's outputs for them (horizon, outputs).
        certificate: How good they are.
        converged: Whether the projected gradient and the violation are within the tolerance.
    """

    x: Float[Tensor, "horizon inputs"]
    predicted: Float[Tensor, "horizon outputs"]
    certificate: MPCCertificate
    converged: bool


class NeuralMPC:
    """Choose the inputs u_1 … u_N that minimise Σ_t ‖ŷ_t‖² + ‖u_t‖² for a network's predictions ŷ.

    The network maps the sequence [x₀; u_t], the measured state beside each input, to ŷ_t. Inputs are kept in a box;
    ``P`` and ``level`` add the bound V(ŷ_t) = ŷ_tᵀ P ŷ_t ≤ level at every step. If the network is convex in its inputs
    with outputs ≥ 0 (:class:`~provenn.nn.ICLRNN`, :class:`~provenn.nn.ICRNN`) and P has no negative entry, the problem
    is convex, and all starts reach one objective. It is so for the set point 0 alone: the square of a convex
    function's distance to another point is not convex. Scale and shift so that the set point is 0 and the outputs
    are distances from it.

    Args:
        model: (batch, horizon, states + inputs) to (batch, horizon, outputs), each sample on its own; a copy runs in
            float64 and in evaluation mode.
        horizon: Steps N.
        bounds: Lower and upper bounds of the inputs (2, inputs).
        P: The matrix of V (outputs, outputs), symmetric positive semidefinite; together with ``level``.
        level: Bound of V.
        starts: Random starts, uniform in the box.
        tol: Largest projected gradient norm, and violation relative to the level, of a converged solution.
        max_iter: Evaluations in each minimisation over the box.
        seed: Draws the starts.

    Shape:
        As above.

    Raises:
        TypeError: ``model`` is no module, a tensor is not floating-point, a number of another type.
        ValueError: Bounds of another shape, not finite or crossed; ``P`` without ``level`` or the reverse, not
            symmetric or not positive semidefinite; a number out of its range.

    Cost: a solve evaluates model and gradient at all starts together, at most ``max_iter`` times, with a level 30 times
    that.

    Source: Wang, Pravin & Wu, arXiv 2401.07494, section on neural-network-based MPC; the bound by augmented
    Lagrangians, Nocedal & Wright, Numerical Optimization (2006), section 17.4.
    """

    def __init__(
        self,
        model: nn.Module,
        horizon: int,
        bounds: Float[Tensor, "2 inputs"],
        P: Float[Tensor, "outputs outputs"] | None = None,
        level: float | None = None,
        starts: int = 10,
        tol: float = 1e-6,
        max_iter: int = 1000,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
        check_integer("horizon", horizon, at_least=1)
        check_integer("starts", starts, at_least=1)
        check_integer("max_iter", max_iter, at_least=1)
        check_integer("seed", seed)
        check_number("tol", tol, above=0)
        _check_bounds(bounds)
        _check_level(P, level)
        self.model, self.horizon, self.P, self.level = model, horizon, P, level
        self.lower, self.upper = bounds.detach().double()
        self.starts, self.tol, self.max_iter, self.seed = starts, tol, max_iter, seed

    def solve(self, x0: Float[Tensor, " states"]) -> MPCSolution:
        """Choose the inputs from a state.

        Args:
            x0: The measured state, in the model's units.

        Raises:
            TypeError: ``x0`` is not floating-point.
            ValueError: ``x0`` is no vector or not finite, or the bound of V is infeasible: no start finds inputs that
                keep it (a proof only where the problem is convex).
        """
        if not x0.is_floating_point():
            raise TypeError(f"x0 must be a floating-point tensor, got {x0.dtype}")
        if x0.ndim != 1 or not bool(x0.isfinite().all()):
            raise ValueError(f"x0 must be a vector of finite numbers, got {x0}")
        problem = _Problem(self, x0)
        u, multipliers = self._minimised(problem)
        return self._best(problem, u, multipliers)

    def _minimised(self, problem: _Problem) -> tuple[Tensor, Tensor]:
        """Return what each start ends with, and its multipliers."""
        u = problem.random_starts()
        multipliers = torch.zeros(len(u), self.horizon, dtype=u.dtype, device=u.device)
        if self.level is None:
            return problem.search(problem.objective, u), multipliers
        weight, before = 10.0, torch.full_like(multipliers[:, 0], torch.inf)
        for _ in range(ROUNDS):
            u = problem.search(_Augmented(problem, multipliers, weight), u)
            excess = problem.excess(u)
            multipliers = (multipliers + weight * excess).clamp(min=0)
            violation = torch.maximum(excess, -multipliers / weight).abs().amax(1)
            if bool((violation <= 0.1 * self.tol).all()):
                break
            if bool((violation > before / 4).any()):
                weight = min(10 * weight, 1e8)
            before = violation
        if float(problem.excess(u).amax(1).min()) > self.tol:
            self._refuse_infeasible(problem, u)
        return u, multipliers

    def _refuse_infeasible(self, problem: _Problem, u: Tensor) -> None:
        least = problem.excess(problem.search(problem.squared_excess, u)).amax(1).min().item()
        if least > self.tol:
            found = (1 + least) * float(self.level or 0)
            raise ValueError(f"level {self.level} is infeasible from x0: the smallest V found is {found:.6g}")

    def _best(self, problem: _Problem, u: Tensor, multipliers: Tensor) -> MPCSolution:
        objectives = problem.objective(u).detach()
        violations = problem.excess(u).amax(1).clamp(min=0)
        # Among starts that keep the bound the best objective; if none does, the smallest violation.
        kept = violations <= max(self.tol, float(violations.min()))
        best = int(torch.where(kept, objectives, torch.inf).argmin())
        _, gradient = value_and_gradient(_Lagrangian(problem, multipliers), u)
        norm = projected_gradient(u, gradient, problem.lower, problem.upper)[best].norm().item()
        smallest, largest = objectives.min().item(), objectives.max().item()
        scale = 1.0 if self.level is None else float(self.level)
        certificate = MPCCertificate(
            objective=objectives[best].item(),
            projected_gradient_norm=norm,
            spread=(largest - smallest) / max(1e-12, abs(smallest)),
            violation=violations[best].item() * scale,
            multipliers=multipliers[best] / scale,
            objectives=tuple(objectives.tolist()),
        )
        converged = norm <= self.tol and float(violations[best]) <= self.tol
        inputs = u[best].view(self.horizon, -1)
        return MPCSolution(inputs, problem.predict(u)[best].detach(), certificate, converged)


class _Problem:
    """One solve: a copy of the model in float64, a state, and the box as vectors."""

    def __init__(self, controller: NeuralMPC, x0: Tensor) -> None:
        self.controller = controller
        self.model = copy.deepcopy(controller.model).double().eval().requires_grad_(False)
        self.x0 = x0.detach().double()
        self.lower, self.upper = (
            side.to(x0.device).repeat(controller.horizon) for side in (controller.lower, controller.upper)
        )
        self.P = None if controller.P is None else controller.P.detach().double().to(x0.device)

    def random_starts(self) -> Tensor:
        source = generator(self.controller.seed, "starts")
        shape = (self.controller.starts, len(self.lower))
        shares = torch.rand(shape, generator=source, device=source.device, dtype=torch.float64).to(self.lower.device)
        return self.lower + shares * (self.upper - self.lower)

    def search(self, objective: object, u: Tensor) -> Tensor:
        limits = (self.controller.tol, self.controller.max_iter)
        return spectral_projected_gradient(objective, u, self.lower, self.upper, *limits)  # type: ignore[arg-type]

    def predict(self, u: Tensor) -> Tensor:
        inputs = u.view(len(u), self.controller.horizon, -1)
        state = self.x0.expand(*inputs.shape[:2], -1)
        predicted: Tensor = self.model(torch.cat((state, inputs), -1))
        return predicted

    def objective(self, u: Tensor) -> Tensor:
        return self.predict(u).square().sum((1, 2)) + u.square().sum(1)

    def excess(self, u: Tensor) -> Tensor:
        """Return V / level − 1 at every step; −1 without a level."""
        y = self.predict(u).detach() if not u.requires_grad else self.predict(u)
        if self.P is None:
            return torch.full(y.shape[:2], -1.0, dtype=y.dtype, device=y.device)
        return ((y @ self.P) * y).sum(-1) / float(self.controller.level or 1) - 1

    def squared_excess(self, u: Tensor) -> Tensor:
        return self.excess(u).clamp(min=0).square().sum(1)


class _Augmented:
    """The augmented Lagrangian of the inequalities excess ≤ 0."""

    def __init__(self, problem: _Problem, multipliers: Tensor, weight: float) -> None:
        self.problem, self.multipliers, self.weight = problem, multipliers, weight

    def __call__(self, u: Tensor) -> Tensor:
        shifted = (self.problem.excess(u) + self.multipliers / self.weight).clamp(min=0)
        return self.problem.objective(u) + self.weight / 2 * shifted.square().sum(1)


class _Lagrangian:
    """The objective plus multipliers times the excess."""

    def __init__(self, problem: _Problem, multipliers: Tensor) -> None:
        self.problem, self.multipliers = problem, multipliers

    def __call__(self, u: Tensor) -> Tensor:
        return self.problem.objective(u) + (self.multipliers * self.problem.excess(u)).sum(1)


def _check_bounds(bounds: Tensor) -> None:
    if not isinstance(bounds, Tensor) or not bounds.is_floating_point():
        raise TypeError(f"bounds must be a floating-point tensor, got {bounds!r}")
    if bounds.ndim != 2 or len(bounds) != 2:
        raise ValueError(f"bounds must have shape (2, inputs), got {tuple(bounds.shape)}")
    if not bool(bounds.isfinite().all()) or bool((bounds[0] > bounds[1]).any()):
        raise ValueError(f"bounds must be finite and in order, got {bounds.tolist()}")


def _check_level(P: Tensor | None, level: float | None) -> None:
    if (P is None) != (level is None):
        raise ValueError(f"level and P come together, got level={level!r} and P={P!r}")
    if P is None:
        return
    check_number("level", level, above=0)
    if P.ndim != 2 or P.shape[0] != P.shape[1] or not torch.equal(P, P.mT):
        raise ValueError(f"P must be a symmetric matrix, got shape {tuple(P.shape)}")
    smallest = float(torch.linalg.eigvalsh(P.double()).min())
    if smallest < -1e-12 * float(P.abs().max()):
        raise ValueError(f"P must be positive semidefinite, got the eigenvalue {smallest:.3g}")
