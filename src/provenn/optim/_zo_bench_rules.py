"""Update rules: how a gradient estimate, drawn piece by piece, changes the parameters in place."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from provenn.core.experiment.parameters import flat_view
from provenn.optim._zo_bench_estimate import Estimate

RULES = ("sgd", "sign", "momentum", "adam", "conservative")

_ADAM_EPS = 1e-8
_BUFFERS = {"momentum": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}


@torch.no_grad()
def apply(
    found: Estimate,
    rule: str,
    options: Mapping[Tensor, Mapping[str, Any]],
    state: MutableMapping[Tensor, dict[str, Any]],
    coordinate: bool = False,
    scale: float = 1.0,
) -> None:
    """Step along an estimate.

    Args:
        found: The estimate.
        rule: The rule's name.
        options: Of each parameter, its group.
        state: Of each parameter, the buffers of the rule.
        coordinate: For ``"sign"``: whether to take the sign of every entry, not of the derivatives.
        scale: Factor of the learning rate.
    """
    views = [flat_view(tensor) for tensor in found.tensors]
    buffers = [_buffers(tensor, rule, state) for tensor in found.tensors]
    if rule == "sign" and not coordinate:
        found = found.signs()
    for index, piece, gradient in found.pieces():
        tensor = found.tensors[index]
        group, weights = options[tensor], views[index][piece]
        if rule == "sign" and coordinate:
            gradient.sign_()
        if group["weight_decay"]:
            gradient.add_(weights, alpha=group["weight_decay"])
        held = [buffer[piece] for buffer in buffers[index]]
        if rule == "momentum":
            gradient = held[0].mul_(group["momentum"]).add_(gradient)
        if rule == "adam":
            _adam_(weights, gradient, held, group, state[tensor]["step"])
        else:
            weights.add_(gradient, alpha=-scale * group["lr"])
        del gradient  # or it would outlive the draw of the next piece


def _buffers(tensor: Tensor, rule: str, state: MutableMapping[Tensor, dict[str, Any]]) -> list[Tensor]:
    """Return the tensor's buffers as flat views, made at its first step, and count the step."""
    names = _BUFFERS.get(rule, ())
    if not names:
        return []
    kept = state[tensor]
    for name in names:
        if name not in kept:
            kept[name] = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
    kept["step"] = kept.get("step", 0) + 1
    return [flat_view(kept[name]) for name in names]


def _adam_(weights: Tensor, gradient: Tensor, held: list[Tensor], group: Mapping[str, Any], step: int) -> None:
    mean, square = held
    first, second = group["betas"]
    mean.lerp_(gradient, 1 - first)
    square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    spread = square.sqrt().div_(math.sqrt(1 - second**step)).add_(_ADAM_EPS)
    weights.addcdiv_(mean, spread, value=-group["lr"] / (1 - first**step))
