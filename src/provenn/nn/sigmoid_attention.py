"""Theory, Analysis, and Best Practices for Sigmoid Self-Attention.

Ramapuram, Danieli, Dhekane, Weers, Busbridge, Ablin, Likhomanenko, Digani, Gu, Shidani, Webb, ICLR 2025.
https://arxiv.org/abs/2409.04431; the authors' code: https://github.com/apple/ml-sigmoid-attention

Attention whose weights are an elementwise sigmoid of the scores, with a bias −log n that starts them as small as
softmax's:

    SigmoidAttn(Q, K, V) = σ(QKᵀ/√d + b) V,    b = −log n

The layer is in ``_sigmoid_attention_layer``, the function in ``_sigmoid_attention_functional``, its CUDA kernel in
``_sigmoid_attention_triton``; blocks, positions and masks are shared, in ``provenn.core.sequences``.
"""

from provenn.nn._sigmoid_attention_functional import sigmoid_attention
from provenn.nn._sigmoid_attention_layer import SigmoidAttention
from provenn.nn._sigmoid_attention_regularity import AttentionRegularity, attention_regularity
from provenn.nn._sigmoid_attention_replace import replace_attention

__all__ = ["AttentionRegularity", "SigmoidAttention", "attention_regularity", "replace_attention", "sigmoid_attention"]
