"""The transformers of the claim: a vision transformer and a character model, with the attention left open."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

AttentionFactory = Callable[[], nn.Module]


class Block(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, attention: AttentionFactory) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(dim), attention()
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Return the block's output."""
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class VisionTransformer(nn.Module):
    """Patches, learned positions, blocks, mean pooling, a linear map to the classes."""

    def __init__(
        self,
        image: int,
        channels: int,
        patch: int,
        dim: int,
        depth: int,
        attention: AttentionFactory,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((image // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, attention) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of the classes."""
        tokens = self.patches(x).flatten(2).mT + self.positions
        out: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return out


class CharacterModel(nn.Module):
    """Characters, blocks (positions are the attention's affair), a linear map to the next character."""

    def __init__(self, vocabulary: int, dim: int, depth: int, attention: AttentionFactory) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(dim, attention) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary)

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length vocabulary"]:
        """Return the logits of each next character."""
        out: Tensor = self.head(self.norm(self.blocks(self.embedding(tokens))))
        return out
