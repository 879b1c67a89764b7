"""pLSTM-Vis: patches, blocks that alternate the two modes, and a head on the corners."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_choice, check_integer
from provenn.nn._plstm_gates import EPS
from provenn.nn._plstm_layers import PLSTM2d


class MixerBlock(nn.Module):
    """Pre-norm residual block: a mixer of positions, then an MLP with GELU.

    Args:
        dim: Features.
        mixer: (batch, X, Y, dim) → the same.
        hidden: Width of the MLP.
    """

    def __init__(self, dim: int, mixer: nn.Module, hidden: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm_mixer, self.norm_mlp = nn.RMSNorm(dim, eps=EPS), nn.RMSNorm(dim, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, X, Y, dim)."""
        x = x + self.mixer(self.norm_mixer(x))
        changed: Tensor = x + self.mlp(self.norm_mlp(x))
        return changed


class PLSTMVision(nn.Module):
    r"""Classifier of images: patches, blocks of :class:`PLSTM2d` whose modes alternate P and D, and a linear head.

    Args:
        classes: Outputs.
        dim: Features of a patch.
        depth: Blocks.
        heads: Heads.
        channels: Channels of the images.
        patch: Side of the square patches; both sides of an image must be multiples of it.
        hidden: Width of the blocks' MLPs; default 4·dim.
        grid: Patches along either axis for a learned position embedding, resized bilinearly to other images' grids;
            ``None`` for no embedding: the scans know directions by themselves.
        pooling: ``"corners"``: the head sees the four corners' features side by side. ``"mean"``: their mean over all
            patches.
        layer: Options of :class:`PLSTM2d`.

    Shape:
        images (batch, X, Y, channels) → (batch, classes), for any X and Y.

    Returns:
        Calling it returns the logits.

    Raises:
        TypeError: A number that must be an integer is none.
        ValueError: An argument out of bounds, or images of another shape.

    Cost: that of ``depth`` layers and MLPs at (X/patch)·(Y/patch) places.

    Source: Pöppel et al., "pLSTM", 2025, section 5; blocks, norms, pooling and head as in the authors'
    ``vision_model``.
    """

    def __init__(
        self,
        classes: int,
        dim: int,
        depth: int,
        heads: int,
        *,
        channels: int = 3,
        patch: int = 16,
        hidden: int | None = None,
        grid: tuple[int, int] | None = None,
        pooling: Literal["corners", "mean"] = "corners",
        layer: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("classes", classes), ("depth", depth), ("channels", channels), ("patch", patch)):
            check_integer(name, value, at_least=1)
        if hidden is not None:
            check_integer("hidden", hidden, at_least=1)
        if grid is not None and (len(grid) != 2 or min(grid) < 1):
            raise ValueError(f"grid must be two positive numbers, got {grid}")
        check_choice("pooling", pooling, ("corners", "mean"))
        self.channels, self.patch, self.pooling = channels, patch, pooling
        self.blocks = nn.ModuleList(
            MixerBlock(dim, PLSTM2d(dim, heads, mode, **(layer or {})), hidden or 4 * dim)
            for mode, _ in zip(("P", "D") * depth, range(depth), strict=False)
        )
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        position = None if grid is None else nn.Parameter(torch.empty(1, dim, *grid))
        self.register_parameter("position", position)
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.head = nn.Linear(dim * (4 if pooling == "corners" else 1), classes)
        if position is not None:
            nn.init.normal_(position, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "batch x y channels"]) -> Float[Tensor, "batch classes"]:
        """Classify.

        Args:
            images: Images, channels last.
        """
        p = self.patch
        if images.ndim != 4 or images.shape[-1] != self.channels or images.shape[1] % p or images.shape[2] % p:
            wanted = f"(batch, X, Y, {self.channels}) with X and Y multiples of {p}"
            raise ValueError(f"images must be {wanted}, got {tuple(images.shape)}")
        x = self.embed(images.permute(0, 3, 1, 2))
        if self.position is not None:
            x = x + resized(self.position, x.shape[-2:])
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        pooled = x.mean((1, 2)) if self.pooling == "mean" else x[:, (0, -1, 0, -1), (0, 0, -1, -1)].flatten(1)
        logits: Tensor = self.head(pooled)
        return logits


def resized(embedding: Tensor, shape: torch.Size) -> Tensor:
    """Resize a position embedding (1, dim, X, Y) bilinearly to a grid of another shape."""
    if embedding.shape[-2:] == shape:
        return embedding
    return F.interpolate(embedding, size=tuple(shape), mode="bilinear", align_corners=False)
