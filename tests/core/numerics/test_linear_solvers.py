"""The classical solvers: how they rank, what they keep, what they refuse."""

import pytest
import torch

from provenn.core.numerics.krylov import KrylovTrace
from provenn.core.numerics.linear_solvers import (
    Certificate,
    ConjugateGradient,
    DeflatedCG,
    ICPreconditionedCG,
    LinearProblem,
)
from provenn.core.physics.poisson import poisson_matrix


def problem(side=24, seed=0):
    A = poisson_matrix(torch.zeros(side, side, dtype=torch.int64))
    return LinearProblem(A, torch.randn(side**2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def test_preconditioning_and_deflation_save_iterations():
    counts = [
        one(tol=1e-8).solve(problem()).certificate.iterations
        for one in (ConjugateGradient, DeflatedCG, ICPreconditionedCG)
    ]
    assert counts[2] < 0.5 * counts[0]
    assert counts[1] < counts[0]


def test_deflation_starts_where_conjugate_gradients_would_be():
    """The 16 Ritz vectors span b's Krylov space, so the start is the 16th iterate of plain CG."""
    one = problem()
    start = DeflatedCG(n_ritz=16, max_iter=1).solve(one).certificate.residual_norms[0]
    assert start == pytest.approx(ConjugateGradient(tol=1e-12, max_iter=16).solve(one).certificate.residual_norms[16])


def test_more_ritz_vectors_save_more():
    counts = [DeflatedCG(n_ritz, tol=1e-8).solve(problem()).certificate.iterations for n_ritz in (1, 16, 48)]
    assert counts[0] > counts[1] > counts[2]


def test_factors_are_kept_for_the_same_matrix_alone():
    solver, one = ICPreconditionedCG(), problem()
    kept = solver.factors(one.A)
    assert solver.factors(problem(seed=1).A) is kept
    other = LinearProblem(2 * one.A.to_dense(), one.b)
    assert solver.factors(other.A) is not kept
    torch.testing.assert_close(solver.solve(other).x, 0.5 * solver.solve(one).x, rtol=1e-6, atol=1e-8)


def test_problem_is_held_in_double_precision_and_left_alone():
    A, b = torch.diag(torch.tensor([1.0, 2.0])), torch.ones(2)
    one = LinearProblem(A, b, (2, 1))
    assert one.A.dtype == one.b.dtype == torch.float64
    assert A.dtype == b.dtype == torch.float32
    assert one.diagonal.tolist() == [1.0, 2.0]


def test_active_cells_are_those_with_a_row():
    flags = torch.tensor([[0, 2], [1, 0]])
    one = LinearProblem(poisson_matrix(flags), torch.zeros(4))
    assert one.active.tolist() == [True, False, False, True]


def test_only_the_floating_region_must_sum_to_zero():
    flags = torch.tensor([0, 2, 0, 0, 2, 0])  # beyond both ends it is open; the middle is closed
    A = poisson_matrix(flags)
    b = torch.tensor([1.0, 0, 1, -1, 0, 5]).double()
    solution = ConjugateGradient(tol=1e-10).solve(LinearProblem(A, b))
    torch.testing.assert_close(A.to_dense() @ solution.x, b)
    b[2] = 2.0
    with pytest.raises(ValueError, match="region of 2 of 6 cells, over which b sums to 1 "):
        LinearProblem(A, b)


def test_certificate_adds_up_the_drops():
    trace = KrylovTrace(torch.zeros(1), (4.0, 2.0, 1.0), (3.0, 0.5))
    certificate = Certificate.of(trace, goal=1.5)
    assert certificate.energy_gap == (3.5, 0.5, 0.0)
    assert certificate.iterations == 2
    assert certificate.converged
    assert certificate.residual_norm == 1.0
    assert not Certificate.of(trace, goal=0.9).converged
