"""What optimistic mirror descent is compared with, for the same domains and gradients."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from provenn.core.experiment.checks import check_number
from provenn.optim._optimistic_omd_base import OnlineOptimizer
from provenn.optim._optimistic_omd_domains import Domain

_TINY = 1e-300


class _Baseline(OnlineOptimizer):
    """A method of one Euclidean step a round, from a point that its subclass names."""

    points = ("point",)
    directions = ("last",)
    attributes = (*OnlineOptimizer.attributes, "smoothness", "strong_convexity")

    def __init__(
        self,
        params: ParamsT,
        domain: Domain | None = None,
        diameter: float | None = None,
        lipschitz: float | None = None,
        smoothness: float = 0.0,
        strong_convexity: float | None = None,
        strict: bool = False,
    ) -> None:
        check_number("smoothness", smoothness, at_least=0)
        if strong_convexity is not None:
            check_number("strong_convexity", strong_convexity, above=0)
        elif domain is None and diameter is None:
            raise ValueError("diameter must be given where there is no domain, got None")
        self.smoothness, self.strong_convexity = smoothness, strong_convexity
        super().__init__(params, domain, diameter, lipschitz, strict)

    def _begin(self, start: Tensor) -> dict[str, Any]:
        held = {name: start.clone() for name in self.points}
        return held | {name: torch.zeros_like(start) for name in self.directions}

    def _advance(self, gradient: Tensor) -> Tensor:
        held = self.held
        square, wrong = torch.stack([gradient, gradient - held["last"]]).square().sum(-1).tolist()
        self._meet(math.sqrt(square))
        held["steps"] += 1
        point = self._next(gradient, square, wrong)
        held["last"] = gradient
        held["point"] = point if self.domain is None else self.domain.project(point)
        played: Tensor = held["point"]
        return played

    @abstractmethod
    def _next(self, gradient: Tensor, square: float, wrong: float) -> Tensor:
        """Return the next point before projection, given ‖g_t‖² and ‖g_t − g_{t−1}‖²."""

    def _over_root(self, amount: float) -> float:
        return float(self.diameter or 0.0) / math.sqrt(max(amount, _TINY))

    def _delta(self) -> float:
        return 10 * (float(self.diameter or 0.0) * self.smoothness) ** 2


class OnlineGradientDescent(_Baseline):
    """Projected gradient steps of length D/(G√t), or 1/(λt) for strongly convex losses.

    Args:
        params: Parameters or groups of them.
        domain: Where points are played; ``None``: everywhere.
        diameter: D; ``None``: the domain's.
        lipschitz: G; ``None``: the largest gradient met so far.
        strong_convexity: λ; ``None``: losses are convex.
        strict: Whether a gradient beyond ``lipschitz`` raises instead of warning once.

    Shape:
        Parameters of any shape; a simplex takes a single tensor.

    Raises:
        ValueError: An option out of bounds, or no ``diameter`` where it is needed.
        TypeError: An option of the wrong type.
        RuntimeError: A gradient is sparse.

    Cost: one projection a step; state 2d numbers.

    Source: Zinkevich, 2003; Hazan, Agarwal & Kale, 2007, for 1/(λt).
    """

    def __init__(
        self,
        params: ParamsT,
        domain: Domain | None = None,
        diameter: float | None = None,
        lipschitz: float | None = None,
        strong_convexity: float | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(params, domain, diameter, lipschitz, 0.0, strong_convexity, strict)

    def _next(self, gradient: Tensor, square: float, wrong: float) -> Tensor:
        held = self.held
        rate = self._over_root(self._bound() ** 2 * held["steps"])
        if self.strong_convexity is not None:
            rate = 1 / (self.strong_convexity * held["steps"])
        return torch.add(held["point"], gradient, alpha=-rate)


class AdaGradNorm(_Baseline):
    """Projected gradient steps of length D/√(2 Σ_{s≤t} ‖g_s‖²).

    Args:
        params: Parameters or groups of them.
        domain: Where points are played; ``None``: everywhere.
        diameter: D; ``None``: the domain's.
        lipschitz: G, checked only.
        strict: Whether a gradient beyond ``lipschitz`` raises instead of warning once.

    Shape:
        Parameters of any shape; a simplex takes a single tensor.

    Raises:
        ValueError: An option out of bounds, or no ``diameter`` where it is needed.
        TypeError: An option of the wrong type.
        RuntimeError: A gradient is sparse.

    Cost: one projection a step; state 2d numbers.

    Source: Streeter & McMahan, arXiv 1002.4862.
    """

    def __init__(
        self,
        params: ParamsT,
        domain: Domain | None = None,
        diameter: float | None = None,
        lipschitz: float | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(params, domain, diameter, lipschitz, strict=strict)

    def _next(self, gradient: Tensor, square: float, wrong: float) -> Tensor:
        held = self.held
        held["variation"] += square
        return torch.add(held["point"], gradient, alpha=-self._over_root(2 * held["variation"]))


class PastGradient(_Baseline):
    """The optimistic method of a single sequence, x_{t+1} = Π(x_t − η_t (2g_t − g_{t−1})).

    It has no carried state: beside a boundary it is another algorithm than the two-step one, with the same η_t.

    Args:
        params: Parameters or groups of them.
        domain: Where points are played; ``None``: everywhere.
        diameter: D; ``None``: the domain's.
        lipschitz: G; ``None``: the largest gradient met so far.
        smoothness: L.
        strict: Whether a gradient beyond ``lipschitz`` raises instead of warning once.

    Shape:
        Parameters of any shape; a simplex takes a single tensor.

    Raises:
        ValueError: An option out of bounds, or no ``diameter`` where it is needed.
        TypeError: An option of the wrong type.
        RuntimeError: A gradient is sparse.

    Cost: one projection a step; state 2d numbers.

    Source: Popov, 1980; Joulani, György & Szepesvári, 2017, for the single sequence.
    """

    def __init__(
        self,
        params: ParamsT,
        domain: Domain | None = None,
        diameter: float | None = None,
        lipschitz: float | None = None,
        smoothness: float = 0.0,
        strict: bool = False,
    ) -> None:
        super().__init__(params, domain, diameter, lipschitz, smoothness, strict=strict)

    def _next(self, gradient: Tensor, square: float, wrong: float) -> Tensor:
        held = self.held
        held["variation"] += wrong
        rate = self._over_root(self._delta() + 4 * self._bound() ** 2 + held["variation"])
        return torch.add(held["point"], 2 * gradient - held["last"], alpha=-rate)


class _Leader(_Baseline):
    """A method that plays the minimizer of all gradients so far and a regularizer around an anchor."""

    points = ("point", "anchor")
    directions = ("last", "total")

    def _lead(self, gradient: Tensor, guess: Tensor | None) -> Tensor:
        held = self.held
        held["total"] = held["total"] + gradient
        total = held["total"] if guess is None else held["total"] + guess
        if self.strong_convexity is None:
            rate = self._over_root(self._delta() + 4 * self._bound() ** 2 + held["variation"])
        else:
            # The anchor is then the mean of the points played.
            held["anchor"] = torch.lerp(held["anchor"], held["point"], 1 / held["steps"])
            rate = 1 / (self.strong_convexity * held["steps"])
        return torch.add(held["anchor"], total, alpha=-rate)


class FTRL(_Leader):
    """Follow the regularized leader, x_{t+1} = argmin Σ_{s≤t} ⟨g_s, x⟩ + ‖x − x_1‖²/(2η_{t+1}).

    η_{t+1} = D/√(4G² + Σ_{s≤t} ‖g_s‖²). For strongly convex losses the regularizer is (λ/2) Σ_{s≤t} ‖x − x_s‖².

    Args:
        params: Parameters or groups of them.
        domain: Where points are played; ``None``: everywhere.
        diameter: D; ``None``: the domain's.
        lipschitz: G; ``None``: the largest gradient met so far.
        strong_convexity: λ; ``None``: losses are convex.
        strict: Whether a gradient beyond ``lipschitz`` raises instead of warning once.

    Shape:
        Parameters of any shape; a simplex takes a single tensor.

    Raises:
        ValueError: An option out of bounds, or no ``diameter`` where it is needed.
        TypeError: An option of the wrong type.
        RuntimeError: A gradient is sparse.

    Cost: one projection a step; state 4d numbers.

    Source: McMahan, arXiv 1403.3465.
    """

    def __init__(
        self,
        params: ParamsT,
        domain: Domain | None = None,
        diameter: float | None = None,
        lipschitz: float | None = None,
        strong_convexity: float | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(params, domain, diameter, lipschitz, 0.0, strong_convexity, strict)

    def _next(self, gradient: Tensor, square: float, wrong: float) -> Tensor:
        self.held["variation"] += square
        return self._lead(gradient, None)


class OptimisticFTRL(_Leader):
    """Follow the regularized leader with the last gradient counted once more, as a guess of the next.

    η_{t+1} = D/√(10 D²L² + 4G² + Σ_{s≤t} ‖g_s − g_{s−1}‖²). For strongly convex losses the regularizer is that of
    :class:`FTRL`.

    Args:
        params: Parameters or groups of them.
        domain: Where points are played; ``None``: everywhere.
        diameter: D; ``None``: the domain's.
        lipschitz: G; ``None``: the largest gradient met so far.
        smoothness: L.
        strong_convexity: λ; ``None``: losses are convex.
        strict: Whether a gradient beyond ``lipschitz`` raises instead of warning once.

    Shape:
        Parameters of any shape; a simplex takes a single tensor.

    Raises:
        ValueError: An option out of bounds, or no ``diameter`` where it is needed.
        TypeError: An option of the wrong type.
        RuntimeError: A gradient is sparse.

    Cost: one projection a step; state 4d numbers.

    Source: Sachs, Hadiji, van Erven & Guzmán, arXiv 2202.07554, who bridge the two worlds by it; its step size here
    is that of :class:`OptimisticOMD`.
    """

    def __init__(
        self,
        params: ParamsT,
        domain: Domain | None = None,
        diameter: float | None = None,
        lipschitz: float | None = None,
        smoothness: float = 0.0,
        strong_convexity: float | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(params, domain, diameter, lipschitz, smoothness, strong_convexity, strict)

    def _next(self, gradient: Tensor, square: float, wrong: float) -> Tensor:
        self.held["variation"] += wrong
        return self._lead(gradient, gradient)
