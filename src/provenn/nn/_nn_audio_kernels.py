"""Fourier kernels and constant-Q kernels, designed in float64."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.signal import get_window
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer, check_number

FrequencyScale = Literal["no", "linear", "log", "log2"]
Array = NDArray[np.float64]
FMIN = 32.70
"""The note C1, in Hz: where constant-Q transforms begin unless told otherwise."""


def tensor_of(array: Array, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """Return an array as a tensor of the default or the given type and device."""
    return torch.tensor(array, device=device, dtype=dtype or torch.get_default_dtype())


def window_of(window: str, win_length: int, n_fft: int) -> Array:
    """Return a periodic window, padded with zeros on both sides to the frame."""
    check_integer("n_fft", n_fft, at_least=1)
    check_integer("win_length", win_length, at_least=1, at_most=int(n_fft))
    try:
        values = np.asarray(get_window(window, win_length, fftbins=True), dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"window must be one that scipy.signal.get_window knows, got {window!r}: {error}") from error
    left = (n_fft - win_length) // 2
    return np.pad(values, (left, n_fft - win_length - left))


class FourierKernels(NamedTuple):
    """Windowed cosines and sines, one row a bin, and the bins' frequencies in Hz."""

    cosine: Float[Tensor, "freq_bins n_fft"]
    sine: Float[Tensor, "freq_bins n_fft"]
    frequencies: Float[Tensor, " freq_bins"]


def bin_frequencies(
    n_fft: int, freq_bins: int | None, freq_scale: FrequencyScale, fmin: float, fmax: float, sr: float
) -> Array:
    """Return the bins' frequencies in Hz, after a check of the arguments."""
    check_integer("n_fft", n_fft, at_least=2)
    check_choice("freq_scale", freq_scale, get_args(FrequencyScale))
    check_number("sr", sr, above=0)
    uniform = n_fft // 2 + 1
    freq_bins = uniform if freq_bins is None else freq_bins
    if freq_scale == "no":
        check_integer("freq_bins", freq_bins, at_least=1, at_most=uniform)
        return np.arange(freq_bins) * sr / n_fft
    check_integer("freq_bins", freq_bins, at_least=1)
    check_number("fmin", fmin, above=0, at_most=sr / 2)
    check_number("fmax", fmax, above=fmin, at_most=sr / 2)
    share = np.arange(freq_bins) / freq_bins
    return fmin + share * (fmax - fmin) if freq_scale == "linear" else fmin * (fmax / fmin) ** share


