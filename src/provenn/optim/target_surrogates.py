"""Target-based Surrogates for Stochastic Optimization.

Lavington, Vaswani, Babanezhad, Schmidt, Le Roux, ICML 2023. https://arxiv.org/abs/2302.02607

Where the gradient of a loss by a model's outputs z = f(θ) is dear, each one is used for many parameter steps, on

    g̃(θ) = ℓ(z_t) + ⟨∇ℓ(z_t), f(θ) − z_t⟩ + (1/(2η)) ‖f(θ) − z_t‖²

which bounds the loss from above for η ≤ 1/L, with L the smoothness of ℓ in the outputs, whatever the model.

:class:`SSO` is the optimizer, :class:`TargetSurrogate` the surrogate, :class:`ArmijoGD` the usual inner optimizer;
:class:`ImitationTrainer` imitates an expert online.
"""

from __future__ import annotations

from provenn.optim._target_surrogates_armijo import ArmijoGD
from provenn.optim._target_surrogates_imitation import CartPole, ImitationResult, ImitationTrainer, LQRExpert
from provenn.optim._target_surrogates_sso import SSO, SSOCalls
from provenn.optim._target_surrogates_steps import (
    constant_target_step,
    exponential_target_step,
    search_target_step,
    smooth_target_step,
    sqrt_target_step,
)
from provenn.optim._target_surrogates_surrogate import BregmanDivergence, KLDivergence, TargetSurrogate

__all__ = [
    "SSO",
    "ArmijoGD",
    "BregmanDivergence",
    "CartPole",
    "ImitationResult",
    "ImitationTrainer",
    "KLDivergence",
    "LQRExpert",
    "SSOCalls",
    "TargetSurrogate",
    "constant_target_step",
    "exponential_target_step",
    "search_target_step",
    "smooth_target_step",
    "sqrt_target_step",
]
