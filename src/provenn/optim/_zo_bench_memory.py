"""What a training step of each method holds in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from provenn.core.experiment.accounting import TensorMemory
from provenn.core.experiment.checks import check_choice
from provenn.core.experiment.recording import evaluating

_BUFFERS = {
    "fo-sgd": 0,
    "fo-adam": 2,
    "forward-gradient": 0,
    "zo-sgd": 0,
    "zo-sign": 0,
    "zo-conservative": 0,
    "zo-momentum": 1,
    "zo-adam": 2,
}
"""Buffers of the parameters' size that a method keeps between steps."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training step holds at its peak, as :func:`estimate_memory` counts them.

    Args:
        weights: Parameters and buffers of the model.
        gradients: One number a trainable parameter, for first-order methods.
        optimizer_state: What is kept between steps.
        tangents: The direction of a forward gradient.
        activations: What is alive at once of what the model computes: all that back-propagation needs, or about a
            layer's, twice that with tangents.

    Source: arXiv 2402.11592.
    """

    weights: int
    gradients: int
    optimizer_state: int
    tangents: int
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.optimizer_state + self.tangents + self.activations


def estimate_memory(model: nn.Module, batch: Sequence[Any], method: str = "zo-sgd") -> MemoryEstimate:
    """Count the bytes that a training step of a method holds.

    The model runs once on the batch, in evaluation mode, and the tensors that are alive at once are counted. Model and
    batch may lie on torch's meta device, where nothing is allocated::

        estimate_memory(model.to("meta"), (x.to("meta"),), "fo-adam").total

    Args:
        model: The model.
        batch: Its arguments.
        method: ``"fo-sgd"``, ``"fo-adam"``, ``"forward-gradient"``, ``"zo-sgd"``, ``"zo-sign"``,
            ``"zo-conservative"``, ``"zo-momentum"`` or ``"zo-adam"``.

    Returns:
        The bytes, by what they hold.

    Shape:
        As the model takes; bytes.

    Raises:
        ValueError: ``method`` is unknown.

    Cost: one forward pass.

    Source: arXiv 2402.11592, table of memory and its appendix on how it is estimated.
    """
    check_choice("method", method, _BUFFERS)
    trainable = sum(one.numel() * one.element_size() for one in model.parameters() if one.requires_grad)
    first_order = method.startswith("fo-")
    tangents = method == "forward-gradient"
    return MemoryEstimate(
        weights=sum(one.numel() * one.element_size() for one in [*model.parameters(), *model.buffers()]),
        gradients=trainable if first_order else 0,
        optimizer_state=_BUFFERS[method] * trainable,
        tangents=trainable if tangents else 0,
        activations=_activations(model, batch, first_order) * (2 if tangents else 1),
    )


def _activations(model: nn.Module, batch: Sequence[Any], kept: bool) -> int:
    with evaluating(model), torch.set_grad_enabled(kept), TensorMemory() as memory:
        model(*batch)
    peak: int = memory.peak
    return peak
