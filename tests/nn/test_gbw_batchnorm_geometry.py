"""Bures–Wasserstein geometry against SciPy's roots and Sylvester equations, pyriemann, and its own identities."""

import importlib

import numpy as np
import pytest
import scipy.linalg
import torch

from provenn.core.experiment.accounting import TensorMemory
from provenn.nn import _gbw_batchnorm_spectral as spectral
from provenn.nn import spd


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(*shape, seed=0):
    A = normal(*shape, shape[-1], seed=seed)
    return 0.5 * (A + A.mT)


def matrices(*shape, seed=0):
    A = normal(*shape, shape[-1], seed=seed)
    return A @ A.mT / shape[-1] + 0.3 * torch.eye(shape[-1], dtype=torch.float64)


def inner(P, U, V):
    """½ tr(L_P[U] V)."""
    L = scipy.linalg.solve_continuous_lyapunov(P.numpy(), U.numpy())
    return 0.5 * np.trace(L @ V.numpy())


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def test_logarithm_is_by_scipys_roots():
    P, Q = matrices(4), matrices(4, seed=1)
    root = np.real(scipy.linalg.sqrtm(P.numpy() @ Q.numpy()))
    close(spd.log(P, Q), torch.from_numpy(root + root.T) - 2 * P)


def test_exponential_is_by_scipys_lyapunov_equation():
    P, V = matrices(4), symmetric(4, seed=1)
    L = torch.from_numpy(scipy.linalg.solve_continuous_lyapunov(P.numpy(), V.numpy()))
    close(spd.exp(P, V), P + V + L @ P @ L)


@pytest.mark.parametrize("metric", [None, matrices(3, seed=7)], ids=["plain", "with M"])
def test_exponential_and_logarithm_are_inverse_and_broadcast(metric):
    P, Q = matrices(3), matrices(2, 5, 3, seed=1)
    close(spd.exp(P, spd.log(P, Q, metric), metric), Q)
    V = spd.log(P, matrices(3, seed=2), metric)
    close(spd.log(P, spd.exp(P, V, metric), metric), V)


def test_exponential_is_inverse_up_to_the_edge_of_its_domain():
    P = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
    for edge, inverse in ((-0.999, True), (-1.001, False)):  # the smallest eigenvalue of L; I + L must be ⪰ 0
        V = 2 * edge * P
        assert torch.allclose(spd.log(P, spd.exp(P, V)), V, atol=1e-9) is inverse


def test_distance_is_the_length_of_the_logarithm_and_the_formula_by_traces():
    P, Q = matrices(5), matrices(5, seed=1)
    V = spd.log(P, Q)
    assert spd.dist(P, Q).item() ** 2 == pytest.approx(inner(P, V, V), abs=1e-12)
    root = np.real(scipy.linalg.sqrtm(P.numpy() @ Q.numpy()))
    traces = np.trace(P) + np.trace(Q) - 2 * np.trace(root)
    assert spd.dist(P, Q).item() == pytest.approx(np.sqrt(traces), abs=1e-12)
    assert spd.dist(Q, P).item() == pytest.approx(np.sqrt(traces), abs=1e-12)


def test_distance_keeps_digits_of_close_matrices_and_has_a_gradient_at_zero():
    P = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)).requires_grad_()
    Q = P.detach() + 1e-9 * torch.eye(2, dtype=torch.float64)
    expected = np.hypot(1e-9 / 2, 1e-9 / 4)  # of commuting matrices, the distance of their roots
    assert spd.dist(P, Q).item() == pytest.approx(expected, rel=1e-5)
    zero = spd.dist(P, P.detach())
    (gradient,) = torch.autograd.grad(zero, P)
    assert zero.item() < 1e-14
    assert gradient.isfinite().all()


def test_power_deformed_distance_of_commuting_matrices():
    p, q = torch.tensor([[0.5, 2.0, 3.0], [1.5, 0.3, 4.0]], dtype=torch.float64)
    for theta in (0.25, 0.5, 1.5, -1.0):
        expected = (p ** (theta / 2) - q ** (theta / 2)).norm() / abs(theta)
        close(spd.dist(torch.diag(p), torch.diag(q), theta=theta), expected, atol=1e-12)


