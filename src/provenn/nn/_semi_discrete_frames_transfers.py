"""What filters are made of: Gaussians, waves under them, smooth steps and wrapped taps; and how fast they decay."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Inexact
from torch import Tensor
from torch.nn import functional as F


def radius(
    grid: Sequence[int], like: Tensor | None = None, device: torch.device | None = None
) -> Float[Tensor, "*grid"]:
    """Return |ω| in cycles a sample."""
    place = {"dtype": torch.float64, "device": device} if like is None else {"dtype": like.dtype, "device": like.device}
    squares = [torch.fft.fftfreq(n, **place) ** 2 for n in grid]
    return (squares[0] if len(grid) == 1 else squares[0][:, None] + squares[1]).sqrt()


def lowpass(grid: Sequence[int], width: float = 0.1, device: torch.device | None = None) -> Float[Tensor, "*grid"]:
    """Return a Gaussian transfer function of height 1.

    Args:
        grid: Sizes.
        width: Standard deviation in cycles a sample.
        device: Where it goes.
    """
    return torch.exp(-0.5 * (radius(grid, device=device) / width) ** 2)


def decay(chi: Inexact[Tensor, "*grid"]) -> float:
    """Return K = max |χ̂(ω)||ω| of a transfer function, ω in cycles a sample."""
    height = chi.detach().abs()
    return float((height * radius(height.shape, height)).max())


def wrapped(taps: Tensor, size: int) -> Tensor:
    """Return the transfer functions of taps that may be longer than the circle."""
    padded = F.pad(taps, (0, -taps.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-2)
    return torch.fft.fft(padded)


def smooth_step(t: Tensor) -> Tensor:
    """Return a smooth step from 0 for t ≤ −½ to 1 for t ≥ ½."""
    s = (t + 0.5).clamp(0, 1)
    return torch.sin(0.5 * math.pi * s**4 * (35 - 84 * s + 70 * s**2 - 20 * s**3))


def gaussian_wave(grid: Sequence[int], width: float, angle: float, frequency: float, slant: float) -> Tensor:
    """Return a wave under an elliptic Gaussian of sum about 1, wrapped round the grid five times."""
    total = torch.zeros(*grid, dtype=torch.complex128)
    cosine, sine = math.cos(angle), math.sin(angle)
    for wrap in torch.cartesian_prod(torch.arange(-2, 3), torch.arange(-2, 3)).tolist():
        y, x = (torch.arange(n, dtype=torch.float64) + turn * n for n, turn in zip(grid, wrap, strict=True))
        y = y[:, None]
        along, across = y * cosine + x * sine, -y * sine + x * cosine
        envelope = torch.exp(-(along**2 + (slant * across) ** 2) / (2 * width**2))
        total += torch.polar(envelope, (frequency * along).expand_as(envelope))
    return total * slant / (2 * math.pi * width**2)


def transfer_of(taps: Tensor) -> Tensor:
    """Return a transfer function that is real because the taps are symmetric but for conjugation."""
    return torch.fft.fft2(taps).real
