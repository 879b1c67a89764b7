"""Filter banks on periodic grids: wavelets, Weyl–Heisenberg systems, curvelets, random and learned filters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Inexact
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.numerics.frames import completing_filter, frame_bounds, littlewood_paley
from provenn.nn._semi_discrete_frames_transfers import (
    decay,
    gaussian_wave,
    lowpass,
    radius,
    smooth_step,
    transfer_of,
    wrapped,
)

_ROOT = math.sqrt(3)
_DAUBECHIES: dict[int, tuple[float, ...]] = {
    1: (1.0, 1.0),
    2: ((1 + _ROOT) / 4, (3 + _ROOT) / 4, (3 - _ROOT) / 4, (1 - _ROOT) / 4),
}
"""Low-pass taps of sum 2 with one and two vanishing moments."""


class FilterBank(nn.Module):
    """The translates of a few filters on a periodic grid: a frame, if their energies cover all frequencies.

    Args:
        filters: Transfer functions ĝ(ω), in the order of ``torch.fft.fftn``.
        output: Which of them generates the outputs (a low-pass, as a rule); the others propagate.

    Shape:
        ``filters`` (Λ, *grid), a grid of one or two dimensions.

    Returns:
        On a call, the transfer functions.

    Raises:
        TypeError: ``output`` is no integer.
        ValueError: Fewer than two filters, another number of dimensions, ``output`` out of range.

    Cost: Λ numbers a grid point.

    Source: Wiatowski & Bölcskei (2015), definition 2 and appendix A.
    """

    parts: Tensor

    def __init__(self, filters: Inexact[Tensor, "filters *grid"], output: int = 0) -> None:
        super().__init__()
        if filters.ndim not in (2, 3) or len(filters) < 2:
            raise ValueError(
                f"filters must be two or more on a grid of one or two dimensions, got {tuple(filters.shape)}"
            )
        check_integer("output", output, at_least=0, at_most=len(filters) - 1)
        # Complex numbers are kept as pairs: ``module.to(dtype)`` would drop their imaginary parts.
        self.complex = filters.is_complex()
        self.register_buffer("parts", torch.view_as_real(filters).clone() if self.complex else filters)
        self.output = output

    @property
    def grid(self) -> tuple[int, ...]:
        """The grid's sizes."""
        return tuple(self.parts.shape[1:-1] if self.complex else self.parts.shape[1:])

    def forward(self) -> Inexact[Tensor, "filters *grid"]:
        """Return the transfer functions."""
        return self.transfer()

    def transfer(self) -> Inexact[Tensor, "filters *grid"]:
        """Return the transfer functions, in single precision at least."""
        wide = self.parts.to(torch.promote_types(self.parts.dtype, torch.float32))
        return torch.view_as_complex(wide.contiguous()) if self.complex else wide

    def frame_bounds(self) -> tuple[float, float]:
        """Return A and B of A‖f‖² ≤ Σ‖f * g_λ‖² ≤ B‖f‖²; A = 0 where the bank is no frame."""
        return frame_bounds(self.transfer().detach())

    def decay(self) -> float:
        """Return K, the largest |χ̂(ω)||ω| of the output-generating atom, ω in cycles a sample."""
        return decay(self.transfer()[self.output])

    def scaled(self, factor: float) -> FilterBank:
        """Return the bank with all filters multiplied by a number.

        Args:
            factor: The number, > 0.
        """
        check_number("factor", factor, above=0)
        return FilterBank(self.transfer() * factor, self.output)

    def complete(self, bound: float | None = None) -> FilterBank:
        """Return the bank with a filter appended that makes it tight.

        Args:
            bound: Both bounds of the new bank; without it the upper bound of this one.

        Raises:
            ValueError: ``bound`` is below the upper bound.
        """
        filters = self.transfer()
        last = completing_filter(filters.detach(), bound)
        return FilterBank(torch.cat((filters, last[None].to(filters.dtype))), self.output)

    @classmethod
    def haar(cls, grid: Sequence[int], moments: int = 1) -> FilterBank:
        """Make the two filters of an orthogonal wavelet, or their four products on a plane: a tight frame with bound 1.

        Args:
            grid: Sizes.
            moments: Vanishing moments: 1 Haar's, 2 Daubechies' wavelet.

        Raises:
            ValueError: Another number of moments.
        """
        _check_grid(grid)
        check_integer("moments", moments, at_least=1, at_most=max(_DAUBECHIES))
        taps = torch.tensor(_DAUBECHIES[moments], dtype=torch.float64) / 2
        signs = torch.tensor([(-1.0) ** n for n in range(len(taps))], dtype=torch.float64)
        pairs = [wrapped(torch.stack((taps, signs * taps.flip(0))), n) for n in grid]
        if len(grid) == 1:
            return cls(_default(pairs[0]))
        products = pairs[0][:, None, :, None] * pairs[1][None, :, None, :]
        return cls(_default(products.flatten(0, 1)))

    @classmethod
    def morlet(cls, grid: Sequence[int], scales: int, orientations: int = 8) -> FilterBank:
        """Make Morlet wavelets on a plane, and a Gaussian low-pass: the bank of the usual scattering transform.

        Args:
            grid: Two sizes.
            scales: J; wavelets of scale 2^j, j < J, and a low-pass of scale 2^J.
            orientations: L, over half a turn.

        Raises:
            ValueError: A number out of range, or a grid that is no plane.
        """
        _check_grid(grid, planes=True)
        check_integer("scales", scales, at_least=1)
        check_integer("orientations", orientations, at_least=1)
        filters = [transfer_of(gaussian_wave(grid, 0.8 * 2 ** (scales - 1), 0.0, 0.0, 1.0))]
        for j in range(scales):
            width, frequency = 0.8 * 2**j, 0.75 * math.pi / 2**j
            for turn in range(orientations):
                angle = math.pi * (orientations // 2 - 1 - turn) / orientations
                wave = gaussian_wave(grid, width, angle, frequency, 4 / orientations)
                envelope = gaussian_wave(grid, width, angle, 0.0, 4 / orientations)
                # Without the mean of the wave the filter is blind to constants.
                filters.append(transfer_of(wave - wave.sum() / envelope.sum() * envelope))
        return cls(_default(torch.stack(filters)))

    @classmethod
    def gabor(cls, grid: Sequence[int], channels: int, width: float | None = None) -> FilterBank:
        """Make a Weyl–Heisenberg system: one Gaussian window in frequency, shifted uniformly along each axis.

        Args:
            grid: Sizes.
            channels: Shifts along each axis.
            width: Standard deviation of the window in cycles a sample; half a shift without it.

        Raises:
            ValueError: A number out of range.
        """
        _check_grid(grid)
        check_integer("channels", channels, at_least=2)
        width = 0.5 / channels if width is None else width
        check_number("width", width, above=0)
        centres = torch.arange(channels, dtype=torch.float64) / channels
        axes = []
        for n in grid:
            away = (torch.fft.fftfreq(n, dtype=torch.float64) - centres[:, None] + 0.5) % 1 - 0.5
            axes.append(torch.exp(-0.5 * (away / width) ** 2))
        filters = axes[0] if len(grid) == 1 else (axes[0][:, None, :, None] * axes[1][None, :, None, :]).flatten(0, 1)
        return cls(_default(filters))

    @classmethod
    def curvelet(cls, grid: Sequence[int], scales: int = 3, orientations: int = 4) -> FilterBank:
        """Make parabolic wedges of the frequency plane: twice as many angles at every second scale; tight, bound 1.

        Args:
            grid: Two sizes.
            scales: Rings around the low-pass.
            orientations: Wedges of the innermost ring, over half a turn; each comes with its mirror image.

        Raises:
            ValueError: A number out of range, or a grid that is no plane.
        """
        _check_grid(grid, planes=True)
        check_integer("scales", scales, at_least=1)
        check_integer("orientations", orientations, at_least=1)
        octave = torch.log2(radius(grid).clamp(min=1e-9) / 0.5) + scales
        rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) for n in grid)
        turn = torch.atan2(rows[:, None], columns) / math.pi % 1
        # Squares of neighbouring rises and falls add up to one.
        rise = [smooth_step(octave - ring) for ring in range(scales)]
        filters = [torch.sqrt((1 - rise[0] ** 2).clamp(min=0))]
        for ring in range(scales):
            radial = rise[ring] * (torch.sqrt((1 - rise[ring + 1] ** 2).clamp(min=0)) if ring + 1 < scales else 1)
            wedges = orientations * 2 ** ((ring + 1) // 2)
            for wedge in range(wedges):
                away = ((turn * wedges - wedge + wedges / 2) % wedges - wedges / 2).abs()
                angular = torch.cos(0.5 * math.pi * away.clamp(max=1)) if wedges > 1 else torch.ones_like(turn)
                filters.append(radial * angular)
        return cls(_default(torch.stack(filters)))

    @classmethod
    def random(
        cls, grid: Sequence[int], count: int, size: int = 5, generator: torch.Generator | None = None
    ) -> FilterBank:
        """Make random filters of compact support, and a Gaussian low-pass.

        Args:
            grid: Sizes.
            count: Random filters.
            size: Taps along each axis.
            generator: Draws them, where it is; without it torch's global one.

        Raises:
            ValueError: A number out of range, or filters larger than the grid.
        """
        _check_grid(grid)
        check_integer("count", count, at_least=1)
        check_integer("size", size, at_least=1, at_most=min(grid))
        device = None if generator is None else generator.device
        taps = torch.randn(count, *[size] * len(grid), generator=generator, device=device, dtype=torch.float64)
        return cls(_with_lowpass(taps, grid))

    @classmethod
    def from_conv(cls, conv: nn.Conv1d | nn.Conv2d, grid: Sequence[int]) -> FilterBank:
        """Make a bank of a convolution's kernels, one filter for each pair of channels, and a Gaussian low-pass.

        Args:
            conv: The convolution; its weights are copied.
            grid: Sizes, as many as the kernel has dimensions and not smaller.

        Raises:
            ValueError: The kernel does not fit the grid.
        """
        kernel = conv.weight.detach().flatten(0, 1).double()
        if kernel.ndim - 1 != len(grid) or any(k > n for k, n in zip(kernel.shape[1:], grid, strict=True)):
            raise ValueError(f"grid must hold a kernel of {tuple(kernel.shape[1:])}, got {tuple(grid)}")
        _check_grid(grid)
        # A convolution layer correlates: its kernel is the filter turned round.
        return cls(_with_lowpass(kernel.flip(tuple(range(1, kernel.ndim))), grid))


def _with_lowpass(taps: Tensor, grid: Sequence[int]) -> Tensor:
    dims = tuple(range(1, taps.ndim))
    filters = torch.fft.fftn(taps, s=tuple(grid), dim=dims)
    filters = filters / littlewood_paley(filters).max().sqrt()
    return _default(torch.cat((lowpass(grid, device=taps.device)[None].to(filters.dtype), filters)))


def _default(filters: Tensor) -> Tensor:
    """Bring filters to the default precision, and to real numbers where they are."""
    if filters.is_complex() and bool(filters.imag.abs().max() <= 1e-12 * filters.abs().max()):
        filters = filters.real
    wide = torch.get_default_dtype()
    return filters.to(torch.promote_types(wide, torch.complex64) if filters.is_complex() else wide)


def _check_grid(grid: Sequence[int], planes: bool = False) -> None:
    if len(grid) not in ((2,) if planes else (1, 2)):
        raise ValueError(f"grid must have {'two' if planes else 'one or two'} sizes, got {tuple(grid)}")
    for size in grid:
        check_integer("grid", size, at_least=2)
