"""Signals for generalised scattering's claim: digits, band-limited noise, discs, cones, and deformations."""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from provenn.core.experiment.seeding import generator
from provenn.data import load

SMOOTHNESS = 0.04
"""Standard deviation of a deformation's spectrum, in cycles a sample."""


@cache
def digits(name: str, size: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (count, 1, size, size) in [0, 1] and classes: MNIST framed by zeros, or 8 × 8 digits enlarged."""
    draws = generator("digits", name, seed)
    if name == "digits":
        pixels, labels = load_digits(return_X_y=True)
        x = F.interpolate(torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, size=(size, size), mode="bilinear")
        y = torch.from_numpy(labels).long()
    else:
        bundle = load("mnist")
        x, y = torch.from_numpy(bundle.x_train).float().unsqueeze(1) / 255, torch.from_numpy(bundle.y_train)
        x = F.pad(x, ((size - 28) // 2,) * 4)
    picked = torch.randperm(len(y), generator=draws)[:count]
    return x[picked], y[picked]


def _frequencies(size: int) -> Tensor:
    steps = torch.fft.fftfreq(size, dtype=torch.float64)
    radius: Tensor = (steps[:, None].square() + steps.square()).sqrt()
    return radius


def _filtered(noise: Tensor, transfer: Tensor) -> Tensor:
    smooth: Tensor = torch.fft.ifft2(torch.fft.fft2(noise) * transfer).real
    return smooth


def band_limited(count: int, size: int, draws: torch.Generator) -> Tensor:
    """Draw noise without frequencies above a tenth of a cycle a sample."""
    noise = torch.randn(count, 1, size, size, generator=draws, dtype=torch.float64)
    return _filtered(noise, (_frequencies(size) < 0.1).double())


Shape = tuple[Tensor, Tensor]


def shapes(count: int, size: int, draws: torch.Generator) -> Shape:
    """Draw centres (count, 2) and radii (count,) of discs and cones."""
    centre = size * torch.rand(count, 2, generator=draws, dtype=torch.float64)
    return centre, size * (0.12 + 0.13 * torch.rand(count, generator=draws, dtype=torch.float64))


def _reach(shape: Shape, size: int, tau: Tensor | float) -> Tensor:
    """Return distance over radius at each point x − τ(x), on the torus that the grid closes to."""
    centre, radius = shape
    places = torch.arange(size, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(places, places, indexing="ij")) - tau
    away = (points - centre[:, :, None, None] + size / 2) % size - size / 2
    share: Tensor = away.norm(dim=1) / radius[:, None, None]
    return share[:, None]


def discs(shape: Shape, size: int, tau: Tensor | float = 0.0) -> Tensor:
    """Return discs with sharp edges, deformed before they are sampled: cartoon functions."""
    return (_reach(shape, size, tau) < 1).double()


def cones(shape: Shape, size: int, tau: Tensor | float = 0.0) -> Tensor:
    """Return cones, deformed before they are sampled: Lipschitz functions of compact support."""
    return (1 - _reach(shape, size, tau)).clamp(min=0)


def displacement(size: int, draws: torch.Generator) -> Tensor:
    """Draw a smooth displacement field (2, size, size) whose largest component is 1."""
    noise = torch.randn(2, size, size, generator=draws, dtype=torch.float64)
    field = _filtered(noise, torch.exp(-0.5 * (_frequencies(size) / SMOOTHNESS) ** 2))
    return field / field.abs().max()
