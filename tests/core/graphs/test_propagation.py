"""Adjacency and normalised operators against dense linear algebra and PyTorch Geometric."""

from __future__ import annotations

import pytest
import torch
from torch_geometric.nn.conv.gcn_conv import gcn_norm

from provenn.core.graphs.propagation import add_self_loops, adjacency, fill_self_loops, normalize

NODES = 7
EDGES = torch.tensor([[0, 1, 1, 2, 5, 5, 3, 0, 0], [1, 0, 2, 2, 3, 4, 5, 1, 6]])  # 0→1 twice, a loop at 2
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.25, 1.5, 1.0, 4.0, 1.0], dtype=torch.float64)


def by_hand() -> torch.Tensor:
    dense = torch.zeros(NODES, NODES, dtype=torch.float64)
    for (source, target), weight in zip(EDGES.T.tolist(), WEIGHTS.tolist(), strict=True):
        dense[target, source] += weight
    return dense


def test_rows_gather_from_sources_and_repeated_edges_add_up() -> None:
    A = adjacency(EDGES, NODES, WEIGHTS)
    assert A.layout == torch.sparse_csr
    assert A.dtype == torch.float64
    torch.testing.assert_close(A.to_dense(), by_hand(), rtol=0, atol=0)


def test_unweighted_edges_count_one_in_the_type_asked_for() -> None:
    A = adjacency(EDGES, NODES, dtype=torch.float64)
    assert A.dtype == torch.float64
    assert A.to_dense()[1, 0] == 2
    assert A.to_dense().sum() == EDGES.shape[1]
    assert adjacency(EDGES, NODES).dtype == torch.get_default_dtype()


def test_self_loops_are_added_to_or_filled_in() -> None:
    dense = by_hand()
    added = add_self_loops(adjacency(EDGES, NODES, WEIGHTS), 1.5).to_dense()
    torch.testing.assert_close(added, dense + 1.5 * torch.eye(NODES, dtype=torch.float64), rtol=0, atol=0)
    filled = fill_self_loops(adjacency(EDGES, NODES, WEIGHTS), 2.0).to_dense()
    wanted = torch.where((torch.eye(NODES) == 1) & (dense == 0), 2.0, dense)
    torch.testing.assert_close(filled, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("r", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("column_degrees", [False, True])
def test_normalize_is_the_dense_formula(r: float, column_degrees: bool) -> None:
    A = adjacency(EDGES, NODES, WEIGHTS)
    dense = by_hand()
    left, right = dense.sum(1), dense.sum(0 if column_degrees else 1)
    wanted = torch.zeros_like(dense)
    for i in range(NODES):
        for j in range(NODES):
            if left[i] > 0 and right[j] > 0:
                wanted[i, j] = dense[i, j] * left[i] ** (r - 1) * right[j] ** (-r)
    torch.testing.assert_close(normalize(A, r, column_degrees).to_dense(), wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("improved", [False, True])
def test_the_symmetric_operator_with_filled_loops_is_that_of_pytorch_geometric(improved: bool) -> None:
    index, weight = gcn_norm(EDGES, WEIGHTS, NODES, improved=improved)
    theirs = torch.zeros(NODES, NODES, dtype=torch.float64)
    theirs.index_put_((index[1], index[0]), weight, accumulate=True)
    ours = normalize(fill_self_loops(adjacency(EDGES, NODES, WEIGHTS), 2.0 if improved else 1.0))
    torch.testing.assert_close(ours.to_dense(), theirs, rtol=1e-12, atol=0)


def test_row_normalisation_keeps_constants_and_column_normalisation_keeps_sums() -> None:
    A = fill_self_loops(adjacency(EDGES, NODES, WEIGHTS))
    ones = torch.ones(NODES, dtype=torch.float64)
    torch.testing.assert_close(normalize(A, 0.0) @ ones, ones)
    torch.testing.assert_close(normalize(A, 1.0, column_degrees=True).to_dense().sum(0), ones)


def test_gradients_flow_through_the_product() -> None:
    P = normalize(fill_self_loops(adjacency(EDGES, NODES, WEIGHTS)))
    x = torch.randn(NODES, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (P @ x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * P.to_dense().T @ (P.to_dense() @ x.detach()))


def test_a_graph_without_edges() -> None:
    none = torch.empty(2, 0, dtype=torch.int64)
    A = adjacency(none, 3)
    assert not A.to_dense().any()
    assert not normalize(A).to_dense().any()
    torch.testing.assert_close(normalize(fill_self_loops(A)).to_dense(), torch.eye(3))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((EDGES, 0), ValueError, "num_nodes"),
        ((EDGES, 6), ValueError, "nodes 0…5, got nodes from 0 to 6"),
        ((EDGES.float(), NODES), TypeError, "edge_index must hold integers, got torch.float32"),
        ((EDGES.T, NODES), ValueError, r"edge_index must have shape \(2, edges\), got \(9, 2\)"),
        ((EDGES, NODES, WEIGHTS[:3]), ValueError, "edge_weight must have shape"),
        ((EDGES, NODES, WEIGHTS * float("nan")), ValueError, "edge_weight must be finite"),
    ],
)
def test_bad_input_is_named(arguments: tuple, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        adjacency(*arguments)


def test_bad_exponents_and_degrees_are_named() -> None:
    A = adjacency(EDGES, NODES, WEIGHTS)
    with pytest.raises(ValueError, match=r"r must be a finite number ≥ 0 and ≤ 1, got 1\.5"):
        normalize(A, 1.5)
    with pytest.raises(ValueError, match="degrees ≥ 0, got -2"):
        normalize(adjacency(torch.tensor([[0], [1]]), 2, torch.tensor([-2.0])))
    with pytest.raises(ValueError, match="weight must be a finite number"):
        add_self_loops(A, float("inf"))
