"""pLSTM: parallelizable Linear Source Transition Mark networks.

Pöppel, Freinschlag, Schmied, Lin, Hochreiter, 2025. https://arxiv.org/abs/2506.11997; the authors' code:
https://github.com/ml-jku/plstm

A linear recurrent network on directed acyclic graphs. States C live on edges: at a node m a source gate writes k_m v_mᵀ
to the edges out of it, transition gates pass the states of the edges into it on to those, and mark gates read them,

    C_e = s_e k_m v_mᵀ + Σ_{e' → e} t_{e'e} C_{e'},    h_n = Σ_{e → n} μ_e q_nᵀ C_e + δ_n (q_nᵀ k_n) v_n

so that the coefficient of v_m in h_n is q_nᵀ k_m times a sum over all paths from m to n of the products of their gates.
Being linear, it has a parallel form (G ∘ QKᵀ)V, whose G is put together by doubling. Two modes keep activation
from growing: P splits what enters a node over what leaves it, D leaves one path between two edges.

The scans are in ``_plstm_scan_1d``, ``_plstm_scan_2d`` and ``_plstm_graph``, the layers in ``_plstm_layers`` and
``_plstm_graph_layer``, their gates in ``_plstm_gates``, the classifier in ``_plstm_vision``, its task in
``_plstm_arrow``.
"""

from provenn.nn._plstm_arrow import arrow_pointing
from provenn.nn._plstm_graph import PreparedDAG, plstm_graph
from provenn.nn._plstm_graph_layer import PLSTMGraph
from provenn.nn._plstm_layers import PLSTM1d, PLSTM2d
from provenn.nn._plstm_scan_1d import plstm_scan_1d
from provenn.nn._plstm_scan_2d import plstm_scan_2d
from provenn.nn._plstm_vision import PLSTMVision

__all__ = [
    "PLSTM1d",
    "PLSTM2d",
    "PLSTMGraph",
    "PLSTMVision",
    "PreparedDAG",
    "arrow_pointing",
    "plstm_graph",
    "plstm_scan_1d",
    "plstm_scan_2d",
]
