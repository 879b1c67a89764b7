"""diffGrad: An Optimization Method for Convolutional Neural Networks.

Dubey, Chakraborty, Roy, Mukherjee, Singh, Chaudhuri, IEEE TNNLS 31(11), 2020. https://arxiv.org/abs/1909.11015

Adam whose step is damped, element by element, where the gradient has stopped changing:

    ξ_t = 1 / (1 + exp(−|g_{t−1} − g_t|)),    θ_t = θ_{t−1} − α · ξ_t · m̂_t / (√v̂_t + ε)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from provenn.core.experiment.checks import check_choice, check_number
from provenn.core.numerics.foreach import foreach_pays, same_kind

__all__ = ["DiffGrad"]

FRICTIONS = ("difference", "signed", "wide", "aliased")


class DiffGrad(torch.optim.Optimizer):
    r"""Adam with a friction coefficient that shortens the step where the gradient has stopped changing.

    With :math:`m, v` Adam's moments, bias-corrected to :math:`\hat m, \hat v`, and :math:`g_0 = 0`:

    .. math::
        \xi_t = \frac{1}{1 + e^{-|g_{t-1} - g_t|}}, \qquad
        \theta_t = \theta_{t-1} - \alpha\, \xi_t\, \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}

    Args:
        params: Parameters, or dicts of parameter groups.
        lr: Learning rate α.
        betas: Decay rates β₁, β₂ of the two moments.
        eps: ε, added to the denominator.
        weight_decay: L2 penalty, added to the gradient before the moments and before the difference, as in the
            authors' code.
        friction: The form of ξ. With Δ = g_{t−1} − g_t:

            - ``"difference"``: σ(\|Δ\|) ∈ [½, 1), the paper's method;
            - ``"signed"``: σ(Δ) ∈ (0, 1), the paper's variant without the absolute value;
            - ``"wide"``: 9 σ(\|Δ\|/2) − 4 ∈ [½, 5), the paper's variant that may also lengthen the step;
            - ``"aliased"``: ½. The code that the paper's image experiments ran kept a reference to the gradient
              instead of a copy, so its difference was always 0: Adam at half the learning rate.
        foreach: Whether to use ``torch._foreach_*`` kernels. ``None`` decides: yes on CUDA, no on the CPU, where a
            loop that keeps each tensor in cache is faster.
        maximize: Ascend instead of descend.

    Shape:
        Parameters of any shape; real or complex (a complex one counts as its real and imaginary parts).

    Raises:
        ValueError: ``lr`` ≤ 0, a beta outside [0, 1), ``eps`` < 0, ``weight_decay`` < 0, or an unknown ``friction``.
        RuntimeError: A gradient is sparse.

    Cost: per step 12 elementwise passes (Adam: 7), one of them an exponential. State: three tensors a parameter
    (Adam: two), since the last gradient is kept; the friction is computed in that tensor's place, so the step's own
    memory is one temporary of the parameter's size, as in Adam.

    Source: equations 5 to 8 and Algorithm 1 of the paper; the aliasing is named in the authors' repository,
    github.com/shivram1987/diffGrad.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        friction: str = "difference",
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        check_number("lr", lr, above=0)
        for index, beta in enumerate(betas):
            check_number(f"betas[{index}]", beta, at_least=0, below=1)
        check_number("eps", eps, at_least=0)
        check_number("weight_decay", weight_decay, at_least=0)
        check_choice("friction", friction, FRICTIONS)
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "friction": friction,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

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
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        for param in params:
            if param.grad.is_sparse:
                raise RuntimeError("DiffGrad does not support sparse gradients; torch.optim.SparseAdam does")
        states = [self._state_of(param) for param in params]
        update = _update_lists if self._uses_foreach(group, params) else _update_one_by_one
        # Parameters of one group may have taken different numbers of steps, where some had no gradient at times.
        by_step: dict[float, list[int]] = {}
        for place, state in enumerate(states):
            state["step"] += 1
            by_step.setdefault(state["step"].item(), []).append(place)
        for step, places in by_step.items():
            columns = [
                [_real(tensor) for tensor in column]
                for column in (
                    [params[place] for place in places],
                    [params[place].grad for place in places],
                    *([states[place][key] for place in places] for key in ("exp_avg", "exp_avg_sq", "previous_grad")),
                )
            ]
            for alike in same_kind(*columns):
                update(*alike, step=step, **{key: group[key] for key in _HYPERPARAMETERS})

    @staticmethod
    def _uses_foreach(group: dict[str, Any], params: list[Tensor]) -> bool:
        return foreach_pays(params) if group["foreach"] is None else group["foreach"]

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros(())
            for key in ("exp_avg", "exp_avg_sq", "previous_grad"):
                state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state


_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "friction", "maximize")


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _scales(step: float, lr: float, betas: tuple[float, float], eps: float) -> tuple[float, float]:
    """Fold both bias corrections into the step size and ε, which saves a pass: √v̂ + ε = (√v + ε√c₂) / √c₂."""
    correction1, correction2 = 1 - betas[0] ** step, math.sqrt(1 - betas[1] ** step)
    return lr * correction2 / correction1, eps * correction2


def _update_one_by_one(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    previous_grads: list[Tensor],
    *,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    friction: str,
    maximize: bool,
) -> None:
    beta1, beta2 = betas
    step_size, eps = _scales(step, lr, betas, eps)
    for param, grad, exp_avg, exp_avg_sq, previous in zip(
        params, grads, exp_avgs, exp_avg_sqs, previous_grads, strict=True
    ):
        if maximize:
            grad = -grad
        if weight_decay != 0:
            grad = grad.add(param, alpha=weight_decay)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        # From here on `previous` holds ξ, then ξm, until the gradient is kept in it for the next step.
        if friction == "aliased":
            torch.mul(exp_avg, 0.5, out=previous)
        else:
            previous.sub_(grad)
            if friction != "signed":
                previous.abs_()
            if friction == "wide":
                previous.mul_(0.5)
            previous.sigmoid_()
            if friction == "wide":
                previous.mul_(9).sub_(4)
            previous.mul_(exp_avg)
        param.addcdiv_(previous, exp_avg_sq.sqrt().add_(eps), value=-step_size)
        previous.copy_(grad)


def _update_lists(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    previous_grads: list[Tensor],
    *,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    friction: str,
    maximize: bool,
) -> None:
    beta1, beta2 = betas
    step_size, eps = _scales(step, lr, betas, eps)
    if maximize:
        grads = list(torch._foreach_neg(grads))
    if weight_decay != 0:
        grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)
    if friction == "aliased":
        torch._foreach_copy_(previous_grads, exp_avgs)
        torch._foreach_mul_(previous_grads, 0.5)
    else:
        torch._foreach_sub_(previous_grads, grads)
        if friction != "signed":
            torch._foreach_abs_(previous_grads)
        if friction == "wide":
            torch._foreach_mul_(previous_grads, 0.5)
        torch._foreach_sigmoid_(previous_grads)
        if friction == "wide":
            torch._foreach_mul_(previous_grads, 9)
            torch._foreach_sub_(previous_grads, 4)
        torch._foreach_mul_(previous_grads, exp_avgs)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(params, previous_grads, denominators, value=-step_size)
    torch._foreach_copy_(previous_grads, grads)
