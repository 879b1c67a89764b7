"""Sparse matrices against dense ones."""

import pytest
import torch

from provenn.core.numerics.sparse import as_csr, check_symmetric, csr_from_entries, entries, symmetric_product


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sparse_symmetric(size=7):
    B = normal(size, size) * (normal(size, size, seed=1) > 0.5)
    return B + B.T


def test_entries_in_any_order_make_the_matrix_and_come_back_by_row():
    dense = sparse_symmetric()
    rows, columns = dense.nonzero().T
    shuffle = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))
    A = csr_from_entries(rows[shuffle], columns[shuffle], dense[rows, columns][shuffle], 7)
    assert torch.equal(A.to_dense(), dense)
    torch.sparse_csr_tensor(A.crow_indices(), A.col_indices(), A.values(), A.shape, check_invariants=True)
    for found, expected in zip(entries(A), (rows, columns, dense[rows, columns]), strict=True):
        assert torch.equal(found, expected)


def test_a_matrix_is_where_its_entries_are():
    dense = sparse_symmetric()
    rows, columns = dense.nonzero().T
    with torch.device("meta"):  # the default device, where what is made without one would be, without values
        A = csr_from_entries(rows, columns, dense[rows, columns], 7)
        check_symmetric("A", A)
    assert torch.equal(A.to_dense(), dense)


@pytest.mark.parametrize("layout", ["dense", "csr", "coo", "csc"])
def test_any_layout_becomes_csr(layout):
    dense = sparse_symmetric()
    given = {"dense": dense, "csr": dense.to_sparse_csr(), "coo": dense.to_sparse(), "csc": dense.to_sparse_csc()}
    A = as_csr("A", given[layout])
    assert A.layout == torch.sparse_csr
    assert torch.equal(A.to_dense(), dense)


@pytest.mark.parametrize("bad", [torch.ones(2, 3), torch.ones(3), torch.zeros(0, 0), torch.tensor([[torch.nan]])])
def test_what_is_no_finite_square_matrix_is_refused(bad):
    with pytest.raises(ValueError, match="M must be"):
        as_csr("M", bad)


def test_symmetry_is_probed_to_rounding():
    dense = sparse_symmetric(30)
    check_symmetric("A", dense.to_sparse_csr())
    check_symmetric("A", (1e12 * dense).to_sparse_csr())
    check_symmetric("A", dense.float().to_sparse_csr())
    dense[2, 5] += 1e-6
    with pytest.raises(ValueError, match="A must be symmetric"):
        check_symmetric("A", dense.to_sparse_csr())


def test_product_and_its_gradient():
    dense, x = sparse_symmetric(), normal(7, 3).requires_grad_()
    A = dense.to_sparse_csr()
    torch.testing.assert_close(symmetric_product(A, x), dense @ x)
    assert torch.autograd.gradcheck(lambda v: symmetric_product(A, v), (x,))
    assert torch.autograd.gradgradcheck(lambda v: symmetric_product(A, v) ** 2, (x,))
