"""M-FAC: Efficient Matrix-Free Approximations of Second-Order Information.

Frantar, Kurtic, Alistarh, NeurIPS 2021. https://arxiv.org/abs/2107.03356

Products with the inverse of the damped empirical Fisher matrix of m gradients of length d, in O(m d) memory:

    F = λI + (1/m) Σᵢ gᵢ gᵢᵀ,    θ ← θ − η F⁻¹ g

The static algorithm works on a fixed set of gradients and serves pruning; the dynamic one works on the last m
gradients and serves training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from provenn.core.experiment.checks import check_integer, check_number, check_one_kind
from provenn.optim._m_fac_dynamic import DynamicInverseFisher
from provenn.optim._m_fac_pruner import MFACPruner
from provenn.optim._m_fac_schedule import GradualSchedule
from provenn.optim._m_fac_static import StaticInverseFisher

__all__ = ["MFAC", "DynamicInverseFisher", "GradualSchedule", "MFACPruner", "StaticInverseFisher"]

_STATE: Any = "m_fac"
"""Key of the window in ``optimizer.state``: it belongs to all parameters, not to one."""


class MFAC(torch.optim.Optimizer):
    r"""Gradient descent preconditioned by the inverse Fisher matrix of the last m gradients.

    .. math::
        g \leftarrow \nabla + \text{wd}\,\theta, \quad u = F^{-1} g, \quad
        v \leftarrow \mu v + (1 - \mu) u, \quad \theta \leftarrow \theta - \eta v

    The window already holds g when u is formed. One F spans all parameters of all groups. A parameter without gradient
    stays where it is and counts with zeros; where none has a gradient, nothing happens. A gradient that is not finite
    is refused before anything changes.

    Args:
        params: Parameters or groups of them, all of one real floating-point type. Groups may have their own ``lr``,
            ``momentum``, ``weight_decay`` and ``maximize``.
        lr: η, the step size.
        momentum: μ. The paper trains without and with 0.9.
        weight_decay: Added to the gradient as this multiple of the parameter, and so preconditioned with it.
        num_grads: m, the length of the window; rows that are not filled yet count as zero gradients. The paper's
            ResNet-20 runs take 512.
        damping: λ.
        sparse: Keep weights that are exactly 0 at construction at 0, and leave them out of d.
        maximize: Ascend instead.

    Shape:
        Parameters of any shape.

    Raises:
        ValueError: ``lr``, ``weight_decay`` < 0, ``momentum`` outside [0, 1), ``num_grads`` < 1, ``damping`` ≤ 0,
            parameters on several devices, none with an element that is trained, or a gradient that is not finite.
        TypeError: Parameters differ in type, or are complex or integer.
        RuntimeError: A gradient is sparse.

    Cost: a step reads the window twice and takes O(m d + m³) operations. The state is m·d numbers of the parameters'
    type (float32 for bfloat16 and float16), m² of float64 (and as many of their factor, which is not part of the
    state), d more with momentum. The window is allocated at construction, where the parameters are then.

    Source: the paper's section on optimization; defaults as in the authors' code.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        num_grads: int = 1024,
        damping: float = 1e-5,
        sparse: bool = False,
        maximize: bool = False,
    ) -> None:
        check_integer("num_grads", num_grads, at_least=1)
        check_number("damping", damping, above=0)
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize}
        _check_options(options)
        super().__init__(params, options)
        first = self._params()[0]
        kept = _nonzero(self._params()) if sparse else None
        dim = sum(param.numel() for param in self._params()) if kept is None else int(kept.sum())
        if dim == 0:
            raise ValueError(f"params must have at least one element to train, got {len(self._params())} without")
        dtype = torch.promote_types(first.dtype, torch.float32)
        self._fisher = DynamicInverseFisher(num_grads, dim, damping, dtype=dtype, device=first.device)
        self._keep(velocity=None, kept=kept)

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _keep(self, velocity: Tensor | None, kept: Tensor | None) -> None:
        """Let ``state`` hold the live tensors, so that copies, pickles and ``state_dict`` take them along."""
        self.state[_STATE] = {**self._fisher.state_dict(), "velocity": velocity, "kept": kept}
        self._places = None if kept is None else kept.nonzero().squeeze(1)
        sizes = [sum(param.numel() for param in group["params"]) for group in self.param_groups]
        if kept is not None:
            sizes = [int(piece.sum()) for piece in kept.split(sizes)]
        self._group_sizes = sizes

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        held = self.state[_STATE]
        self._fisher = DynamicInverseFisher(1, 1, held["damping"], dtype=held["grads"].dtype)
        self._fisher.adopt(held)
        self._keep(held["velocity"], held["kept"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another MFAC was: its window, momentum, frozen weights and options are taken over.

        Args:
            state_dict: What ``state_dict`` of another MFAC returned; copied.

        Raises:
            ValueError: It is of another optimizer, or of parameters of other sizes.
        """
        held = state_dict["state"].get(_STATE)
        if held is None:
            raise ValueError(f"state_dict must be MFAC's, with the state {_STATE!r}, got {list(state_dict['state'])}")
        elements = sum(param.numel() for param in self._params())
        found = held["grads"].shape[1] if held["kept"] is None else len(held["kept"])
        if found != elements:
            raise ValueError(f"state_dict must be of {elements} elements of parameters, got {found}")
        device = self._fisher.grads.device
        copied = {
            name: value.to("cpu" if name == "next" else device, copy=True) if isinstance(value, Tensor) else value
            for name, value in held.items()
        }
        super().load_state_dict({**state_dict, "state": {**state_dict["state"], _STATE: copied}})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; in the gradients of the window they count with zeros.

        Args:
            param_group: Parameters and their options.

        Raises:
            ValueError: As at construction.
            TypeError: As at construction.
        """
        super().add_param_group(param_group)
        try:
            _check_options(self.param_groups[-1])
            check_one_kind("params", self._params())
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if _STATE not in self.state:  # the constructor adds its groups one by one, and then makes the window
            return
        added, held = self.param_groups[-1]["params"], self.state[_STATE]
        more = sum(param.numel() for param in added)
        kept, velocity = held["kept"], held["velocity"]
        if kept is not None:
            fresh = _nonzero(added).to(kept.device)
            kept, more = torch.cat([kept, fresh]), int(fresh.sum())
        if velocity is not None:
            velocity = torch.cat([velocity, velocity.new_zeros(more)])
        self._fisher.widen(more)
        self._keep(velocity, kept)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float] | None = None) -> Tensor | float | None:
        """Take one step.

        Args:
            closure: Re-evaluates the model and returns the loss; called once.

        Returns:
            The closure's loss, or ``None`` without one.

        Raises:
            RuntimeError: A gradient is sparse.
            ValueError: A gradient is not finite; parameters and window stay as they are.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if all(param.grad is None for param in self._params()):
            return loss
        gradient = torch.cat([piece for group in self.param_groups for piece in _gradients(group)])
        if self._places is not None:
            gradient = gradient[self._places]
        update = self._averaged(self._fisher.update_mul(gradient))
        if self._places is not None:
            update = update.new_zeros(len(self.state[_STATE]["kept"])).index_copy_(0, self._places, update)
        pieces = iter(update.split([param.numel() for param in self._params()]))
        for group in self.param_groups:
            _descend(group, pieces)
        return loss

    def _averaged(self, update: Tensor) -> Tensor:
        """Return the velocity after an update, where any group has momentum."""
        held = self.state[_STATE]
        if held["velocity"] is None:
            if not any(group["momentum"] for group in self.param_groups):
                return update
            held["velocity"] = torch.zeros_like(update)
        velocity: Tensor = held["velocity"]
        pieces = zip(velocity.split(self._group_sizes), update.split(self._group_sizes), strict=True)
        for group, (old, new) in zip(self.param_groups, pieces, strict=True):
            old.mul_(group["momentum"]).add_(new, alpha=1 - group["momentum"])
        return velocity


def _gradients(group: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the flat gradients of a group, with weight decay, and zeros where there are none."""
    for param in group["params"]:
        grad = param.grad
        if grad is None:
            yield torch.zeros_like(param).flatten()
            continue
        if grad.is_sparse:
            raise RuntimeError("MFAC does not support sparse gradients: the window holds dense ones")
        grad = -grad if group["maximize"] else grad
        yield (grad.add(param, alpha=group["weight_decay"]) if group["weight_decay"] else grad).flatten()


def _descend(group: dict[str, Any], pieces: Iterator[Tensor]) -> None:
    """Step along the next pieces of the update, one a parameter of the group."""
    pairs = [(param, piece) for param, piece in zip(group["params"], pieces, strict=False) if param.grad is not None]
    if pairs:
        updates = [piece.view_as(param).to(param.device) for param, piece in pairs]
        torch._foreach_add_([param for param, _ in pairs], updates, alpha=-float(group["lr"]))


def _nonzero(params: list[Tensor]) -> Tensor:
    return torch.cat([param.detach().flatten() != 0 for param in params])


def _check_options(options: dict[str, Any]) -> None:
    check_number("lr", float(options["lr"]) if isinstance(options["lr"], Tensor) else options["lr"], at_least=0)
    check_number("momentum", options["momentum"], at_least=0, below=1)
    check_number("weight_decay", options["weight_decay"], at_least=0)
