"""Arithmetic that autocast must not narrow: decompositions, and iterations that hold a bound to rounding."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast leaves a device's products in the type of their operands.

    Args:
        device: Of the operands; one without autocast, such as ``meta``, needs nothing.

    Returns:
        The context.

    Cost: none.
    """
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
