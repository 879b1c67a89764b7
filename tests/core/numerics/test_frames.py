"""Filter banks against the dense frame operator."""

import pytest
import torch

from provenn.core.numerics.frames import analyze, completing_filter, frame_bounds, littlewood_paley

GRIDS = [(16,), (4, 6)]


def bank(grid, filters=3, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(filters, *grid, generator=draws, dtype=torch.complex128)


def signal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(filters):
    """Rows: every translate of every filter, as inner products with a signal."""
    grid = filters.shape[1:]
    atoms = []
    for transfer in filters:
        taps = torch.fft.ifftn(transfer)
        for place in torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, len(grid)):
            # (f * g)(b) = Σ_x f(x) g(b − x)
            index = [(place[d] - torch.arange(n)) % n for d, n in enumerate(grid)]
            atoms.append(taps[torch.meshgrid(*index, indexing="ij")].flatten())
    return torch.stack(atoms)


@pytest.mark.parametrize("grid", GRIDS)
def test_bounds_are_the_extreme_eigenvalues_of_the_frame_operator(grid):
    filters = bank(grid)
    matrix = dense(filters)
    eigenvalues = torch.linalg.eigvalsh(matrix.mH @ matrix)
    assert frame_bounds(filters) == pytest.approx((eigenvalues[0].item(), eigenvalues[-1].item()))


@pytest.mark.parametrize("grid", GRIDS)
def test_analysis_is_the_dense_matrix(grid):
    filters, f = bank(grid), signal(2, *grid)
    coefficients = analyze(f, filters)
    matrix = dense(filters)
    torch.testing.assert_close(coefficients.flatten(1), f.flatten(1).to(matrix.dtype) @ matrix.T)


@pytest.mark.parametrize("grid", GRIDS)
def test_completion_makes_a_bank_tight(grid):
    filters = bank(grid)
    for bound in (None, 30.0):
        whole = torch.cat((filters, completing_filter(filters, bound)[None].to(filters.dtype)))
        lower, upper = frame_bounds(whole)
        assert lower == pytest.approx(upper)
        assert upper == pytest.approx(bound or frame_bounds(filters)[1])
        f = signal(*grid)
        assert analyze(f, whole).abs().square().sum() == pytest.approx((upper * f.square().sum()).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.int64])
def test_an_empty_batch_of_signals_has_the_type_of_a_full_one(dtype):
    for filters in (bank((8,)), bank((8,)).real, bank((8,)).real.float()):
        empty, full = (analyze(torch.zeros(count, 8, dtype=dtype), filters) for count in (0, 1))
        assert empty.shape == (0, 3, 8)
        assert empty.dtype == full.dtype


def test_energy_at_one_frequency():
    filters = bank((8,))
    wave = torch.exp(2j * torch.pi * 3 * torch.arange(8) / 8)
    kept = analyze(wave.to(torch.complex128), filters).abs().square().sum() / 8
    assert kept.item() == pytest.approx(littlewood_paley(filters)[3].item(), rel=1e-6)


def test_bad_input():
    filters = bank((8,))
    with pytest.raises(ValueError, match="bound must be ≥"):
        completing_filter(filters, 0.1)
    with pytest.raises(ValueError, match="bound must be ≥"):
        completing_filter(filters, float("nan"))
    with pytest.raises(ValueError, match=r"grid \(8,\), got shape \(2, 7\)"):
        analyze(torch.ones(2, 7), filters)
