"""The layer for directed acyclic graphs."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer
from provenn.nn._plstm_gates import SHUT, Gate, Projections, check_mode
from provenn.nn._plstm_graph import PreparedDAG, plstm_graph
from provenn.nn._plstm_operands import METHODS


class PLSTMGraph(nn.Module):
    r"""pLSTM on directed acyclic graphs: gates of a node's features, one for every slot of an incident edge.

    ``mode="P"``: what an edge passes on at a node is normalised over the edges out of it, t/(½ + Σ|t|), so that
    activation does not grow. ``mode="D"``: transitions are tanh t, and the line graph is pruned to at most one path
    between any two edges. Slots are the places of edges among those into, or out of, a node, in the graph's order.

    Args:
        dim: Features of a node, in and out.
        heads: Heads.
        mode: How activation moves.
        max_degree: The most edges into, and out of, a node.
        bidirectional: Whether the reversed graph is run too, with gates of its own, and added.
        constant_gates: Whether the gates are learned constants.
        method: As in :func:`plstm_graph`.

    Shape:
        x (batch, nodes, dim), ``dag`` the graph of every sample (or several, side by side, in one) →
        (batch, nodes, dim).

    Returns:
        Calling it returns the output.

    Raises:
        TypeError: A number that must be an integer is none.
        ValueError: ``dim`` not divisible by ``heads``, an argument out of bounds, another shape, or a node of ``dag``
            with more than ``max_degree`` edges.

    Cost: that of four dim × dim projections, heads·max_degree² gates a node, and of :func:`plstm_graph`. Under
    ``torch.compile`` use ``method="parallel"``; ``torch.export`` takes no prepared graph.

    Source: Pöppel et al., "pLSTM", 2025, section 3; starts of the gates as in the authors' ``plstm_graph_layer``.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mode: Literal["P", "D"],
        max_degree: int,
        *,
        bidirectional: bool = False,
        constant_gates: bool = False,
        method: Literal["recurrent", "parallel"] = "recurrent",
    ) -> None:
        super().__init__()
        check_mode(mode, "L")
        check_integer("max_degree", max_degree, at_least=1)
        check_choice("method", method, METHODS)
        self.dim, self.mode, self.max_degree, self.method = dim, mode, max_degree, method
        self.bidirectional = bidirectional
        self.projections = Projections(dim, heads, 1)
        ways = 2 if bidirectional else 1
        self.source, self.mark = (
            nn.ModuleList(Gate(dim, (heads, max_degree), SHUT, constant_gates) for _ in range(ways)) for _ in range(2)
        )
        start = 10 * torch.eye(max_degree)
        self.transition = nn.ModuleList(
            Gate(dim, (heads, max_degree, max_degree), start, constant_gates) for _ in range(ways)
        )
        self.direct = Gate(dim, (heads,), SHUT, constant_gates)

    def forward(self, x: Float[Tensor, "batch nodes dim"], dag: PreparedDAG) -> Float[Tensor, "batch nodes dim"]:
        """Run the layer.

        Args:
            x: Features of each node.
            dag: The graph.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (batch, nodes, {self.dim}), got {tuple(x.shape)}")
        if x.shape[1] != dag.nodes:
            raise ValueError(f"x must have the {dag.nodes} nodes of the graph, got {x.shape[1]}")
        if dag.max_degree > self.max_degree:
            raise ValueError(f"max_degree is {self.max_degree}, but a node of the graph has {dag.max_degree} edges")
        dag = dag.to(x.device)
        q, k, v = (one[..., 0] for one in self.projections(x, x))
        direct = torch.sigmoid(self.direct(x))
        heard = plstm_graph(q, k, v, *self.gates(x, dag, 0), direct, dag, method=self.method)
        if self.bidirectional:
            gates = self.gates(x, dag.reversed, 1)
            none = torch.zeros_like(direct)  # a node's own value is added once
            heard = heard + plstm_graph(q, k, v, *gates, none, dag.reversed, method=self.method)
        return self.projections.finish(heard[..., None], x)

    def gates(self, x: Tensor, dag: PreparedDAG, way: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return sources (batch, edges, heads), transitions (batch, pairs, heads) and marks (batch, edges, heads)."""
        tail, head = dag.edge_index
        before, after = dag.pairs
        source = torch.sigmoid(self.source[way](x))[:, tail, :, dag.out_slots].movedim(0, 1)
        mark = torch.sigmoid(self.mark[way](x))[:, head, :, dag.in_slots].movedim(0, 1)
        free = self.transition[way](x)[:, dag.pair_nodes, :, dag.in_slots[before], dag.out_slots[after]].movedim(0, 1)
        if self.mode == "D":
            return source, torch.tanh(free) * dag.multitree[:, None], mark
        total = torch.zeros_like(source).index_add(1, before, free.abs())
        return source, free / (0.5 + total[:, before]), mark
