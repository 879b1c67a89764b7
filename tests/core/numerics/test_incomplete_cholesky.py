"""Incomplete Cholesky factors against elimination entry by entry."""

import math

import pytest
import torch

from provenn.core.numerics.incomplete_cholesky import IncompleteCholesky
from provenn.core.numerics.krylov import NotPositiveDefiniteError
from provenn.core.physics.poisson import poisson_matrix


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dominant(size=12, seed=0):
    """A sparse, symmetric, diagonally dominant matrix whose graph has triangles."""
    B = -normal(size, size, seed=seed).abs() * (normal(size, size, seed=seed + 1) > 0.6)
    A = torch.tril(B, -1) + torch.tril(B, -1).T
    return A + torch.diag(A.abs().sum(1) + 0.1)


def by_elimination(A):
    """The usual elimination, in place on the lower triangle, skipping entries outside the pattern."""
    size = len(A)
    L = torch.tril(A).clone()
    for k in range(size):
        L[k, k] = math.sqrt(L[k, k])
        for i in range(k + 1, size):
            if L[i, k] != 0:
                L[i, k] /= L[k, k]
        for j in range(k + 1, size):
            for i in range(j, size):
                if L[i, j] != 0:
                    L[i, j] -= L[i, k] * L[j, k]
    return L


@pytest.mark.parametrize("seed", range(4))
def test_factors_are_those_of_elimination(seed):
    A = dominant(seed=10 * seed)
    expected = by_elimination(A)
    assert ((expected != 0).sum() - 12) < 66  # there are zeros to skip
    torch.testing.assert_close(IncompleteCholesky(A).factor.to_dense(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 3)])
def test_factors_of_grids(shape):
    A = poisson_matrix(torch.zeros(shape, dtype=torch.int64))
    torch.testing.assert_close(
        IncompleteCholesky(A).factor.to_dense(), by_elimination(A.to_dense()), rtol=1e-12, atol=1e-14
    )


def test_full_pattern_gives_cholesky():
    B = normal(8, 8)
    A = B @ B.T + torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(
        IncompleteCholesky(A).factor.to_dense(), torch.linalg.cholesky(A), rtol=1e-10, atol=1e-10
    )


def test_product_agrees_with_the_matrix_on_the_pattern():
    A = poisson_matrix(torch.zeros(6, 7, dtype=torch.int64)).to_dense()
    L = IncompleteCholesky(A).factor.to_dense()
    product = L @ L.T
    torch.testing.assert_close(product[A != 0], A[A != 0], rtol=1e-12, atol=1e-12)
    assert (product - A).abs().max() > 0.01  # and it is incomplete


def test_solve_is_two_triangular_solves():
    A, r = dominant(), normal(12, seed=5)
    factors = IncompleteCholesky(A)
    L = factors.factor.to_dense()
    torch.testing.assert_close(factors.solve(r), torch.linalg.solve(L @ L.T, r), rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch solves sparse triangles by MKL")
def test_solve_by_torch_alone_as_on_cuda():
    A, r = dominant(), normal(12, seed=5)
    factors = IncompleteCholesky(A)
    expected = factors.solve(r)
    factors._on_cpu = None
    torch.testing.assert_close(factors.solve(r), expected, rtol=1e-10, atol=1e-10)


def test_sweeps_stay_few_as_the_grid_grows():
    sweeps = [IncompleteCholesky(poisson_matrix(torch.zeros(n, n, dtype=torch.int64))).sweeps for n in (16, 64)]
    assert sweeps[1] <= sweeps[0] + 5  # the chain of dependencies is four times as long


def test_rows_of_zeros_and_singular_matrices():
    flags = torch.tensor([2, 0, 0, 0, 2])  # a closed line: its last pivot is 0
    A = poisson_matrix(flags)
    L = IncompleteCholesky(A).factor.to_dense()
    torch.testing.assert_close(L[0], torch.tensor([1.0, 0, 0, 0, 0]).double())
    torch.testing.assert_close(L.diagonal(), torch.ones(5).double())
    assert IncompleteCholesky(A).solve(normal(5)).isfinite().all()


def test_indefinite_matrices_are_refused():
    with pytest.raises(NotPositiveDefiniteError, match="pivot -3 in row 1"):
        IncompleteCholesky(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_solves_on_cuda():
    A, r = dominant(), normal(12, seed=5)
    expected = IncompleteCholesky(A).solve(r)
    torch.testing.assert_close(IncompleteCholesky(A.cuda()).solve(r.cuda()).cpu(), expected)
