"""What sigmoid attention is compared with: softmax and ReLU/n, in the same layer with the same parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from provenn.core.sequences.attention import ScoreTerms, attention_scores, reference_attention
from provenn.core.sequences.masks import Mask
from provenn.nn._sigmoid_attention_layer import SigmoidAttention


class SoftmaxAttention(SigmoidAttention):
    """The same layer with softmax weights; it has no bias term, which softmax would not notice.

    A query that sees no key gets weights 0.
    """

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with projected heads; see the base class."""
        scores = attention_scores(q, k, unbiased_terms(self, mask, causal))
        hidden = scores == float("-inf")
        # Softmax of a row that is hidden whole is NaN, and so is its gradient; a large finite score avoids both.
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(dim=-1).masked_fill(hidden, 0.0)
        if self.training and self.dropout > 0:
            weights = torch.dropout(weights, self.dropout, train=True)
        return torch.matmul(weights, v.to(weights.dtype)).to(v.dtype), weights


class ReluAttention(SigmoidAttention):
    """The same layer with weights relu(s)/n, n being the number of keys."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with projected heads; see the base class."""
        dropout = self.dropout if self.training else 0.0
        output, weights = reference_attention(q, k, v, "relu", unbiased_terms(self, mask, causal), dropout)
        return output / k.shape[-2], weights / k.shape[-2]


def unbiased_terms(layer: SigmoidAttention, mask: Mask | None, causal: bool) -> ScoreTerms:
    """Return the layer's score terms without its bias."""
    scale = layer.sharpness / math.sqrt(layer.head_dim)
    slopes = layer.slopes(layer.q_proj.weight)
    return ScoreTerms(scale=scale, mask=mask, causal=causal, alibi_slopes=slopes)


BASELINES = {"softmax": SoftmaxAttention, "relu": ReluAttention}
