"""What the online methods share: parameters as one vector, a domain, checked gradients, and state that travels."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from provenn.core.experiment.checks import check_number, check_one_kind
from provenn.optim._optimistic_omd_domains import Domain, Simplex

STATE: Any = "online"
"""Key of the state in ``optimizer.state``: it belongs to all parameters, not to one."""

_SLACK = 1 + 1e-6
"""How far beyond the stated bound a gradient may be, by rounding."""


class OnlineOptimizer(torch.optim.Optimizer, ABC):
    """An online method over one vector: all parameters, laid end to end.

    ``step`` reads the gradient at the played point and leaves the next played point in the parameters. A parameter
    without gradient counts with zeros; where none has a gradient, nothing happens.

    Args:
        params: Parameters or groups of them, of one real floating-point type on one device.
        domain: Where points are played; ``None``: everywhere.
        diameter: D, the distance of two points at most; ``None``: the domain's.
        lipschitz: G, a bound on the gradients' norm; ``None``: the largest met so far.
        strict: Whether a gradient beyond ``lipschitz`` is an error. Otherwise it warns, once, and G grows.
    """

    points: ClassVar[tuple[str, ...]] = ()
    """Names of the state's points: new coordinates come with the values of the new parameters."""
    directions: ClassVar[tuple[str, ...]] = ()
    """Names of the state's gradients: new coordinates come with zeros."""
    attributes: ClassVar[tuple[str, ...]] = ("domain", "diameter", "lipschitz", "strict")
    """What a copy or a pickle takes along, beside groups and state."""

    def __init__(
        self, params: ParamsT, domain: Domain | None, diameter: float | None, lipschitz: float | None, strict: bool
    ) -> None:
        if domain is not None and not isinstance(domain, Domain):
            raise TypeError(f"domain must be a Ball, Box, Simplex, AffineBall or None, got {domain!r}")
        for name, value in (("diameter", diameter), ("lipschitz", lipschitz)):
            if value is not None:
                check_number(name, value, above=0)
        self.domain, self.lipschitz, self.strict = domain, lipschitz, strict
        super().__init__(params, {})
        size = sum(param.numel() for param in self._params())
        self._check_domain()
        self.diameter = domain.diameter(size) if diameter is None and domain is not None else diameter
        self.state[STATE] = {"steps": 0, "largest": 0.0, "variation": 0.0, "warned": False}
        self.held.update(self._begin(self._start()))

    @abstractmethod
    def _begin(self, start: Tensor) -> dict[str, Any]:
        """Return the state before the first round, given the starting point."""

    @abstractmethod
    def _advance(self, gradient: Tensor) -> Tensor:
        """Return the next played point."""

    @property
    def held(self) -> dict[str, Any]:
        """The state."""
        state: dict[str, Any] = self.state[STATE]
        return state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.attributes}}

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _vector(self, params: Sequence[Tensor]) -> Tensor:
        vector = torch.cat([param.detach().flatten() for param in params])
        return vector.to(torch.promote_types(vector.dtype, torch.float32))

    def _start(self) -> Tensor:
        """Return the starting point; one outside the domain is projected, in the parameters too, with a warning."""
        start = self._vector(self._params())
        if self.domain is None or start.is_meta or not start.numel() or self.domain.contains(start):
            return start
        warnings.warn(f"the starting point is outside {self.domain} and was projected on it", stacklevel=5)
        start = self.domain.project(start)
        self._play(start)
        return start

    def _play(self, point: Tensor) -> None:
        params = self._params()
        if len(params) == 1:
            params[0].detach().copy_(point.view_as(params[0]))
            return
        pieces = point.split([param.numel() for param in params])
        with torch.no_grad():
            torch._foreach_copy_(params, [p.view_as(param) for p, param in zip(pieces, params, strict=True)])

    def _check_domain(self) -> None:
        params = self._params()
        if isinstance(self.domain, Simplex) and len(params) > 1:
            raise TypeError(f"domain must not be a Simplex for several tensors, got {len(params)} of them")
        if self.domain is not None:
            self.domain.check(sum(param.numel() for param in params))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float] | None = None) -> Tensor | float | None:
        """End a round with the gradient at the played point, and play the next point.

        Args:
            closure: Re-evaluates the model and returns the loss; called once.

        Returns:
            The closure's loss, or ``None`` without one.

        Raises:
            RuntimeError: A gradient is sparse.
            ValueError: A gradient is not finite, or, under ``strict``, longer than ``lipschitz``; nothing changes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = self._params()
        if any(param.grad is not None for param in params):
            self._play(self._advance(self._gradient(params)))
        return loss

    def _gradient(self, params: Sequence[Tensor]) -> Tensor:
        pieces = []
        for param in params:
            grad = param.grad
            if grad is not None and grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients: projections are dense")
            pieces.append((torch.zeros_like(param) if grad is None else grad).flatten())
        vector = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        # Copied: the gradient is remembered, and its tensor may be zeroed in place.
        return vector.to(torch.promote_types(vector.dtype, torch.float32), copy=True)

    def _meet(self, norm: float) -> None:
        """Check a gradient's norm before anything changes, and remember the largest."""
        if not math.isfinite(norm):
            raise ValueError(f"gradient must be finite, got one of norm {norm}")
        held = self.held
        if self.lipschitz is not None and norm > self.lipschitz * _SLACK:
            words = f"lipschitz is {self.lipschitz}, but a gradient has norm {norm:.6g}"
            if self.strict:
                raise ValueError(words)
            if not held["warned"]:
                warnings.warn(f"{words}; the larger one counts from here on", stacklevel=5)
                held["warned"] = True
        held["largest"] = max(held["largest"], norm)

    def _bound(self) -> float:
        """Return G: the stated bound, or what gradients have shown it to be."""
        largest: float = self.held["largest"]
        return largest if self.lipschitz is None else max(self.lipschitz, largest)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters: they start where they are, with zeros as their past gradients.

        Args:
            param_group: Parameters.

        Raises:
            ValueError: Parameters are on several devices, or the domain is of another size.
            TypeError: Parameters differ in type, or are complex or integer; or the domain is a simplex.
        """
        super().add_param_group(param_group)
        started = STATE in self.state  # the constructor adds its groups one by one, and then makes the state
        try:
            check_one_kind("params", self._params())
            if started:
                self._check_domain()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if started:
            self._widen(self._vector(self.param_groups[-1]["params"]))

    def _widen(self, added: Tensor) -> None:
        held = self.held
        for name in self.points + self.directions:
            more = added if name in self.points else torch.zeros_like(added)
            old = held[name]
            held[name] = torch.cat([old, more.expand(*old.shape[:-1], -1)], dim=-1)
        if self.domain is not None:
            for name in self.points:
                held[name] = self.domain.project(held[name])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another optimizer of the same kind was.

        Args:
            state_dict: What its ``state_dict`` returned; copied.

        Raises:
            ValueError: It is of another optimizer, or of parameters of another size.
        """
        found, held = state_dict["state"].get(STATE), self.held
        if found is None or not held.keys() <= found.keys():
            raise ValueError(f"state_dict must be of a {type(self).__name__}, got the state {found}")
        for name in self.points + self.directions:
            if found[name].shape[-1] != held[name].shape[-1]:
                raise ValueError(
                    f"state_dict must be of {held[name].shape[-1]} entries of parameters, got {found[name].shape[-1]}"
                )
        device = self._params()[0].device
        copied = {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in found.items()}
        super().load_state_dict({**state_dict, "state": {**state_dict["state"], STATE: copied}})
