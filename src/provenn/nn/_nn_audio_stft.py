"""The short-time Fourier transform as a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer
from provenn.nn._nn_audio_frames import (
    Output,
    PadMode,
    Streaming,
    as_batch,
    check_layer,
    correlate,
    formatted,
    framed_input,
    hold,
    in_blocks,
    power_of,
    spectra,
)
from provenn.nn._nn_audio_kernels import FrequencyScale, bin_frequencies, fourier_kernels, tensor_of, window_of


class STFT(Streaming):
    r"""Short-time Fourier transform whose kernels are filters of the network.

    .. math:: X_{i,t} = \sum_n x_{n + t h}\, w_n\, e^{-2\pi i\, k_i n / N}

    Untrained on the scale ``"no"`` the frames go through a fast Fourier transform; else they are correlated with the
    kernels. Both give the same numbers.

    Args:
        n_fft: N, samples of a frame.
        win_length: Samples of the window, which is padded with zeros to the frame; default N.
        freq_bins: Number of bins; default N//2 + 1. On the scale ``"no"`` the lowest ones are kept.
        hop_length: h, samples between frames; default ``win_length // 4``.
        window: Name of the window, as in ``scipy.signal.get_window``; periodic.
        freq_scale: ``"no"``, ``"linear"``, ``"log"`` or ``"log2"``, as in :func:`fourier_kernels`.
        fmin: Lowest frequency in Hz of the scales that have one.
        fmax: End of those scales in Hz.
        sr: Samples a second.
        center: Whether frame t is centred at sample t·h, in the clip padded by N//2 on both sides, or begins there.
        pad_mode: ``"reflect"`` or ``"constant"`` (zeros).
        trainable: Whether the kernels are a parameter. Magnitudes then are √(re² + im² + 1e-8).
        output_format: ``"Complex"``: real and imaginary part, stacked last. ``"Magnitude"``. ``"Phase"``: the angle.
        device: Where to put the kernels.
        dtype: Their type.

    Attributes:
        kernels: Windowed cosines and sines, (2, freq_bins, N); ``None`` where the fast transform does without.
        frequencies: The bins' frequencies in Hz.

    Shape:
        x (samples,), (batch, samples) or (batch, 1, samples) → (batch, freq_bins, frames), or
        (batch, freq_bins, frames, 2) for ``"Complex"``; frames = samples // h + 1 if centred.

    Returns:
        The spectrogram. Amplitudes are not scaled: a unit sine at a bin gives half the window's sum.

    Raises:
        TypeError: An argument is of another type; ``x`` is not floating-point.
        ValueError: As :func:`fourier_kernels`; ``hop_length`` < 1; an unknown ``output_format`` or ``pad_mode``; or
            ``x`` is no longer than the reflection padding, or shorter than a frame.

    Cost: O(frames · N log N) time by the fast transform; O(frames · N · freq_bins) trained or on another scale.

    Source: the paper's sections on the STFT and on trainable kernels.
    """

    def __init__(
        self,
        n_fft: int = 2048,
        win_length: int | None = None,
        freq_bins: int | None = None,
        hop_length: int | None = None,
        window: str = "hann",
        freq_scale: FrequencyScale = "no",
        fmin: float = 50.0,
        fmax: float = 6000.0,
        sr: float = 22050,
        center: bool = True,
        pad_mode: PadMode = "reflect",
        trainable: bool = False,
        output_format: Output = "Complex",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.frame_length, self.center, self.pad_mode, self.trainable = n_fft, center, pad_mode, trainable
        self.hop_length = checked_hop(n_fft, win_length, hop_length)
        check_layer(output_format, pad_mode)
        self.output_format = output_format
        bins = bin_frequencies(n_fft, freq_bins, freq_scale, fmin, fmax, sr)
        self.freq_bins = len(bins)
        self.register_buffer("frequencies", tensor_of(bins, device, dtype))
        if freq_scale == "no" and not trainable:
            values = window_of(window, win_length or n_fft, n_fft)
            self.register_buffer("window", tensor_of(values, device, dtype))
            self.register_buffer("kernels", None)
        else:
            cosine, sine, _ = fourier_kernels(
                n_fft, win_length, freq_bins, window, freq_scale, fmin, fmax, sr, device=device, dtype=dtype
            )
            self.register_buffer("window", None)
            hold(self, "kernels", torch.stack((cosine, sine)), trainable)

    def forward(self, x: Float[Tensor, "*batch samples"]) -> Float[Tensor, "..."]:
        """Return the spectrogram of a batch of clips.

        Args:
            x: Clips, of floating-point samples.
        """
        clips = as_batch(x)
        result = self._formatted(clips) if self.kernels is not None else self.in_blocks(self._formatted, clips)
        return result.transpose(1, 2).to(x.dtype)

    def in_blocks(self, function: Callable[[Tensor], Tensor], x: Float[Tensor, "batch samples"]) -> Tensor:
        """Apply a function of single clips to a few at a time, where the processor's cache gains by it.

        Args:
            function: Maps clips to a tensor with one entry each.
            x: All clips.
        """
        return in_blocks(function, x, self.frame_length, self.hop_length)

    def _formatted(self, x: Tensor) -> Tensor:
        return formatted(*self.parts(x), self.output_format, self.trainable)

    def power(self, x: Float[Tensor, "*batch samples"], exponent: float) -> Float[Tensor, "batch frames freq_bins"]:
        """Return magnitudes to a power, with the bins last.

        Args:
            x: Clips, as in :meth:`forward`.
            exponent: The power of the magnitude.
        """
        real, imaginary = self.parts(x)
        if exponent == 2:
            return power_of(real, imaginary, self.trainable)
        magnitude = formatted(real, imaginary, "Magnitude", self.trainable)
        return magnitude if exponent == 1 else magnitude**exponent

    def parts(self, x: Float[Tensor, "*batch samples"]) -> tuple[Tensor, Tensor]:
        """Return real and imaginary parts, each (batch, frames, freq_bins)."""
        x = framed_input(x, self.frame_length, self.center, self.pad_mode)
        if self.kernels is None:
            real, imaginary = spectra(x, self.frame_length, self.hop_length, self.window)[
                :, :, : self.freq_bins
            ].unbind(-1)
            return real, imaginary
        cosine, sine = correlate(x, self.kernels.flatten(0, 1), self.hop_length).transpose(1, 2).chunk(2, -1)
        return cosine, -sine

    def extra_repr(self) -> str:
        """Return the sizes for ``print``."""
        return (
            f"n_fft={self.frame_length}, freq_bins={self.freq_bins}, hop_length={self.hop_length}, "
            f"trainable={self.trainable}"
        )


def checked_hop(n_fft: int, win_length: int | None, hop_length: int | None) -> int:
    """Return the hop, by default a quarter of the window."""
    check_integer("n_fft", n_fft, at_least=2)
    if win_length is not None:
        check_integer("win_length", win_length, at_least=1, at_most=n_fft)
    if hop_length is None:
        return max(1, (win_length or n_fft) // 4)
    check_integer("hop_length", hop_length, at_least=1)
    return hop_length
