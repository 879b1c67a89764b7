"""Gradient descent for networks some of whose weights are SPD matrices or have orthonormal rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from provenn.core.experiment.checks import check_choice, check_number
from provenn.nn._gbw_batchnorm_spectral import symmetrized

MANIFOLDS = ("euclidean", "spd", "stiefel")


def manifold_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters by their manifold, for :class:`RiemannianSGD`.

    A module names the manifolds of its own parameters in a class attribute ``manifolds``, such as
    ``{"weight": "stiefel"}``; parameters that it does not name are Euclidean.

    Args:
        model: Any module.

    Returns:
        Parameter groups with the keys ``"params"`` and ``"manifold"``; manifolds without parameters are left out.

    Raises:
        ValueError: A module names an unknown manifold.

    Source: the optimizers of the authors' code, which sort by the parameter's class.
    """
    sorted_by: dict[str, list[Tensor]] = {name: [] for name in MANIFOLDS}
    seen: set[int] = set()
    for module in model.modules():
        own: dict[str, str] = getattr(module, "manifolds", {})
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            manifold = own.get(name, "euclidean")
            check_choice(f"manifolds[{name!r}]", manifold, MANIFOLDS)
            sorted_by[manifold].append(parameter)
    return [{"params": params, "manifold": name} for name, params in sorted_by.items() if params]


class RiemannianSGD(torch.optim.Optimizer):
    r"""Gradient descent along the manifolds that the parameters lie on.

    - ``"euclidean"``: :class:`torch.optim.SGD` with momentum and weight decay.
    - ``"spd"``: symmetric positive definite matrices P under the affine-invariant metric. With :math:`\xi =
      -\alpha\, P\, \mathrm{sym}(\nabla) P` the step is :math:`P + \xi + \tfrac12 \xi P^{-1} \xi`,
      which is positive definite for every learning rate.
    - ``"stiefel"``: matrices W of orthonormal rows. With :math:`\xi = -\alpha\,(\nabla - W \nabla^\top W)` the step is
      the orthonormal factor of :math:`W + \xi`, by QR with a positive diagonal.

    Args:
        params: Parameters, or dicts of parameter groups; :func:`manifold_groups` makes them of a model.
        lr: Learning rate α.
        momentum: Decay of the accumulated gradient; of Euclidean parameters alone, as in the authors' code.
        weight_decay: L2 penalty; of Euclidean parameters alone.
        manifold: ``"euclidean"``, ``"spd"`` or ``"stiefel"``; an option of each group.

    Shape:
        Euclidean parameters of any shape; SPD ones (…, n, n); Stiefel ones (…, m, n) with m ≤ n.

    Raises:
        TypeError: An option is no number.
        ValueError: ``lr`` ≤ 0, another option is out of bounds, an unknown ``manifold``, or a parameter of a shape that
            its manifold does not have.
        RuntimeError: A gradient is sparse.

    Cost: per step four products of an SPD parameter, O(n³); two products and a QR factorisation of a Stiefel one,
    O(m² n). State: one tensor a Euclidean parameter with momentum.

    Source: Absil, Mahony & Sepulchre, Optimization Algorithms on Matrix Manifolds (2008), chapter 4; the retraction of
    SPD matrices is the second-order one of geoopt, which the authors' code for skeletons uses.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        manifold: str = "euclidean",
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "manifold": manifold}
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Args:
            param_group: ``"params"``, and options that differ from the defaults.

        Raises:
            TypeError: As the class.
            ValueError: As the class.
        """
        options = {**self.defaults, **param_group}
        _check_options(options)
        params = options["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        super().add_param_group({**param_group, "params": params})
        for param in self.param_groups[-1]["params"]:
            _check_shape(options["manifold"], param)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float] | None = None) -> Tensor | float | None:
        """Take one step.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or ``None`` without one.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if any(param.grad.is_sparse for param in params):
                raise RuntimeError("RiemannianSGD does not support sparse gradients; torch.optim.SGD does")
            if group["manifold"] == "euclidean":
                self._step_euclidean(group, params)
            else:
                move = _spd_step if group["manifold"] == "spd" else _stiefel_step
                for param in params:
                    param.copy_(move(param, param.grad, float(group["lr"])))
        return loss

    def _step_euclidean(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if not params:
            return
        directions: Any = [param.grad for param in params]
        if group["weight_decay"]:
            directions = torch._foreach_add(directions, params, alpha=group["weight_decay"])
        if group["momentum"]:
            directions = [self._accumulated(*pair, group["momentum"]) for pair in zip(params, directions, strict=True)]
        torch._foreach_add_(params, directions, alpha=-group["lr"])

    def _accumulated(self, param: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = gradient.clone()
        else:
            state["momentum_buffer"].mul_(momentum).add_(gradient)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def _spd_step(P: Tensor, gradient: Tensor, lr: float) -> Tensor:
    step = -lr * P @ symmetrized(gradient)  # ξ P^{-1}
    return symmetrized(P + step @ P + 0.5 * step @ step @ P)


def _stiefel_step(W: Tensor, gradient: Tensor, lr: float) -> Tensor:
    moved = W - lr * (gradient - W @ gradient.mT @ W)
    Q, R = torch.linalg.qr(moved.mT)
    signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype)
    orthonormal: Tensor = (Q * signs[..., None, :]).mT
    return orthonormal


def _check_options(options: dict[str, Any]) -> None:
    check_number("lr", options["lr"], above=0)
    check_number("momentum", options["momentum"], at_least=0, below=1)
    check_number("weight_decay", options["weight_decay"], at_least=0)
    check_choice("manifold", options["manifold"], MANIFOLDS)


def _check_shape(manifold: str, param: Tensor) -> None:
    shape = tuple(param.shape)
    if manifold == "spd" and not (len(shape) >= 2 and shape[-1] == shape[-2]):
        raise ValueError(f"params of the manifold 'spd' must be square matrices, got the shape {shape}")
    if manifold == "stiefel" and not (len(shape) >= 2 and shape[-2] <= shape[-1]):
        raise ValueError(f"params of the manifold 'stiefel' must have no more rows than columns, got the shape {shape}")
