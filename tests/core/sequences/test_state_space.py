"""State-space systems against projections by quadrature, SciPy's discretisation, matrix exponentials and powers."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from scipy.signal import cont2discrete
from scipy.special import eval_laguerre, eval_legendre

from provenn.core.sequences.state_space import generalized_bilinear, hippo, krylov, repeated_squares

NODES, WEIGHTS = np.polynomial.legendre.leggauss(40)


def matrices(measure, order):
    A, B = hippo(measure, order, dtype=torch.float64)
    return A.numpy(), B.numpy()


def signal(t):
    return np.sin(3 * t) + 0.3 * t


def legendre(u, start, end, order):
    """Coefficients of u on [start, end] in √(2n+1) P_n, under the uniform measure."""
    s = 0.5 * (end - start) * NODES + 0.5 * (end + start)
    return np.array([np.sqrt(2 * n + 1) * np.sum(WEIGHTS * u(s) * eval_legendre(n, NODES)) / 2 for n in range(order)])


def test_legs_keeps_the_legendre_coefficients_of_all_of_the_past():
    A, B = matrices("legs", 8)
    begin = legendre(signal, 0, 0.5, 8)
    solved = solve_ivp(lambda t, x: (A @ x + B * signal(t)) / t, (0.5, 3.0), begin, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(solved.y[:, -1], legendre(signal, 0, 3.0, 8), atol=1e-7)


def test_four_coefficients_of_legs_rebuild_a_cubic():
    def cubic(t):
        return 1 - 2 * t + 0.5 * t**2 + 0.3 * t**3

    A, B = matrices("legs", 4)
    solved = solve_ivp(
        lambda t, x: (A @ x + B * cubic(t)) / t, (0.1, 2), legendre(cubic, 0, 0.1, 4), rtol=1e-11, atol=1e-12
    )
    t = np.linspace(0, 2, 21)
    rebuilt = sum(c * np.sqrt(2 * n + 1) * eval_legendre(n, t - 1) for n, c in enumerate(solved.y[:, -1]))
    np.testing.assert_allclose(rebuilt, cubic(t), atol=1e-6)


def test_legt_keeps_a_polynomial_on_a_window_of_length_one():
    def cubic(t):
        return 1 - 2 * t + 0.5 * t**2 + 0.3 * t**3

    A, B = matrices("legt", 4)
    begin = legendre(cubic, 0, 1, 4)
    solved = solve_ivp(lambda t, x: A @ x + B * cubic(t), (1, 2.5), begin, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(solved.y[:, -1], legendre(cubic, 1.5, 2.5, 4), atol=1e-7)


def test_lagt_keeps_the_laguerre_coefficients_of_a_fading_past():
    # The system's own impulse responses are Laguerre polynomials with weight: x_n(t) = ∫ u(t − s) L_n(s) e^{−s/2} ds.
    A, B = matrices("lagt", 5)
    for s in (0.0, 0.4, 1.7, 5.0):
        response = expm(A * s) @ B
        np.testing.assert_allclose(response, [eval_laguerre(n, s) * np.exp(-s / 2) for n in range(5)], atol=1e-12)


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
def test_systems_are_stable_and_of_the_type_asked_for(measure):
    A, _ = matrices(measure, 12)
    assert np.linalg.eigvals(A).real.max() < 0
    assert hippo(measure, 3)[0].dtype == torch.get_default_dtype()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_discretisation_is_scipys(alpha):
    A, B = matrices("legs", 6)
    steps = torch.tensor([0.01, 0.2], dtype=torch.float64)
    ours = generalized_bilinear(torch.from_numpy(A), torch.from_numpy(B), steps, alpha)
    for index, dt in enumerate(steps.tolist()):
        theirs = cont2discrete((A, B[:, None], np.eye(6), np.zeros((6, 1))), dt, method="gbt", alpha=alpha)
        np.testing.assert_allclose(ours[0][index], theirs[0], atol=1e-12)
        np.testing.assert_allclose(ours[1][index], theirs[1][:, 0], atol=1e-12)


@pytest.mark.parametrize(("alpha", "order"), [(0.0, 1), (1.0, 1), (0.5, 2)])
def test_order_of_the_discretisation(alpha, order):
    A, B = matrices("lagt", 4)
    errors = []
    for dt in (0.02, 0.01, 0.005):
        step, _ = generalized_bilinear(torch.from_numpy(A), torch.from_numpy(B), dt, alpha)
        errors.append(np.abs(np.linalg.matrix_power(step.numpy(), round(1 / dt)) - expm(A)).max())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, order, atol=0.1)


def test_the_bilinear_step_keeps_stability_and_its_gradient_is_right():
    draws = torch.Generator().manual_seed(0)
    A = torch.randn(3, 5, 5, generator=draws, dtype=torch.float64)
    A = A - (torch.linalg.eigvals(A).real.amax(-1) + 0.1)[:, None, None] * torch.eye(5)
    step, _ = generalized_bilinear(A, torch.ones(5, dtype=torch.float64), 3.0)
    assert torch.linalg.eigvals(step).abs().max() < 1
    dt = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(generalized_bilinear, (A.requires_grad_(), A[:, 0].detach().clone(), dt))


@pytest.mark.parametrize("length", range(1, 18))
def test_krylov_is_sequential_powers(length):
    draws = torch.Generator().manual_seed(length)
    A = torch.randn(2, 3, 3, generator=draws, dtype=torch.float64)
    b = torch.randn(3, generator=draws, dtype=torch.float64)
    column, columns = b.expand(2, 3), []
    for _ in range(length):
        columns.append(column)
        column = (A @ column[..., None])[..., 0]
    torch.testing.assert_close(krylov(length, A, b), torch.stack(columns, -1))
    at_hand = krylov(length, A, b, repeated_squares(A, 17))
    assert torch.equal(at_hand, krylov(length, A, b))


@pytest.mark.parametrize(("length", "count"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4)])
def test_repeated_squares_make_up_every_shorter_power(length, count):
    A = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares = repeated_squares(A, length)
    assert len(squares) == count
    for place, power in enumerate(squares):
        torch.testing.assert_close(power, torch.linalg.matrix_power(A, 2**place))


def test_bad_input():
    A, B = hippo("legs", 3)
    with pytest.raises(ValueError, match="measure must be one of legs, legt, lagt, got 'leg'"):
        hippo("leg", 3)
    with pytest.raises(ValueError, match="order"):
        hippo("legs", 0)
    with pytest.raises(ValueError, match="dt must be > 0, got -1"):
        generalized_bilinear(A, B, -1.0)
    with pytest.raises(ValueError, match="alpha"):
        generalized_bilinear(A, B, 1.0, 2.0)
    with pytest.raises(ValueError, match="invertible"):
        generalized_bilinear(torch.eye(2), torch.ones(2), 1.0, 1.0)
    with pytest.raises(ValueError, match="length"):
        krylov(0, A, B)
    with pytest.raises(ValueError, match="length"):
        repeated_squares(A, 0)
    with pytest.raises(ValueError, match="squares must reach a length of 5, got 2"):
        krylov(5, A, B, repeated_squares(A, 4))
