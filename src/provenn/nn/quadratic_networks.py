"""On Expressivity and Trainability of Quadratic Networks.

Fan, Li, Wang, Lai, Wang, IEEE Transactions on Neural Networks and Learning Systems 2023.
https://arxiv.org/abs/2110.06081; the authors' code: https://github.com/FengleiFan/ReLinear

Neurons that are quadratic in their input, at three times the cost of a linear neuron:

    q(x) = (w_rᵀx + b_r)(w_gᵀx + b_g) + w_bᵀ(x ⊙ x) + c

and ReLinear, which trains them: start at w_g = 0, b_g = 1, w_b = 0, c = 0, where the network is an ordinary one, and
hold the quadratic part back by a small learning rate or by shrinking it.

The layers are in ``_quadratic_networks_layers``, ReLinear and the conversion of models in
``_quadratic_networks_relinear``, the residual network in ``_quadratic_networks_resnet``, and the instruments of
expressivity in ``_quadratic_networks_probes``.
"""

from provenn.nn._quadratic_networks_layers import QuadraticConv2d, QuadraticLinear, relinear_init_
from provenn.nn._quadratic_networks_probes import (
    PolynomialPieces,
    VarietyDimension,
    polynomial_pieces,
    variety_dimension,
)
from provenn.nn._quadratic_networks_relinear import ReLinearShrink, quadratize, relinear_param_groups
from provenn.nn._quadratic_networks_resnet import QResNet

__all__ = [
    "PolynomialPieces",
    "QResNet",
    "QuadraticConv2d",
    "QuadraticLinear",
    "ReLinearShrink",
    "VarietyDimension",
    "polynomial_pieces",
    "quadratize",
    "relinear_init_",
    "relinear_param_groups",
    "variety_dimension",
]
