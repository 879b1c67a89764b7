"""The three experiments of the LSSL claim: pixels one by one, raw audio at two rates, and the speed of two views."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor, nn

from provenn import data
from provenn.claims.claim import Event, Metric, Point, Progress, Trial
from provenn.core.experiment.accounting import median_seconds
from provenn.core.experiment.recording import evaluating
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import accuracy, minibatches, train
from provenn.nn import LSSL, LSSLModel, lssl_parameter_groups

PIXELS, AUDIO, SPEED = "pixels", "audio", "speed"
LEARNED, FROZEN, RANDOM, LSTM = "LSSL", "LSSL-f", "random A", "LSTM"
CONVOLUTION, RECURRENCE = "convolution", "recurrence"
CLIPPED = 1.0
"""Largest norm of a gradient in all training."""
_LAYERS: dict[str, dict[str, str]] = {
    LEARNED: {"learn": "shared"},
    FROZEN: {"learn": "none"},
    RANDOM: {"learn": "shared", "measure": "random"},
}
Split = tuple[Tensor, Tensor]


class LSTMClassifier(nn.Module):
    """Two LSTM layers, the mean over time, and a head, of the width whose parameters are nearest to a count.

    Args:
        classes: Outputs.
        parameters: The count.
    """

    def __init__(self, classes: int, parameters: int) -> None:
        super().__init__()
        width = min(range(1, 2000), key=lambda h: abs(_lstm_parameters(h, classes) - parameters))
        self.lstm = nn.LSTM(1, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, u: Tensor) -> Tensor:
        """Classify sequences (batch, length, 1)."""
        logits: Tensor = self.head(self.lstm(u)[0].mean(1))
        return logits


def _lstm_parameters(width: int, classes: int) -> int:
    return 4 * width * (1 + width + 2) + 4 * width * (2 * width + 2) + classes * (width + 1)


def classifier(arm: str, sizes: dict[str, int], classes: int = 10) -> nn.Module:
    """Build an arm's model; the LSTM has as many parameters as the learned LSSL.

    Args:
        arm: Which.
        sizes: ``width``, ``depth`` and ``order``.
        classes: Outputs.
    """
    lssl = partial(LSSLModel, 1, classes, sizes["width"], sizes["depth"], sizes["order"])
    if arm != LSTM:
        made: nn.Module = lssl(**_LAYERS[arm])
        return made
    with torch.device("meta"):
        parameters = sum(one.numel() for one in lssl(**_LAYERS[LEARNED]).parameters())
    return LSTMClassifier(classes, parameters)


@cache
def images(name: str, train: int, held: int, test: int, pooled: int) -> tuple[Split, Split, Split]:
    """Return images as standardised sequences of pixels: for training, validation and test."""
    if name == "digits":
        digits = data.load("digits")
        x, y = torch.from_numpy(digits.x).float().reshape(-1, 1, 8, 8), torch.from_numpy(digits.y).long()
        x_test, y_test = x[train + held :], y[train + held :]
    else:
        mnist = data.load("mnist")
        x, y = torch.from_numpy(mnist.x_train)[:, None], torch.from_numpy(mnist.y_train).long()
        x_test, y_test = torch.from_numpy(mnist.x_test)[:, None], torch.from_numpy(mnist.y_test).long()
    order = torch.randperm(train + held if name == "digits" else len(x), generator=generator("split"))[: train + held]
    parts = ((x[order[:train]], y[order[:train]]), (x[order[train:]], y[order[train:]]), (x_test[:test], y_test[:test]))
    pixels = [nn.functional.avg_pool2d(x.float(), pooled).flatten(1)[..., None] for x, _ in parts]
    mean, std = pixels[0].mean(), pixels[0].std()
    first, second, third = (((x - mean) / std, y) for x, (_, y) in zip(pixels, parts, strict=True))
    return first, second, third


@cache
def sounds(name: str, train: int, held: int, test: int, length: int, down: int) -> tuple[Split, Split, Split]:
    """Return spoken digits, resampled from 8 kHz, or tones of ten pitches to stand in, as standardised sequences."""
    count = train + held + test
    if name == "tones":
        draws = generator("tones")
        y = torch.randint(10, (count,), generator=draws)
        phase, time = torch.rand(count, 1, generator=draws), torch.arange(length) / length
        x = torch.sin(2 * math.pi * ((3 + 2 * y[:, None]) * time + phase))
        order = torch.arange(count)
    else:
        bundle = data.load("fsdd")
        waves = resample_poly(bundle.padded(length * down).astype(np.float64), 1, down, axis=1)
        x, y = torch.from_numpy(waves[:, :length]).float(), torch.from_numpy(bundle.y).long()
        tested = torch.from_numpy(np.asarray(bundle.take) < 5)  # the data set's own split
        rest = (~tested).nonzero()[:, 0]
        rest = rest[torch.randperm(len(rest), generator=generator("sounds"))]
        order = torch.cat((rest[: train + held], tested.nonzero()[:test, 0]))
    x, y = x[order, :, None], y[order]
    x = x / x[:train].std()
    bounds = (0, train, train + held, count)
    first, second, third = ((x[a:b], y[a:b]) for a, b in pairwise(bounds))
    return first, second, third


def run_pixels(trial: Trial) -> Iterator[Event]:
    """Train one arm to classify images that it reads pixel by pixel."""
    sizes = {name: int(value) for name, value in trial.budget.items() if name != "data"}
    parts = images(str(trial.budget["data"]), *(sizes[name] for name in ("train", "held", "test", "pooled")))
    learning, held, test = ((x.to(trial.device), y.to(trial.device)) for x, y in parts)
    with seeded(trial.seed, "weights"):
        model = classifier(trial.arm, sizes).to(trial.device)
    yield Metric("parameters", sum(one.numel() for one in model.parameters()))
    yield from _trained(trial, model, learning, sizes)
    yield Metric("validation_accuracy", accuracy(model, *held, batch_size=100))
    if not trial.tuning:
        yield Metric("test_accuracy", accuracy(model, *test, batch_size=100))


def run_audio(trial: Trial) -> Iterator[Event]:
    """Train at the full rate, and test at the full and at half the rate, with Δ doubled and without."""
    sizes = {name: int(value) for name, value in trial.budget.items() if name != "data"}
    parts = sounds(str(trial.budget["data"]), *(sizes[name] for name in ("train", "held", "test", "length", "down")))
    learning, held, (x, y) = ((x.to(trial.device), y.to(trial.device)) for x, y in parts)
    with seeded(trial.seed, "weights"):
        model = classifier(trial.arm, sizes).to(trial.device)
    yield from _trained(trial, model, learning, sizes)
    yield Metric("validation_accuracy", accuracy(model, *held, batch_size=100))
    if trial.tuning:
        return
    yield Metric("full rate", _accuracy_at(model, x, y, 1.0))
    yield Metric("half rate, adapted", _accuracy_at(model, x[:, ::2], y, 2.0))
    yield Metric("half rate, not adapted", _accuracy_at(model, x[:, ::2], y, 1.0))


def _accuracy_at(model: nn.Module, x: Tensor, y: Tensor, rate: float) -> float:
    with evaluating(model):
        guesses = torch.cat([model(part, rate).argmax(-1) for part in x.split(100)])
    return float((guesses == y).double().mean())


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def _trained(trial: Trial, model: nn.Module, learning: Split, sizes: dict[str, int]) -> Iterator[Event]:
    """Train by Adam with clipped gradients and a falling cosine; the step size is picked on a part of the epochs."""
    epochs = max(1, sizes["epochs"] // (sizes["tuning_divisor"] if trial.tuning else 1))
    batch_size = sizes["batch_size"]
    lr = float(trial.settings["lr"])
    optimizer = torch.optim.Adam(lssl_parameter_groups(model, lr))
    steps = epochs * -(-len(learning[0]) // batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    optimizer.register_step_pre_hook(partial(_clip, model))

    def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        yield from minibatches(learning, batch_size, generator(trial.seed, "order", epoch))

    diverged = False
    try:
        for epoch in train(model, optimizer, batches, _loss, epochs=epochs, scheduler=scheduler):
            yield Progress(epoch.index + 1, epochs)
            yield Point("training loss", epoch.step, epoch.loss)
    except FloatingPointError:
        diverged = True
    yield Metric("diverged", float(diverged))


def _clip(model: nn.Module, *_: Any) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), CLIPPED)


def run_speed(trial: Trial) -> Iterator[Event]:
    """Time one view of a layer without gradients, from its parameters on, as sequences get longer."""
    width, order, batch = (int(trial.budget[name]) for name in ("width", "order", "batch_size"))
    lengths = [2**power for power in range(int(trial.budget["shortest"]), 1 + int(trial.budget["longest"]))]
    with seeded(trial.seed, "weights"):
        system = LSSL(width, order).to(trial.device).system
    taken = math.nan
    for done, length in enumerate(lengths, 1):
        u = torch.randn(batch, length, width, generator=generator(trial.seed, "inputs", length)).to(trial.device)
        with torch.no_grad():
            taken = 1e3 * median_seconds(partial(_view, trial.arm, system, u), rounds=5, warmup=1)
        yield Point("milliseconds", length, taken)
        yield Progress(done, len(lengths))
    yield Metric("milliseconds at the longest", taken)


def _view(arm: str, system: Any, u: Tensor) -> Any:
    system.reset_cache()
    if arm == CONVOLUTION:
        return system(u)
    # In the inputs' own type, as the convolution by FFT is.
    return system.recurrent(u, u.new_zeros(len(u), system.d_model, system.d_state))
