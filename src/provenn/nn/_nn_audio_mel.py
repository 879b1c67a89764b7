"""Mel spectrograms, mel-frequency cepstral coefficients and gammatonegrams as layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.nn._nn_audio_banks import FilterBank, gammatone_filterbank, mel_filterbank
from provenn.nn._nn_audio_frames import PadMode, Streaming, as_batch
from provenn.nn._nn_audio_kernels import tensor_of
from provenn.nn._nn_audio_stft import STFT

Trained = bool | Literal["bank", "stft"]


class _BandSpectrogram(Streaming):
    """A bank of filters on the magnitudes of an STFT to a power; the subclass says which bank.

    ``bank_of`` returns the bank on a device and in a type.
    """

    def __init__(
        self,
        bank_of: Callable[..., Tensor],
        sr: float,
        n_fft: int,
        win_length: int | None,
        hop_length: int,
        window: str,
        center: bool,
        pad_mode: PadMode,
        power: float,
        trainable: Trained,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_number("power", power, above=0)
        check_choice("trainable", trainable, (False, True, "bank", "stft"))
        self.stft = STFT(
            n_fft, win_length, None, hop_length, window, sr=sr, center=center, pad_mode=pad_mode,
            trainable=trainable in (True, "stft"), device=device, dtype=dtype,
        )  # fmt: skip
        self.frame_length, self.hop_length, self.center, self.power = n_fft, hop_length, center, power
        design = bank_of(device="cpu", dtype=torch.float64)
        self.bank = FilterBank(bank_of(device=device, dtype=dtype), trainable in (True, "bank"), design)

    def forward(self, x: Float[Tensor, "*batch samples"]) -> Float[Tensor, "batch bands frames"]:
        """Return the spectrogram of a batch of clips.

        Args:
            x: Clips, of floating-point samples.
        """
        clips = as_batch(x)
        bands = self._bands(clips) if self.stft.trainable else self.stft.in_blocks(self._bands, clips)
        return bands.transpose(1, 2).to(x.dtype)

    def _bands(self, x: Tensor) -> Tensor:
        bands: Tensor = self.bank(self.stft.power(x, self.power))
        return bands


class MelSpectrogram(_BandSpectrogram):
    r"""Mel spectrogram: a bank of triangular filters on the magnitudes of an STFT to a power.

    .. math:: M_{m,t} = \sum_k B_{m,k}\, |X_{k,t}|^p

    Args:
        sr: Samples a second.
        n_fft: Samples of a frame.
        win_length: Samples of the window; default ``n_fft``.
        n_mels: Number of bands.
        hop_length: Samples between frames.
        window: Name of the window, as in ``scipy.signal.get_window``; periodic.
        center: Whether frame t is centred at sample t · hop_length.
        pad_mode: ``"reflect"`` or ``"constant"`` (zeros).
        power: p; 1 for magnitudes.
        htk: Whether to use HTK's mel scale instead of Slaney's.
        fmin: Where the lowest triangle begins, in Hz.
        fmax: Where the highest triangle ends, in Hz; default Nyquist's frequency.
        norm: ``"slaney"`` gives every triangle an area of 1 over Hz; ``None`` a peak of 1.
        trainable: ``True``: the bank and the Fourier kernels are parameters; ``"bank"`` or ``"stft"``: one of the two.
        device: Where to put the kernels.
        dtype: Their type.

    Shape:
        x (samples,), (batch, samples) or (batch, 1, samples) → (batch, n_mels, frames).

    Returns:
        The mel spectrogram.

    Raises:
        TypeError: An argument is of another type; ``x`` is not floating-point.
        ValueError: As :class:`STFT` and :func:`mel_filterbank`; ``power`` ≤ 0; an unknown ``trainable``.

    Cost: that of :class:`STFT`, and O(frames · n_fft · n_mels) time with a trained bank, an eighth of it with a
    fixed one of 128 bands.

    Source: the paper's section on the mel spectrogram.
    """

    def __init__(
        self,
        sr: float = 22050,
        n_fft: int = 2048,
        win_length: int | None = None,
        n_mels: int = 128,
        hop_length: int = 512,
        window: str = "hann",
        center: bool = True,
        pad_mode: PadMode = "reflect",
        power: float = 2.0,
        htk: bool = False,
        fmin: float = 0.0,
        fmax: float | None = None,
        norm: Literal["slaney"] | None = "slaney",
        trainable: Trained = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        bank_of = partial(mel_filterbank, sr, n_fft, n_mels, fmin, fmax, htk, norm)
        super().__init__(
            bank_of, sr, n_fft, win_length, hop_length, window, center, pad_mode, power, trainable, device, dtype
        )


class Gammatonegram(_BandSpectrogram):
    r"""Gammatonegram: the magnitude responses of gammatone filters on the magnitudes of an STFT to a power.

    Args:
        sr: Samples a second.
        n_fft: Samples of a frame.
        win_length: Samples of the window; default ``n_fft``.
        n_bins: Number of bands.
        hop_length: Samples between frames.
        window: Name of the window, as in ``scipy.signal.get_window``; periodic.
        center: Whether frame t is centred at sample t · hop_length.
        pad_mode: ``"reflect"`` or ``"constant"`` (zeros).
        power: Power of the magnitudes.
        fmin: Centre of the lowest band, in Hz.
        fmax: End of the scale in Hz; default Nyquist's frequency.
        trainable: ``True``: the bank and the Fourier kernels are parameters; ``"bank"`` or ``"stft"``: one of the two.
        device: Where to put the kernels.
        dtype: Their type.

    Shape:
        x (samples,), (batch, samples) or (batch, 1, samples) → (batch, n_bins, frames).

    Returns:
        The gammatonegram.

    Raises:
        TypeError: An argument is of another type; ``x`` is not floating-point.
        ValueError: As :class:`STFT` and :func:`gammatone_filterbank`; ``power`` ≤ 0; an unknown ``trainable``.

    Cost: that of :class:`STFT`, and O(frames · n_fft · n_bins) time.

    Source: the authors' package, ``Gammatonegram``.
    """

    def __init__(
        self,
        sr: float = 22050,
        n_fft: int = 2048,
        win_length: int | None = None,
        n_bins: int = 64,
        hop_length: int = 512,
        window: str = "hann",
        center: bool = True,
        pad_mode: PadMode = "reflect",
        power: float = 2.0,
        fmin: float = 20.0,
        fmax: float | None = None,
        trainable: Trained = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        bank_of = partial(gammatone_filterbank, sr, n_fft, n_bins, fmin, fmax)
        super().__init__(
            bank_of, sr, n_fft, win_length, hop_length, window, center, pad_mode, power, trainable, device, dtype
        )


class MFCC(nn.Module):
    r"""Mel-frequency cepstral coefficients: the cosine transform of a mel spectrogram in decibels.

    .. math::
        C_{j,t} = \sum_m D_{j,m}\, \max\big(L_{m,t},\; \max L - 80\big), \quad L = 10 \log_{10}\max(M, 10^{-10})

    with the orthonormal DCT-II D, the maximum taken over each clip.

    Args:
        sr: Samples a second.
        n_mfcc: Number of coefficients.
        n_fft: Samples of a frame.
        win_length: Samples of the window; default ``n_fft``.
        n_mels: Number of mel bands.
        hop_length: Samples between frames.
        window: Name of the window, as in ``scipy.signal.get_window``; periodic.
        center: Whether frame t is centred at sample t · hop_length.
        pad_mode: ``"reflect"`` or ``"constant"`` (zeros).
        power: Power of the magnitudes.
        htk: Whether to use HTK's mel scale instead of Slaney's.
        fmin: Where the lowest triangle begins, in Hz.
        fmax: Where the highest triangle ends, in Hz; default Nyquist's frequency.
        norm: ``"slaney"`` gives every triangle an area of 1 over Hz; ``None`` a peak of 1.
        amin: Smallest power that is told apart from silence.
        top_db: Decibels below a clip's maximum at which it is cut off; ``None`` for no cut.
        trainable: As in :class:`MelSpectrogram`.
        device: Where to put the kernels.
        dtype: Their type.

    Shape:
        x (samples,), (batch, samples) or (batch, 1, samples) → (batch, n_mfcc, frames).

    Returns:
        The coefficients.

    Raises:
        TypeError: An argument is of another type; ``x`` is not floating-point.
        ValueError: As :class:`MelSpectrogram`; ``n_mfcc`` is not in [1, ``n_mels``]; ``amin`` ≤ 0; ``top_db`` < 0.

    Cost: that of :class:`MelSpectrogram`, and O(frames · n_mels · n_mfcc).

    Source: the paper's section on MFCC; Davis and Mermelstein, IEEE TASSP 1980.
    """

    def __init__(
        self,
        sr: float = 22050,
        n_mfcc: int = 20,
        n_fft: int = 2048,
        win_length: int | None = None,
        n_mels: int = 128,
        hop_length: int = 512,
        window: str = "hann",
        center: bool = True,
        pad_mode: PadMode = "reflect",
        power: float = 2.0,
        htk: bool = False,
        fmin: float = 0.0,
        fmax: float | None = None,
        norm: Literal["slaney"] | None = "slaney",
        amin: float = 1e-10,
        top_db: float | None = 80.0,
        trainable: Trained = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mel = MelSpectrogram(
            sr, n_fft, win_length, n_mels, hop_length, window, center, pad_mode, power, htk, fmin, fmax, norm,
            trainable, device=device, dtype=dtype,
        )  # fmt: skip
        check_integer("n_mfcc", n_mfcc, at_least=1, at_most=n_mels)
        check_number("amin", amin, above=0)
        if top_db is not None:
            check_number("top_db", top_db, at_least=0)
        self.amin, self.top_db = amin, top_db
        rows, columns = np.arange(n_mfcc)[:, None], np.arange(n_mels)
        transform = np.cos(math.pi * rows * (2 * columns + 1) / (2 * n_mels)) * math.sqrt(2 / n_mels)
        transform[0] /= math.sqrt(2)
        self.register_buffer("dct", tensor_of(transform, device, dtype))

    def forward(self, x: Float[Tensor, "*batch samples"]) -> Float[Tensor, "batch n_mfcc frames"]:
        """Return the coefficients of a batch of clips.

        Args:
            x: Clips, of floating-point samples.
        """
        level = 10 * self.mel(x).clamp_min(self.amin).log10()
        if self.top_db is not None and level.numel() > 0:
            level = torch.maximum(level, level.amax((1, 2), keepdim=True) - self.top_db)
        return (level.transpose(1, 2) @ self.dct.to(level.dtype).T).transpose(1, 2)
