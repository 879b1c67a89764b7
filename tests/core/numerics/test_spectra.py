"""Stochastic Lanczos quadrature against exact eigenvalues, moments and known densities."""

from __future__ import annotations

import math

import pytest
import torch

from provenn.core.numerics.spectra import Spectrum, stochastic_lanczos


def symmetric(size: int, seed: int = 0) -> torch.Tensor:
    A = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (A + A.T) / math.sqrt(2 * size)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_as_many_steps_as_dimensions_give_all_eigenvalues() -> None:
    A = symmetric(30)
    spectrum = stochastic_lanczos(A.matmul, A[0], steps=30, generator=seeded(1))
    torch.testing.assert_close(spectrum.nodes, torch.linalg.eigvalsh(A), rtol=0, atol=1e-9)
    assert spectrum.weights.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("steps", [2, 3, 6])
def test_moments_of_one_vector_are_exact_up_to_twice_the_steps(steps: int) -> None:
    A = symmetric(40)
    spectrum = stochastic_lanczos(A.matmul, A[0], steps=steps, generator=seeded(2))
    v = torch.randn(40, dtype=torch.float64, generator=seeded(2))
    v = v / v.norm()
    for power in range(2 * steps):
        wanted = v @ torch.linalg.matrix_power(A, power) @ v
        torch.testing.assert_close(spectrum.moment(power), wanted, rtol=0, atol=1e-10)
    # The next power is not exact: the quadrature has no more degrees of freedom.
    beyond = v @ torch.linalg.matrix_power(A, 2 * steps) @ v
    assert abs(spectrum.moment(2 * steps) - beyond) > 1e-6


def test_nodes_stay_within_the_eigenvalues_range_and_reach_the_extremes() -> None:
    A = symmetric(200)
    A[0, 0] += 5  # a spike
    exact = torch.linalg.eigvalsh(A)
    spectrum = stochastic_lanczos(A.matmul, A[0], steps=40, num_vectors=3, generator=seeded(3))
    assert len(spectrum.nodes) == 120
    assert (spectrum.nodes.diff() >= 0).all()
    assert spectrum.nodes[0] >= exact[0] - 1e-9
    assert spectrum.nodes[-1] <= exact[-1] + 1e-9
    assert spectrum.nodes[-1] == pytest.approx(exact[-1].item(), abs=1e-8)


def test_the_mean_over_vectors_estimates_the_trace() -> None:
    A = symmetric(100)
    spectrum = stochastic_lanczos(A.matmul, A[0], steps=10, num_vectors=200, generator=seeded(4))
    assert spectrum.weights.sum().item() == pytest.approx(1, abs=1e-12)
    second = A.square().sum().item() / 100
    spread = math.sqrt(2 * torch.linalg.matrix_power(A, 4).trace().item()) / 100 / math.sqrt(200)
    assert abs(spectrum.moment(2).item() - second) < 4 * spread


def test_density_is_that_of_its_nodes() -> None:
    spectrum = Spectrum(torch.tensor([0.0, 2.0]), torch.tensor([0.25, 0.75]))
    grid = torch.linspace(-3, 5, 2001)
    density = spectrum.density(grid, width=0.2)
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-4)
    assert (density * grid).mean() / density.mean() == pytest.approx(1.5, abs=1e-3)
    assert density[750].item() == pytest.approx(0.25 / (0.2 * math.sqrt(2 * math.pi)), rel=1e-3)
    with pytest.raises(ValueError, match="width must be a finite number > 0, got 0"):
        spectrum.density(grid, width=0)


def test_repeated_eigenvalues_end_early_and_bad_numbers_are_named() -> None:
    like = torch.zeros(6, dtype=torch.float64)
    spectrum = stochastic_lanczos(lambda v: 3 * v, like, steps=6, generator=seeded(5))
    assert spectrum.nodes.tolist() == pytest.approx([3.0])
    with pytest.raises(ValueError, match="steps must be"):
        stochastic_lanczos(lambda v: v, like, steps=0)
    with pytest.raises(ValueError, match="num_vectors must be"):
        stochastic_lanczos(lambda v: v, like, num_vectors=0)
