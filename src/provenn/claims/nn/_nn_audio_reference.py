"""Every transform once more, in float64 and straight from its definition: what the layers are held against."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import fft, signal

RATE, HOP, N_FFT = 22050, 512, 2048
LOWEST, BINS, OCTAVE = 32.70, 84, 12
GAMMA = 20.0
INSIDE = 12
"""Frames from either end at which the longest constant-Q kernel reaches beyond the clip."""
Array = NDArray[np.float64]


def frames(x: Array, width: int) -> Array:
    """Cut clips, reflected at both ends, into centred frames (clip, frame, sample)."""
    padded = np.pad(x, ((0, 0), (width // 2, width // 2)), mode="reflect")
    return np.lib.stride_tricks.sliding_window_view(padded, width, axis=1)[:, ::HOP]


def stft(x: Array) -> Array:
    """Magnitudes (clip, bin, frame)."""
    window = 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(N_FFT) / N_FFT)
    return np.abs(np.fft.rfft(frames(x, N_FFT) * window)).swapaxes(1, 2)


def mel(x: Array) -> Array:
    """128 triangles of unit area, evenly spaced on Slaney's scale, on powers."""
    top = 15 + 27 * math.log(RATE / 2 / 1000) / math.log(6.4)
    steps = np.linspace(0, top, 130)
    edges = np.where(steps < 15, steps * 200 / 3, 1000 * 6.4 ** ((steps - 15) / 27))
    bins = np.arange(N_FFT // 2 + 1) * RATE / N_FFT
    triples = zip(edges, edges[1:], edges[2:], strict=False)
    bank = np.stack([np.interp(bins, three, (0, 2 / (three[2] - three[0]), 0)) for three in triples])
    return bank @ stft(x) ** 2


def mfcc(x: Array) -> Array:
    """20 coefficients of decibels that are cut 80 below each clip's maximum."""
    level = 10 * np.log10(np.maximum(mel(x), 1e-10))
    cut = np.maximum(level, level.max((1, 2), keepdims=True) - 80)
    coefficients: Array = fft.dct(cut, axis=1, norm="ortho")[:, :20]
    return coefficients


def gammatone(x: Array) -> Array:
    """64 gammatone filters as cascades given by zeros and poles, unit gain at the centre, on powers."""
    corner = 9.26449 * 24.7
    centres = np.exp(np.linspace(math.log(20 + corner), math.log(RATE / 2 + corner), 65)[:-1]) - corner
    turns = 2 * math.pi * np.arange(N_FFT // 2 + 1) / N_FFT
    rows = []
    for centre in centres:
        decay = math.exp(-2 * math.pi * 1.019 * (centre / 9.26449 + 24.7) / RATE)
        angle = 2 * math.pi * centre / RATE
        slopes = [sign * (math.sqrt(2) + step) for sign in (1, -1) for step in (1, -1)]
        zeros = [decay * (math.cos(angle) + slope * math.sin(angle)) for slope in slopes]
        poles = [decay * np.exp(1j * angle), decay * np.exp(-1j * angle)] * 4
        _, response = signal.freqz_zpk(zeros, poles, 1.0, worN=np.append(turns, angle))
        rows.append(np.abs(response[:-1] / response[-1]) / N_FFT)
    return np.stack(rows) @ stft(x) ** 2


def constant_q(x: Array, gamma: float = 0.0) -> Array:
    """Magnitudes of inner products with windowed waves of unit L1 norm, times the root of their lengths."""
    alpha = 2 ** (1 / OCTAVE) - 1
    rows = []
    for k in range(BINS):
        frequency = LOWEST * 2 ** (k / OCTAVE)
        length = math.ceil(RATE / alpha / (frequency + gamma / alpha))
        window = 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(length) / length)
        time = np.arange(length) - (length + 1) // 2
        wave = window / window.sum() * np.exp(-2j * math.pi * frequency / RATE * time)
        width = 2 * ((length + 1) // 2)
        rows.append(np.abs(frames(x, width)[..., :length] @ wave) * math.sqrt(length))
    return np.stack(rows, 1)


def variable_q(x: Array) -> Array:
    """The same with an offset of all bandwidths."""
    return constant_q(x, GAMMA)


REFERENCES: dict[str, Callable[[Array], Array]] = {
    "STFT": stft,
    "MelSpectrogram": mel,
    "MFCC": mfcc,
    "Gammatonegram": gammatone,
    "CQT1992": constant_q,
    "CQT1992v2": constant_q,
    "CQT2010": constant_q,
    "CQT2010v2": constant_q,
    "VQT": variable_q,
}
"""By the layer's name."""
