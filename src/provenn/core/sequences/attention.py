"""Attention whose weights are an elementwise function of the scores.

With queries Q (L × d), keys K (S × d), values V (S × e), a slope m ≥ 0 a head, and a function φ of one number:

    S_ij = scale · ⟨q_i, k_j⟩ − m · |i − j| + mask_ij + bias_i,        output_i = Σ_j φ(S_ij) v_j

No row is normalised, so every key's term stands alone: blocks of keys add up exactly, without the running maximum and
sum that softmax needs. Two ways to compute it: :func:`reference_attention`, plain operations that hold all L · S
weights, and :func:`blocked_attention`, which never holds more than one block of them, forward or backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.sequences.masks import Mask, causal_mask

Queries = Float[Tensor, "*batch queries head"]
Keys = Float[Tensor, "*batch keys head"]
Values = Float[Tensor, "*batch keys value"]
Outputs = Float[Tensor, "*batch queries value"]


@dataclass(frozen=True)
class Activation:
    """A function φ of one score with φ(−∞) = 0, so that hidden keys weigh nothing.

    Args:
        weigh: φ, elementwise.
        weigh_: φ in place.
        chain: ``chain(gradient, weights)`` is the gradient by the scores, from that by the weights φ(s).
    """

    weigh: Callable[[Tensor], Tensor]
    weigh_: Callable[[Tensor], Tensor]
    chain: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "sigmoid": Activation(torch.sigmoid, torch.sigmoid_, torch.ops.aten.sigmoid_backward),
    "relu": Activation(torch.relu, torch.relu_, lambda gradient, weights: gradient * (weights > 0)),
}


class ScoreTerms(NamedTuple):
    """What is added to the scaled products of queries and keys.

    Args:
        scale: Factor of the products.
        bias: A number, or a tensor broadcastable to (..., L, 1).
        mask: Broadcastable to (..., L, S): boolean, True where a query may look, or added.
        causal: Whether query i sees keys up to position S − L + i alone.
        alibi_slopes: m, broadcastable to the leading dimensions, such as (heads,). No gradient flows to it.
    """

    scale: float
    bias: Tensor | float = 0.0
    mask: Mask | None = None
    causal: bool = False
    alibi_slopes: Float[Tensor, "..."] | None = None


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type that scores and weights are computed in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def distance(queries: int, keys: int, device: torch.device | None, dtype: torch.dtype) -> Float[Tensor, "queries keys"]:
    """Return |i − j| of every query's and key's position; the last query stands where the last key does."""
    rows = torch.arange(keys - queries, keys, device=device)
    return (rows[:, None] - torch.arange(keys, device=device)).abs().to(dtype)


def attention_scores(q: Queries, k: Keys, terms: ScoreTerms) -> Float[Tensor, "*batch queries keys"]:
    """Return the scores S in float32 at least; −∞ where a key is hidden.

    Args:
        q: Queries.
        k: Keys.
        terms: What is added to the products.

    Shape:
        q (..., L, d), k (..., S, d) → (..., L, S).
    """
    dtype = wide(q.dtype)
    queries, keys = q.shape[-2], k.shape[-2]
    scores = torch.matmul(q.to(dtype), k.to(dtype).mT) * terms.scale
    if terms.alibi_slopes is not None:
        slopes = terms.alibi_slopes.to(dtype)[..., None, None]
        scores = scores - slopes * distance(queries, keys, q.device, dtype)
    scores = scores + terms.bias
    if terms.mask is not None and terms.mask.dtype != torch.bool:
        scores = scores + terms.mask
    elif terms.mask is not None:
        scores = scores.masked_fill(~terms.mask, float("-inf"))
    if terms.causal:
        scores = scores.masked_fill(~causal_mask(queries, keys, q.device, keys - queries), float("-inf"))
    return scores


def reference_attention(
    q: Queries, k: Keys, v: Values, activation: str, terms: ScoreTerms, dropout_p: float = 0.0
) -> tuple[Outputs, Float[Tensor, "*batch queries keys"]]:
    """Attend by plain operations: every transform of torch works, and all L · S weights are held.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        activation: φ, a key of ``ACTIVATIONS``.
        terms: What the scores are made of beside the products.
        dropout_p: Share of weights that are dropped.

    Shape:
        q (..., L, d), k (..., S, d), v (..., S, e) → output (..., L, e), weights (..., L, S).

    Returns:
        The output in the type of ``v``, and the weights (after dropout) in float32 at least.
    """
    weights = ACTIVATIONS[activation].weigh(attention_scores(q, k, terms))
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, train=True)
    return torch.matmul(weights, v.to(weights.dtype)).to(v.dtype), weights
