"""Optimistic online mirror descent between stochastic and adversarial online convex optimization.

Chen, Tu, Zhao, Zhang, ICML 2023 and JMLR 2024. https://arxiv.org/abs/2302.04552

A round plays x_t, meets f_t and corrects a carried state x̂ by its gradient g_t; the next point adds a step along a
guess M_{t+1} of the next gradient, the last one:

    x̂_{t+1} = argmin_{x∈𝒳} ⟨g_t, x⟩ + D_{ψ_t}(x, x̂_t)
    x_{t+1} = argmin_{x∈𝒳} ⟨M_{t+1}, x⟩ + D_{ψ_{t+1}}(x, x̂_{t+1}),    M_{t+1} = g_t

With f_t drawn around F_t = E f_t, σ²_{1:T} the gradients' variance and Σ²_{1:T} the drift of ∇F_t, summed over the
rounds, the expected regret is O(√σ²_{1:T} + √Σ²_{1:T}): √T for independent draws, the gradients' variation for an
adversary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.optimizer import ParamsT

from provenn.core.experiment.checks import check_choice, check_number
from provenn.optim._optimistic_omd_base import OnlineOptimizer
from provenn.optim._optimistic_omd_baselines import (
    FTRL,
    AdaGradNorm,
    OnlineGradientDescent,
    OptimisticFTRL,
    PastGradient,
)
from provenn.optim._optimistic_omd_domains import AffineBall, Ball, Box, Domain, Simplex
from provenn.optim._optimistic_omd_dynamic import DynamicOptimisticOMD
from provenn.optim._optimistic_omd_projections import project_ball, project_box, project_simplex
from provenn.optim._optimistic_omd_report import SEAReport, sea_report
from provenn.optim._optimistic_omd_stream import SEAStream, Trajectory

__all__ = [
    "FTRL",
    "AdaGradNorm",
    "AffineBall",
    "Ball",
    "Box",
    "DynamicOptimisticOMD",
    "OnlineGradientDescent",
    "OptimisticFTRL",
    "OptimisticOMD",
    "PastGradient",
    "SEAReport",
    "SEAStream",
    "Simplex",
    "Trajectory",
    "project_ball",
    "project_box",
    "project_simplex",
    "sea_report",
]

_TINY = 1e-300
"""Keeps step sizes finite before any gradient was met."""


class OptimisticOMD(OnlineOptimizer):
    r"""Two mirror steps a round: one from the carried state by the gradient met, one on from it by a guess of the next.

    ``step`` takes the gradient at the played point, which the parameters hold, and leaves the next played point there:
    one gradient a round, never at the carried state. All parameters are one vector.

    ====================  =====================================================================================
    ``mode``              regularizer ψ_t
    ====================  =====================================================================================
    ``convex``            ‖x‖²/(2η_t), η_t = D/√(10 D²L² + 4G² + V_{t−1}), V_{t−1} = Σ_{s<t} ‖g_s − M_s‖², g_0 = 0
    ``strongly-convex``   ‖x‖²/(2η_t), η_t = 2/(λt)
    ``exp-concave``       ½‖x‖² in H_t = (1 + βG²/2) I + (β/2) Σ_{s<t} g_s g_sᵀ, β = ½ min{1/(4GD), α}
    ====================  =====================================================================================

    Both steps of round t use ψ_t: its correction V_{t−1}, the next play V_t. The expected regret against any fixed
    point is at most 5√10 D²L + (5√5/2) DG + 5√2 D√σ²_{1:T} + 5 D√Σ²_{1:T} in ``convex``, where only the expected
    losses need be convex; it is of order (σ²_max + Σ²_max)/λ times a logarithm in ``strongly-convex``, and of order
    (d/α) log(σ²_{1:T} + Σ²_{1:T}) in ``exp-concave``; see :func:`sea_report`.

    Args:
        params: Parameters or groups of them, of one real floating-point type on one device.
        domain: 𝒳; ``None``: all of ℝ^d. A starting point outside is projected, with a warning.
        mode: What is known of the losses.
        diameter: D; ``None``: the domain's, as long as the geometry measures it.
        lipschitz: G, in the norm dual to the geometry's; ``None``: the largest gradient met so far, this round's
            included.
        smoothness: L, of the expected losses.
        strong_convexity: λ of ``strongly-convex``.
        alpha: α of ``exp-concave``.
        geometry: ``"entropy"`` replaces ‖x‖²/2 by Σ x log x on a :class:`Simplex`: steps are multiplicative, gradients
            are measured by their largest entry, and D is √(2 log d).
        metric: Replaces ‖x‖²/2 by ½xᵀHx: a diagonal (d,) or a matrix (d, d). ``None``: the identity.
        optimism: ``"none"`` guesses zero: plain online mirror descent.
        eta: Keeps η_t at this value.
        strict: Whether a gradient beyond ``lipschitz`` raises. Otherwise it warns, once, and counts as G from there.

    Shape:
        Parameters of any shape; a simplex takes a single tensor.

    Raises:
        ValueError: An option out of bounds; no ``diameter`` where the domain has none and the mode needs it; no
            ``strong_convexity``, or no ``alpha`` or ``lipschitz``, in the mode that needs it; a domain or metric of
            another size; ``geometry="entropy"`` without a simplex, or together with a metric.
        TypeError: An option of the wrong type, parameters that are complex or differ in type, or a simplex over
            several tensors.
        RuntimeError: A gradient is sparse.

    Cost: two projections and a few passes a step, O(d); state 2d numbers. ``exp-concave`` keeps H and its inverse,
    2d² numbers, by rank-one updates, O(d²) a step, and O(d³) where a projection moves the point.

    Source: arXiv 2302.04552, optimistic OMD and its three theorems. No code is public, and the paper's text was
    not at hand: the constants of the bounds are derived anew along the proofs.
    """

    points = ("carried",)
    directions = ("guess",)
    attributes = (
        *OnlineOptimizer.attributes,
        *("mode", "smoothness", "strong_convexity", "alpha", "geometry", "metric", "optimism", "eta"),
    )

    def __init__(
        self,
        params: ParamsT,
        domain: Domain | None = None,
        mode: str = "convex",
        diameter: float | None = None,
        lipschitz: float | None = None,
        smoothness: float = 0.0,
        strong_convexity: float | None = None,
        alpha: float | None = None,
        geometry: str = "euclidean",
        metric: Float[Tensor, " d"] | Float[Tensor, "d d"] | None = None,
        optimism: str = "last",
        eta: float | None = None,
        strict: bool = False,
    ) -> None:
        check_choice("mode", mode, ("convex", "strongly-convex", "exp-concave"))
        check_choice("geometry", geometry, ("euclidean", "entropy"))
        check_choice("optimism", optimism, ("last", "none"))
        check_number("smoothness", smoothness, at_least=0)
        for name, value in (("strong_convexity", strong_convexity), ("alpha", alpha), ("eta", eta)):
            if value is not None:
                check_number(name, value, above=0)
        self.mode, self.smoothness, self.strong_convexity, self.alpha = mode, smoothness, strong_convexity, alpha
        self.geometry, self.metric, self.optimism, self.eta = geometry, metric, optimism, eta
        if geometry == "entropy" and (not isinstance(domain, Simplex) or metric is not None or mode == "exp-concave"):
            raise ValueError(f"geometry 'entropy' needs a Simplex, no metric, and a mode with η, got {domain}, {mode}")
        if mode == "exp-concave" and (metric is not None or eta is not None):
            raise ValueError(f"mode 'exp-concave' makes its own metric, got metric={metric!r}, eta={eta!r}")
        super().__init__(params, domain, diameter, lipschitz, strict)
        self._check_needs()
        if diameter is None and domain is not None:
            self.diameter = self._measured(self.diameter)

    def _check_domain(self) -> None:
        super()._check_domain()
        size = sum(param.numel() for param in self._params())
        if self.metric is not None and self.metric.shape not in ((size,), (size, size)):
            shape = tuple(self.metric.shape)
            raise ValueError(f"metric must have the shape ({size},) or ({size}, {size}), got {shape}")

    def _check_needs(self) -> None:
        needs = {
            "convex": {} if self.eta else {"diameter": self.diameter},
            "strongly-convex": {"strong_convexity": self.strong_convexity},
            "exp-concave": {"diameter": self.diameter, "alpha": self.alpha, "lipschitz": self.lipschitz},
        }
        for name, value in needs[self.mode].items():
            if value is None:
                raise ValueError(f"{name} must be given in mode {self.mode!r} with domain {self.domain}, got None")

    def _measured(self, diameter: float | None) -> float | None:
        """Return the domain's Euclidean diameter in the norm of the geometry."""
        if diameter is None:
            return None
        if self.geometry == "entropy":
            return math.sqrt(2 * math.log(max(2, self.held["carried"].numel())))
        if self.metric is None:
            return diameter
        largest = self.metric.max() if self.metric.dim() == 1 else torch.linalg.eigvalsh(self.metric)[-1]
        return diameter * math.sqrt(float(largest))

    def _begin(self, start: Tensor) -> dict[str, Any]:
        size = start.numel()
        if self.metric is not None:
            self.metric = self.metric.to(start)
        if self.geometry == "entropy":
            # In the mirror's coordinates nothing is lost where an entry is too small for x itself.
            start = (start.clamp(min=torch.finfo(start.dtype).eps)).log().log_softmax(-1)
        held: dict[str, Any] = {"carried": start, "guess": torch.zeros_like(start)}
        if self.mode == "exp-concave":
            self._check_needs()
            ridge = 1 + self._beta() * float(self.lipschitz or 0) ** 2 / 2
            eye = torch.eye(size, dtype=start.dtype, device=start.device)
            held |= {"H": ridge * eye, "inverse": eye / ridge}
        return held

    def _beta(self) -> float:
        assert self.lipschitz is not None
        assert self.diameter is not None
        assert self.alpha is not None
        return min(1 / (4 * self.lipschitz * self.diameter), self.alpha) / 2

    def _eta(self, round_: int) -> float:
        """Return η of a round, given the variation before it."""
        if self.eta is not None:
            return self.eta
        if self.mode == "strongly-convex":
            assert self.strong_convexity is not None
            return 2 / (self.strong_convexity * round_)
        assert self.diameter is not None
        delta = 10 * (self.diameter * self.smoothness) ** 2
        return self.diameter / math.sqrt(max(delta + 4 * self._bound() ** 2 + self.held["variation"], _TINY))

    def _dual_squares(self, *directions: Tensor) -> list[float]:
        """Return squared norms, in the dual of the geometry's norm, with one wait for the device."""
        stacked = torch.stack(directions)
        if self.geometry == "entropy":
            squares = stacked.abs().amax(-1).square() if stacked.shape[-1] else stacked.sum(-1)
        elif self.metric is None:
            squares = stacked.square().sum(-1)
        else:
            squares = (stacked * self._raised(stacked)).sum(-1)
        found: list[float] = squares.tolist()
        return found

    def _raised(self, direction: Tensor) -> Tensor:
        """Return H⁻¹ times directions, in the fixed metric."""
        assert self.metric is not None
        if self.metric.dim() == 1:
            return direction / self.metric
        return torch.linalg.solve(self.metric, direction.unsqueeze(-1)).squeeze(-1)

    def _move(self, direction: Tensor, round_: int) -> Tensor:
        """Return a mirror step from the carried state, in the round's regularizer."""
        carried = self.held["carried"]
        if self.mode == "exp-concave":
            point, metric = carried - self.held["inverse"] @ direction, self.held["H"]
        elif self.geometry == "entropy":
            return (carried - self._eta(round_) * direction).log_softmax(-1)
        else:
            metric = self.metric
            raised = direction if metric is None else self._raised(direction)
            point = torch.add(carried, raised, alpha=-self._eta(round_))
        return point if self.domain is None else self.domain.project(point, metric)

    def _point(self, mirrored: Tensor) -> Tensor:
        if self.geometry == "entropy":
            assert isinstance(self.domain, Simplex)
            return mirrored.exp() * self.domain.total
        return mirrored

    def _advance(self, gradient: Tensor) -> Tensor:
        held = self.held
        square, wrong = self._dual_squares(gradient, gradient - held["guess"])
        self._meet(math.sqrt(square) if square >= 0 else square)
        held["steps"] += 1
        held["carried"] = self._move(gradient, held["steps"])
        held["variation"] += wrong
        if self.mode == "exp-concave":
            self._sharpen(gradient)
        if self.optimism == "none":
            return self._point(held["carried"])
        return self._guess(gradient)

    def _guess(self, guess: Tensor) -> Tensor:
        self.held["guess"] = guess
        return self._point(self._move(guess, self.held["steps"] + 1))

    def _sharpen(self, gradient: Tensor) -> None:
        """Add (β/2) g gᵀ to H, and its effect to the inverse by Sherman and Morrison's formula."""
        held, half = self.held, self._beta() / 2
        raised = held["inverse"] @ gradient
        held["H"].addr_(gradient, gradient, alpha=half)
        held["inverse"].sub_(torch.outer(raised, raised) * (half / (1 + half * (gradient @ raised))))

    @torch.no_grad()
    def predict(self, guess: Sequence[Tensor]) -> None:
        """Play the coming round by another guess of its gradient than the last one.

        The carried state stays; the played point, in the parameters, is formed anew. Call it before the gradient is
        taken, as often as wanted.

        Args:
            guess: M, one tensor a parameter.

        Shape:
            As the parameters.

        Raises:
            ValueError: The tensors do not fit the parameters, or one is not finite.

        Cost: one projection.
        """
        params = self._params()
        if [one.shape for one in guess] != [param.shape for param in params]:
            raise ValueError(f"guess must have the parameters' shapes, got {[tuple(one.shape) for one in guess]}")
        vector = self._vector(list(guess))
        if not bool(vector.isfinite().all()):
            raise ValueError("guess must be finite, got one that is not")
        self._play(self._guess(vector.clone()))

    def _widen(self, added: Tensor) -> None:
        super()._widen(added)
        if self.mode == "exp-concave":
            held, ridge = self.held, 1 + self._beta() * float(self.lipschitz or 0) ** 2 / 2
            for name, value in (("H", ridge), ("inverse", 1 / ridge)):
                more = torch.eye(len(added), dtype=added.dtype, device=added.device) * value
                held[name] = torch.block_diag(held[name], more)
