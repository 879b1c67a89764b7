"""On the Initialization of Graph Neural Networks.

Li, Song, Song, Wipf, ICML 2023. https://arxiv.org/abs/2312.02622

Weights uniform on ±√(3 v_l), where v_l balances variances over layers by fan-in, fan-out, and how much of the features'
mean and of a constant gradient the graph's operator leaves:

    forward  v_1 = 2/m_0,  v_l = (2/m_{l−1}) ‖P^{l−1} x̄‖²/‖P^l x̄‖²
    backward v_L = N/((C − 1) ‖P 1‖²),  v_{L−k+1} = (2/m_1) ‖P^{k−1} 1‖²/‖P^k 1‖²
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer
from provenn.graphs._virgo_init_layers import PUBLISHED, Layer, layers_in_order, read_layer
from provenn.graphs._virgo_init_report import VarianceReport, variance_report
from provenn.graphs._virgo_init_variances import Combine, Mode, virgo_variances

__all__ = ["VarianceReport", "variance_report", "virgo_", "virgo_variances"]


def virgo_(
    module: nn.Module,
    edge_index: Int[Tensor, "2 edges"],
    x: Float[Tensor, "nodes features"],
    num_classes: int,
    mode: Mode = "both",
    combine: Combine = "harmonic",
    edge_weight: Float[Tensor, " edges"] | None = None,
    generator: torch.Generator | None = None,
    *,
    operator: Literal["own", "gcn"] = "own",
    layers: Sequence[nn.Module] | None = None,
) -> list[float]:
    r"""Initialise a network's message-passing layers in place, with variances that suit the graph.

    Weights are uniform on :math:`[-\sqrt{3 v_l}, \sqrt{3 v_l}]`: a GCN layer's weight; a SAGE layer's neighbour and
    self weights alike; the first and last linear map of a GIN layer's MLP, whose others get Kaiming's uniform by
    fan-in. Biases of these layers become zero; nothing else changes.

    Args:
        module: Contains ``GCNConv``, ``SAGEConv`` or ``GINConv`` of torch_geometric, connected one after the other.
        edge_index: Source and target of each edge of the training graph, or of a batch of training graphs.
        x: Features of the nodes.
        num_classes: C; 2 for link prediction.
        mode: ``"forward"``, ``"backward"``, or the mean of ``"both"``.
        combine: ``"harmonic"`` or ``"arithmetic"`` mean.
        edge_weight: Weight of each edge, for GCN layers; the others do not read it.
        generator: Draws the weights; ``None`` for torch's global generator.
        operator: What a layer's P is: its ``"own"`` aggregation, or the ``"gcn"`` operator
            D_out^(−½) (A + I) D_in^(−½) for all, as in the published code.
        layers: The message-passing layers in the order of the forward pass; ``None``: found by one call
            ``module(x, edge_index)`` in evaluation mode.

    Shape:
        ``edge_index`` (2, edges), ``x`` (nodes, features), ``edge_weight`` (edges,).

    Returns:
        v_1 … v_L.

    Raises:
        ValueError: ``module`` has no message-passing layer or one of another type, calls one twice, ``num_classes``
            < 2 where gradients count, an option is unknown, or a graph factor is zero, as in :func:`virgo_variances`.
        TypeError: ``num_classes`` is not an integer, or ``module`` cannot be called with (x, edge_index).
        ImportError: torch_geometric is missing; the extra ``provenn[graphs]`` brings it.

    Cost: 2L products of a sparse matrix with a vector, and one forward pass without ``layers``; nothing of N × N.

    Source: the paper's Algorithm for Virgo, and its code. There the last layer's gradients are taken equal over nodes.
    """
    check_choice("operator", operator, ("own", "gcn"))
    if mode != "forward":
        check_integer("num_classes", num_classes, at_least=2)
    found = layers_in_order(module, x, edge_index) if layers is None else list(layers)
    if not found:
        raise ValueError("layers must name one message-passing layer or more, got none")
    read = [read_layer(layer) for layer in found]
    kinds = [PUBLISHED if operator == "gcn" else layer.aggregation for layer in read]
    matrices = {kind: kind.matrix(edge_index.to(x.device), len(x), edge_weight) for kind in dict.fromkeys(kinds)}
    dims = [read[0].fan_in, *(layer.fan_out for layer in read)]
    variances = virgo_variances([matrices[kind].mv for kind in kinds], x, dims, num_classes, mode, combine)
    with torch.no_grad():
        for layer, variance in zip(read, variances, strict=True):
            _fill(layer, variance, generator)
    return variances


def _fill(layer: Layer, variance: float, generator: torch.Generator | None) -> None:
    bound = (3 * variance) ** 0.5
    for weight in layer.weights:
        weight.uniform_(-bound, bound, generator=generator)
    for weight in layer.inner:
        nn.init.kaiming_uniform_(weight, nonlinearity="relu", generator=generator)
    for bias in layer.biases:
        bias.zero_()
