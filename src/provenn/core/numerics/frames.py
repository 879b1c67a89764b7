"""Frames of translates on periodic grids: filter banks in the Fourier domain, their bounds, completion and analysis.

A bank is a stack of transfer functions ĝ_λ(ω) on the grid's frequencies, in the order of ``torch.fft.fftn``. Its atoms
are all translates of all filters, so that the frame condition is one on each frequency alone:
A ≤ Σ_λ |ĝ_λ(ω)|² ≤ B.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Inexact, Shaped
from torch import Tensor


def littlewood_paley(filters: Inexact[Tensor, "filters *grid"]) -> Float[Tensor, "*grid"]:
    """Return Σ_λ |ĝ_λ(ω)|², the share of a signal's energy that a bank keeps at each frequency.

    Args:
        filters: ĝ, real or complex.

    Shape:
        ``filters`` (Λ, *grid); the result (*grid).

    Returns:
        The sum.

    Cost: O(Λ) a frequency.

    Source: Kovačević & Chebira, "Life beyond bases: the advent of frames", IEEE Signal Processing Magazine 24 (2007).
    """
    return filters.abs().square().sum(0)


def frame_bounds(filters: Inexact[Tensor, "filters *grid"]) -> tuple[float, float]:
    """Return the tightest A and B with A‖f‖² ≤ Σ_λ ‖f * g_λ‖² ≤ B‖f‖².

    Args:
        filters: ĝ.

    Shape:
        ``filters`` (Λ, *grid).

    Returns:
        The least and the greatest value of the Littlewood–Paley sum; A = 0 says that the bank is no frame.

    Cost: as :func:`littlewood_paley`.

    Source: as :func:`littlewood_paley`.
    """
    kept = littlewood_paley(filters)
    return kept.min().item(), kept.max().item()


def completing_filter(filters: Inexact[Tensor, "filters *grid"], bound: float | None = None) -> Float[Tensor, "*grid"]:
    """Return the filter √(B − Σ|ĝ|²) that makes a bank tight, with both bounds B.

    Args:
        filters: ĝ.
        bound: B; without it the bank's own upper bound.

    Shape:
        ``filters`` (Λ, *grid); the result (*grid), real and ≥ 0.

    Returns:
        The transfer function to append.

    Raises:
        ValueError: ``bound`` is below the bank's upper bound.

    Cost: as :func:`littlewood_paley`.

    Source: Mallat, A Wavelet Tour of Signal Processing (2009), section 5.
    """
    kept = littlewood_paley(filters)
    highest = kept.max().item()
    if bound is not None and not bound >= highest:
        raise ValueError(f"bound must be ≥ the bank's upper bound {highest}, got {bound}")
    return ((highest if bound is None else bound) - kept).clamp(min=0).sqrt()


def analyze(
    signal: Shaped[Tensor, "*batch *grid"], filters: Inexact[Tensor, "filters *grid"]
) -> Inexact[Tensor, "*batch filters *grid"]:
    """Convolve a periodic signal with every filter of a bank.

    Args:
        signal: f, real or complex.
        filters: ĝ.

    Shape:
        ``signal`` (…, *grid), ``filters`` (Λ, *grid); the result (…, Λ, *grid), complex.

    Returns:
        f * g_λ.

    Raises:
        ValueError: The signal's grid is not the bank's.

    Cost: Λ + 1 FFTs a signal.

    Source: as :func:`littlewood_paley`.
    """
    dims = _dims(signal, filters)
    if signal.numel() == 0:  # FFTs do not take empty batches
        products = signal.unsqueeze(-len(dims) - 1) * filters
        return products.to(products.dtype.to_complex())
    spectrum = torch.fft.fftn(signal, dim=dims)
    filtered: Tensor = torch.fft.ifftn(spectrum.unsqueeze(-len(dims) - 1) * filters, dim=dims)
    return filtered


def _dims(signal: Tensor, filters: Tensor) -> tuple[int, ...]:
    grid = filters.shape[1:]
    if signal.shape[signal.ndim - len(grid) :] != grid or not grid:
        raise ValueError(f"signal must end in the bank's grid {tuple(grid)}, got shape {tuple(signal.shape)}")
    return tuple(range(-len(grid), 0))
