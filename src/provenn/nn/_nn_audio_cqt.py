"""Constant-Q transforms by one set of kernels for all bins: in the frequency domain, and in the time domain."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer
from provenn.nn._nn_audio_frames import (
    Output,
    PadMode,
    Streaming,
    check_layer,
    correlate,
    formatted,
    framed_input,
    hold,
    spectra,
)
from provenn.nn._nn_audio_kernels import FMIN, CQTKernels, cqt_kernels

Normalization = Literal["librosa", "convolutional", "wrap"]
_BINS_A_GROUP = 24
"""Fewer multiply short kernels less often by zeros, more keep a processor busier; 24 was fastest of 4 to 84."""


class WaveBank(nn.Module):
    """Correlate a signal with constant-Q kernels in groups of neighbouring bins, each as long as its longest kernel.

    The dense kernels of 84 bins hold 84 · 16384 samples, most of them 0 beside short kernels; groups hold a quarter.
    A trained kernel can change within its group's length.
    """

    def __init__(self, kernels: CQTKernels, lengths: list[int], trainable: bool) -> None:
        super().__init__()
        self.width = kernels.real.shape[1]
        self.groups: list[tuple[int, int]] = []
        for place in range(0, len(lengths), _BINS_A_GROUP):
            rows = slice(place, place + _BINS_A_GROUP)
            length = max(lengths[rows])
            start = (self.width - length) // 2
            self.groups.append((start, length))
            both = torch.cat((kernels.real[rows], kernels.imaginary[rows]))[:, start : start + length].clone()
            hold(self, f"kernels{len(self.groups) - 1}", both, trainable)

    def forward(self, x: Float[Tensor, "batch samples"], hop: int) -> tuple[Tensor, Tensor]:
        """Return real and imaginary parts, each (batch, bins, frames), of frames as wide as the kernels' common one."""
        reach = (x.shape[-1] - self.width) // hop * hop
        real, imaginary = [], []
        for place, (start, length) in enumerate(self.groups):
            part = x[:, start : start + reach + length]
            cosine, sine = correlate(part, getattr(self, f"kernels{place}"), hop).chunk(2, 1)
            real.append(cosine)
            imaginary.append(-sine)
        return torch.cat(real, 1), torch.cat(imaginary, 1)


def check_constant_q(hop_length: int, output_format: str, pad_mode: str, normalization: str) -> None:
    """Check the arguments that all constant-Q layers share."""
    check_integer("hop_length", hop_length, at_least=1)
    check_layer(output_format, pad_mode)
    check_choice("normalization", normalization, get_args(Normalization))


def finished(
    real: Tensor,
    imaginary: Tensor,
    lengths: Tensor,
    normalization: Normalization,
    output_format: Output,
    trained: bool,
) -> Tensor:
    """Normalise, and bring to the output's format; a phase is given by its cosine and sine, stacked last."""
    if normalization == "librosa":
        scale = lengths.to(real.dtype).sqrt()[:, None]
        real, imaginary = real * scale, imaginary * scale
    elif normalization == "wrap":
        real, imaginary = 2 * real, 2 * imaginary
    result = formatted(real, imaginary, output_format, trained)
    return torch.stack((result.cos(), result.sin()), -1) if output_format == "Phase" else result


