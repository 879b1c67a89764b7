"""FISTA, gradient descent and L-BFGS against quadratics' closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from provenn.core.numerics.smooth_convex import MINIMIZERS, Descent, fista, gradient_descent

EIGENVALUES = torch.logspace(0, 3, 20, dtype=torch.float64)
B = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def quadratic(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (0.5 * EIGENVALUES * x * x - B * x).sum(), EIGENVALUES * x - B


def minimise(name: str, tol: float = 1e-8, smoothness: float = 1e3, max_iter: int = 100_000) -> Descent:
    start = torch.zeros(20, dtype=torch.float64)
    return MINIMIZERS[name](quadratic, start, tol=tol, mu=1.0, smoothness=smoothness, max_iter=max_iter)


@pytest.mark.parametrize("name", MINIMIZERS)
def test_ends_within_the_tolerance_of_the_minimiser(name: str) -> None:
    tol = 1e-5 if name == "lbfgs" else 1e-8  # L-BFGS compares values, which rounding hides
    end = minimise(name, tol)
    assert end.gradient_norm <= tol
    assert (quadratic(end.x)[1].norm() - end.gradient_norm).abs() < 1e-12
    assert (end.x - B / EIGENVALUES).norm() <= tol  # ‖∇h‖/μ


@pytest.mark.parametrize("name", MINIMIZERS)
def test_counts_gradients_and_stops_at_the_cap(name: str) -> None:
    calls = 0

    def counted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        return quadratic(x)

    start = torch.zeros(20, dtype=torch.float64)
    end = MINIMIZERS[name](counted, start, tol=1e-8, mu=1.0, smoothness=1e3, max_iter=12)
    assert end.iterations == calls
    assert 12 <= end.iterations <= (12 if name != "lbfgs" else 38)
    assert end.gradient_norm > 1e-8
    assert (start == 0).all()


@pytest.mark.parametrize("name", MINIMIZERS)
def test_a_start_that_is_good_enough_costs_one_gradient(name: str) -> None:
    start = B / EIGENVALUES
    end = MINIMIZERS[name](quadratic, start, tol=1e-8, mu=1.0, smoothness=1e3, max_iter=50)
    assert end.iterations == 1
    torch.testing.assert_close(end.x, start, rtol=0, atol=0)


def test_momentum_saves_what_theory_says() -> None:
    """Rates 1 − √(μ/L) and (1 − μ/L)² in the value: about √1000 against 1000/2 iterations a factor e."""
    fast, slow = minimise("fista").iterations, minimise("gd").iterations
    assert fast < slow / 8
    assert fast < 2.5 * math.sqrt(1e3) * math.log(1e3 / 1e-8 * 2)


def test_first_iterates_by_hand() -> None:
    """One dimension, h = ½·2·x², L = 4, μ = 1, worked out: x₁ = ½, y₁ = x₁, x₂ = ¼, y₂ = x₂ + β(x₂ − x₁)."""
    seen = []

    def watched(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(x.item())
        return (x * x).sum(), 2 * x

    fista(watched, torch.ones(1, dtype=torch.float64), tol=0.0, mu=1.0, smoothness=4.0, max_iter=3)
    q = 0.25
    t1 = 1.0
    t2 = (1 - q * t1**2 + math.sqrt((1 - q * t1**2) ** 2 + 4 * t1**2)) / 2
    t3 = (1 - q * t2**2 + math.sqrt((1 - q * t2**2) ** 2 + 4 * t2**2)) / 2
    beta = (t2 - 1) / t3 * (1 - t3 * q) / (1 - q)
    y2 = 0.25 + beta * (0.25 - 0.5)
    assert seen == pytest.approx([1, 0.5, y2], rel=1e-12)


@pytest.mark.parametrize("method", [fista, gradient_descent])
def test_a_smoothness_that_is_too_small_is_doubled(method: object) -> None:
    end = minimise("fista" if method is fista else "gd", smoothness=100.0, tol=1e-6)
    assert end.gradient_norm <= 1e-6


def test_a_mu_above_smoothness_does_no_harm() -> None:
    end = fista(quadratic, torch.zeros(20, dtype=torch.float64), tol=1e-6, mu=2e3, smoothness=1e3, max_iter=20_000)
    assert end.gradient_norm <= 1e-6


@pytest.mark.parametrize("name", MINIMIZERS)
def test_leaving_the_numbers_ends_it(name: str) -> None:
    def broken(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.sum() * math.nan, x * math.nan

    end = MINIMIZERS[name](broken, torch.ones(3), tol=1e-3, mu=1.0, smoothness=1.0, max_iter=50)
    assert math.isnan(end.gradient_norm)
    assert end.iterations == 1
