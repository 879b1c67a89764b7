"""Oracles and dual norms of many layers at once: matrices of one shape, tall or wide, are orthogonalised as a stack.

Every norm here has a ball whose linear minimisation oracle is ``radius · unit_direction`` and whose dual norm is
``radius · unit_dual_norm``; the radius depends on the shape alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from provenn.core.numerics.norm_oracles import Norm, Orthogonalization, newton_schulz, orthogonal_factor

EmbedScale = Literal["fan_in", "unit"]

MAX_STACK = 2**26
"""Entries of one stack: bounds the copies beside the model, and is far beyond where a larger stack is faster."""

ADAMW_RMS = 0.2
"""Root mean square of a typical AdamW step, which ``scale_by_rms`` gives an orthogonal step of any shape."""


def radius(shape: torch.Size, norm: Norm, embed_scale: EmbedScale, scale_by_rms: bool) -> float:
    """Return how long the oracle's step is, in units of U Vᵀ, of signs, or of the vector's own direction."""
    if norm == "rms":
        return math.sqrt(shape.numel())
    fan_in = shape[1:].numel() if len(shape) > 1 else shape.numel()
    if norm == "sign":
        return 1 / fan_in if embed_scale == "fan_in" else 1.0
    return ADAMW_RMS * math.sqrt(max(shape[0], fan_in)) if scale_by_rms else math.sqrt(shape[0] / fan_in)


def unit_directions(tensors: Sequence[Tensor], norm: Norm, lmo: Orthogonalization, ns_steps: int) -> list[Tensor]:
    """Return, for each tensor, U Vᵀ, its signs, or itself at length 1; 0 for zeros.

    Args:
        tensors: Of one device and type, none of them empty.
        norm: ``"spectral"``, ``"sign"`` or ``"rms"``.
        lmo: How U Vᵀ is found.
        ns_steps: Iterations of Newton–Schulz.
    """
    if norm == "sign":
        return list(torch._foreach_sign(tensors))
    if norm == "rms":
        lengths = torch.stack(unit_dual_norms(tensors, norm, lmo, ns_steps))
        divisors = matched(torch.where(lengths > 0, lengths, 1.0), tensors[0])
        return list(torch._foreach_div(tensors, list(divisors.unbind())))
    directions = list(tensors)
    for places, stack in _stacks(tensors):
        for place, factor in zip(places, _factors(stack, lmo, ns_steps), strict=True):
            shape = tensors[place].shape
            direction = factor.mT if shape[0] > shape[1:].numel() else factor
            direction = direction if direction.shape == shape else direction.reshape(shape)
            directions[place] = matched(direction, tensors[place])
    return directions


def unit_dual_norms(tensors: Sequence[Tensor], norm: Norm, lmo: Orthogonalization, ns_steps: int) -> list[Tensor]:
    """Return each tensor's inner product with its unit direction: nuclear norm, sum of absolutes, or length.

    With Newton–Schulz the nuclear norm is ⟨B, factor⟩, and so as far off as the factor's singular values are off 1.

    Args:
        tensors: As in :func:`unit_directions`.
        norm: Likewise.
        lmo: Likewise; ``"svd"`` sums the singular values.
        ns_steps: Likewise.

    Returns:
        One scalar a tensor, in float32 or better.
    """
    if norm != "spectral":
        return list(
            torch._foreach_norm(
                tensors, 1 if norm == "sign" else 2, dtype=torch.promote_types(tensors[0].dtype, torch.float32)
            )
        )
    values = list(tensors)
    for places, stack in _stacks(tensors):
        if lmo == "svd":
            found = torch.linalg.svdvals(stack).sum(dim=-1)
        else:
            found = (stack * newton_schulz(stack, ns_steps)).sum(dim=(-2, -1))
        for place, value in zip(places, found.unbind(), strict=True):
            values[place] = value
    return values


def matched(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in another's type and on its device; most often it is there already, and stays as it is."""
    alike = tensor.dtype == like.dtype and tensor.device == like.device
    return tensor if alike else tensor.to(like)


def _factors(stack: Tensor, lmo: Orthogonalization, ns_steps: int) -> Tensor:
    return orthogonal_factor(stack) if lmo == "svd" else newton_schulz(stack, ns_steps)


def _stacks(tensors: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield stacks of wide matrices of one shape, with the places of the tensors they come from."""
    places: dict[torch.Size, list[int]] = {}
    wide = []
    for place, tensor in enumerate(tensors):
        matrix = tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[0], -1)
        wide.append(matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix)
        places.setdefault(wide[-1].shape, []).append(place)
    for shape, alike in places.items():
        size = max(1, MAX_STACK // shape.numel())
        for start in range(0, len(alike), size):
            picked = alike[start : start + size]
            stack = torch.stack([wide[place] for place in picked])
            yield picked, stack.float() if stack.dtype in (torch.float16, torch.bfloat16) else stack
