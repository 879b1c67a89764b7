"""Message-passing layers of torch_geometric: their order, their aggregation, and their weights by role."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from provenn.core.experiment.recording import evaluating
from provenn.core.graphs.propagation import add_self_loops, adjacency, fill_self_loops, normalize


def _convolutions() -> Any:
    try:
        from torch_geometric.nn import conv
    except ImportError as error:
        raise ImportError("virgo_ reads layers of torch_geometric: pip install 'provenn[graphs]'") from error
    return conv


def layers_in_order(module: nn.Module, x: Tensor, edge_index: Tensor) -> list[nn.Module]:
    """Return a module's message-passing layers in the order in which a forward pass calls them.

    Raises:
        ValueError: There is none, or one is called twice.
        TypeError: The module cannot be called with (x, edge_index).
    """
    conv = _convolutions()
    candidates = [one for one in module.modules() if isinstance(one, conv.MessagePassing)]
    if not candidates:
        raise ValueError(f"module {type(module).__name__} has no message-passing layer of torch_geometric")
    try:
        if type(module).forward is nn.Module.forward:
            raise TypeError("it has no forward")
        inspect.signature(module.forward).bind(x, edge_index)
    except TypeError as error:
        raise TypeError(
            f"module cannot be called with (x, edge_index): name its layers, in order, by layers= ({error})"
        ) from None
    called: list[nn.Module] = []
    caches = [(one, name) for one in candidates for name in vars(one) if name.startswith("_cached_")]
    held = [getattr(one, name) for one, name in caches]
    handles = [one.register_forward_pre_hook(lambda layer, inputs: called.append(layer)) for one in candidates]
    try:
        like = next(module.parameters())
        with evaluating(module):
            module(x.to(like), edge_index.to(like.device))
    finally:
        for handle in handles:
            handle.remove()
        for (one, name), value in zip(caches, held, strict=True):
            setattr(one, name, value)
    if len({id(layer) for layer in called}) < len(called):
        raise ValueError("module calls a message-passing layer twice, which has one variance to serve two depths")
    return called


class Aggregation(NamedTuple):
    """What a layer makes of its neighbours' signals; layers that agree in it share one operator."""

    aggr: str
    flow: str
    weighted: bool = False
    filled_loops: float = 0.0
    added_loops: float = 0.0
    power: float | None = None
    column_degrees: bool = False

    def matrix(self, edge_index: Tensor, nodes: int, edge_weight: Tensor | None) -> Tensor:
        """Return the operator: row i gathers what node i receives."""
        towards = edge_index.flip(0) if self.flow == "target_to_source" else edge_index
        A = adjacency(towards, nodes, edge_weight if self.weighted else None, torch.float64)
        if self.filled_loops:
            A = fill_self_loops(A, self.filled_loops)
        if self.added_loops:
            A = add_self_loops(A, self.added_loops)
        return A if self.power is None else normalize(A, self.power, self.column_degrees)


PUBLISHED = Aggregation("add", "source_to_target", True, filled_loops=1.0, power=0.5, column_degrees=True)
"""The operator of the published code, for layers of every type."""


class Layer(NamedTuple):
    """What the initialisation has to know of a layer."""

    aggregation: Aggregation
    fan_in: int
    fan_out: int
    weights: list[Tensor]
    inner: list[Tensor]
    biases: list[Tensor]


def read_layer(layer: Any) -> Layer:
    """Return a layer's aggregation and weights.

    Raises:
        ValueError: It is of a type, or aggregates in a way, that the initialisation does not know.
    """
    conv = _convolutions()
    known = {"add", "sum"}
    if isinstance(layer, conv.GCNConv):
        linears = [layer.lin]
        loops = (2.0 if layer.improved else 1.0) if layer.add_self_loops and layer.normalize else 0.0
        power = 0.5 if layer.normalize else None
        aggregation = Aggregation(layer.aggr, layer.flow, True, filled_loops=loops, power=power)
    elif isinstance(layer, conv.SAGEConv):
        linears = [layer.lin_l, *([layer.lin_r] if layer.root_weight else [])]
        aggregation = Aggregation(layer.aggr, layer.flow, power=0.0 if layer.aggr == "mean" else None)
        known = known | {"mean"}
    elif isinstance(layer, conv.GINConv):
        linears = [one for one in layer.nn.modules() if isinstance(one, nn.Linear)]
        if not linears:
            raise ValueError("module has a GINConv without an nn.Linear")
        aggregation = Aggregation(layer.aggr, layer.flow, added_loops=1 + float(layer.eps))
    else:
        raise ValueError(
            f"module has a {type(layer).__name__}; known are GCNConv, SAGEConv and GINConv: use virgo_variances"
        )
    if layer.aggr not in known:
        raise ValueError(f"module has a {type(layer).__name__} that aggregates by {layer.aggr!r}: use virgo_variances")
    inner = linears[1:-1]
    return Layer(
        aggregation,
        fan_in=linears[0].weight.shape[1],
        fan_out=linears[-1].weight.shape[0],
        weights=[one.weight for one in linears if one not in inner],
        inner=[one.weight for one in inner],
        biases=[one.bias for one in (*linears, layer) if getattr(one, "bias", None) is not None],
    )
