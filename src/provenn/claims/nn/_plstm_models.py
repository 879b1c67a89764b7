"""Arrow pointing in tokens, and the four classifiers that learn it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn._plstm_arrow import aimed, arrow_pointing
from provenn.nn._plstm_gates import EPS
from provenn.nn._plstm_vision import MixerBlock, PLSTMVision, resized

GATED, CONSTANT, INTERPOLATED, NO_POSITION = (
    "pLSTM",
    "pLSTM, constant gates",
    "ViT, interpolated positions",
    "ViT, none",
)
ARMS = (GATED, CONSTANT, INTERPOLATED, NO_POSITION)
CHANNELS = 6
"""Of a cell: arrow, cos θ, sin θ, circle, and two of noise."""
HIDDEN = {GATED: 96, CONSTANT: 128, INTERPOLATED: 124, NO_POSITION: 140}
"""Widths of the MLPs at 24 features, by which the arms' parameters agree."""


def tokens(n: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw n grids (n, size, size, 6) with an arrow and a circle in two cells, and their labels."""
    cells = torch.rand(n, size * size, generator=generator).topk(2, dim=1).indices
    where = torch.stack((cells // size, cells % size), -1).float()
    scene = aimed(where[:, 0], where[:, 1], generator)
    grids = torch.zeros(n, size * size, CHANNELS)
    one = torch.ones(n)
    rows = torch.arange(n)
    grids[rows, cells[:, 0], :3] = torch.stack((one, scene.direction.cos(), scene.direction.sin()), -1)
    grids[rows, cells[:, 1], 3] = 1
    grids[..., 4:] = torch.randn(n, size * size, 2, generator=generator)
    return grids.unflatten(1, (size, size)), scene.label


def sample(data: str, n: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw n samples of the task in tokens or in pixels."""
    return tokens(n, size, generator) if data == "tokens" else arrow_pointing(n, size, generator)


class Attention(nn.Module):
    """Softmax attention among all cells of a grid."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.into, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, X, Y, dim)."""
        split = self.into(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heard = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        projected: Tensor = self.out(heard).unflatten(1, x.shape[1:3])
        return projected


class VisionTransformer(nn.Module):
    """The classifier with attention in the place of pLSTM: the same embedding, blocks and head, on the cells' mean.

    Args:
        dim: Features.
        depth: Blocks.
        heads: Heads.
        hidden: Width of the MLPs.
        channels: Channels of the images.
        patch: Side of the patches.
        grid: Patches along either axis of the images that it is trained on, for a learned position embedding that is
            resized bilinearly for others; 0 for none.
    """

    def __init__(self, dim: int, depth: int, heads: int, hidden: int, channels: int, patch: int, grid: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        # From 0.02 on, as ViTs usually start, trial runs of 3000 steps at 4 × 4 stayed at chance.
        self.position = nn.Parameter(torch.randn(1, dim, grid, grid)) if grid else None
        self.blocks = nn.Sequential(*(MixerBlock(dim, Attention(dim, heads), hidden) for _ in range(depth)))
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, 2)."""
        x = self.embed(images.permute(0, 3, 1, 2))
        if self.position is not None:
            x = x + resized(self.position, x.shape[-2:])
        logits: Tensor = self.head(self.norm(self.blocks(x.permute(0, 2, 3, 1))).mean((1, 2)))
        return logits


def classifier(arm: str, size: int, dim: int, depth: int, heads: int, channels: int, patch: int) -> nn.Module:
    """Build an arm's classifier of images of a side."""
    hidden = HIDDEN[arm] * dim // 24
    if arm in (GATED, CONSTANT):
        options = {"constant_gates": arm == CONSTANT}
        return PLSTMVision(2, dim, depth, heads, channels=channels, patch=patch, hidden=hidden, layer=options)
    grid = size // patch if arm == INTERPOLATED else 0
    return VisionTransformer(dim, depth, heads, hidden, channels, patch, grid)
