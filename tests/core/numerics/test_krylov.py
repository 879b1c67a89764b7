"""Conjugate gradients and Lanczos against SciPy and dense eigenvalues."""

import pickle

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from provenn.core.numerics.krylov import Deflation, NotPositiveDefiniteError, conjugate_gradient, lanczos


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spd(size, seed=0):
    B = normal(size, size, seed=seed)
    return B @ B.T + torch.eye(size, dtype=torch.float64)


def scipy_iterates(A, b, count, M=None):
    found = []
    scipy.sparse.linalg.cg(A.numpy(), b.numpy(), rtol=0, maxiter=count, M=M, callback=lambda x: found.append(x.copy()))
    return found


@pytest.mark.parametrize("preconditioned", [False, True])
def test_iterates_are_those_of_scipy(preconditioned):
    A, b = spd(30), normal(30, seed=1)
    diagonal = A.diagonal()
    M = np.diag((1 / diagonal).numpy()) if preconditioned else None
    for count, expected in enumerate(scipy_iterates(A, b, 12, M), 1):
        trace = conjugate_gradient(
            lambda v: A @ v,
            b,
            tol=1e-15,
            max_iter=count,
            precondition=(lambda r: r / diagonal) if preconditioned else None,
        )
        np.testing.assert_allclose(trace.x, expected, rtol=1e-7, atol=1e-10)


def test_deflation_is_conjugate_gradients_on_the_projected_system():
    """Saad et al.: deflated CG is CG on P A with P = I − A W (WᵀA W)⁻¹ Wᵀ, x corrected at the end."""
    A, b = spd(20), normal(20, seed=1)
    values, vectors = torch.linalg.eigh(A)
    deflation = Deflation(vectors[:, :5].T.contiguous(), values[:5])
    trace = conjugate_gradient(lambda v: A @ v, b, tol=1e-12, max_iter=6, deflation=deflation)
    W = vectors[:, :5].numpy()
    P = np.eye(20) - A.numpy() @ W @ np.linalg.inv(W.T @ A.numpy() @ W) @ W.T
    inner = scipy_iterates(torch.from_numpy(P @ A.numpy()), torch.from_numpy(P @ b.numpy()), 6)[-1]
    x = W @ np.linalg.solve(W.T @ A.numpy() @ W, W.T @ b.numpy()) + P.T @ inner
    np.testing.assert_allclose(trace.x, x, rtol=1e-8, atol=1e-10)


def test_exact_deflation_removes_its_eigenvalues():
    """With all but three eigenvectors deflated, three iterations are left."""
    A, b = spd(12), normal(12, seed=1)
    values, vectors = torch.linalg.eigh(A)
    deflation = Deflation(vectors[:, 3:].T.contiguous(), values[3:])
    trace = conjugate_gradient(lambda v: A @ v, b, tol=1e-10, max_iter=12, deflation=deflation)
    assert len(trace.energy_drops) == 3
    torch.testing.assert_close(A @ trace.x, b, rtol=1e-8, atol=1e-8)


def test_trace_by_hand():
    A, b = spd(15), normal(15, seed=1)
    exact = torch.linalg.solve(A, b)
    traces = [conjugate_gradient(lambda v: A @ v, b, tol=1e-15, max_iter=count) for count in range(1, 6)]
    energies = [(0.5 * (one.x - exact) @ A @ (one.x - exact)).item() for one in traces]
    for count in range(1, 5):
        assert traces[4].energy_drops[count] == pytest.approx(energies[count - 1] - energies[count], rel=1e-8)
        assert traces[4].residual_norms[count] == pytest.approx((b - A @ traces[count - 1].x).norm().item(), rel=1e-8)


def test_stops_below_the_tolerance_and_not_before():
    A, b = spd(40), normal(40, seed=1)
    trace = conjugate_gradient(lambda v: A @ v, b, tol=1e-3, max_iter=100)
    goal = 1e-3 * b.norm()
    assert trace.residual_norms[-1] < goal <= min(trace.residual_norms[:-1])


def test_indefinite_matrices_are_named_with_the_iteration():
    A, b = torch.diag(torch.tensor([1.0, -2.0]).double()), torch.tensor([1.0, 0.1]).double()
    with pytest.raises(NotPositiveDefiniteError, match="iteration 1") as caught:
        conjugate_gradient(lambda v: A @ v, b, tol=1e-8, max_iter=5)
    assert pickle.loads(pickle.dumps(caught.value)).iteration == 1


def test_lanczos_is_orthonormal_and_tridiagonal():
    # Converging Ritz values are what costs plain Lanczos its orthogonality: eigenvalues over ten orders do it soon.
    Q = torch.linalg.qr(normal(60, 60)).Q
    A = Q @ torch.diag(torch.logspace(0, -10, 60, dtype=torch.float64)) @ Q.T
    A = (A + A.T) / 2
    found = lanczos(A, normal(60, seed=1), 20)
    W = found.vectors
    gram = W @ W.T - torch.eye(20).double()
    assert gram.abs().max() < 1e-10
    T = torch.diag(found.diagonal) + torch.diag(found.off_diagonal, 1) + torch.diag(found.off_diagonal, -1)
    torch.testing.assert_close(W @ A @ W.T, T, rtol=0, atol=1e-12)
    torch.testing.assert_close(W[0], normal(60, seed=1) / normal(60, seed=1).norm(), rtol=1e-12, atol=1e-12)
    plain = lanczos(A, normal(60, seed=1), 20, reorthogonalize=False).vectors
    assert (plain @ plain.T - torch.eye(20).double()).abs().max() > 1e-6


def test_lanczos_spans_the_krylov_space():
    A, v = spd(10), normal(10, seed=1)
    W = lanczos(A, v, 4).vectors
    powers = torch.stack([v, A @ v, A @ A @ v, A @ A @ A @ v])
    torch.testing.assert_close((powers @ W.T) @ W, powers, rtol=1e-9, atol=1e-9)


def test_ritz_values_lie_within_the_spectrum_and_interlace():
    A = spd(25)
    spectrum = torch.linalg.eigvalsh(A)
    for k in (1, 5, 12):
        values, _ = lanczos(A, normal(25, seed=1), k).ritz()
        assert values[0] >= spectrum[0] - 1e-10
        assert values[-1] <= spectrum[-1] + 1e-10
        assert (values >= spectrum[:k] - 1e-10).all()  # Cauchy


def test_all_steps_recover_the_spectrum_and_eigenvectors():
    A = spd(25)
    found = lanczos(A, normal(25, seed=1), 25)
    values, mixing = found.ritz()
    torch.testing.assert_close(values, torch.linalg.eigvalsh(A), rtol=1e-9, atol=1e-9)
    vectors = mixing.T @ found.vectors
    torch.testing.assert_close(vectors @ A, values[:, None] * vectors, rtol=0, atol=1e-8)


def test_repeated_eigenvalues_end_the_run_early():
    A = torch.diag(torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 5.0]).double())
    found = lanczos(A, normal(6), 6)
    assert len(found.vectors) == 3
    torch.testing.assert_close(found.ritz()[0], torch.tensor([1.0, 2.0, 5.0]).double())


def test_lanczos_takes_sparse_and_dense_alike():
    A = spd(8) * (normal(8, 8).abs() + normal(8, 8).abs().T > 1.5)
    A = A + 20 * torch.eye(8).double()
    one, other = (lanczos(B, normal(8, seed=1), 5) for B in (A, A.to_sparse_csr()))
    torch.testing.assert_close(one.vectors, other.vectors)
