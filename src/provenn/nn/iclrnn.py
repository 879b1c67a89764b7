"""Input Convex Lipschitz RNN: A Fast and Robust Approach for Engineering Tasks.

Wang, Pravin, Wu, 2024. https://arxiv.org/abs/2401.07494; the authors' code:
https://github.com/killingbear999/ICLRNN

Recurrent layers h_t = ReLU(W [x_t; −x_t] + U h_{t−1} + b) with non-negative matrices of spectral norm 1, so that the
outputs are convex in the whole sequence of inputs and of bounded gain, and control by a learned model is a convex
problem.

The layers are in ``_iclrnn_layers``, the projection in ``_iclrnn_constraint``, the networks they are compared with in
``_iclrnn_baselines``, the plant in ``_iclrnn_plant``, the controller in ``_iclrnn_control`` and its search in
``_iclrnn_search``.
"""

from provenn.nn._iclrnn_baselines import ICRNN, LipschitzRNN
from provenn.nn._iclrnn_constraint import nonnegative_spectral_
from provenn.nn._iclrnn_control import NeuralMPC
from provenn.nn._iclrnn_layers import ICLRNN, ICLRNNCell
from provenn.nn._iclrnn_plant import CSTR

__all__ = ["CSTR", "ICLRNN", "ICRNN", "ICLRNNCell", "LipschitzRNN", "NeuralMPC", "nonnegative_spectral_"]
