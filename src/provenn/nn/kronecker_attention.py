"""How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker Computation.

Alman and Song, 2023. https://arxiv.org/abs/2310.04064

Attention whose queries score pairs of tokens (or tuples of k − 1):

    D⁻¹ exp(Q (K₁ ⊘ K₂)ᵀ / d) (V₁ ⊘ V₂),    (A ⊘ B)_{(j,l),c} = A_{jc} B_{lc}

exactly, in blocks that never hold n³ scores, or with a polynomial for exp, whose monomials factorise the sum over pairs
into (U₂ᵀV₁) ∘ (U₃ᵀV₂), almost linear time for bounded entries.

The exact function is in ``_kronecker_attention_exact``, its two passes in ``_kronecker_attention_blocks``; the
approximation is in ``_kronecker_attention_fast``, its polynomials in ``_kronecker_attention_polynomial``; the layer and
the construction for Match3 are in ``_kronecker_attention_layer``.
"""

from provenn.nn._kronecker_attention_exact import tensor_attention
from provenn.nn._kronecker_attention_fast import tensor_attention_poly
from provenn.nn._kronecker_attention_layer import KroneckerAttention, match3_layer
from provenn.nn._kronecker_attention_polynomial import PolynomialReport

__all__ = ["KroneckerAttention", "PolynomialReport", "match3_layer", "tensor_attention", "tensor_attention_poly"]
