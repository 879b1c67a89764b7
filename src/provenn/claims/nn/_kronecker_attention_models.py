"""Match3's data, and the models that learn it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.nn import KroneckerAttention

THIRD, ONE, TWO = "third order", "one ordinary layer", "two ordinary layers"
ARMS = (THIRD, ONE, TWO)


def sequences(
    count: int, length: int, modulus: int, generator: torch.Generator
) -> tuple[Int[Tensor, "count length"], Bool[Tensor, "count length"]]:
    """Draw tokens uniformly, and say of each whether two tokens of its sequence bring it to 0 (mod M).

    Args:
        count: Sequences.
        length: n.
        modulus: M.
        generator: Draws the tokens.
    """
    tokens = torch.randint(modulus, (count, length), generator=generator)
    sums = tokens[:, :, None, None] + tokens[:, None, :, None] + tokens[:, None, None, :]
    return tokens, (sums % modulus == 0).flatten(2).any(dim=-1)


class ThirdOrderBlock(nn.Module):
    """One layer of third-order attention beside the identity: 4 heads of 8 features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = KroneckerAttention(width, 4, head_dim=8)

    def forward(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Attend, and add the input."""
        attended: Tensor = self.attention(x)
        return x + attended


class Match3Model(nn.Module):
    """Fixed angles of the tokens, an arm's layers, and a small perceptron that answers for every token.

    Args:
        arm: One of ``ARMS``.
        modulus: M.
    """

    def __init__(self, arm: str, modulus: int) -> None:
        super().__init__()
        self.modulus = modulus
        width = 12 if arm == THIRD else 32
        self.embedding = nn.Linear(2, width)
        self.layers: nn.Module
        if arm == THIRD:
            self.layers = ThirdOrderBlock(width)
        else:
            self.layers = nn.Sequential(
                *(
                    nn.TransformerEncoderLayer(width, 4, 32, dropout=0.0, batch_first=True, norm_first=True)
                    for _ in range(1 if arm == ONE else 2)
                )
            )
        self.answer = nn.Sequential(nn.Linear(width, 24), nn.ReLU(), nn.Linear(24, 1))

    def forward(self, tokens: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
        """Return one logit a token."""
        angles = 2 * math.pi * tokens.to(self.embedding.weight.dtype) / self.modulus
        x = self.embedding(torch.stack([angles.cos(), angles.sin()], dim=-1))
        logits: Tensor = self.answer(self.layers(x))
        return logits.squeeze(-1)