def fourier_kernels(
    n_fft: int = 2048,
    win_length: int | None = None,
    freq_bins: int | None = None,
    window: str = "hann",
    freq_scale: FrequencyScale = "no",
    fmin: float = 50.0,
    fmax: float = 6000.0,
    sr: float = 22050,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> FourierKernels:
    r"""Return the kernels of a short-time Fourier transform.

    .. math:: \cos(2\pi k_i n / N)\, w_n \quad\text{and}\quad \sin(2\pi k_i n / N)\, w_n

    Args:
        n_fft: N, samples of a frame.
        win_length: Samples of the window, which is padded with zeros to the frame; default N.
        freq_bins: Number of kernels; default N//2 + 1.
        window: Name of the window, as in ``scipy.signal.get_window``; periodic.
        freq_scale: ``"no"``: bin i is the multiple i of sr/N, from 0 on. ``"linear"``: evenly from ``fmin`` up to, and
            without, ``fmax``. ``"log"`` and ``"log2"``: evenly in the logarithm; its base changes nothing.
        fmin: Lowest frequency in Hz of the scales that have one.
        fmax: End of those scales in Hz.
        sr: Samples a second.
        device: Where to put the kernels.
        dtype: Their type.

    Shape:
        cosine and sine (freq_bins, N), frequencies (freq_bins,) in Hz.

    Returns:
        The kernels and their frequencies.

    Raises:
        TypeError: An argument is of another type.
        ValueError: A size is below 1, the window is longer than the frame or unknown, ``freq_bins`` exceeds N//2 + 1 on
            the scale ``"no"``, ``fmax`` ≤ ``fmin``, or a frequency is beyond Nyquist's.

    Cost: O(freq_bins · N) time and memory.

    Source: the paper's section on the discrete Fourier transform; the scales as in the authors' package.
    """
    frequencies = bin_frequencies(n_fft, freq_bins, freq_scale, fmin, fmax, sr)
    values = window_of(window, n_fft if win_length is None else win_length, n_fft)
    turns = np.outer(frequencies / sr, np.arange(n_fft))
    angles = 2 * math.pi * (turns % 1)  # whole turns taken off first: no digits are lost in large angles
    return FourierKernels(
        tensor_of(np.cos(angles) * values, device, dtype),
        tensor_of(np.sin(angles) * values, device, dtype),
        tensor_of(frequencies, device, dtype),
    )


class CQTKernels(NamedTuple):
    """Constant-Q kernels centred in a common frame, their lengths in samples, and the bins' frequencies in Hz."""

    real: Float[Tensor, "n_bins width"]
    imaginary: Float[Tensor, "n_bins width"]
    lengths: Float[Tensor, " n_bins"]
    frequencies: Float[Tensor, " n_bins"]


def quality(filter_scale: float, bins_per_octave: int) -> float:
    """Return Q, the ratio of a bin's frequency to its bandwidth."""
    check_integer("bins_per_octave", bins_per_octave, at_least=1)
    check_number("filter_scale", filter_scale, above=0)
    return filter_scale / (2 ** (1 / bins_per_octave) - 1)


def octave_frequencies(sr: float, fmin: float, n_bins: int, bins_per_octave: int, fmax: float | None = None) -> Array:
    """Return the frequencies of a constant-Q transform in Hz, after a check that they are below Nyquist's."""
    check_number("sr", sr, above=0)
    check_number("fmin", fmin, above=0)
    check_integer("bins_per_octave", bins_per_octave, at_least=1)
    if fmax is not None:
        check_number("fmax", fmax, above=fmin)
        n_bins = math.ceil(bins_per_octave * math.log2(fmax / fmin))
    check_integer("n_bins", n_bins, at_least=1)
    frequencies = fmin * 2.0 ** (np.arange(n_bins) / bins_per_octave)
    if frequencies[-1] > sr / 2:
        raise ValueError(
            f"n_bins: the top one of {n_bins} is at {frequencies[-1]:.5g} Hz, above Nyquist's {sr / 2:g} Hz"
        )
    return frequencies


def kernel_lengths(frequencies: Array, sr: float, q: float, bins_per_octave: int, gamma: float = 0.0) -> Array:
    """Return the kernels' lengths in samples, ⌈Q sr/(f + γ/α)⌉ with α = 2^{1/b} − 1."""
    offset = gamma / (2 ** (1 / bins_per_octave) - 1)
    return np.ceil(q * sr / (frequencies + offset))


def waves(frequencies: Array, lengths: Array, sr: float, window: str) -> NDArray[np.complex128]:
    """Return windowed complex exponentials of unit L1 norm, each centred in the smallest power of two that holds all.

    A wave's phase is 0 at its middle sample.
    """
    width = 2 ** math.ceil(math.log2(max(lengths.max(), 2)))
    kernels = np.zeros((len(frequencies), width), dtype=np.complex128)
    for row, frequency, length in zip(kernels, frequencies, lengths.astype(int).tolist(), strict=True):
        time = np.arange(length) - (length + 1) // 2
        wave = window_of(window, length, length)
        wave = wave * np.exp(2j * math.pi * frequency / sr * time)
        start = (width - length) // 2
        row[start : start + length] = wave / np.abs(wave).sum()
    return kernels


def cqt_kernels(
    sr: float = 22050,
    fmin: float = FMIN,
    n_bins: int = 84,
    bins_per_octave: int = 12,
    filter_scale: float = 1.0,
    window: str = "hann",
    fmax: float | None = None,
    gamma: float = 0.0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CQTKernels:
    r"""Return the kernels of a constant-Q transform in the time domain.

    .. math::
        \frac{1}{\|w_{l_k}\|_1} w_{l_k}(n)\, e^{2\pi i f_k n / sr}, \quad f_k = f_{min} 2^{k/b}, \quad
        l_k = \left\lceil \frac{Q\, sr}{f_k + \gamma/\alpha} \right\rceil, \quad \alpha = 2^{1/b} - 1, \quad
        Q = \frac{filter\_scale}{\alpha}

    Args:
        sr: Samples a second.
        fmin: Frequency of the lowest bin, in Hz.
        n_bins: Number of bins; not used with ``fmax``.
        bins_per_octave: b, bins an octave.
        filter_scale: Scales all lengths: below 1 for finer time, above for finer frequency.
        window: Name of the window, as in ``scipy.signal.get_window``; periodic.
        fmax: End of the scale in Hz, from which the number of bins follows.
        gamma: γ, an offset of the bandwidths in Hz; 0 for constant Q.
        device: Where to put the kernels.
        dtype: Their type.

    Shape:
        real and imaginary (n_bins, width), the width being the power of two that holds the longest kernel; lengths
        (n_bins,) in samples; frequencies (n_bins,) in Hz.

    Returns:
        The kernels, each of unit L1 norm and centred in the frame, their lengths and their frequencies.

    Raises:
        TypeError: An argument is of another type.
        ValueError: A size is below 1, ``fmax`` ≤ ``fmin``, ``gamma`` < 0, or the top bin (``n_bins``) is above
            Nyquist's frequency.

    Cost: O(n_bins · width) time and memory, 84 × 16384 by default.

    Source: the paper's section on the constant-Q transform; Brown and Puckette, JASA 1992; γ: Schörkhuber et al.,
    AES 2014.
    """
    q = quality(filter_scale, bins_per_octave)
    check_number("gamma", gamma, at_least=0)
    frequencies = octave_frequencies(sr, fmin, n_bins, bins_per_octave, fmax)
    lengths = kernel_lengths(frequencies, sr, q, bins_per_octave, gamma)
    kernels = waves(frequencies, lengths, sr, window)
    real, imaginary, *rest = (tensor_of(a, device, dtype) for a in (kernels.real, kernels.imag, lengths, frequencies))
    return CQTKernels(real, imaginary, *rest)
