"""Masks of attention: padding and visibility in one tensor, and how many keys a query sees.

A mask is boolean, True where a query may look (as in ``scaled_dot_product_attention``), or is added to the scores,
−∞ where it may not. Queries are the last ones of the keys' sequence: query i of L stands at position S − L + i.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Mask = Bool[Tensor, "..."] | Float[Tensor, "..."]


def causal_mask(
    queries: int, keys: int, device: torch.device | str | None = None, first: int = 0
) -> Bool[Tensor, "queries keys"]:
    """Return which keys the queries see if none looks ahead.

    Args:
        queries: Number of queries.
        keys: Number of keys.
        device: Where to put it.
        first: Position of the first query minus that of the first key.
    """
    rows = torch.arange(first, first + queries, device=device)
    return rows[:, None] >= torch.arange(keys, device=device)


def combine_masks(first: Mask | None, second: Mask | None) -> Mask | None:
    """Return the mask that hides what either hides; additive parts add up."""
    if first is None or second is None:
        return second if first is None else first
    if first.dtype == torch.bool and second.dtype == torch.bool:
        return first & second
    if first.dtype == torch.bool:
        return second.masked_fill(~first, float("-inf"))
    if second.dtype == torch.bool:
        return first.masked_fill(~second, float("-inf"))
    return first + second


def visible_keys(
    queries: int, keys: int, mask: Mask | None, causal: bool, device: torch.device | str | None = None
) -> Int[Tensor, "*batch rows 1"]:
    """Count the keys that each query sees.

    Args:
        queries: Number of queries L.
        keys: Number of keys S.
        mask: Broadcastable to (..., L, S).
        causal: Whether no query looks ahead.
        device: Where to count, if there is no mask.

    Returns:
        Counts, (..., L, 1), or (..., 1, 1) where all queries see the same keys. Memory: that of the mask.
    """
    if mask is None:
        mask = torch.ones(1, keys, dtype=torch.bool, device=device)
    visible = mask if mask.dtype == torch.bool else mask > float("-inf")
    if visible.ndim < 2:
        visible = visible.expand(1, keys)
    visible = visible.expand(*visible.shape[:-1], keys)
    if not causal:
        return visible.sum(dim=-1, keepdim=True)
    if visible.shape[-2] > 1:
        return (visible & causal_mask(queries, keys, visible.device, keys - queries)).sum(dim=-1, keepdim=True)
    # One row for all queries: a running count over keys, read off at each query's position, needs no L × S tensor.
    running = visible.cumsum(dim=-1)
    last = torch.arange(keys - queries, keys, device=visible.device)
    counts = running[..., 0, last.clamp(min=0)].masked_fill(last < 0, 0)
    return counts.unsqueeze(-1)
