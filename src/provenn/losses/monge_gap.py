"""The Monge Gap: A Regularizer to Learn All Transport Maps.

Uscidda and Cuturi, ICML 2023. https://arxiv.org/abs/2302.04953

The gap between what a map T costs on samples of a reference measure ρ, and the cheapest transport between ρ and its
own image, is 0 just for optimal maps. Added to a loss that fits the image of μ to ν, it teaches any network an optimal
map, for any differentiable cost c:

    M_ρ(T) = E_ρ c(x, T(x)) − W_c(ρ, T♯ρ)
    min_θ Δ(T_θ♯μ, ν) + λ M_ρ(T_θ)

The rooms: ``_monge_gap_costs``, ``_monge_gap_loss`` (the gap), ``_monge_gap_fitting`` (choices of Δ),
``_monge_gap_maps`` (networks, gradients of potentials, closed forms), ``_monge_gap_trainer``, ``_monge_gap_metrics``.
"""

from provenn.losses._monge_gap_costs import ElasticCost, PNormCost
from provenn.losses._monge_gap_fitting import EnergyDistance, MaximumMeanDiscrepancy, SinkhornDivergence
from provenn.losses._monge_gap_loss import MongeGap
from provenn.losses._monge_gap_maps import (
    GradientMap,
    InputConvexNetwork,
    TransportMLP,
    entropic_map,
    gaussian_ot_map,
)
from provenn.losses._monge_gap_metrics import l2_uvp, transport_cost_ratio
from provenn.losses._monge_gap_trainer import MongeMapEstimator

__all__ = [
    "ElasticCost",
    "EnergyDistance",
    "GradientMap",
    "InputConvexNetwork",
    "MaximumMeanDiscrepancy",
    "MongeGap",
    "MongeMapEstimator",
    "PNormCost",
    "SinkhornDivergence",
    "TransportMLP",
    "entropic_map",
    "gaussian_ot_map",
    "l2_uvp",
    "transport_cost_ratio",
]