def test_generalised_distance_is_by_the_inverse_metric_and_has_its_invariance():
    P, Q, M, A = matrices(4), matrices(4, seed=1), matrices(4, seed=2), normal(4, 4, seed=3)
    inverse = torch.linalg.inv(M)
    root = scipy.linalg.sqrtm((P @ inverse @ Q @ inverse).numpy())
    squared = torch.trace(inverse @ P) + torch.trace(inverse @ Q) - 2 * np.trace(np.real(root))
    close(spd.dist(P, Q, M), squared.sqrt())
    close(spd.dist(P, Q, torch.eye(4, dtype=torch.float64)), spd.dist(P, Q))
    moved = [A @ one @ A.T for one in (P, Q, M)]
    close(spd.dist(*moved), spd.dist(P, Q, M), atol=1e-9)
    assert abs(spd.dist(moved[0], moved[1]) - spd.dist(P, Q)) > 0.1  # the plain distance has it not


def test_geodesic_has_constant_speed_and_joins_its_ends():
    P, Q, M = matrices(4), matrices(4, seed=1), matrices(4, seed=2)
    close(spd.geodesic(P, Q, 0.0), P)
    close(spd.geodesic(P, Q, 1.0), Q)
    for metric in (None, M):
        length = spd.dist(P, Q, metric)
        for t in (0.1, 0.5, 0.8):
            point = spd.geodesic(P, Q, t, metric)
            close(spd.dist(P, point, metric), t * length)
            close(spd.dist(point, Q, metric), (1 - t) * length)
            close(point, spd.exp(P, t * spd.log(P, Q, metric), metric))


def test_transport_is_isometric_and_has_an_inverse():
    P, U, V = matrices(4), symmetric(4, seed=1), symmetric(4, seed=2)
    eye = torch.eye(4, dtype=torch.float64)
    at_eye = [spd.transport(P, one) for one in (U, V)]
    assert inner(eye, *at_eye) == pytest.approx(inner(P, U, V), abs=1e-12)
    close(spd.transport(P, at_eye[0], inverse=True), U)
    close(spd.transport(eye, U), U)


def test_transport_is_the_limit_of_pole_ladders():
    """Rungs of geodesics alone carry a vector from P to I, with an error of second order in their number."""
    P, V = matrices(3), symmetric(3, seed=1)
    eye = torch.eye(3, dtype=torch.float64)
    expected, errors, h = spd.transport(P, V), [], 1e-3
    for rungs in (4, 8):
        carried = V
        for k in range(rungs):
            here, middle, there = (spd.geodesic(P, eye, (k + part) / rungs) for part in (0.0, 0.5, 1.0))
            beyond = spd.exp(middle, -spd.log(middle, spd.exp(here, h * carried)))
            carried = -spd.log(there, beyond) / h
        errors.append((carried - expected).abs().max().item())
    assert (V - expected).abs().max() > 0.05
    assert errors[1] < 2e-3
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("inverse", [False, True])
def test_transport_has_gradients_at_equal_eigenvalues(inverse):
    P = torch.diag(torch.tensor([2.0, 2.0, 0.5], dtype=torch.float64)).repeat(2, 1, 1)
    V = symmetric(4, 2, 3)

    def carry(P, V):
        return spd.transport(0.5 * (P + P.mT), 0.5 * (V + V.mT), inverse)

    assert torch.autograd.gradcheck(carry, (P.requires_grad_(), V.requires_grad_()))
    one = P[0].detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(carry, (one, V))
    assert torch.autograd.gradcheck(carry, (matrices(4, 1, 3).requires_grad_(), V))


def test_functions_have_gradients_at_equal_eigenvalues():
    P, Q, M = (c * torch.eye(3, dtype=torch.float64) for c in (1.0, 2.0, 0.5))
    points = [one.requires_grad_() for one in (P, Q, M)]
    for function in (spd.log, spd.dist, lambda P, Q, M: spd.dist(P, Q, M, theta=0.5)):
        assert torch.autograd.gradcheck(lambda *given, f=function: f(*(0.5 * (one + one.mT) for one in given)), points)


def test_a_shared_point_takes_no_table_a_matrix():
    """The gradient's table of n³ numbers is made once for a point that a batch shares."""
    P, V = matrices(16).requires_grad_(), symmetric(64, 16)
    with TensorMemory() as memory:
        spd.transport(P, V).sum().backward()
    assert memory.peak < 8 * 64 * 16**3


