"""Thinning a signal out: low-pass filters of 256 taps, and how much the first octave can bear."""

from __future__ import annotations

import math

from jaxtyping import Float
from scipy.signal import firwin2
from torch import Tensor
from torch.nn import functional

from provenn.nn._nn_audio_frames import correlate
from provenn.nn._nn_audio_kernels import Array

_TAPS = 256
_PHASES = 64
"""Output samples of a low-pass filter that are computed as channels of one convolution."""
_MOST_HALVINGS = 5
"""Of one early filter: 256 taps are too few to part the bands of a signal thinned out by more than 32."""


def low_pass(cutoff: float, transition: float) -> Array:
    """Return the 256 taps of a low-pass filter, its cutoff given as a share of Nyquist's frequency."""
    edges = [0.0, cutoff / (1 + transition), cutoff * (1 + transition), 1.0]
    taps: Array = firwin2(_TAPS, edges, [1.0, 1.0, 0.0, 0.0])
    return taps


def decimate(
    x: Float[Tensor, "batch samples"], taps: Float[Tensor, " taps"], factor: int
) -> Float[Tensor, "batch fewer"]:
    """Filter, and keep every ``factor``-th sample; zeros are assumed beyond the ends.

    The same numbers as ``conv1d(x, taps, stride=factor, padding=127)``. 64 outputs at a time are the channels of one
    convolution with shifted copies of the filter, since a convolution of one channel leaves a processor idle.
    """
    left, samples = (_TAPS - 1) // 2, x.shape[-1]
    count = (samples + 2 * left - _TAPS) // factor + 1
    shift = factor * (_PHASES - 1)
    copies = functional.pad(taps, (shift, shift)).unfold(0, _TAPS + shift, factor).flip(0)
    blocks = -(-count // _PHASES)
    needed = (blocks - 1) * factor * _PHASES + _TAPS + shift
    x = functional.pad(x, (left, needed - left - samples))
    return correlate(x, copies, factor * _PHASES).transpose(1, 2).flatten(1)[:, :count]


def early_factor(sr: float, hop_length: int, top: float, bandwidth: float, octaves: int) -> int:
    """Return the power of two by which the signal can be thinned out before its first octave.

    Args:
        sr: Samples a second.
        hop_length: Samples between frames, to be halved ``octaves − 1`` times and once more for every early halving.
        top: Highest bin's frequency in Hz.
        bandwidth: Half the width of its main lobe in Hz.
        octaves: Number of octaves.
    """
    by_band = math.ceil(math.log2(0.85 * sr / 2 / (top + bandwidth))) - 2
    twos = (hop_length & -hop_length).bit_length() - 1
    return 2 ** max(0, min(by_band, twos - octaves + 1, _MOST_HALVINGS))
