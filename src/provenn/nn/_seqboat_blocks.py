"""Attention within a window, cut into blocks as long as the window: each sees itself and its neighbours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Blocks(NamedTuple):
    """Queries and the keys that they may see, in blocks of neighbouring slots, (batch, blocks, slots, …)."""

    q: Tensor
    k: Tensor
    v: Tensor
    query_positions: Tensor
    key_positions: Tensor
    key_mask: Tensor
    offset: Tensor
    """Slots from query to key, broadcastable to (batch, blocks, queries, keys)."""


def whole(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor, slots: Tensor | None) -> Blocks:
    """Put everything into one block."""
    place = torch.arange(q.shape[1], device=q.device) if slots is None else slots[:, None]
    offset = place[..., None, :] - place[..., None]
    return Blocks(*(one[:, None] for one in (q, k, v, positions, positions, mask)), offset)


def cut_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor, window: int, bidirectional: bool
) -> Blocks:
    """Cut into blocks as long as the window; each sees the block before, itself, and with both sides the next."""
    sides = (1, 1) if bidirectional else (1, 0)
    q, query_positions = _cut(q, window), _cut(positions, window)
    k, v, key_positions, key_mask = (_around(_cut(one, window), *sides) for one in (k, v, positions, mask))
    keys = torch.arange(-window, window * (1 + sides[1]), device=q.device)
    offset = keys - torch.arange(window, device=q.device)[:, None]
    return Blocks(q, k, v, query_positions, key_positions, key_mask, offset)


def _cut(x: Tensor, size: int) -> Tensor:
    """Cut time into blocks, zeros (False) at the end."""
    missing = -x.shape[1] % size
    padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
    return padded.unflatten(1, (-1, size))


def _around(blocks: Tensor, before: int, after: int) -> Tensor:
    """Join each block with its neighbours, along the slots; beyond the ends are zeros (False)."""
    padded = F.pad(blocks, (0, 0) * (blocks.ndim - 2) + (before, after))
    count = blocks.shape[1]
    return torch.cat([padded[:, shift : shift + count] for shift in range(1 + before + after)], 2)
