"""Autocast, for functions of their own: what it would cast to, and arithmetic that it must not narrow."""

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
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the type that autocast casts to on a device; ``None`` where it is off or, as on ``meta``, unknown.

    Args:
        device: Of the operands.

    Returns:
        The type.

    Cost: none.
    """
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None
