"""A simulator of EEG-like covariance matrices: classes mix the sources differently, sessions distort the sensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from provenn.core.experiment.seeding import generator

LARGEST = 10.0


@dataclass(frozen=True)
class Covariances:
    """Covariance matrices (N, 1, n, n) and their classes, cut in three."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def simulate(
    seed: int,
    sizes: tuple[int, int, int],
    decades: float,
    rotation: float,
    jitter: float,
    window: int,
    channels: int = 12,
    classes: int = 4,
    sessions: int = 4,
) -> Covariances:
    """Draw covariances of windows of simulated recordings.

    The powers of the sources are log-uniform over some decades below 10. A class turns the mixing of the sources by
    the exponential of a random antisymmetric matrix, a session multiplies the sensors by that of a symmetric one, and
    a sample changes the powers at random and is measured over a window of finite length.

    Args:
        seed: Draws everything.
        sizes: Samples of training, validation and test; all from the same sessions.
        decades: Decades of the powers.
        rotation: Size of a class's turn, in radians a pair of sources (root mean square, times √n).
        jitter: Standard deviation of a sample's logarithmic powers.
        window: Time steps of a window, more than the channels.
        channels: Sensors, as many as sources.
        classes: Number of classes, drawn uniformly.
        sessions: Number of sessions, drawn uniformly.
    """
    draws = generator(seed, "covariances")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws, dtype=torch.float64)

    n, total = channels, sum(sizes)
    strata = (torch.arange(n) + torch.rand(n, generator=draws, dtype=torch.float64)) / n
    amplitudes = (LARGEST * 10 ** (-decades * strata)).sqrt()
    shared = torch.linalg.qr(normal(n, n))[0]
    turns, stretches = normal(classes, n, n), normal(sessions, n, n)
    mixings = shared @ torch.linalg.matrix_exp(rotation * (turns - turns.mT) / math.sqrt(2 * n))
    distortions = torch.linalg.matrix_exp(0.5 * (stretches + stretches.mT) / math.sqrt(2 * n))
    y = torch.randint(classes, (total,), generator=draws)
    session = torch.randint(sessions, (total,), generator=draws)
    sources = amplitudes[:, None] * (0.5 * jitter * normal(total, n, 1)).exp() * normal(total, n, window)
    signals = distortions[session] @ mixings[y] @ sources
    X = signals @ signals.mT / window
    X = 0.5 * (X + X.mT)[:, None]
    train, validation, test = zip(X.split(sizes), y.split(sizes), strict=True)
    return Covariances(train, validation, test)
