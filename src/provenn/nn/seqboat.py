"""Sparse Modular Activation for Efficient Sequence Modeling.

Ren, Liu, Wang, Xu, Zhu, Zhai, NeurIPS 2023. https://arxiv.org/abs/2306.11197; the authors' code:
https://github.com/renll/SeqBoat

A sequence layer that runs a linear state-space model on every element, and a gated attention unit only on the elements
that a learned router selects; these are packed, so that a short window of attention reaches far in time.

The state-space models are in ``_seqboat_ssm``, router and packing in ``_seqboat_sma``, attention in ``_seqboat_gau``
and its windows in ``_seqboat_blocks``, the layer in ``_seqboat_layer``, the model in ``_seqboat_model``.
"""

from provenn.nn._seqboat_gau import GatedAttentionUnit
from provenn.nn._seqboat_layer import SeqBoatLayer
from provenn.nn._seqboat_model import SeqBoat
from provenn.nn._seqboat_sma import SparseModularActivation, compress, extract
from provenn.nn._seqboat_ssm import MultiHeadEMA

__all__ = [
    "GatedAttentionUnit",
    "MultiHeadEMA",
    "SeqBoat",
    "SeqBoatLayer",
    "SparseModularActivation",
    "compress",
    "extract",
]
