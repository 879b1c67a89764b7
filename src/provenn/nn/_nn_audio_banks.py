"""Mel and gammatone filter banks, designed in float64, and the product of power spectra with a bank."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.nn._nn_audio_kernels import Array, tensor_of

_BANDS_A_BLOCK = 16


def _to_mel(frequency: float, htk: bool) -> float:
    """Slaney's scale: 3 mels every 200 Hz up to 1 kHz, then 27 mels for a factor of 6.4."""
    if htk:
        return 2595 * math.log10(1 + frequency / 700)
    return frequency * 3 / 200 if frequency < 1000 else 15 + 27 * math.log(frequency / 1000) / math.log(6.4)


def _to_hertz(mel: Array, htk: bool) -> Array:
    if htk:
        return 700 * (10 ** (mel / 2595) - 1)
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * math.log(6.4) / 27))


def _check_bank(sr: float, n_fft: int, name: str, bands: int, fmin: float, fmax: float | None) -> float:
    check_number("sr", sr, above=0)
    check_integer("n_fft", n_fft, at_least=2)
    check_integer(name, bands, at_least=1)
    top = sr / 2 if fmax is None else fmax
    check_number("fmin", fmin, at_least=0)
    check_number("fmax", top, above=fmin, at_most=sr / 2)
    return top


def mel_filterbank(
    sr: float = 22050,
    n_fft: int = 2048,
    n_mels: int = 128,
    fmin: float = 0.0,
    fmax: float | None = None,
    htk: bool = False,
    norm: Literal["slaney"] | None = "slaney",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "n_mels bins"]:
    """Return triangular filters, evenly spaced on the mel scale.

    Args:
        sr: Samples a second.
        n_fft: Samples of a frame.
        n_mels: Number of bands.
        fmin: Where the lowest triangle begins, in Hz.
        fmax: Where the highest triangle ends, in Hz; default Nyquist's frequency.
        htk: Whether to use HTK's mel scale, 2595 log₁₀(1 + f/700), instead of Slaney's.
        norm: ``"slaney"`` gives every triangle an area of 1 over Hz; ``None`` a peak of 1.
        device: Where to put the bank.
        dtype: Its type.

    Shape:
        → (n_mels, n_fft//2 + 1).

    Returns:
        The weights of the bins of a power spectrum, one row a band.

    Raises:
        TypeError: An argument is of another type.
        ValueError: A size is below 1, ``fmax`` ≤ ``fmin``, ``fmax`` is above Nyquist's frequency, or ``norm`` is
            unknown.

    Cost: O(n_mels · n_fft) time and memory.

    Source: the paper's section on the mel spectrogram; Slaney, Auditory Toolbox, 1998.
    """
    top = _check_bank(sr, n_fft, "n_mels", n_mels, fmin, fmax)
    check_choice("norm", norm, ("slaney", None))
    edges = _to_hertz(np.linspace(_to_mel(fmin, htk), _to_mel(top, htk), n_mels + 2), htk)
    low, peak, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bins = np.arange(n_fft // 2 + 1) * sr / n_fft
    bank = np.clip(np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)), 0, None)
    return tensor_of(bank * 2 / (high - low) if norm else bank, device, dtype)


