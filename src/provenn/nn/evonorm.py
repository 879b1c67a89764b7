"""EvoNorm: layers that normalise and activate at once, the search that found them, and what puts them into a model.

Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", arXiv 2004.02967.
"""

from __future__ import annotations

from provenn.nn._evonorm_anchors import NormActAnchor
from provenn.nn._evonorm_graph import NormActGraph, NormActSpace
from provenn.nn._evonorm_graph_layer import NormActLayer
from provenn.nn._evonorm_layer import EvoNorm2d
from provenn.nn._evonorm_rejection import NormActRejection
from provenn.nn._evonorm_replace import replace_norm_act
from provenn.nn._evonorm_search import EvoNormSearch

__all__ = [
    "EvoNorm2d",
    "EvoNormSearch",
    "NormActAnchor",
    "NormActGraph",
    "NormActLayer",
    "NormActRejection",
    "NormActSpace",
    "replace_norm_act",
]
