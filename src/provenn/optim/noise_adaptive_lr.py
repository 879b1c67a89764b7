"""LANTON: noise-adaptive layerwise learning rates for geometry-aware optimization.

Hao, Gong, Xu, Wang, Liu, 2025. https://arxiv.org/abs/2510.14009

Steps from linear minimisation oracles (as Muon's and Scion's), and in each layer a rate that shrinks where the
gradient's noise, measured in the dual of the oracle's norm, is large beside that of the group's quietest layer:

    B_t = β₁ B_{t−1} + (1 − β₁) G_t                   H_t = β₂ H_{t−1} + (1 − β₂) ‖G_t − G̃_t‖²_*
    a_t = α / √(α² + H_t)                             r_t = √(a_t / max over the group of a_t)
    X_t = (1 − η wd) X_{t−1} − η r_t lmo(B_t)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from provenn.core.numerics.foreach import same_kind
from provenn.core.numerics.norm_oracles import Norm
from provenn.optim._noise_adaptive_lr_groups import check_group, dense, lanton_param_groups, layers_by_norm
from provenn.optim._noise_adaptive_lr_oracles import matched, radius, unit_directions, unit_dual_norms
from provenn.optim._noise_adaptive_lr_report import LayerRate, LayerReport

__all__ = ["LANTON", "lanton_param_groups"]

Closure = Callable[[], Any]


class LANTON(torch.optim.Optimizer):
    r"""Steps of unit length in each layer's norm, shortened in the layers whose gradients are noisier.

    With :math:`G_t` the gradient of a layer, :math:`B_t` its momentum and :math:`\eta` the group's learning rate:

    .. math::
        H_t = \beta_2 H_{t-1} + (1 - \beta_2)\, \|G_t - \tilde G_t\|_*^2, \qquad
        a_t = \frac{\alpha}{\sqrt{\alpha^2 + H_t}}, \qquad
        r_t = \sqrt{a_t / \max_k a_t^k}

        X_t = (1 - \eta \lambda)\, X_{t-1} - \eta\, r_t\, \mathrm{lmo}(B_t)

    Each group carries the norm of its layers. The maximum runs over the layers of one group that have one norm and a
    gradient in this step, and r is computed anew at every step. A layer is one parameter tensor.

    =============  ====================================  =============================  ========================
    ``norm``       for                                   step lmo(B)                    dual norm of the noise D
    =============  ====================================  =============================  ========================
    ``spectral``   matrices; kernels as D_out × rest     √(D_out/D_in) U Vᵀ             √(D_out/D_in) Σ σ(D)
    ``sign``       embeddings and output heads           sign(B) / D_in                 Σ abs(D_ij) / D_in
    ``rms``        vectors: gains and biases             √d B / ‖B‖₂                    √d ‖D‖₂
    =============  ====================================  =============================  ========================

    Args:
        params: Parameters, or dicts of parameter groups, such as :func:`lanton_param_groups` makes. A group without
            ``norm`` takes ``spectral`` for its tensors of two dimensions or more and ``rms`` for the others.
        lr: Learning rate η, the step's length in the layer's norm. A scheduler decays it.
        betas: Decay rates β₁ of the momentum and β₂ of the noise.
        alpha: α, in units of the gradient's dual norm: noise acts on a layer's rate from √H ≈ α on.
        noise_option: Where G̃ comes from: ``"consecutive"`` takes the gradient of the step before (the first step
            adds no noise), ``"resample"`` that of an independent batch at the same point, by the second closure.
        lmo: How U Vᵀ is found: ``"newton-schulz"`` or, exactly and slowly, ``"svd"``.
        ns_steps: Iterations of Newton–Schulz.
        weight_decay: λ, decoupled from the gradient and from r.
        noise_adaptive: ``False`` keeps r = 1 and measures no noise: the fixed-rate method (Scion's kind).
        scale_by_rms: Whether spectral steps are 0.2 √max(D_out, D_in) U Vᵀ, as D-Muon's, whose root mean square is
            that of AdamW's typical step whatever the shape. The dual norm scales with it.
        embed_scale: The length of ``sign`` steps: ``"fan_in"`` for 1/D_in, ``"unit"`` for 1. D_in of a table is its
            number of columns, which is what a tied head multiplies by.

    Shape:
        Parameters of any shape, real; ``spectral`` needs two dimensions.

    Raises:
        ValueError: ``lr`` < 0, a beta outside [0, 1), ``alpha`` ≤ 0, ``ns_steps`` < 1, ``weight_decay`` < 0, an
            unknown choice, ``norm="spectral"`` for a tensor with fewer than two dimensions, or complex ``params``.
            The message names the group, and the shape.
        TypeError: An option is not a number.
        RuntimeError: A gradient is sparse, or a second closure is needed and not given.

    Cost: per step and matrix, 2 · ``ns_steps`` · 3 products of the smaller side, half of them for the noise; matrices
    of one shape, tall or wide, are multiplied together. Elsewhere a few passes. ``"resample"`` doubles the forward and
    backward passes. State a parameter: momentum and last gradient (``"resample"`` and fixed rate: momentum), as Adam's
    two; and one number a layer. A step's own memory is a copy of the group and a few of a stack of up to 2²⁶ entries.

    Source: Algorithm 1 of the paper, whose layers' norms are those of Pethick et al., arXiv 2502.07529. The outer
    square root of r, the defaults, the 1/D_in of the sign step and D-Muon's 0.2 are as they are known second-hand: no
    code is public, and the paper's text was not at hand to check them against.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.9),
        alpha: float = 1.0,
        noise_option: str = "consecutive",
        lmo: str = "newton-schulz",
        ns_steps: int = 5,
        weight_decay: float = 0.1,
        noise_adaptive: bool = True,
        scale_by_rms: bool = False,
        embed_scale: str = "fan_in",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "alpha": alpha,
            "noise_option": noise_option,
            "lmo": lmo,
            "ns_steps": ns_steps,
            "weight_decay": weight_decay,
            "noise_adaptive": noise_adaptive,
            "scale_by_rms": scale_by_rms,
            "embed_scale": embed_scale,
            "norm": None,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Args:
            param_group: As in :class:`torch.optim.Optimizer`; may carry ``norm`` and any option of the constructor.

        Raises:
            ValueError: As the constructor; the optimizer is left as it was.
        """
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], len(self.param_groups) - 1)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Closure | None = None, second_closure: Closure | None = None) -> Any:
        """Take one step.

        Args:
            closure: Re-evaluates the model and returns the loss.
            second_closure: Evaluates the model on an independent batch, backward pass included; called only under
                ``noise_option="resample"``. The gradients of the step are in place again after it.

        Returns:
            The closure's loss, or ``None`` without one.

        Raises:
            RuntimeError: A gradient is sparse, or ``noise_option="resample"`` and there is no second closure.
        """
        resampled = any(group["noise_adaptive"] and group["noise_option"] == "resample" for group in self.param_groups)
        if resampled and second_closure is None:
            raise RuntimeError("noise_option='resample' needs a second_closure, which evaluates an independent batch")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        others = self._gradients_of(second_closure) if resampled and second_closure is not None else {}
        grads = self._gradients()
        for group in self.param_groups:
            stepped = [param for param in group["params"] if param in grads]
            for norm, params in layers_by_norm(stepped, group["norm"]).items():
                self._step_layers(group, norm, params, grads, others)
        return loss

    def _gradients(self) -> dict[Tensor, Tensor]:
        params = [param for group in self.param_groups for param in group["params"]]
        return {param: dense(param.grad) for param in params if param.grad is not None}

    def _gradients_of(self, closure: Closure) -> dict[Tensor, Tensor]:
        """Return the gradients that a closure leaves, and put back those that were there."""
        params = [param for group in self.param_groups for param in group["params"]]
        kept = [param.grad for param in params]
        for param in params:
            param.grad = None
        try:
            with torch.enable_grad():
                closure()
            return self._gradients()
        finally:
            for param, grad in zip(params, kept, strict=True):
                param.grad = grad

    def _step_layers(
        self,
        group: dict[str, Any],
        norm: Norm,
        params: list[Tensor],
        grads: dict[Tensor, Tensor],
        others: dict[Tensor, Tensor],
    ) -> None:
        how = norm, group["lmo"], group["ns_steps"]
        radii = {param: radius(param.shape, norm, group["embed_scale"], group["scale_by_rms"]) for param in params}
        ratios: dict[Tensor, Tensor] = {}
        if group["noise_adaptive"]:
            self._measure_noise(group, params, grads, others, radii, how)
            noises = [self.state[param]["noise"] for param in params]
            noises = [matched(noise, noises[0]) for noise in noises]
            ratios = dict(zip(params, _ratios(torch.stack(noises), group["alpha"]).unbind(), strict=True))
        for param in params:
            if "momentum" not in self.state[param]:
                self.state[param]["momentum"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        for alike, fresh in same_kind(params, [grads[param] for param in params]):
            momenta = [self.state[param]["momentum"] for param in alike]
            torch._foreach_lerp_(momenta, fresh, 1 - group["betas"][0])
            steps = unit_directions(momenta, *how)
            torch._foreach_mul_(steps, [radii[param] for param in alike])
            if ratios:
                torch._foreach_mul_(steps, [matched(ratios[param], param) for param in alike])
            if group["weight_decay"] != 0:
                torch._foreach_mul_(alike, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(alike, steps, alpha=-group["lr"])

    def _measure_noise(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: dict[Tensor, Tensor],
        others: dict[Tensor, Tensor],
        radii: Mapping[Tensor, float],
        how: tuple[Norm, Any, int],
    ) -> None:
        """Bring H up to date, and keep the gradients that the next step needs."""
        resampled = group["noise_option"] == "resample"
        for param in params:
            if "noise" not in self.state[param]:
                self.state[param]["noise"] = torch.zeros((), dtype=_precise(param.dtype), device=param.device)
        if not resampled:
            others = {param: state["last_grad"] for param in params if "last_grad" in (state := self.state[param])}
        measured = [param for param in params if param in others]
        columns = measured, [grads[param] for param in measured], [others[param] for param in measured]
        for alike, fresh, references in same_kind(*columns):
            lengths = unit_dual_norms(list(torch._foreach_sub(fresh, references)), *how)
            torch._foreach_mul_(lengths, [radii[param] for param in alike])
            noises = [self.state[param]["noise"] for param in alike]
            torch._foreach_lerp_(noises, torch._foreach_mul(lengths, lengths), 1 - group["betas"][1])
        if not resampled:
            for param in params:
                if param in others:
                    others[param].copy_(grads[param])
                else:
                    self.state[param]["last_grad"] = grads[param].clone(memory_format=torch.preserve_format)

    def layer_report(self) -> LayerReport:
        """Return every layer's noise and effective learning rate, as the last step left them.

        Returns:
            A report whose ``layers`` have ``noise`` (H), ``factor`` (a), ``ratio`` (r) and ``rate`` (η r), in the order
            of the parameter groups. A layer that has taken no step yet counts as one without noise.
        """
        layers = []
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names", [f"{number}.{place}" for place in range(len(group["params"]))])
            name_of = dict(zip(group["params"], names, strict=True))
            found: dict[Tensor, LayerRate] = {}
            for norm, params in layers_by_norm(group["params"], group["norm"]).items():
                noises = torch.tensor([float(self.state.get(param, {}).get("noise", 0.0)) for param in params])
                factors, ratios = _factors(noises, group["alpha"]), _ratios(noises, group["alpha"])
                if not group["noise_adaptive"]:
                    noises, factors, ratios = noises * math.nan, factors * math.nan, torch.ones_like(ratios)
                for param, noise, factor, ratio in zip(
                    params, noises.tolist(), factors.tolist(), ratios.tolist(), strict=True
                ):
                    rate = float(group["lr"]) * ratio
                    found[param] = LayerRate(
                        name_of[param], number, norm, tuple(param.shape), noise, factor, ratio, rate
                    )
            layers += [found[param] for param in group["params"] if param in found]
        return LayerReport(tuple(layers))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; H keeps its own precision, where torch would round it to a half-precision parameter's.

        Args:
            state_dict: What ``state_dict()`` returned.
        """
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(keys, params, strict=True):
            if "noise" in (state := state_dict["state"].get(key, {})):
                self.state[param]["noise"] = state["noise"].detach().clone().to(param.device)


def _factors(noises: Tensor, alpha: float) -> Tensor:
    return 1 / torch.hypot(noises.sqrt() / alpha, torch.ones_like(noises))  # α² may be beyond float32


def _ratios(noises: Tensor, alpha: float) -> Tensor:
    factors = _factors(noises, alpha)
    return (factors / factors.max()).sqrt()


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
