"""Mini-batches into micro-batches and back, and the state of the caller's thread that tasks must see."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from provenn.core.pipelines.links import Parcel


def scatter(x: Any, chunks: int) -> tuple[list[Parcel], list[int]]:
    """Cut a mini-batch into micro-batches of as equal size as ``torch.chunk`` makes them, the last may be smaller.

    Args:
        x: A tensor, or a tuple of tensors of one batch size.
        chunks: How many are wanted; there are fewer where the batch does not allow more.

    Returns:
        The micro-batches, and their sizes.

    Raises:
        TypeError: ``x`` holds no tensors.
        ValueError: Batch sizes differ, or are 0, or a tensor has no dimension.
    """
    tensors = x if isinstance(x, tuple) else (x,)
    if not tensors or not all(isinstance(one, Tensor) for one in tensors):
        raise TypeError(f"x must be a tensor or a tuple of tensors, got {type(x).__name__}")
    if any(one.dim() == 0 for one in tensors):
        raise ValueError("x must have samples along dimension 0, got a tensor without dimensions")
    sizes = {len(one) for one in tensors}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"x must hold tensors of one batch size, at least 1, got {[len(one) for one in tensors]}")
    parts = [one.chunk(chunks) for one in tensors]
    found = len(parts[0])
    if found < chunks:
        warnings.warn(f"a batch of {len(tensors[0])} is cut into {found} micro-batches, not {chunks}", stacklevel=5)
    needs_grad = tuple(one.requires_grad for one in tensors)
    parcels = [Parcel(tuple(part[i] for part in parts), needs_grad, isinstance(x, tuple)) for i in range(found)]
    return parcels, [len(part) for part in parts[0]]


def gather(parcels: Sequence[Parcel], device: torch.device | None) -> tuple[Tensor, ...]:
    """Join the outputs of micro-batches along dimension 0.

    Args:
        parcels: The outputs.
        device: Where they go; ``None`` leaves them.

    Raises:
        ValueError: An output has no samples along dimension 0.
    """
    columns = list(zip(*(parcel.tensors for parcel in parcels), strict=True))
    if any(one is None or one.dim() == 0 for column in columns for one in column):
        raise ValueError(
            "the last layer must return tensors with samples along dimension 0, got one without dimensions"
        )
    joined = (torch.cat(column) for column in columns)
    return tuple(one if device is None else one.to(device) for one in joined)


def autocast_now() -> tuple[tuple[str, torch.dtype], ...]:
    """Return the types of device that are in autocast in this thread, with their types."""
    kinds = ("cpu", "cuda")
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))