def gammatone_filterbank(
    sr: float = 22050,
    n_fft: int = 2048,
    n_bins: int = 64,
    fmin: float = 20.0,
    fmax: float | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "n_bins bins"]:
    r"""Return the magnitude responses of Slaney's fourth-order gammatone filters, evenly spaced on the ERB scale.

    .. math::
        |H(u)| \propto \frac{\prod_{\pm\pm} |u - r(\cos\varphi \pm (\sqrt2 \pm 1)\sin\varphi)|}
        {|(u - r e^{i\varphi})(u - r e^{-i\varphi})|^4},
        \quad r = e^{-2\pi\, 1.019\, ERB(f)/sr}, \quad \varphi = 2\pi f/sr, \quad ERB(f) = f/9.26449 + 24.7

    Args:
        sr: Samples a second.
        n_fft: Samples of a frame.
        n_bins: Number of bands.
        fmin: Centre of the lowest band, in Hz.
        fmax: End of the scale in Hz, one step above the highest centre; default Nyquist's frequency.
        device: Where to put the bank.
        dtype: Its type.

    Shape:
        → (n_bins, n_fft//2 + 1).

    Returns:
        The responses at the bins of a frame's transform, 1/n_fft at a band's centre.

    Raises:
        TypeError: An argument is of another type.
        ValueError: A size is below 1, ``fmax`` ≤ ``fmin``, or ``fmax`` is above Nyquist's frequency.

    Cost: O(n_bins · n_fft) time and memory.

    Source: the authors' package, ``Gammatonegram``; Slaney, Apple technical report 35, 1993; Ellis, 2009.
    """
    top = _check_bank(sr, n_fft, "n_bins", n_bins, fmin, fmax)
    corner = 9.26449 * 24.7
    share = np.arange(n_bins, 0, -1) / n_bins
    centres = (top + corner) ** (1 - share) * (fmin + corner) ** share - corner
    radius = np.exp(-2 * math.pi * 1.019 * (centres / 9.26449 + 24.7) / sr)[:, None]
    angle = (2 * math.pi * centres / sr)[:, None]
    at_bins = _gammatone_response(np.exp(2j * math.pi * np.arange(n_fft // 2 + 1) / n_fft), radius, angle)
    at_centre = _gammatone_response(np.exp(1j * angle), radius, angle)
    return tensor_of(at_bins / at_centre / n_fft, device, dtype)


def _gammatone_response(u: NDArray[np.complex128], radius: Array, angle: Array) -> Array:
    slopes = (math.sqrt(2) + 1, -math.sqrt(2) - 1, math.sqrt(2) - 1, 1 - math.sqrt(2))
    zeros = (radius * (np.cos(angle) + slope * np.sin(angle)) for slope in slopes)
    poles = np.abs(u - radius * np.exp(1j * angle)) * np.abs(u - radius * np.exp(-1j * angle))
    response: Array = np.prod([np.abs(u - zero) for zero in zeros], axis=0) / poles**4
    return response


class FilterBank(nn.Module):
    """Multiply power spectra by a bank of filters.

    A fixed bank whose rows are mostly zero is kept as blocks of neighbouring bands, each with the bins between its
    first and its last non-zero weight: an eighth of the work for 128 mel bands. A trained bank is one dense matrix.
    """

    def __init__(self, bank: Float[Tensor, "bands bins"], trainable: bool, design: Float[Tensor, "bands bins"]) -> None:
        super().__init__()
        self.ranges = [(0, bank.shape[1])] if trainable else _ranges(design)
        rows = bank.split(_BANDS_A_BLOCK if len(self.ranges) > 1 else len(bank))
        for place, (block, (first, end)) in enumerate(zip(rows, self.ranges, strict=True)):
            value = block[:, first:end].clone()
            if trainable:
                self.register_parameter(f"weight{place}", nn.Parameter(value))
            else:
                self.register_buffer(f"weight{place}", value)

    def forward(self, power: Float[Tensor, "batch frames bins"]) -> Float[Tensor, "batch frames bands"]:
        blocks = [
            power[..., first:end] @ getattr(self, f"weight{place}").to(power.dtype).T
            for place, (first, end) in enumerate(self.ranges)
        ]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)


def _ranges(design: Float[Tensor, "bands bins"]) -> list[tuple[int, int]]:
    """Return the bins that each block of bands covers; all of them as one where few weights are zero."""
    used = (design != 0).cpu()
    bins = design.shape[1]
    if used.double().mean() > 0.25 or len(design) <= _BANDS_A_BLOCK:
        return [(0, bins)]
    found = []
    for block in used.split(_BANDS_A_BLOCK):
        places = block.any(0).nonzero().flatten().tolist()
        found.append((places[0], places[-1] + 1) if places else (0, 1))
    return found
