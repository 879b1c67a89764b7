"""Measurements beside their bounds: how features change under shifts and deformations, and what energy they keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.recording import evaluating
from provenn.core.experiment.reports import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from provenn.nn.semi_discrete_frames import GeneralizedScattering


@dataclass(frozen=True)
class TranslationReport(Report):
    """What shifts change, layer by layer.

    Args:
        shifts: t, in samples.
        measured: For each layer and shift the largest |||Φⁿ(T_t f) − Φⁿ(f)||| / ‖f‖ over signals.
        mean: Likewise the mean over signals.
        bound: 2π|t|K_n / (S_1 ⋯ S_n).
    """

    shifts: tuple[int, ...]
    measured: tuple[tuple[float, ...], ...]
    mean: tuple[tuple[float, ...], ...]
    bound: tuple[tuple[float, ...], ...]

    def plot(self) -> Figure:
        """Return a curve for each layer, dashed for its bound."""
        return _curves(self.shifts, self.measured, self.bound, "shift in samples", "largest relative change")


@dataclass(frozen=True)
class DeformationReport(Report):
    """What deformations change.

    Args:
        amplitudes: ‖τ‖_∞, in samples.
        measured: For each amplitude the mean |||Φ(F_τ f) − Φ(f)||| / ‖f‖ over signals.
        bound: The mean ‖F_τ f − f‖ / ‖f‖, which the features' Lipschitz constant 1 makes a bound.
        slope: Of log measured against log amplitude, by least squares; NaN where nothing changes.
    """

    amplitudes: tuple[float, ...]
    measured: tuple[float, ...]
    bound: tuple[float, ...]
    slope: float

    def plot(self) -> Figure:
        """Return the curve, dashed for its bound."""
        return _curves(self.amplitudes, (self.measured,), (self.bound,), "amplitude in samples", "mean relative change")


@dataclass(frozen=True)
class EnergyReport(Report):
    """What energy the features keep.

    Args:
        layers: The mean of |||Φⁿ(f)|||² / ‖f‖² over signals, layer by layer.
        total: The largest sum over layers.
        bound: 1, for an admissible network.
    """

    layers: tuple[float, ...]
    total: float
    bound: float

    def plot(self) -> Figure:
        """Return a bar for each layer."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        axes.bar(range(len(self.layers)), self.layers)
        axes.set(xlabel="layer", ylabel="share of the energy")
        return figure


def _curves(x: Sequence[float], lines: Sequence[Any], bounds: Sequence[Any], xlabel: str, ylabel: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for place, (line, bound) in enumerate(zip(lines, bounds, strict=True)):
        axes.plot(x, line, "o-", color=f"C{place}", label=f"n = {place}" if len(lines) > 1 else "features")
        axes.plot(x, bound, "--", color=f"C{place}")
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log", yscale="log")
    axes.legend()
    return figure


def deform(
    f: Inexact[Tensor, "*batch_and_grid"],
    tau: Float[Tensor, "axes *grid"],
    omega: Float[Tensor, "*grid"] | None = None,
) -> Inexact[Tensor, "*batch_and_grid"]:
    """Return e^{2πiω(x)} f(x − τ(x)), with f between samples by trigonometric interpolation.

    Args:
        f: Periodic signals.
        tau: τ, by how many samples each point looks back along each axis.
        omega: ω, turns of the phase; none without it.

    Shape:
        ``f`` (…, *grid), ``tau`` (d, *grid), ``omega`` (*grid), d = 1 or 2.

    Returns:
        The deformed signals: real for real signals without ``omega``, exact for band-limited ones.

    Raises:
        ValueError: The shapes do not fit.

    Cost: O(P N) for each of P points and axes of N samples: dense, for grids up to some 64 × 64.

    Source: Wiatowski & Bölcskei (2015), equation 19.
    """
    grid = tuple(tau.shape[1:])
    d = len(grid)
    if d not in (1, 2) or len(tau) != d or tuple(f.shape[f.ndim - d :]) != grid:
        raise ValueError(f"tau must be ({d}, *grid) for the signals' grid, got {tuple(tau.shape)} for {tuple(f.shape)}")
    if omega is not None and tuple(omega.shape) != grid:
        raise ValueError(f"omega must be {grid}, got {tuple(omega.shape)}")
    dims = tuple(range(-d, 0))
    spectrum = torch.fft.fftn(f, dim=dims) / math.prod(grid)
    waves = []
    for axis, n in enumerate(grid):
        place = torch.arange(n, device=f.device, dtype=tau.dtype).view([-1 if one == axis else 1 for one in range(d)])
        angle = (
            2 * math.pi * ((place - tau[axis]).reshape(-1, 1) * torch.fft.fftfreq(n, device=f.device, dtype=tau.dtype))
        )
        waves.append(torch.polar(torch.ones_like(angle), angle).to(spectrum.dtype))
    # On a plane: points × rows of the spectrum × columns, summed one axis after the other.
    moved = spectrum @ waves[0].T if d == 1 else ((waves[0] @ spectrum) * waves[1]).sum(-1)
    moved = moved.unflatten(-1, grid)
    if omega is not None:
        return moved * torch.polar(torch.ones_like(omega), 2 * math.pi * omega).to(moved.dtype)
    return moved if f.is_complex() else moved.real


def translation_probe(
    net: GeneralizedScattering, f: Inexact[Tensor, "batch one *grid"], shifts: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8)
) -> TranslationReport:
    """Measure how much circular shifts along the last axis change the features of each layer, beside the bound.

    Args:
        net: An admissible network.
        f: Signals.
        shifts: t, in samples, not 0.

    Shape:
        ``f`` (batch, 1, *grid).

    Returns:
        The measurements. On a grid the theorem holds exactly where the strides' product divides t; between, sampling
        what is not band-limited adds to the change.

    Raises:
        TypeError: A shift is no integer.
        ValueError: The network is not admissible, or a shift is 0.

    Cost: 1 + len(shifts) passes.

    Source: Wiatowski & Bölcskei (2015), theorem 1.
    """
    _check_admissible(net)
    for t in shifts:
        check_integer("shifts", t)
        if t == 0:
            raise ValueError("shifts must not be 0, got 0")
    with evaluating(net), torch.no_grad():
        still, size = net(f), _norms([f])
        changes = [[_norms([a - b]) / size for a, b in zip(net(f.roll(t, -1)), still, strict=True)] for t in shifts]
    layers = range(len(still))
    scales, decay = net.total_strides(), net.decays()
    return TranslationReport(
        tuple(shifts),
        tuple(tuple(changes[i][n].max().item() for i in range(len(shifts))) for n in layers),
        tuple(tuple(changes[i][n].mean().item() for i in range(len(shifts))) for n in layers),
        tuple(tuple(2 * math.pi * abs(t) * decay[n] / scales[n] for t in shifts) for n in layers),
    )


