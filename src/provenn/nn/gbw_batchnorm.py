"""Learning to Normalize on the SPD Manifold under Bures-Wasserstein Geometry.

CVPR 2025. https://arxiv.org/abs/2504.00660; the authors' code: https://github.com/jjscc/GBWBN

Batch normalisation of symmetric positive definite matrices under the generalised Bures–Wasserstein metric of a
learnable matrix M, on powers X^θ. With X̃ = M^{−½} X^θ M^{−½}, G̃ likewise of the bias, B the batch's barycentre, v its
variance and Γ the parallel transport:

    V = Γ_{B→I}(log_B X̃),   Y = exp_I V,   Z = exp_I(s / √(v + ε) · log_I Y),   out = exp_G̃(Γ_{I→G̃}(log_I Z))

The geometry is in ``_gbw_batchnorm_geometry``, the normalisations in ``_gbw_batchnorm_norms`` and their statistics in
``_gbw_batchnorm_means``, the network that they stand in in ``_gbw_batchnorm_layers``, its optimizer in
``_gbw_batchnorm_optimizer``.
"""

from provenn.nn._gbw_batchnorm_geometry import barycenter, dist, exp, geodesic, log, transport
from provenn.nn._gbw_batchnorm_layers import BiMap, LogEig, ReEig, SPDNet
from provenn.nn._gbw_batchnorm_norms import GBWBatchNorm, SPDBatchNorm
from provenn.nn._gbw_batchnorm_optimizer import RiemannianSGD, manifold_groups

__all__ = [
    "BiMap",
    "GBWBatchNorm",
    "LogEig",
    "ReEig",
    "RiemannianSGD",
    "SPDBatchNorm",
    "SPDNet",
    "barycenter",
    "dist",
    "exp",
    "geodesic",
    "log",
    "manifold_groups",
    "transport",
]
