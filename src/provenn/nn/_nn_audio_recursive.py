"""Constant-Q and variable-Q transforms octave by octave: short kernels, on a signal halved from octave to octave."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_number
from provenn.nn._nn_audio_cqt import Normalization, SpectralBank, WaveBank, check_constant_q, finished
from provenn.nn._nn_audio_decimation import decimate, early_factor, low_pass
from provenn.nn._nn_audio_frames import Output, PadMode, as_batch, padded
from provenn.nn._nn_audio_kernels import (
    FMIN,
    CQTKernels,
    kernel_lengths,
    octave_frequencies,
    quality,
    tensor_of,
    waves,
)

_HANN_BANDWIDTH = 1.5


class _Recursive(nn.Module):
    """The recursion, by kernels in the time domain unless a subclass says otherwise."""

    def __init__(
        self,
        sr: float,
        hop_length: int,
        fmin: float,
        fmax: float | None,
        n_bins: int,
        bins_per_octave: int,
        filter_scale: float,
        gamma: float,
        window: str,
        pad_mode: PadMode,
        early_downsample: bool,
        trainable: bool,
        output_format: Output,
        normalization: Normalization,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_constant_q(hop_length, output_format, pad_mode, normalization)
        check_number("gamma", gamma, at_least=0)
        q = quality(filter_scale, bins_per_octave)
        frequencies = octave_frequencies(sr, fmin, n_bins, bins_per_octave, fmax)
        self.octaves = math.ceil(len(frequencies) / bins_per_octave)
        if hop_length % 2 ** (self.octaves - 1):
            raise ValueError(
                f"hop_length must be divisible by {2 ** (self.octaves - 1)} to be halved for each of {self.octaves} "
                f"octaves, got {hop_length}"
            )
        self.hop_length, self.pad_mode, self.trainable = hop_length, pad_mode, trainable
        self.output_format, self.normalization = output_format, normalization
        lobe = 0.5 * _HANN_BANDWIDTH * frequencies[-1] / q + 0.5 * gamma
        self.factor = early_factor(sr, hop_length, frequencies[-1], lobe, self.octaves) if early_downsample else 1
        self.register_buffer("lowpass", tensor_of(low_pass(0.5, 0.001), device, dtype))
        early = low_pass(1 / self.factor, 0.03) if self.factor > 1 else np.zeros(0)
        self.register_buffer("early_lowpass", tensor_of(early, device, dtype))
        lengths = kernel_lengths(frequencies, sr, q, bins_per_octave, gamma)
        self.register_buffer("lengths", tensor_of(lengths, device, dtype))
        self.register_buffer("frequencies", tensor_of(frequencies, device, dtype))
        self.banks = nn.ModuleList()
        for octave in range(self.octaves if gamma > 0 else 1):  # of constant Q, all octaves share their kernels
            rate = sr / self.factor / 2**octave
            here = frequencies[-bins_per_octave:] / 2**octave
            taps = kernel_lengths(here, rate, q, bins_per_octave, gamma)
            wave = waves(here, taps, rate, window)
            held = CQTKernels(*(tensor_of(a, device, dtype) for a in (wave.real, wave.imag, taps, here)))
            self.banks.append(self._bank(held, taps.astype(int).tolist()))

    def _bank(self, kernels: CQTKernels, lengths: list[int]) -> nn.Module:
        return WaveBank(kernels, lengths, self.trainable)

    def forward(self, x: Float[Tensor, "*batch samples"]) -> Float[Tensor, "..."]:
        """Return the transform of a batch of clips.

        Args:
            x: Clips, of floating-point samples.
        """
        given, x = x, as_batch(x)
        frames, hop = x.shape[-1] // self.hop_length + 1, self.hop_length // self.factor
        if self.factor > 1:
            x = decimate(x, self.early_lowpass, self.factor)
        parts: list[tuple[Tensor, Tensor]] = []
        for octave in range(self.octaves):
            if octave > 0:
                x, hop = decimate(x, self.lowpass, 2), hop // 2
            bank = self.banks[min(octave, len(self.banks) - 1)]
            parts.append(bank(padded(x, bank.width // 2, self.pad_mode), hop))
        real, imaginary = (
            torch.cat([one[:, :, :frames] for one in kind], 1)[:, -len(self.lengths) :]
            for kind in zip(*reversed(parts), strict=True)
        )
        result = finished(real, imaginary, self.lengths, self.normalization, self.output_format, self.trainable)
        return result.to(given.dtype)

    def extra_repr(self) -> str:
        """Return the sizes for ``print``."""
        return f"n_bins={len(self.lengths)}, octaves={self.octaves}, early factor={self.factor}"


class CQT2010v2(_Recursive):
    r"""Constant-Q transform octave by octave, by kernels in the time domain.

    The kernels of the top octave serve all: for each lower octave the signal is low-pass filtered (256 taps) and
    halved, and the hop with it. Near to :class:`CQT1992v2` away from the clip's ends, at a fraction of its cost.
    A halving delays the signal by half a sample, which turns the phase of lower octaves; magnitudes feel nothing of it.

    Args:
        sr: Samples a second.
        hop_length: Samples between frames; halved from octave to octave.
        fmin: Frequency of the lowest bin, in Hz.
        fmax: End of the scale in Hz, from which the number of bins follows.
        n_bins: Number of bins; not used with ``fmax``.
        bins_per_octave: Bins an octave.
        filter_scale: Scales all kernels' lengths.
        window: Name of the window, as in ``scipy.signal.get_window``; periodic.
        pad_mode: ``"reflect"`` or ``"constant"`` (zeros), in every octave.
        early_downsample: Whether to halve the signal before the first octave as often as the top bin allows. Rate, hop
            and kernels change together; the normalisation does not.
        trainable: Whether the kernels are parameters, shared by all octaves. Magnitudes then are
            √(re² + im² + 1e-8).
        output_format: ``"Magnitude"``, ``"Complex"`` or ``"Phase"``, as in :class:`CQT1992v2`.
        normalization: ``"librosa"``, ``"convolutional"`` or ``"wrap"``, as in :class:`CQT1992v2`.
        device: Where to put the kernels.
        dtype: Their type.

    Attributes:
        lengths: The kernels' lengths in samples, at the clip's own rate.
        frequencies: The bins' frequencies in Hz.
        factor: By how much the signal is thinned out before the first octave.

    Shape:
        As :class:`CQT1992v2`, centred.

    Returns:
        The transform.

    Raises:
        TypeError: An argument is of another type; ``x`` is not floating-point.
        ValueError: As :class:`CQT1992v2`; ``hop_length`` is not divisible by 2 to the power of the
            octaves below the first; or ``x`` is, in some octave, no longer than the reflection padding.

    Cost: O(samples · 512 + frames · Σ l) time, l being the lengths of one octave's kernels; the filters dominate.

    Source: the paper's section on the constant-Q transform, "CQT2010v2"; Schörkhuber and Klapuri, SMC 2010.
    """

    def __init__(
        self,
        sr: float = 22050,
        hop_length: int = 512,
        fmin: float = FMIN,
        fmax: float | None = None,
        n_bins: int = 84,
        bins_per_octave: int = 12,
        filter_scale: float = 1.0,
        window: str = "hann",
        pad_mode: PadMode = "reflect",
        early_downsample: bool = True,
        trainable: bool = False,
        output_format: Output = "Magnitude",
        normalization: Normalization = "librosa",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            sr, hop_length, fmin, fmax, n_bins, bins_per_octave, filter_scale, 0.0, window, pad_mode,
            early_downsample, trainable, output_format, normalization, device, dtype,
        )  # fmt: skip


class CQT2010(CQT2010v2):
    r"""Constant-Q transform octave by octave, by kernels in the frequency domain.

    As :class:`CQT2010v2`, with spectra of frames times the kernels' spectra in place of correlations.

    Args:
        sr: Samples a second.
        hop_length: Samples between frames; halved from octave to octave.
        fmin: Frequency of the lowest bin, in Hz.
        fmax: End of the scale in Hz, from which the number of bins follows.
        n_bins: Number of bins; not used with ``fmax``.
        bins_per_octave: Bins an octave.
        filter_scale: Scales all kernels' lengths.
        window: Name of the window, as in ``scipy.signal.get_window``; periodic.
        pad_mode: ``"reflect"`` or ``"constant"`` (zeros), in every octave.
        early_downsample: Whether to halve the signal before the first octave as often as the top bin allows. Rate, hop
            and kernels change together; the normalisation does not.
        trainable: Whether the kernels' spectra are parameters, shared by all octaves. Magnitudes then are
            √(re² + im² + 1e-8).
        output_format: ``"Magnitude"``, ``"Complex"`` or ``"Phase"``, as in :class:`CQT1992v2`.
        normalization: ``"librosa"``, ``"convolutional"`` or ``"wrap"``, as in :class:`CQT1992v2`.
        device: Where to put the kernels.
        dtype: Their type.

    Attributes:
        lengths: The kernels' lengths in samples, at the clip's own rate.
        frequencies: The bins' frequencies in Hz.
        factor: By how much the signal is thinned out before the first octave.

    Shape:
        As :class:`CQT1992v2`, centred.

    Returns:
        The transform.

    Raises:
        TypeError: An argument is of another type; ``x`` is not floating-point.
        ValueError: As :class:`CQT1992v2`; ``hop_length`` is not divisible by 2 to the power of the
            octaves below the first; or ``x`` is, in some octave, no longer than the reflection padding.

    Cost: O(samples · 512 + frames · octaves · N · bins_per_octave) time, N being the frame of the top octave's kernels.

    Source: Schörkhuber and Klapuri, SMC 2010; the paper's "CQT2010".
    """

    def _bank(self, kernels: CQTKernels, lengths: list[int]) -> nn.Module:
        return SpectralBank(kernels, self.trainable)


class VQT(_Recursive):
    r"""Variable-Q transform octave by octave: bandwidths of constant Q with an offset γ, which shortens low kernels.

    With γ = 0 it is :class:`CQT2010v2`. Else every octave has kernels of its own, of lengths ⌈Q sr/(f + γ/α)⌉ with
    α = 2^{1/b} − 1. A large γ leaves the lowest octaves' kernels few samples (16 with γ = 20 Hz), beside which the
    delay of the halvings counts: there fast chirps come out up to a tenth off.

    Args:
        sr: Samples a second.
        hop_length: Samples between frames; halved from octave to octave.
        fmin: Frequency of the lowest bin, in Hz.
        fmax: End of the scale in Hz, from which the number of bins follows.
        n_bins: Number of bins; not used with ``fmax``.
        bins_per_octave: Bins an octave.
        filter_scale: Scales all kernels' lengths.
        gamma: γ, an offset of the bandwidths in Hz; 0 for constant Q.
        window: Name of the window, as in ``scipy.signal.get_window``; periodic.
        pad_mode: ``"reflect"`` or ``"constant"`` (zeros), in every octave.
        early_downsample: Whether to halve the signal before the first octave as often as the top bin allows. Rate, hop
            and kernels change together; the normalisation does not.
        trainable: Whether the kernels are parameters. Magnitudes then are √(re² + im² + 1e-8).
        output_format: ``"Magnitude"``, ``"Complex"`` or ``"Phase"``, as in :class:`CQT1992v2`.
        normalization: ``"librosa"``, ``"convolutional"`` or ``"wrap"``, as in :class:`CQT1992v2`.
        device: Where to put the kernels.
        dtype: Their type.

    Attributes:
        lengths: The kernels' lengths in samples, at the clip's own rate.
        frequencies: The bins' frequencies in Hz.
        factor: By how much the signal is thinned out before the first octave.

    Shape:
        As :class:`CQT1992v2`, centred.

    Returns:
        The transform.

    Raises:
        TypeError: An argument is of another type; ``x`` is not floating-point.
        ValueError: As :class:`CQT1992v2`; ``gamma`` < 0; ``hop_length`` is not divisible by 2 to the power of the
            octaves below the first; or ``x`` is, in some octave, no longer than the reflection padding.

    Cost: O(samples · 512 + frames · Σ l) time, l being the lengths of the kernels; the filters dominate.

    Source: the authors' package, ``VQT``; Schörkhuber et al., AES 2014.
    """

    def __init__(
        self,
        sr: float = 22050,
        hop_length: int = 512,
        fmin: float = FMIN,
        fmax: float | None = None,
        n_bins: int = 84,
        bins_per_octave: int = 12,
        filter_scale: float = 1.0,
        gamma: float = 0.0,
        window: str = "hann",
        pad_mode: PadMode = "reflect",
        early_downsample: bool = True,
        trainable: bool = False,
        output_format: Output = "Magnitude",
        normalization: Normalization = "librosa",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            sr, hop_length, fmin, fmax, n_bins, bins_per_octave, filter_scale, gamma, window, pad_mode,
            early_downsample, trainable, output_format, normalization, device, dtype,
        )  # fmt: skip
