"""pLSTM on any directed acyclic graph: its line graph, prepared once, and the recurrence over it."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer
from provenn.core.sequences.graph_scans import AcyclicSchedule, acyclic_recurrence
from provenn.nn._plstm_operands import METHODS


class PreparedDAG:
    """A directed acyclic graph with its line graph: which edges pass their states on to which.

    Args:
        edge_index: Each edge's first and second node.
        nodes: How many there are; default one more than the largest number in ``edge_index``.

    Shape:
        edge_index (2, E); ``pairs`` (2, L): for each pair of an edge into a node and an edge out of it the two edges;
        ``pair_nodes`` (L,): that node; ``in_slots`` and ``out_slots`` (E,): the place of each edge among those into its
        second node, and among those out of its first, in the order of ``edge_index``; ``multitree`` (L,): whether a
        pair stays when the line graph is pruned until at most one path joins any two edges.

    Raises:
        ValueError: The shape is another, a node is out of range, or there is a cycle, which the message lists.

    Cost: O(E + L) to build, on the CPU; ``multitree`` O(L E / 64) at its first use.

    Source: Pöppel et al., "pLSTM", 2025, section 3; the pruning as in the authors' ``graph``.
    """

    def __init__(self, edge_index: Int[Tensor, "2 edges"], nodes: int | None = None) -> None:
        if edge_index.ndim != 2 or len(edge_index) != 2:
            raise ValueError(f"edge_index must be (2, E), got {tuple(edge_index.shape)}")
        if nodes is not None:
            check_integer("nodes", nodes, at_least=0)
        self.nodes = (int(edge_index.max()) + 1 if edge_index.numel() else 0) if nodes is None else nodes
        self.edge_index = edge_index
        try:
            AcyclicSchedule(edge_index, self.nodes)
        except ValueError as error:
            raise ValueError(f"edge_index is of no acyclic graph of {self.nodes} nodes: {error}") from None
        first, second = edge_index.tolist()
        into: list[list[int]] = [[] for _ in range(self.nodes)]
        out_of: list[list[int]] = [[] for _ in range(self.nodes)]
        in_slots, out_slots = [], []
        for edge, (tail, head) in enumerate(zip(first, second, strict=True)):
            in_slots.append(len(into[head]))
            out_slots.append(len(out_of[tail]))
            into[head].append(edge)
            out_of[tail].append(edge)
        joined = [(e, f, node) for node in range(self.nodes) for e in into[node] for f in out_of[node]]
        device = edge_index.device
        triples = torch.tensor(joined, dtype=torch.int64, device=device).reshape(-1, 3)
        self.pairs, self.pair_nodes = triples[:, :2].T.contiguous(), triples[:, 2]
        self.in_slots = torch.tensor(in_slots, dtype=torch.int64, device=device)
        self.out_slots = torch.tensor(out_slots, dtype=torch.int64, device=device)
        self.max_degree = max((len(edges) for edges in (*into, *out_of)), default=0)
        self.schedule = AcyclicSchedule(self.pairs, edge_index.shape[1])
        self._origin: PreparedDAG | None = None  # where this was copied from
        self._multitree: Tensor | None = None
        self._reversed: PreparedDAG | None = None

    @property
    def edges(self) -> int:
        """The number of edges."""
        return self.edge_index.shape[1]

    @property
    def multitree(self) -> Tensor:
        """Which pairs stay where at most one path may join two edges, chosen greedily in topological order."""
        if self._multitree is None and self._origin is not None:
            self._multitree = self._origin.multitree.to(self.edge_index.device)
        elif self._multitree is None:
            self._multitree = _pruned(self.pairs, self.schedule, self.edges)
        return self._multitree

    @property
    def reversed(self) -> PreparedDAG:
        """The graph with every edge turned round; edges keep their numbers."""
        if self._reversed is None and self._origin is not None:
            self._reversed = self._origin.reversed.to(self.edge_index.device)
        elif self._reversed is None:
            self._reversed = PreparedDAG(self.edge_index.flip(0), self.nodes)
        return self._reversed

    def to(self, device: torch.device | str) -> PreparedDAG:
        """Return the graph on a device; itself where it is there."""
        if self.edge_index.device == torch.device(device):
            return self
        copied = copy.copy(self)
        copied._origin, copied._multitree, copied._reversed = self, None, None
        for name in ("edge_index", "pairs", "pair_nodes", "in_slots", "out_slots"):
            setattr(copied, name, getattr(self, name).to(device))
        copied.schedule = copy.copy(self.schedule)
        copied.schedule.pairs = copied.pairs
        copied.schedule.rounds = [one.to(device) for one in self.schedule.rounds]
        return copied


def _pruned(pairs: Tensor, schedule: AcyclicSchedule, edges: int) -> Tensor:
    """Keep a pair unless an edge that reaches its first reaches its second already."""
    rank = [0] * edges
    for step, entering in enumerate(schedule.rounds, 1):
        for edge in pairs[1, entering].tolist():
            rank[edge] = step
    origin, target = pairs.tolist()
    order = sorted(range(len(origin)), key=lambda pair: (rank[target[pair]], target[pair], rank[origin[pair]], pair))
    reached_by = [1 << edge for edge in range(edges)]  # bit sets: whence each edge is reached, itself included
    kept = [False] * len(origin)
    for pair in order:
        before, after = origin[pair], target[pair]
        if not reached_by[before] & reached_by[after]:
            reached_by[after] |= reached_by[before]
            kept[pair] = True
    return torch.tensor(kept, dtype=torch.bool, device=pairs.device)


def plstm_graph(
    q: Shaped[Tensor, "... nodes heads query"],
    k: Shaped[Tensor, "... nodes heads query"],
    v: Shaped[Tensor, "... nodes heads value"],
    source: Shaped[Tensor, "... edges heads"],
    transition: Shaped[Tensor, "... pairs heads"],
    mark: Shaped[Tensor, "... edges heads"],
    direct: Shaped[Tensor, "... nodes heads"],
    dag: PreparedDAG,
    *,
    method: Literal["recurrent", "parallel"] = "recurrent",
) -> Shaped[Tensor, "... nodes heads value"]:
    r"""Run pLSTM on a directed acyclic graph, whose edges hold the states.

    .. math::
        C_e = s_e k_m v_m^\top + \sum_{e' \to e} t_{e'e} C_{e'} \quad (e = m \to n), \qquad
        h_n = \sum_{e \to n} \mu_e q_n^\top C_e + \delta_n (q_n^\top k_n) v_n

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        source: s, one an edge.
        transition: t, one a pair of ``dag.pairs``.
        mark: μ, one an edge.
        direct: δ.
        dag: The graph; what comes before nodes in the shapes are samples on the same graph.
        method: ``"recurrent"``: generation by generation. ``"parallel"``: the gating matrix of all pairs of nodes,
            M (1 − T)⁻¹ S, whose inverse is the product of the 1 + T^(2^i); and (G ∘ QKᵀ)V.

    Shape:
        As in the annotations.

    Returns:
        h.

    Raises:
        ValueError: Shapes that do not fit the graph, or an unknown ``method``.

    Cost: recurrent O((E + L) d_k d_v) in as many rounds as the longest path has edges; parallel O(E³) a head, in
    log₂ of as many rounds, for small graphs.

    Source: Pöppel et al., "pLSTM", 2025, equations of section 3.
    """
    check_choice("method", method, METHODS)
    lead, heads = q.shape[:-3], q.shape[-2]
    counts = {"nodes": dag.nodes, "edges": dag.edges, "pairs": dag.pairs.shape[1]}
    for name, one, kind, width in (
        ("q", q, "nodes", q.shape[-1:]), ("k", k, "nodes", q.shape[-1:]), ("v", v, "nodes", v.shape[-1:]),
        ("source", source, "edges", ()), ("transition", transition, "pairs", ()),
        ("mark", mark, "edges", ()), ("direct", direct, "nodes", ()),
    ):  # fmt: skip
        wanted = (*lead, counts[kind], heads, *width)
        if tuple(one.shape) != wanted:
            raise ValueError(f"{name} must be {wanted} on this graph, got {tuple(one.shape)}")
    dag = dag.to(q.device)
    own = direct[..., None] * (q * k).sum(-1, keepdim=True) * v
    tail, head = dag.edge_index
    if method == "parallel":
        gating = _gating(source, transition, mark, dag)
        scores = torch.einsum("...nhd,...mhd->...hnm", q, k)
        return own + torch.einsum("...hnm,...mhv->...nhv", gating * scores, v)
    writes = (source[..., None] * k[..., tail, :, :])[..., None] * v[..., tail, :, None, :]
    weights = transition.movedim(-2, 0)[..., None, None]
    states = acyclic_recurrence(writes.movedim(-4, 0), weights, dag.schedule).movedim(0, -4)
    reads = torch.einsum("...ehd,...ehdv->...ehv", mark[..., None] * q[..., head, :, :], states)
    return own + torch.zeros_like(own).index_add(-3, head, reads.to(own.dtype))


def _gating(source: Tensor, transition: Tensor, mark: Tensor, dag: PreparedDAG) -> Tensor:
    """Return G, (…, heads, nodes, nodes)."""
    edges, longest = dag.edges, len(dag.schedule.rounds)
    origin, target = dag.pairs
    passed = transition.mT.new_zeros(*transition.mT.shape[:-1], edges * edges)
    power = passed.index_add(-1, target * edges + origin, transition.mT).unflatten(-1, (edges, edges))
    inverse = torch.eye(edges, dtype=power.dtype, device=power.device) + power
    for _ in range(max(0, longest.bit_length() - 1)):  # 1 + T reaches one step back; each factor doubles the reach
        power = power @ power
        inverse = inverse + inverse @ power
    tail, head = dag.edge_index
    reached = source.mT.new_zeros(*inverse.shape[:-1], dag.nodes).index_add(-1, tail, inverse * source.mT[..., None, :])
    return reached.new_zeros(*inverse.shape[:-2], dag.nodes, dag.nodes).index_add(
        -2, head, mark.mT[..., None] * reached
    )
