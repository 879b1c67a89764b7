"""Message-passing layers of torch_geometric: their order, their aggregation, and their weights by role."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from provenn.core.experiment.recording import evaluating
from provenn.core.graphs.propagation import add_self_loops, adjacency, fill_self_loops, normalize


class Layer(NamedTuple):
    """What the initialisation has to know of a layer."""

    operator: Callable[[Tensor], Tensor]
    fan_in: int
    fan_out: int
    weights: list[Tensor]
    inner: list[Tensor]
    biases: list[Tensor]


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


def read_layer(
    layer: nn.Module, edge_index: Tensor, nodes: int, edge_weight: Tensor | None, operator: Literal["own", "gcn"]
) -> Layer:
    """Return a layer's aggregation and weights.

    Raises:
        ValueError: It is of a type that the initialisation does not know.
    """
    conv = _convolutions()
    own: Callable[[Any, Tensor, int, Tensor | None], Tensor]
    if isinstance(layer, conv.GCNConv):
        own, linears = _gcn, [layer.lin]
    elif isinstance(layer, conv.SAGEConv):
        own, linears = _sage, [layer.lin_l, *([layer.lin_r] if layer.root_weight else [])]
    elif isinstance(layer, conv.GINConv):
        own, linears = _gin, [one for one in layer.nn.modules() if isinstance(one, nn.Linear)]
        if not linears:
            raise ValueError("module has a GINConv without an nn.Linear")
    else:
        raise ValueError(
            f"module has a {type(layer).__name__}; known are GCNConv, SAGEConv and GINConv: use virgo_variances"
        )
    P = _published(edge_index, nodes, edge_weight) if operator == "gcn" else own(layer, edge_index, nodes, edge_weight)
    inner = linears[1:-1]
    biases = [one.bias for one in (*linears, layer) if getattr(one, "bias", None) is not None]
    return Layer(
        P.mv,
        fan_in=linears[0].weight.shape[1],
        fan_out=linears[-1].weight.shape[0],
        weights=[one.weight for one in linears if one not in inner],
        inner=[one.weight for one in inner],
        biases=biases,
    )


def _gcn(layer: Any, edge_index: Tensor, nodes: int, edge_weight: Tensor | None) -> Tensor:
    A = _adjacency(layer, edge_index, nodes, edge_weight, ("add", "sum"))
    if not layer.normalize:
        return A
    if layer.add_self_loops:
        A = fill_self_loops(A, 2.0 if layer.improved else 1.0)
    return normalize(A)


def _sage(layer: Any, edge_index: Tensor, nodes: int, edge_weight: Tensor | None) -> Tensor:
    A = _adjacency(layer, edge_index, nodes, None, ("mean", "add", "sum"))
    return normalize(A, r=0.0) if layer.aggr == "mean" else A


def _gin(layer: Any, edge_index: Tensor, nodes: int, edge_weight: Tensor | None) -> Tensor:
    A = _adjacency(layer, edge_index, nodes, None, ("add", "sum"))
    return add_self_loops(A, 1 + float(layer.eps))


def _published(edge_index: Tensor, nodes: int, edge_weight: Tensor | None) -> Tensor:
    A = fill_self_loops(adjacency(edge_index, nodes, edge_weight, torch.float64))
    return normalize(A, column_degrees=True)


def _adjacency(
    layer: Any, edge_index: Tensor, nodes: int, edge_weight: Tensor | None, known: tuple[str, ...]
) -> Tensor:
    if layer.aggr not in known:
        raise ValueError(f"module has a {type(layer).__name__} that aggregates by {layer.aggr!r}, known are {known}")
    towards = edge_index.flip(0) if layer.flow == "target_to_source" else edge_index
    return adjacency(towards, nodes, edge_weight, torch.float64)
