"""A small causal language model of GPT-2's kind, the one that claims and tasks on text train."""

from __future__ import annotations

import math

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from provenn.core.experiment.checks import check_integer


class LanguageModel(nn.Module):
    """Predict each next token from the tokens before it: embeddings, pre-norm blocks, and a head tied to the tokens.

    Args:
        vocabulary: Number of tokens known, at least 1.
        dim: Width; the perceptrons inside are four times as wide.
        depth: Blocks.
        heads: Heads of attention; they divide ``dim``.
        length: Most tokens of a sequence, each with a learned position.

    Shape:
        Tokens (batch, length), integers below ``vocabulary`` → logits (batch, length, vocabulary).

    Raises:
        ValueError: A number < 1, or ``dim`` is not divisible by ``heads``; in the forward pass, too long a sequence.

    Cost: 12 · depth · dim² multiply–accumulates a token, vocabulary · dim for the head, and attention's
    2 · depth · length · dim. Linear maps have no biases, and queries, keys and values are maps of their own, so that
    every matrix is one layer to an optimizer.

    Source: Radford et al., "Language models are unsupervised multitask learners" (2019), for layout and initial
    weights: normal with standard deviation 0.02, and 0.02 / √(2 · depth) where a branch joins the residual stream.
    """

    def __init__(self, vocabulary: int, dim: int = 64, depth: int = 2, heads: int = 4, length: int = 64) -> None:
        super().__init__()
        sizes = {"vocabulary": vocabulary, "dim": dim, "depth": depth, "heads": heads, "length": length}
        for name, size in sizes.items():
            check_integer(name, size, at_least=1)
        if dim % heads:
            raise ValueError(f"dim must be divisible by heads, got {dim} and {heads}")
        self.length = length
        self.tokens, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*(_Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, param in self.named_parameters():
            if param.dim() > 1:
                joins = name.endswith(("attention.out_proj.weight", "mlp.2.weight"))
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * depth) if joins else 0.02)

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length vocabulary"]:
        """Return the logits of each next token.

        Args:
            tokens: Numbers of tokens.

        Raises:
            ValueError: The sequence is longer than ``length``.
        """
        if tokens.shape[1] > self.length:
            raise ValueError(f"tokens must have at most {self.length} a sequence, got {tokens.shape[1]}")
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(dim), _CausalAttention(dim, heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False))

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class _CausalAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.out_proj(seen.transpose(1, 2).flatten(2))
        return y


def next_token_loss(
    model: nn.Module, tokens: Int[Tensor, "batch length"], targets: Int[Tensor, "batch length"]
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of the next tokens, in nats.

    Args:
        model: Maps tokens to logits (batch, length, vocabulary).
        tokens: Numbers of tokens.
        targets: The tokens one place later.
    """
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