def deformation_probe(
    net: GeneralizedScattering,
    f: Inexact[Tensor, "batch one *grid"],
    tau: Float[Tensor, "axes *grid"],
    amplitudes: Sequence[float] = (0.05, 0.1, 0.2, 0.4),
) -> DeformationReport:
    """Measure how much a deformation of growing amplitude changes the features, beside the bound.

    Args:
        net: An admissible network.
        f: Signals.
        tau: The displacement field, scaled to each amplitude.
        amplitudes: ‖τ‖_∞, in samples.

    Shape:
        ``f`` (batch, 1, *grid), ``tau`` (d, *grid).

    Returns:
        The measurements.

    Raises:
        TypeError: An amplitude is no number.
        ValueError: The network is not admissible, ``tau`` is 0 or at some amplitude steeper than 1/(2d).

    Cost: 1 + len(amplitudes) passes.

    Source: Wiatowski & Bölcskei (2015), theorem 2; Wiatowski et al., "Discrete deep feature extraction", 2016.
    """
    _check_admissible(net)
    largest = tau.abs().max().item()
    if not largest > 0:
        raise ValueError("tau must not be 0 everywhere")
    steepest = max((tau - tau.roll(1, axis)).abs().max().item() for axis in range(1, tau.ndim)) / largest
    for amplitude in amplitudes:
        check_number("amplitudes", amplitude, above=0)
        if amplitude * steepest > 1 / (2 * len(tau)):
            raise ValueError(f"tau must be flatter than 1/(2d), got a slope of {amplitude * steepest:.3g}")
    with evaluating(net), torch.no_grad():
        still, size = net(f), _norms([f])
        measured, bound = [], []
        for amplitude in amplitudes:
            moved = deform(f, amplitude / largest * tau)
            changes = _norms([a - b for a, b in zip(net(moved), still, strict=True)])
            measured.append((changes / size).mean().item())
            bound.append((_norms([moved - f]) / size).mean().item())
    known = [(math.log(x), math.log(y)) for x, y in zip(amplitudes, measured, strict=True) if y > 0]
    slope = float(np.polyfit(*zip(*known, strict=True), 1)[0]) if len(known) > 1 else math.nan
    return DeformationReport(tuple(map(float, amplitudes)), tuple(measured), tuple(bound), slope)


def energy_probe(net: GeneralizedScattering, f: Inexact[Tensor, "batch one *grid"]) -> EnergyReport:
    """Measure what share of the signals' energy each layer's features hold.

    Args:
        net: An admissible network.
        f: Signals.

    Shape:
        ``f`` (batch, 1, *grid).

    Returns:
        The measurements.

    Raises:
        ValueError: The network is not admissible.

    Cost: one pass.

    Source: Wiatowski & Bölcskei (2015), proposition 1.
    """
    _check_admissible(net)
    with evaluating(net), torch.no_grad():
        size = _norms([f]) ** 2
        shares = torch.stack([_norms([layer]) ** 2 / size for layer in net(f)])
    return EnergyReport(tuple(shares.mean(1).tolist()), shares.sum(0).max().item(), 1.0)


def _norms(layers: Sequence[Tensor]) -> Float[Tensor, " batch"]:
    """Return the norm of each sample's features over all layers."""
    return torch.stack([layer.abs().square().flatten(1).sum(1) for layer in layers]).sum(0).sqrt()


def _check_admissible(net: GeneralizedScattering) -> None:
    constants = net.constants()
    if not constants.admissible:
        raise ValueError(f"net must be admissible for a bound, got max(B, B L² R²) = {constants.admissibility}")
