"""Spectrogram layers against librosa and the authors' package: numbers, and times on 64 clips of one second."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import librosa
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.timing import alternate
from provenn.nn import audio

RATE, CLIPS, BINS = 22050, 64, 84
LOWEST = 32.70
_WAVELETS = "CQT1992v2, its wavelets"
Call = Callable[[], Any]


def measure() -> dict[str, Any]:
    """Compare numbers on 4 clips, then times on 64 that take turns, trained kernels' passes, and growth."""
    warnings.simplefilter("ignore")
    x = _clips(CLIPS)
    layers, package = _layers(), _package()
    to_package = {name: _gap(layers[name](x[:4]), package[name](x[:4])) for name in package}
    to_librosa = _gaps_to_librosa(layers, x[:4])
    over_librosa: dict[str, float] = {}
    over_package: dict[str, float] = {}
    for name, layer in layers.items():
        ways: dict[str, Call] = {"ours": partial(_forward, layer, x)}
        if name in package:
            ways["package"] = partial(_forward, package[name], x)
        if name in _LIBROSA:
            ways["librosa"] = partial(_LIBROSA[name], x.numpy())
        times = alternate(ways, rounds=5)
        for way, ratios in (("package", over_package), ("librosa", over_librosa)):
            if way in times:
                ratios[name] = times[way] / times["ours"]
    back = _back(x)
    over_librosa |= {"ISTFT": back["librosa"], "GriffinLim, 8 rounds": _rounds(x)}
    over_package["ISTFT"] = back["package"]
    exact = [to_librosa[name] for name in ("STFT", "MelSpectrogram", "MFCC", _WAVELETS)]
    return {
        "peer": f"librosa {librosa.__version__}; nnAudio {_version()} beside it",
        "agrees": max(exact) <= 1e-4 and max(to_package.values()) <= 1e-4,
        "largest_difference": max(exact),
        "largest_difference_of_each_from_librosa": to_librosa,
        "largest_difference_of_each_from_nnaudio": to_package,
        "speed_ratio": min(over_librosa.values()),
        "speed_ratio_over_librosa": over_librosa,
        "speed_ratio_over_nnaudio": over_package,
        "speed_ratio_over_nnaudio_trained_forward_backward": _trained(x[:16]),
        "speed_ratio_over_torch_stft": _over_torch(x),
        "growth": _growth(x),
    }


def _clips(count: int) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    time = torch.arange(RATE) / RATE
    pitch = 40 * 60 ** torch.rand(count, 1, generator=draws)
    return 0.5 * torch.sin(2 * torch.pi * pitch * time) + 0.05 * torch.randn(count, RATE, generator=draws)


def _layers() -> dict[str, nn.Module]:
    return {
        "STFT": audio.STFT(output_format="Magnitude"),
        "STFT, logarithmic": audio.STFT(freq_bins=256, freq_scale="log", output_format="Magnitude"),
        "MelSpectrogram": audio.MelSpectrogram(),
        "MFCC": audio.MFCC(),
        "Gammatonegram": audio.Gammatonegram(),
        "CQT1992, from 220 Hz": audio.CQT1992(fmin=220.0, n_bins=60),
        "CQT1992v2": audio.CQT1992v2(),
        "CQT2010": audio.CQT2010(),
        "CQT2010v2": audio.CQT2010v2(),
        "VQT": audio.VQT(gamma=5.0),
    }


def _package() -> dict[str, nn.Module]:
    from nnAudio import features

    with contextlib.redirect_stdout(io.StringIO()):
        return {
            "STFT": features.STFT(hop_length=512, output_format="Magnitude"),
            "STFT, logarithmic": features.STFT(
                freq_bins=256, freq_scale="log", hop_length=512, output_format="Magnitude"
            ),
            "MelSpectrogram": features.MelSpectrogram(),
            "MFCC": features.MFCC(),
            "Gammatonegram": features.Gammatonegram(fmin=20.0),
            "CQT1992, from 220 Hz": features.CQT1992(fmin=220, n_bins=60),
            "CQT1992v2": features.CQT1992v2(),
            "CQT2010": features.CQT2010(),
            "CQT2010v2": features.CQT2010v2(),
            "VQT": features.VQT(gamma=5),
        }


def _version() -> str:
    import nnAudio

    return str(nnAudio.__version__)


def _stft(y: np.ndarray) -> Any:
    return np.abs(librosa.stft(y, pad_mode="reflect"))


def _mel(y: np.ndarray) -> Any:
    return librosa.feature.melspectrogram(y=y, pad_mode="reflect")


def _mfcc(y: np.ndarray) -> Any:
    return librosa.feature.mfcc(y=y, pad_mode="reflect")


def _cqt(y: np.ndarray) -> Any:
    return np.abs(librosa.cqt(y, fmin=LOWEST, pad_mode="reflect"))


def _vqt(y: np.ndarray) -> Any:
    return np.abs(librosa.vqt(y, fmin=LOWEST, gamma=5.0, pad_mode="reflect"))


_LIBROSA: dict[str, Callable[[np.ndarray], Any]] = {
    "STFT": _stft,
    "MelSpectrogram": _mel,
    "MFCC": _mfcc,
    "CQT1992v2": _cqt,
    "CQT2010": _cqt,
    "CQT2010v2": _cqt,
    "VQT": _vqt,
}


