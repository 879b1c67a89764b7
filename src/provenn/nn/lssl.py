"""Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers.

Gu, Johnson, Goel, Saab, Dao, Rudra, Ré, NeurIPS 2021. https://arxiv.org/abs/2110.13985; the authors' code:
https://github.com/state-spaces/s4 (module ``lssl``)

A sequence layer that is a linear continuous-time system for each feature,

    ẋ = Ax + Bu,   y = Cx + Du,

discretised at a step Δ. It runs as a recurrence, as one long convolution, or at another sampling rate, and with HiPPO
matrices A it remembers over thousands of steps.

The layer is in ``_lssl_layer``, the bare system with its three views in ``_lssl_system``, A and B in
``_lssl_transition``, the kernel in ``_lssl_kernel``; what the layer shares with gated and nonlinear recurrences is in
``_lssl_relations``. HiPPO matrices, the transform and the Krylov matrix are shared, in
``provenn.core.sequences.state_space``.
"""

from provenn.core.sequences.state_space import hippo, krylov
from provenn.nn._lssl_layer import LSSL, LSSLModel, lssl_parameter_groups
from provenn.nn._lssl_relations import gated_recurrence, picard_iteration
from provenn.nn._lssl_system import LinearStateSpace
from provenn.nn._lssl_transition import DenseTransition, StructuredTransition, gbt

__all__ = [
    "LSSL",
    "DenseTransition",
    "LSSLModel",
    "LinearStateSpace",
    "StructuredTransition",
    "gated_recurrence",
    "gbt",
    "hippo",
    "krylov",
    "lssl_parameter_groups",
    "picard_iteration",
]
