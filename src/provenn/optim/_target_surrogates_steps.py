"""Step sizes in target space: from smoothness, by schedule, by a line search."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer, check_number

Schedule = Literal["constant", "sqrt", "exponential"]
SCHEDULES = ("constant", "sqrt", "exponential")

_SMOOTHNESS = {"squared": 1.0, "cross-entropy": 0.5, "logistic": 0.25}
_GROWTH, _SHRINK, _TRIALS = 1.8, 0.9, 100
_LEAST, _MOST = 1e-4, 1e4


def smooth_target_step(loss: Literal["squared", "cross-entropy", "logistic"]) -> float:
    """Return η = 1/L, the largest step size at which the surrogate bounds one sample's loss, whatever the model.

    Args:
        loss: ``"squared"``, ½‖z − y‖² (L = 1); ``"cross-entropy"`` of softmax on logits (L = ½); ``"logistic"``,
            log(1 + exp(−yz)) (L = ¼).

    Returns:
        η.

    Raises:
        ValueError: ``loss`` is unknown.

    Source: arXiv 2302.02607, η ≤ 1/L for L-smooth losses; L is the largest eigenvalue of the loss' Hessian.
    """
    check_choice("loss", loss, _SMOOTHNESS)
    return 1 / _SMOOTHNESS[loss]


def constant_target_step(eta: float, step: int) -> float:
    """Return η, whatever the step.

    Args:
        eta: η.
        step: t, from 1.

    Returns:
        η_t.

    Raises:
        ValueError: ``eta`` ≤ 0 or ``step`` < 1.

    Source: arXiv 2302.02607, constant step size: converges to a neighbourhood, or where all samples are fitted.
    """
    check_number("eta", eta, above=0)
    check_integer("step", step, at_least=1)
    return eta


def sqrt_target_step(eta: float, step: int) -> float:
    """Return η/√t.

    Args:
        eta: η.
        step: t, from 1.

    Returns:
        η_t.

    Raises:
        ValueError: ``eta`` ≤ 0 or ``step`` < 1.

    Source: arXiv 2302.02607, the decreasing step size of convex losses; "stochastic" in the authors' code.
    """
    return constant_target_step(eta, step) / math.sqrt(step)


def exponential_target_step(eta: float, step: int, total_steps: int) -> float:
    """Return η T^(−t/T), which falls from η to η/T over T steps.

    Args:
        eta: η.
        step: t, from 1.
        total_steps: T.

    Returns:
        η_t.

    Raises:
        ValueError: ``eta`` ≤ 0, ``step`` < 1 or ``total_steps`` < 1.

    Source: arXiv 2302.02607, the exponential step size, after Li, Zhuang & Orabona, arXiv 2002.05273.
    """
    check_integer("total_steps", total_steps, at_least=1)
    return constant_target_step(eta, step) * total_steps ** (-step / total_steps)


def scheduled(schedule: str, eta: float, step: int, total_steps: int | None) -> float:
    """Return η_t by the schedule's name."""
    if schedule == "exponential":
        assert total_steps is not None
        return exponential_target_step(eta, step, total_steps)
    return (sqrt_target_step if schedule == "sqrt" else constant_target_step)(eta, step)


@torch.no_grad()
def search_target_step(
    target_loss: Callable[[Tensor], Tensor],
    z: Float[Tensor, "n *K"],
    gradient: Float[Tensor, "n *K"],
    loss: float,
    last: float,
    c: float = 0.5,
    scale: float = 1.0,
) -> tuple[float, int]:
    """Find η with ℓ(z − ηNg) ≤ ℓ(z) − c η N ‖g‖², by values of the loss alone.

    The first try is 1.8 times the last η; each further one is 0.9 times the one before, at most 100. Then η is
    clipped to [1e-4, 1e4].

    Args:
        target_loss: ℓ.
        z: Targets.
        gradient: g = ∇ℓ(z).
        loss: ℓ(z).
        last: The η found before.
        c: The share of the decrease that the slope promises which η must keep.
        scale: N: the number of rows where ℓ is their mean, 1 where it is their sum.

    Shape:
        ``z`` and ``gradient`` (n, …).

    Returns:
        η, and how often the loss was evaluated.

    Raises:
        ValueError: ``last`` ≤ 0, or ``c`` outside (0, 1).

    Cost: one value of the loss a try, no model.

    Source: arXiv 2302.02607, SSO-SLS; constants of the authors' code, whose η is 1/η here.
    """
    check_number("last", last, above=0)
    check_number("c", c, above=0, below=1)
    slope = scale * gradient.square().sum().item()
    eta = _GROWTH * last
    for values in range(1, _TRIALS + 1):  # noqa: B007
        if float(target_loss(z - eta * scale * gradient)) <= loss - c * eta * slope:
            break
        eta *= _SHRINK
    return min(max(eta, _LEAST), _MOST), values
