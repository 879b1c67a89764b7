"""Positions in attention: ALiBi's slopes, and rotary embedding of queries and keys."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer


def alibi_slopes(
    num_heads: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Float[Tensor, " heads"]:
    """Return ALiBi's slope of every head: 2^(−8/H), 2^(−16/H), …, 2^(−8) for H a power of two.

    For other H: the slopes of the power of two below, then every second one of the power of two above.

    Args:
        num_heads: Number of heads H.
        device: Where to put them.
        dtype: Their type.

    Raises:
        ValueError: ``num_heads`` < 1.

    Source: Press, Smith, Lewis, "Train Short, Test Long", ICLR 2022, https://arxiv.org/abs/2108.12409.
    """
    check_integer("num_heads", num_heads, at_least=1)
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / below) for head in range(below)]
    between = [2 ** (-4 * (head + 1) / below) for head in range(0, 2 * below, 2)]
    return torch.tensor((slopes + between)[:num_heads], device=device, dtype=dtype)


def rotate(
    x: Float[Tensor, "*batch tokens head"], offset: int = 0, base: float = 10000.0
) -> Float[Tensor, "*batch tokens head"]:
    """Turn each pair of neighbouring features (2m, 2m+1) of token p by the angle (p + offset) · base^(−2m/d).

    After it the product of a query and a key depends on their positions through the difference alone.

    Args:
        x: Queries or keys, an even number d of features a head.
        offset: Position of the first token.
        base: The slowest angle's base.

    Shape:
        (..., tokens, d) → the same.

    Returns:
        The turned tensor, in the type of ``x``; angles and products are computed in float32 at least.

    Raises:
        ValueError: The number of features is odd.

    Source: Su et al., "RoFormer", Neurocomputing 568 (2024), equation 34, https://arxiv.org/abs/2104.09864.
    """
    head = x.shape[-1]
    if head % 2:
        raise ValueError(f"x must have an even number of features a head, got {head}")
    wide = torch.promote_types(x.dtype, torch.float32)
    # Angles in float64: in float32 the angle of a late position is off by more than the result's rounding.
    frequency = base ** (-torch.arange(0, head, 2, device=x.device, dtype=torch.float64) / head)
    position = torch.arange(offset, offset + x.shape[-2], device=x.device, dtype=torch.float64)
    angle = position[:, None] * frequency
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