# The barycentre.


def residual(B, X):
    return spd.log(B, X).mean(0).abs().max().item()


def test_logarithms_cancel_at_the_barycentre_and_distances_are_smallest():
    X = matrices(9, 5)
    B = spd.barycenter(X)
    assert residual(B, X) < 1e-11

    def spread(point, **options):
        return spd.dist(point, X, **options).square().mean()

    for seed in range(5):
        assert spread(spd.exp(B, 0.05 * symmetric(5, seed=seed))) > spread(B)


def test_the_residual_falls_fast_from_the_arithmetic_mean():
    X = matrices(9, 5)
    found = [residual(spd.barycenter(X, max_iters=steps), X) for steps in (1, 2, 5)]
    assert 1e-6 < found[0] < 5e-2
    assert found[1] < 0.2 * found[0]
    assert found[2] < 1e-3 * found[0]


def test_one_step_is_exact_for_commuting_matrices():
    x = 0.1 + torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U = torch.linalg.qr(normal(4, 4))[0]
    X = U @ torch.diag_embed(x) @ U.T
    expected = U @ torch.diag(x.sqrt().mean(0).square()) @ U.T
    close(spd.barycenter(0.5 * (X + X.mT), max_iters=1), expected, atol=1e-12)


def test_barycentre_of_two_is_the_midpoint_and_channels_are_apart():
    X = matrices(2, 3, 4)
    close(spd.barycenter(X), spd.geodesic(X[0], X[1], 0.5))


def test_barycentre_under_a_metric_and_a_power():
    X, M = matrices(7, 3), matrices(3, seed=3)
    B = spd.barycenter(X, M)
    close(spd.log(B, X, M).mean(0), torch.zeros(3, 3, dtype=torch.float64))
    x = 0.1 + torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = spd.barycenter(torch.diag_embed(x), theta=0.5)
    close(found, torch.diag((x**0.25).mean(0) ** 4), atol=1e-12)


def test_barycentre_carries_no_gradient_and_keeps_the_grad_mode():
    X = matrices(4, 3).requires_grad_()
    assert not spd.barycenter(X).requires_grad
    assert torch.is_grad_enabled()


def test_pyriemann_agrees():
    pytest.importorskip("pyriemann")
    distance, mean = (importlib.import_module(f"pyriemann.geometry.{name}") for name in ("distance", "mean"))
    X = matrices(10, 6)
    assert spd.dist(X[0], X[1]).item() == pytest.approx(
        distance.distance_wasserstein(X[0].numpy(), X[1].numpy()), abs=1e-10
    )
    theirs = mean.mean_wasserstein(X.numpy(), tol=1e-12, maxiter=100)
    np.testing.assert_allclose(spd.barycenter(X), theirs, atol=1e-9)


# Functions of eigenvalues.


def test_absolute_value_and_its_derivative_across_zero():
    U = torch.linalg.qr(normal(4, 4))[0]
    A = U @ torch.diag(torch.tensor([-2.0, -0.5, 0.7, 0.7], dtype=torch.float64)) @ U.T
    A = (0.5 * (A + A.T)).requires_grad_()
    close(spectral.absolute(A).detach(), torch.from_numpy(np.real(scipy.linalg.sqrtm((A @ A).detach().numpy()))))
    assert torch.autograd.gradcheck(lambda A: spectral.absolute(0.5 * (A + A.T)), (A,))


def test_semidefinite_power_takes_matrices_that_rounding_made_indefinite():
    A = torch.diag(torch.tensor([1.0, 0.5, -1e-16], dtype=torch.float64))
    root = spectral.semidefinite_power(A, 0.5)
    close(root, torch.diag(torch.tensor([1.0, 0.5**0.5, 0.0], dtype=torch.float64)), atol=1e-7)
    assert spectral.semidefinite_power(torch.zeros(2, 2, dtype=torch.float64), 0.5).isfinite().all()


def test_eigen_roots_are_scipys():
    A = matrices(5)
    root, inverse = spectral.eigen_roots(A)
    np.testing.assert_allclose(root, scipy.linalg.sqrtm(A.numpy()), atol=1e-12)
    np.testing.assert_allclose(inverse, scipy.linalg.inv(scipy.linalg.sqrtm(A.numpy())), atol=1e-12)
