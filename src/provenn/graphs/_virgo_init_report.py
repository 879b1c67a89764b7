"""Variances of outputs and gradients over the depth of a message-passing network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor, nn

from provenn.core.experiment.recording import evaluating
from provenn.core.experiment.reports import Report
from provenn.graphs._virgo_init_layers import layers_in_order


@dataclass(frozen=True)
class VarianceReport(Report):
    """Mean squares over nodes and units, one entry a message-passing layer, first to last.

    Weights have mean zero, and so have pre-activations and their gradients: their mean square is their variance over
    initialisations.
    """

    forward: tuple[float, ...]
    """Of the layers' outputs, before any activation."""
    backward: tuple[float, ...]
    """Of the gradients of the mean cross-entropy in them; empty without labels."""

    def plot(self) -> Figure:
        """Draw both over depth on a logarithmic scale."""
        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axes = figure.subplots()
        for name, values in (("pre-activations", self.forward), ("gradients", self.backward)):
            if values:
                axes.semilogy(range(1, len(values) + 1), values, "o-", label=name)
        axes.set(xlabel="layer", ylabel="mean square")
        axes.legend()
        return figure


def variance_report(
    module: nn.Module,
    x: Float[Tensor, "nodes features"],
    edge_index: Int[Tensor, "2 edges"],
    y: Int[Tensor, " nodes"] | None = None,
) -> VarianceReport:
    """Measure how variances of outputs and gradients run over the depth of a network.

    Args:
        module: Called as ``module(x, edge_index)`` in evaluation mode; returns a row of scores a node. Its modes,
            gradients and hooks are left as they are.
        x: Features of the nodes.
        edge_index: Source and target of each edge.
        y: Classes of the nodes, −100 where there is none; ``None`` leaves gradients out.

    Shape:
        ``x`` (nodes, features), ``edge_index`` (2, edges), ``y`` (nodes,).

    Returns:
        The report.

    Raises:
        ValueError: ``module`` has no message-passing layer, or calls one twice; or ``y`` has another length than ``x``.
        TypeError: ``module`` cannot be called with (x, edge_index).
        ImportError: torch_geometric is missing; the extra ``provenn[graphs]`` brings it.

    Cost: two forward passes and one backward; the memory of one training step.

    Source: the paper's measurement of variances over layers.
    """
    if y is not None and y.shape != x.shape[:1]:
        raise ValueError(f"y must have shape ({len(x)},), got {tuple(y.shape)}")
    layers = layers_in_order(module, x, edge_index)
    outputs: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        outputs.append(output)
        return output.clone()  # an activation in place must not reach what is measured

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        with evaluating(module), torch.enable_grad():
            scores = module(x.detach().requires_grad_(y is not None), edge_index)
            forward = tuple(_mean_square(output) for output in outputs)
            backward: tuple[float, ...] = ()
            if y is not None:
                loss = nn.functional.cross_entropy(scores, y)
                backward = tuple(_mean_square(slope) for slope in torch.autograd.grad(loss, outputs))
    finally:
        for handle in handles:
            handle.remove()
    return VarianceReport(forward, backward)


def _mean_square(values: Tensor) -> float:
    return values.detach().double().square().mean().item()