def _gap(found: Tensor, expected: Tensor | np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    found, expected = (torch.as_tensor(one).detach().double() for one in (found, expected))
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _gaps_to_librosa(layers: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """Clip by clip, since librosa's decibels are cut below the maximum of all that it is given.

    ``librosa.cqt`` resamples, and its Q is of another formula: the layers take that Q by ``filter_scale`` here, and
    still differ by the resampling and by lengths that are rounded. The wavelets alone, at the paper's lengths, agree.
    """
    rows = x.numpy()
    gaps = {
        name: _gap(layers[name](x), np.stack([_LIBROSA[name](row) for row in rows]))
        for name in ("STFT", "MelSpectrogram", "MFCC")
    }
    gaps[_WAVELETS] = _wavelet_gap(x)
    ratio = 2 ** (2 / 12)
    same_q = (2 ** (1 / 12) - 1) / ((ratio - 1) / (ratio + 1))
    inside = slice(14, -14)
    expected = np.stack([_cqt(row) for row in rows])[..., inside]
    for kind in (audio.CQT1992v2, audio.CQT2010v2):
        gaps[f"{kind.__name__}, librosa.cqt"] = _gap(kind(filter_scale=same_q)(x)[..., inside], expected)
    return gaps


def _wavelet_gap(x: Tensor) -> float:
    """Against direct sums with librosa's wavelets, for the bins whose whole lengths its rounding can be given."""
    layer = audio.CQT1992v2()
    frequencies, lengths = LOWEST * 2 ** (np.arange(BINS) / 12), layer.lengths.double().numpy()
    alpha = RATE / frequencies / np.where(lengths % 2 == 1, lengths - 1e-6, lengths)
    whole = (lengths % 2 == 1) | (1 / alpha * RATE / frequencies == lengths)
    wave, _ = librosa.filters.wavelet(freqs=frequencies, sr=RATE, alpha=alpha, norm=1, dtype=np.complex128)
    width = wave.shape[1]
    padded = np.pad(x.double().numpy(), ((0, 0), (width // 2, width // 2)), mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, width, axis=1)[:, ::512]
    expected = np.abs(frames @ wave.T.conj()).swapaxes(1, 2) * np.sqrt(lengths)[:, None]
    return _gap(layer(x)[:, whole], expected[:, whole])


def _back(x: Tensor) -> dict[str, float]:
    """Return the times of the inverse elsewhere over ours; the package's Griffin–Lim does not run with this torch."""
    from nnAudio import features

    layer, spectra = audio.ISTFT(), audio.STFT(output_format="Complex")(x)
    package = features.iSTFT(n_fft=2048, hop_length=512, verbose=False)
    rows, samples = torch.view_as_complex(spectra).numpy(), x.shape[1]
    ways: dict[str, Call] = {
        "ours": partial(layer, spectra, samples),
        "package": partial(package, spectra, onesided=True, length=samples),
        "librosa": partial(librosa.istft, rows, length=samples),
    }
    with torch.no_grad():
        times = alternate(ways, rounds=5)
    return {name: taken / times["ours"] for name, taken in times.items()}


def _rounds(x: Tensor) -> float:
    layer, magnitude = audio.GriffinLim(n_iter=8), audio.STFT(output_format="Magnitude")(x)
    theirs = partial(librosa.griffinlim, magnitude.numpy(), n_iter=8, random_state=0, pad_mode="reflect")
    with torch.no_grad():
        times = alternate({"ours": partial(layer, magnitude), "librosa": theirs}, rounds=5)
    return times["librosa"] / times["ours"]


def _forward(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def _forward_backward(layer: nn.Module, x: Tensor) -> None:
    torch.autograd.grad(layer(x).sum(), list(layer.parameters()))


def _trained(x: Tensor) -> dict[str, float]:
    from nnAudio import features

    pairs = {
        "STFT": (
            audio.STFT(512, output_format="Magnitude", trainable=True),
            features.STFT(512, output_format="Magnitude", trainable=True, verbose=False),
        ),
        "CQT1992v2": (audio.CQT1992v2(trainable=True), features.CQT1992v2(trainable=True, verbose=False)),
    }
    ratios = {}
    for name, (ours, theirs) in pairs.items():
        ways = {"ours": partial(_forward_backward, ours, x), "theirs": partial(_forward_backward, theirs, x)}
        times = alternate(ways, rounds=3)
        ratios[name] = times["theirs"] / times["ours"]
    return ratios


def _over_torch(x: Tensor) -> float:
    window, layer = torch.hann_window(2048), audio.STFT(output_format="Magnitude")
    ways: dict[str, Call] = {
        "ours": partial(_forward, layer, x),
        "torch": lambda: torch.stft(x, 2048, 512, window=window, return_complex=True).abs(),
    }
    times = alternate(ways, rounds=9)
    return times["torch"] / times["ours"]


def _growth(x: Tensor) -> dict[str, float]:
    layer, longer = audio.CQT1992v2(), x[:16].repeat(1, 4)
    ways = {
        "clips 16": partial(_forward, layer, x[:16]),
        "clips 64": partial(_forward, layer, x),
        "seconds 4": partial(_forward, layer, longer),
    }
    times = alternate(ways, rounds=5)
    return {
        "CQT1992v2, clips ×4, time ×": times["clips 64"] / times["clips 16"],
        "CQT1992v2, seconds ×4, time ×": times["seconds 4"] / times["clips 16"],
    }
