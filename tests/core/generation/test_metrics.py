"""Distances between samples against closed forms, SciPy, and linear programming."""

from __future__ import annotations

import numpy as np
import pytest
import scipy
import torch

from provenn.core.generation.metrics import frechet_distance, sliced_wasserstein


def draws(count: int, features: int, seed: int) -> torch.Tensor:
    return torch.randn(count, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "m"), [(200, 150), (4, 6)])  # more and fewer samples than features
def test_frechet_distance_is_the_formula_with_scipys_matrix_root(n: int, m: int) -> None:
    x = draws(n, 5, 0) @ torch.diag(torch.tensor([1.0, 2, 3, 0.5, 1]).double())
    y = draws(m, 5, 1) + 0.7
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root_a = np.real(scipy.linalg.sqrtm(a + 1e-14 * np.eye(5)))
    middle = np.linalg.eigvalsh(root_a @ b @ root_a).clip(min=0)  # the symmetric form of Σ_x Σ_y
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(a + b) - 2 * np.sqrt(middle).sum()
    assert frechet_distance(x, y).item() == pytest.approx(wanted, rel=1e-5)  # the jitter's root is 1e-7


def test_frechet_distance_of_commuting_covariances_and_its_invariances() -> None:
    x = draws(100, 3, 2)
    scale = torch.tensor([2.0, 0.5, 3.0]).double()
    white = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)).T)
    shift = torch.tensor([1.0, -2.0, 0.0]).double()
    # N(0, I) against N(shift, diag(scale²)): |shift|² + Σ (1 − s)².
    wanted = shift.square().sum() + (1 - scale).square().sum()
    torch.testing.assert_close(frechet_distance(white, white * scale + shift), wanted)
    turn = torch.linalg.qr(draws(3, 3, 3)).Q
    torch.testing.assert_close(frechet_distance(white @ turn, (white * scale + shift) @ turn), wanted)
    assert frechet_distance(x, x).item() < 1e-12


def test_frechet_distance_does_not_lose_small_differences_in_float32() -> None:
    x = draws(500, 4, 4)
    apart = frechet_distance((x + 1000).float(), (x + 1000.25).float()).item()
    assert apart == pytest.approx(4 * 0.25**2, rel=1e-3)  # float32 holds 1000.25 to 6e-5


@pytest.mark.parametrize(("n", "m"), [(7, 7), (6, 4), (5, 7), (1, 3)])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_on_a_line_it_is_optimal_transport(n: int, m: int, p: float) -> None:
    x, y = draws(n, 1, 5), draws(m, 1, 6)
    cost = (x - y.T).abs() ** p
    marginals = np.zeros((n + m, n * m))
    for i in range(n):
        marginals[i, i * m : (i + 1) * m] = 1
    for j in range(m):
        marginals[n + j, j::m] = 1
    right = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    plan = scipy.optimize.linprog(cost.flatten().numpy(), A_eq=marginals, b_eq=right)
    got = sliced_wasserstein(x, y, num_projections=3, p=p, generator=torch.Generator().manual_seed(0))
    assert got.item() == pytest.approx(plan.fun ** (1 / p), rel=1e-9)


def test_a_shift_in_space_has_its_closed_form() -> None:
    # E|⟨θ, s⟩| over the unit sphere of R³ is |s|/2; 20 000 directions leave an error of about 0.3 %.
    x = draws(11, 3, 7)
    shift = torch.tensor([3.0, 4.0, 12.0]).double()
    generator = torch.Generator().manual_seed(1)
    assert sliced_wasserstein(x, x + shift, 20_000, generator=generator).item() == pytest.approx(6.5, rel=0.015)


def test_the_generator_decides_the_directions_and_gradients_flow() -> None:
    x, y = draws(9, 3, 8).requires_grad_(), draws(9, 3, 9)
    one, two = (sliced_wasserstein(x, y, 8, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.item() == two.item()
    (gradient,) = torch.autograd.grad(one, x)
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("function", [frechet_distance, sliced_wasserstein])
def test_bad_sets_are_named(function) -> None:
    x = draws(5, 3, 0)
    with pytest.raises(ValueError, match="equally many features, got 3 and 2"):
        function(x, x[:, :2])
    with pytest.raises(ValueError, match="y must be"):
        function(x, x[:0])
    with pytest.raises(ValueError, match="x must be finite"):
        function(x / 0, x)


def test_bad_numbers_are_named() -> None:
    x = draws(5, 3, 0)
    with pytest.raises(ValueError, match="num_projections must be a finite number ≥ 1, got 0"):
        sliced_wasserstein(x, x, 0)
    with pytest.raises(ValueError, match=r"p must be a finite number ≥ 1, got 0\.5"):
        sliced_wasserstein(x, x, p=0.5)