class CQT1992v2(Streaming):
    r"""Constant-Q transform by kernels in the time domain.

    .. math:: X_{k,t} = c_k \sum_n x_{n + t h}\, \overline{K_k(n)}

    with the kernels K of :func:`cqt_kernels` and the normalisation c.

    Args:
        sr: Samples a second.
        hop_length: h, samples between frames.
        fmin: Frequency of the lowest bin, in Hz.
        fmax: End of the scale in Hz, from which the number of bins follows.
        n_bins: Number of bins; not used with ``fmax``.
        bins_per_octave: Bins an octave.
        filter_scale: Scales all kernels' lengths.
        window: Name of the window, as in ``scipy.signal.get_window``; periodic.
        center: Whether frame t is centred at sample t·h, or begins there.
        pad_mode: ``"reflect"`` or ``"constant"`` (zeros).
        trainable: Whether the kernels are parameters. Magnitudes then are √(re² + im² + 1e-8).
        output_format: ``"Magnitude"``. ``"Complex"``: real and imaginary part, stacked last. ``"Phase"``: cosine and
            sine of the angle, stacked last.
        normalization: ``"librosa"``: c = √l, l being the kernel's length in samples. ``"convolutional"``: c = 1.
            ``"wrap"``: c = 2, by which a sine of amplitude 1 at a bin's frequency gives 1 there.
        device: Where to put the kernels.
        dtype: Their type.

    Attributes:
        lengths: The kernels' lengths in samples.
        frequencies: The bins' frequencies in Hz.

    Shape:
        x (samples,), (batch, samples) or (batch, 1, samples) → (batch, n_bins, frames), or (batch, n_bins, frames, 2)
        for ``"Complex"`` and ``"Phase"``; frames = samples // h + 1 if centred.

    Returns:
        The transform.

    Raises:
        TypeError: An argument is of another type; ``x`` is not floating-point.
        ValueError: As :func:`cqt_kernels`; ``hop_length`` < 1; an unknown ``output_format``, ``pad_mode`` or
            ``normalization``; or ``x`` is no longer than the reflection padding (half the longest kernel's frame), or
            shorter than that frame.

    Cost: O(frames · Σ l) time, in groups of 24 bins that share the longest of their lengths.

    Source: the paper's section on the constant-Q transform, "CQT1992v2".
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
        center: bool = True,
        pad_mode: PadMode = "reflect",
        trainable: bool = False,
        output_format: Output = "Magnitude",
        normalization: Normalization = "librosa",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_constant_q(hop_length, output_format, pad_mode, normalization)
        self.hop_length, self.center, self.pad_mode, self.trainable = hop_length, center, pad_mode, trainable
        self.output_format, self.normalization = output_format, normalization
        kernels = cqt_kernels(
            sr, fmin, n_bins, bins_per_octave, filter_scale, window, fmax, device="cpu", dtype=torch.float64
        )
        self.frame_length = kernels.real.shape[1]
        held = CQTKernels(
            *(one.to(device or torch.get_default_device(), dtype or torch.get_default_dtype()) for one in kernels)
        )
        self.register_buffer("lengths", held.lengths)
        self.register_buffer("frequencies", held.frequencies)
        self._hold(held, [int(one) for one in kernels.lengths.tolist()])

    def _hold(self, kernels: CQTKernels, lengths: list[int]) -> None:
        self.bank = WaveBank(kernels, lengths, self.trainable)

    def forward(self, x: Float[Tensor, "*batch samples"]) -> Float[Tensor, "..."]:
        """Return the transform of a batch of clips.

        Args:
            x: Clips, of floating-point samples.
        """
        framed = framed_input(x, self.frame_length, self.center, self.pad_mode)
        real, imaginary = self._parts(framed)
        result = finished(real, imaginary, self.lengths, self.normalization, self.output_format, self.trainable)
        return result.to(x.dtype)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        real, imaginary = self.bank(x, self.hop_length)
        return real, imaginary

    def extra_repr(self) -> str:
        """Return the sizes for ``print``."""
        return f"n_bins={len(self.lengths)}, width={self.frame_length}, hop_length={self.hop_length}"


class SpectralBank(nn.Module):
    """Multiply spectra of frames by the kernels' spectra: by Parseval the correlation, but for negative frequencies."""

    def __init__(self, kernels: CQTKernels, trainable: bool) -> None:
        super().__init__()
        self.width = kernels.real.shape[1]
        wave = torch.complex(kernels.real.double(), kernels.imaginary.double())
        spectrum = torch.fft.fft(wave)[:, : self.width // 2 + 1] / self.width
        for name, part in (("real", spectrum.real), ("imaginary", spectrum.imag)):
            hold(self, name, part.to(kernels.real.dtype, copy=True), trainable)

    def forward(self, x: Float[Tensor, "batch samples"], hop: int) -> tuple[Tensor, Tensor]:
        """Return real and imaginary parts, each (batch, bins, frames)."""
        spectrum = spectra(x, self.width, hop)
        real, imaginary = self.real.to(spectrum.dtype), self.imaginary.to(spectrum.dtype)
        rows = torch.cat((torch.stack((real, imaginary), -1), torch.stack((-imaginary, real), -1)))
        both = spectrum.flatten(-2) @ rows.flatten(1).T
        first, second = both.transpose(1, 2).chunk(2, 1)
        return first, second


class CQT1992(CQT1992v2):
    r"""Constant-Q transform by kernels in the frequency domain: spectra of frames times the kernels' spectra.

    .. math:: X_{k,t} = \frac{c_k}{N} \sum_{f=0}^{N/2} \hat x_t(f)\, \overline{\hat K_k(f)}

    The kernels' spectra at negative frequencies, next to nothing, are left out. All bins pay for the longest kernel's
    frame; :class:`CQT1992v2` does not.

    Args:
        sr: Samples a second.
        hop_length: Samples between frames.
        fmin: Frequency of the lowest bin, in Hz.
        fmax: End of the scale in Hz, from which the number of bins follows.
        n_bins: Number of bins; not used with ``fmax``.
        bins_per_octave: Bins an octave.
        filter_scale: Scales all kernels' lengths.
        window: Name of the window, as in ``scipy.signal.get_window``; periodic.
        center: Whether frame t is centred at sample t · hop_length, or begins there.
        pad_mode: ``"reflect"`` or ``"constant"`` (zeros).
        trainable: Whether the kernels' spectra are parameters. Magnitudes then are √(re² + im² + 1e-8).
        output_format: ``"Magnitude"``, ``"Complex"`` or ``"Phase"``, as in :class:`CQT1992v2`.
        normalization: ``"librosa"``, ``"convolutional"`` or ``"wrap"``, as in :class:`CQT1992v2`.
        device: Where to put the kernels.
        dtype: Their type.

    Shape:
        As :class:`CQT1992v2`.

    Returns:
        The transform.

    Raises:
        TypeError: As :class:`CQT1992v2`.
        ValueError: As :class:`CQT1992v2`.

    Cost: O(frames · N (log N + n_bins)) time and O(batch · frames · N) memory, N being the longest kernel's frame.

    Source: Brown and Puckette, JASA 1992; the paper's "CQT1992".
    """

    def _hold(self, kernels: CQTKernels, lengths: list[int]) -> None:
        self.bank = SpectralBank(kernels, self.trainable)
