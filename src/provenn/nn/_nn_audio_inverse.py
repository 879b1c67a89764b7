"""From spectrograms back to waveforms: the inverse Fourier transform as a layer, and Griffin and Lim's phases."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from provenn.core.experiment.checks import check_integer, check_number
from provenn.nn._nn_audio_frames import PadMode, few_at_a_time, hold, wide
from provenn.nn._nn_audio_kernels import fourier_kernels, tensor_of, window_of
from provenn.nn._nn_audio_stft import STFT, checked_hop

_NEGLIGIBLE = 1e-10
"""Sums of squared windows below this are not divided by."""


class ISTFT(nn.Module):
    """Inverse of the short-time Fourier transform on the scale ``"no"``: the signal of least squares.

    Every spectrum becomes a frame by windowed inverse kernels; the frames are added where they overlap, divided by the
    sum of squared windows, and the centre's padding is cut off. It undoes :class:`STFT` wherever that sum is not 0.

    Args:
        n_fft: N, samples of a frame.
        win_length: Samples of the window; default N.
        hop_length: Samples between frames; default ``win_length // 4``.
        window: Name of the window, as in ``scipy.signal.get_window``; periodic.
        center: Whether the frames were centred.
        onesided: Whether there are N//2 + 1 bins, or all N.
        trainable: Whether the inverse kernels are a parameter.
        device: Where to put the kernels.
        dtype: Their type.

    Attributes:
        kernels: Inverse kernels for real and imaginary parts, (2, N//2 + 1, N); ``None`` unless trainable.

    Shape:
        X (batch, bins, frames, 2) → (batch, samples).

    Returns:
        The signal. A two-sided spectrum that is no real signal's gives the real part of its inverse.

    Raises:
        TypeError: An argument is of another type.
        ValueError: A size is out of bounds, ``X`` has another shape, or ``length`` exceeds what the frames reach.

    Cost: O(frames · N log N) time, or O(frames · N²) trainable; memory O(frames · N).

    Source: the paper's section on the inverse STFT; Griffin and Lim, IEEE TASSP 1984.
    """

    def __init__(
        self,
        n_fft: int = 2048,
        win_length: int | None = None,
        hop_length: int | None = None,
        window: str = "hann",
        center: bool = True,
        onesided: bool = True,
        trainable: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n_fft, self.center, self.onesided = n_fft, center, onesided
        self.hop_length = checked_hop(n_fft, win_length, hop_length)
        values = window_of(window, win_length or n_fft, n_fft)
        self.register_buffer("window", tensor_of(values, device, dtype))
        if trainable:
            cosine, sine, _ = fourier_kernels(n_fft, win_length, window=window, device=device, dtype=dtype)
            twice = torch.full_like(cosine[:, :1], 2 / n_fft)  # for the mirror image, which 0 and N/2 have not
            twice[[0, -1] if n_fft % 2 == 0 else [0]] = 1 / n_fft
            hold(self, "kernels", torch.stack((twice * cosine, -twice * sine)), True)
        else:
            self.register_buffer("kernels", None)

    def forward(
        self, X: Float[Tensor, "batch bins frames 2"], length: int | None = None
    ) -> Float[Tensor, "batch samples"]:
        """Return the signals of a batch of spectrograms.

        Args:
            X: Real and imaginary parts, stacked last.
            length: Samples to return; default all that the frames' centres span.
        """
        bins = self.n_fft // 2 + 1 if self.onesided else self.n_fft
        if X.ndim != 4 or X.shape[1] != bins or X.shape[3] != 2 or X.shape[2] < 1:
            raise ValueError(f"X must be (batch, {bins}, frames, 2), got {tuple(X.shape)}")
        spectrum = X if self.onesided else _folded(X)
        signal = few_at_a_time(self._added, wide(spectrum), X.shape[2] * self.n_fft)
        window = self.window.to(signal.dtype).expand(1, X.shape[2], -1)
        weight = _overlap_add(window.square(), self.hop_length)
        signal = signal / torch.where(weight > _NEGLIGIBLE, weight, torch.ones_like(weight))
        cut = self.n_fft // 2 if self.center else 0
        reach = signal.shape[-1] - cut
        if length is None:
            length = reach - cut
        elif not 0 <= length <= reach:
            raise ValueError(f"length must be from 0 to {reach}, where the frames end, got {length}")
        return signal[:, cut : cut + length].to(X.dtype)

    def _added(self, spectrum: Tensor) -> Float[Tensor, "batch samples"]:
        return _overlap_add(self._frames(spectrum), self.hop_length)

    def _frames(self, spectrum: Tensor) -> Float[Tensor, "batch frames n_fft"]:
        if self.kernels is not None:
            kernels = self.kernels.to(spectrum.dtype)
            return torch.einsum("bfti,ifn->btn", spectrum, kernels)
        if spectrum.numel() == 0:  # no clips: MKL has no plan for them
            return spectrum.new_zeros(spectrum.shape[0], spectrum.shape[2], self.n_fft)
        complex_spectrum = torch.view_as_complex(spectrum.transpose(1, 2).contiguous())
        frames = torch.fft.irfft(complex_spectrum, self.n_fft)
        return frames * self.window.to(frames.dtype)


def _folded(spectrum: Tensor) -> Tensor:
    """Return the one-sided spectrum of the real part of a two-sided one's inverse."""
    bins = spectrum.shape[1]
    mirrored = spectrum.roll(-1, 1).flip(1)[:, : bins // 2 + 1]
    conjugate = torch.stack((mirrored[..., 0], -mirrored[..., 1]), -1)
    return (spectrum[:, : bins // 2 + 1] + conjugate) / 2


def _overlap_add(frames: Float[Tensor, "batch frames width"], hop: int) -> Float[Tensor, "batch samples"]:
    """Add frames where they overlap, a hop's samples of all frames at once: ``fold`` takes seven times as long."""
    count, width = frames.shape[1:]
    parts = -(-width // hop)
    blocks = functional.pad(frames, (0, parts * hop - width)).unflatten(2, (parts, hop))
    signal = frames.new_zeros(frames.shape[0], count + parts - 1, hop)
    for place, block in enumerate(blocks.unbind(2)):
        signal[:, place : place + count] += block
    return signal.flatten(1)[:, : width + hop * (count - 1)]


class GriffinLim(nn.Module):
    r"""Waveforms from magnitude spectrograms: phases by the fast Griffin–Lim iteration.

    .. math::
        R_j = \mathrm{STFT}(\mathrm{ISTFT}(S\, e^{i\varphi_j})), \quad
        \varphi_{j+1} = \angle\Big(R_j - \frac{\mu}{1 + \mu} R_{j-1}\Big)

    Args:
        n_fft: Samples of a frame.
        n_iter: Iterations.
        win_length: Samples of the window; default ``n_fft``.
        hop_length: Samples between frames; default ``win_length // 4``.
        window: Name of the window, as in ``scipy.signal.get_window``; periodic.
        center: Whether the frames were centred.
        pad_mode: ``"reflect"`` or ``"constant"`` (zeros), for the transforms inside.
        momentum: μ; 0 is the original iteration.
        device: Where to put the window.
        dtype: Its type.

    Shape:
        S (batch, n_fft//2 + 1, frames) → (batch, samples).

    Returns:
        The signals, as long as the frames' centres span.

    Raises:
        TypeError: An argument is of another type.
        ValueError: A size is out of bounds, ``momentum`` < 0, ``S`` or ``phase`` has another shape, or so few frames
            that the signal (``x``) cannot be padded by reflection.

    Cost: ``n_iter`` transforms and inverses; memory of a few spectrograms.

    Source: the paper's section on Griffin–Lim; Perraudin, Balazs and Søndergaard, WASPAA 2013, algorithm 2.
    """

    def __init__(
        self,
        n_fft: int = 2048,
        n_iter: int = 32,
        win_length: int | None = None,
        hop_length: int | None = None,
        window: str = "hann",
        center: bool = True,
        pad_mode: PadMode = "reflect",
        momentum: float = 0.99,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("n_iter", n_iter, at_least=0)
        check_number("momentum", momentum, at_least=0)
        self.n_iter, self.momentum = n_iter, momentum
        hop = checked_hop(n_fft, win_length, hop_length)
        self.stft = STFT(
            n_fft, win_length, None, hop, window, center=center, pad_mode=pad_mode, device=device, dtype=dtype
        )
        self.istft = ISTFT(n_fft, win_length, hop, window, center, device=device, dtype=dtype)

    def forward(
        self,
        S: Float[Tensor, "batch bins frames"],
        phase: Float[Tensor, "batch bins frames"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch samples"]:
        """Return signals whose magnitudes come near ``S``.

        Args:
            S: Magnitudes.
            phase: Phases to start from, in radians, in the shape of ``S``; default uniformly random.
            generator: Draws the random phases; default torch's global one.
        """
        if S.ndim != 3 or S.shape[1] != self.stft.freq_bins:
            raise ValueError(f"S must be (batch, {self.stft.freq_bins}, frames), got {tuple(S.shape)}")
        magnitude = wide(S)
        if phase is None:
            phase = (
                2 * math.pi * torch.rand(magnitude.shape, generator=generator, device=S.device, dtype=magnitude.dtype)
            )
        elif phase.shape != S.shape:
            raise ValueError(f"phase must have the shape {tuple(S.shape)} of S, got {tuple(phase.shape)}")
        phase = phase.to(magnitude.dtype)
        direction = torch.stack((phase.cos(), phase.sin()), -1)
        before, share = torch.zeros_like(direction), self.momentum / (1 + self.momentum)
        for _ in range(self.n_iter):
            rebuilt = self.stft(self.istft(magnitude[..., None] * direction))
            direction = rebuilt - share * before
            direction = direction / (torch.linalg.vector_norm(direction, dim=-1, keepdim=True) + 1e-16)
            before = rebuilt
        signal: Tensor = self.istft(magnitude[..., None] * direction)
        return signal.to(S.dtype)
