"""Adjacency matrices as sparse tensors, and the normalised operators that graph networks propagate with.

Row i of a matrix gathers what node i receives: entry (i, j) is the weight of the edge j → i, as in PyTorch Geometric,
whose ``edge_index`` holds sources in its first row and targets in its second.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.numerics.sparse import csr, csr_from_entries, entries


def adjacency(
    edge_index: Int[Tensor, "2 edges"],
    num_nodes: int,
    edge_weight: Float[Tensor, " edges"] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Build the adjacency matrix of a graph.

    Args:
        edge_index: Source and target of each edge; an edge given twice counts twice.
        num_nodes: Nodes of the graph.
        edge_weight: Weight of each edge; ``None``: 1.
        dtype: Type of the values; ``None``: the weights' type, or torch's default.

    Shape:
        Returns (num_nodes, num_nodes), CSR.

    Raises:
        TypeError: ``edge_index`` holds no integers.
        ValueError: ``num_nodes`` < 1, ``edge_index`` is not (2, edges), names a node outside the graph, or
            ``edge_weight`` has another length or is not finite.

    Cost: O(edges log edges), a sort.
    """
    check_integer("num_nodes", num_nodes, at_least=1)
    _check_edges(edge_index, num_nodes)
    source, target = edge_index.to(torch.int64)
    if edge_weight is None:
        edge_weight = torch.ones(len(source), dtype=dtype, device=source.device)
    elif edge_weight.shape != source.shape:
        raise ValueError(f"edge_weight must have shape ({len(source)},), got {tuple(edge_weight.shape)}")
    elif not edge_weight.isfinite().all():
        raise ValueError("edge_weight must be finite, got NaN or infinite weights")
    positions, inverse = torch.unique(target * num_nodes + source, return_inverse=True)
    values = edge_weight.new_zeros(len(positions), dtype=dtype).index_add_(0, inverse, edge_weight.to(dtype))
    return csr_from_entries(positions // num_nodes, positions % num_nodes, values, num_nodes)


def _check_edges(edge_index: Tensor, num_nodes: int) -> None:
    if edge_index.is_floating_point() or edge_index.is_complex() or edge_index.dtype == torch.bool:
        raise TypeError(f"edge_index must hold integers, got {edge_index.dtype}")
    if edge_index.dim() != 2 or len(edge_index) != 2:
        raise ValueError(f"edge_index must have shape (2, edges), got {tuple(edge_index.shape)}")
    if edge_index.numel() > 0:
        low, high = edge_index.min().item(), edge_index.max().item()
        if low < 0 or high >= num_nodes:
            raise ValueError(f"edge_index must name nodes 0…{num_nodes - 1}, got nodes from {low} to {high}")


def add_self_loops(A: Tensor, weight: float = 1.0) -> Tensor:
    """Return A + weight · I: every node receives its own value ``weight`` times more (GIN's 1 + ε, say).

    Args:
        A: Square, CSR.
        weight: What is added on the diagonal.

    Raises:
        ValueError: ``weight`` is NaN or infinite.
        TypeError: ``weight`` is not a number.

    Cost: O(entries log entries), a sort.
    """
    check_number("weight", weight)
    rows, columns, values = entries(A)
    nodes = torch.arange(A.shape[0], device=A.device)
    loops = rows == columns
    diagonal = values.new_full((A.shape[0],), weight).index_add_(0, rows[loops], values[loops])
    return _with_diagonal(rows[~loops], columns[~loops], values[~loops], nodes, diagonal, A.shape[0])


def fill_self_loops(A: Tensor, weight: float = 1.0) -> Tensor:
    """Return A with a self-loop at every node that has none; the loops that are there keep their weight (GCN's Ã).

    Args:
        A: Square, CSR.
        weight: Weight of the new loops; 2 is the "improved" form.

    Raises:
        ValueError: ``weight`` is NaN or infinite.
        TypeError: ``weight`` is not a number.

    Cost: O(entries log entries), a sort.
    """
    check_number("weight", weight)
    rows, columns, values = entries(A)
    bare = torch.ones(A.shape[0], dtype=torch.bool, device=A.device)
    bare[rows[rows == columns]] = False
    nodes = bare.nonzero().flatten()
    return _with_diagonal(rows, columns, values, nodes, values.new_full((len(nodes),), weight), A.shape[0])


def _with_diagonal(rows: Tensor, columns: Tensor, values: Tensor, nodes: Tensor, diagonal: Tensor, size: int) -> Tensor:
    return csr_from_entries(torch.cat([rows, nodes]), torch.cat([columns, nodes]), torch.cat([values, diagonal]), size)


def normalize(A: Tensor, r: float = 0.5, column_degrees: bool = False) -> Tensor:
    """Return D^(r−1) A D^(−r), where D holds the row sums of A.

    r = ½ is the symmetric operator of GCN, r = 0 the mean over what a node receives (GraphSAGE), r = 1 the sum of what
    each source divides among its edges. Rows and columns of degree 0 become 0.

    Args:
        A: Square, CSR, of non-negative degrees.
        r: Which share of the degree divides the source.
        column_degrees: Take the right-hand degrees from the column sums (a source's out-degree); for a directed graph
            the two differ.

    Raises:
        ValueError: ``r`` is outside [0, 1], or a degree is negative.
        TypeError: ``r`` is not a number.

    Cost: O(entries).
    """
    check_number("r", r, at_least=0, at_most=1)
    rows, columns, values = entries(A)
    left = values.new_zeros(A.shape[0]).index_add_(0, rows, values)
    right = values.new_zeros(A.shape[0]).index_add_(0, columns, values) if column_degrees else left
    scaled = values * _power(left, r - 1)[rows] * _power(right, -r)[columns]
    return csr(A.crow_indices(), A.col_indices(), scaled, A.shape)


def _power(degrees: Tensor, exponent: float) -> Tensor:
    """Raise degrees to a power ≤ 0, with 0 for degree 0."""
    if (degrees < 0).any():
        raise ValueError(f"A must have degrees ≥ 0, got {degrees.min().item()}")
    return torch.where(degrees > 0, degrees.clamp(min=torch.finfo(degrees.dtype).tiny) ** exponent, 0.0)
