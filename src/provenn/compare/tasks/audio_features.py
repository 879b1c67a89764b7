"""Spoken digits by a small convolutional network behind a front end; about a minute a run."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from provenn.compare.layer_task import LayerTask
from provenn.compare.task import LogUniform, Split
from provenn.core.experiment.seeding import generator
from provenn.data import load

RATE, HOP, WINDOW = 8000, 128, 512
FAINT = 0.01
SHIFTS, STRIDE = 40, 125
TEST_TAKES, VALIDATION_TAKES, TRAIN_TAKES = 5, 8, 18
_FOURIER = {"sr": RATE, "n_fft": WINDOW, "hop_length": HOP}
_CONSTANT_Q = {"sr": RATE, "hop_length": HOP, "fmin": 65.4, "n_bins": 60, "bins_per_octave": 12}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "STFT": {**_FOURIER, "output_format": "Magnitude"},
    "MelSpectrogram": {**_FOURIER, "n_mels": 40},
    "MFCC": {**_FOURIER, "n_mels": 40, "n_mfcc": 20},
    "Gammatonegram": {**_FOURIER, "n_bins": 40},
    **dict.fromkeys(("CQT", "CQT1992", "CQT1992v2", "CQT2010", "CQT2010v2"), _CONSTANT_Q),
    "VQT": {**_CONSTANT_Q, "gamma": 20.0},
}
"""What front ends take for this task; another part is called without arguments."""


class AudioNetwork(nn.Module):
    """A front end, the logarithm of what it gives, batch norm of each band, three convolutions over time.

    The logarithm is of 1 + |x| / s, where s is the mean that the front end gives for faint noise: so it bends powers
    and magnitudes alike, whatever their unit.

    Args:
        front: (batch, samples) → (batch, bands, frames).
        width: Channels.
    """

    unit: Tensor

    def __init__(self, front: nn.Module, width: int) -> None:
        super().__init__()
        self.front = front
        with torch.no_grad():
            faint = front(FAINT * torch.randn(1, RATE, generator=generator("faint noise")))
        shape = tuple(faint.shape)
        if len(shape) != 3 or shape[0] != 1:
            raise ValueError(f"gives {shape} for a clip (1, {RATE}), not (1, bands, frames)")
        bands = shape[1]
        self.register_buffer("unit", faint.abs().mean().clamp_min(torch.finfo(faint.dtype).tiny))
        self.norm = nn.BatchNorm1d(bands)
        self.body = nn.Sequential(
            nn.Conv1d(bands, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(4),
            nn.Flatten(),
            nn.Linear(4 * width, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        features = self.front(x)
        y: Tensor = self.body(self.norm(features.sign() * (features.abs() / self.unit).log1p()))
        return y


class LearnedFilters(nn.Module):
    """Filters learned from nothing, as long and as far apart as the others' windows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 40, WINDOW, HOP, padding=WINDOW // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the filters' magnitudes."""
        y: Tensor = self.conv(x[:, None]).abs()
        return y


class PlainSTFT(nn.Module):
    """Magnitudes of ``torch.stft``."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(WINDOW))

    def forward(self, x: Tensor) -> Tensor:
        """Return the magnitudes."""
        return torch.stft(x, WINDOW, HOP, window=self.window, return_complex=True).abs()


class Scattering(nn.Module):
    """Averaged magnitudes of Gabor filters, 40 from 0 to 4 kHz: the first paths of a scattering network.

    Args:
        part: ``provenn.nn.GeneralizedScattering``.
    """

    def __init__(self, part: Callable[..., nn.Module]) -> None:
        super().__init__()
        from provenn.nn import FilterBank, ScatteringLayer

        # Real sounds have the same magnitudes at the negative frequencies of the bank's other half.
        bank = FilterBank(FilterBank.gabor((RATE,), 2 * SHIFTS).transfer()[: SHIFTS + 1])
        self.network = part([ScatteringLayer(bank, pooling="average", stride=STRIDE).normalized()])

    def forward(self, x: Tensor) -> Tensor:
        """Return what the paths leave."""
        paths: Tensor = self.network(x[:, None])[1]
        return paths


def build(part: Callable[..., nn.Module], width: int) -> nn.Module:
    """Return the network behind a front end.

    Raises:
        ValueError: The part is no front end.
    """
    name = getattr(part, "__name__", "") if getattr(part, "__module__", "").startswith("provenn.") else ""
    front = Scattering(part) if name == "GeneralizedScattering" else part(**OPTIONS.get(name, {}))
    return AudioNetwork(front, width)


@cache
def data() -> Split:
    """Return clips of one second at 8 kHz: takes 0 to 4 to judge by, 5 to 7 to tune on, 8 to 17 to train on."""
    sounds = load("fsdd")
    x = torch.from_numpy(sounds.padded(RATE))
    y, take = torch.from_numpy(sounds.y), torch.from_numpy(sounds.take)
    bounds = ((VALIDATION_TAKES, TRAIN_TAKES), (TEST_TAKES, VALIDATION_TAKES), (0, TEST_TAKES))
    parts = [(x[(take >= low) & (take < high)], y[(take >= low) & (take < high)]) for low, high in bounds]
    return Split(*(one for part in parts for one in part))


TASK = LayerTask(
    name="audio-features",
    summary="convolutions of width 32 over front ends on Free Spoken Digit at 8 kHz, 600 clips, 8 epochs of batch 32",
    kinds={"nn": {"lr": LogUniform(3e-4, 1e-2)}},
    build=build,
    data=data,
    epochs=8,
    batch_size=32,
    width=32,
    references={"torch-stft": PlainSTFT, "learned-filters": LearnedFilters},
    place="front ends, called as part(); one maps clips (batch, 8000) of a second to (batch, bands, frames)",
)
