"""The tasks and networks of the quadratic networks' claim."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from provenn import data
from provenn.core.experiment.networks import mlp, resnet
from provenn.core.experiment.seeding import generator, seeded
from provenn.data.toys import noisy_digits
from provenn.nn import QuadraticConv2d, quadratize

QUADRATIC, EQUAL_PARAMETERS, EQUAL_WIDTH = "quadratic", "conventional, equal parameters", "conventional, equal width"
RELINEAR, CONVENTIONAL, RANDOM = "ReLinear", "conventional", "quadratic, random start"
WIDTHS = {QUADRATIC: (2, 8, 8, 1), EQUAL_PARAMETERS: (2, 15, 16, 1), EQUAL_WIDTH: (2, 8, 8, 1)}
"""Layers of the perceptrons: 315, 318 and 105 parameters."""

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Splits:
    """Inputs and labels: to train on, to tune by, to judge by."""

    train: Split
    validation: Split
    test: Split


def plane(task: str, seed: int, train: int, validation: int, test: int) -> Splits:
    """Draw a task on the plane; each seed has its own points, and its own quartic.

    Args:
        task: ``"spirals"`` or ``"quartic"``.
        seed: The cell's seed.
        train: Training points.
        validation: Validation points.
        test: Test points.
    """
    draws = generator(seed, task)
    count = train + validation + test
    x, y = (_spirals if task == "spirals" else _quartic)(count, draws)
    cuts = (slice(0, train), slice(train, train + validation), slice(train + validation, count))
    return Splits(*((x[cut], y[cut]) for cut in cuts))


def _spirals(count: int, draws: torch.Generator) -> Split:
    """Two interleaved spirals of one and a half turns, with Gaussian noise of 0.03 in a disc of radius 1."""
    y = torch.randint(0, 2, (count,), generator=draws)
    turn = 3 * math.pi * torch.rand(count, generator=draws).sqrt()
    radius, angle = turn / (3 * math.pi), turn + math.pi * y
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return x + 0.03 * torch.randn(x.shape, generator=draws), y.float()


def _quartic(count: int, draws: torch.Generator) -> Split:
    """Return points of [−1, 1]² and the sign of a random quartic around its median there.

    Its coefficients in products of Chebyshev polynomials of joint degree ≤ 4 are standard normal.
    """
    x = 2 * torch.rand(count, 2, generator=draws) - 1
    weights = torch.randn(5, 5, generator=draws)
    orders = torch.arange(5)
    weights[orders[:, None] + orders > 4] = 0
    first, second = ((orders * axis.clamp(-1, 1).acos()[:, None]).cos() for axis in x.T)
    value = torch.einsum("ni,ij,nj->n", first, weights, second)
    return x, (value > value.median()).float()


@cache
def images(name: str, train: int, validation: int, test: int) -> Splits:
    """Return standardised images: the first for training, the last for validation, and the first test images.

    Args:
        name: ``"cifar10"`` or ``"digits"``, which has fixed sizes.
        train: Training images.
        validation: Validation images.
        test: Test images.
    """
    if name == "digits":
        one = noisy_digits()
        parts = ((one.x_train, one.y_train), (one.x_validation, one.y_validation), (one.x_test, one.y_test))
        return Splits(*(((x - 0.3) / 0.4, y) for x, y in parts))
    bundle = data.load("cifar10")
    pixels = bundle.x_train[:train].astype(np.float32)
    mean, deviation = (torch.from_numpy(f(pixels, axis=(0, 2, 3), keepdims=True)) for f in (np.mean, np.std))

    def standard(x: np.ndarray, y: np.ndarray) -> Split:
        return (torch.from_numpy(x).float() - mean) / deviation, torch.from_numpy(y).long()

    return Splits(
        standard(bundle.x_train[:train], bundle.y_train[:train]),
        standard(bundle.x_train[-validation:], bundle.y_train[-validation:]),
        standard(bundle.x_test[:test], bundle.y_test[:test]),
    )


def perceptron(arm: str, seed: int) -> nn.Module:
    """Build an arm's perceptron; the quadratic one starts as the one of its width.

    Args:
        arm: The arm.
        seed: Draws the weights.
    """
    with seeded(seed, "weights"):
        model = mlp(WIDTHS[arm])
    return quadratize(model) if arm == QUADRATIC else model


def network(arm: str, seed: int, channels_in: int) -> nn.Module:
    """Build an arm's ResNet-8: the convolutions of its branches are Kaiming-normal, and equal in all arms.

    Args:
        arm: The arm; in ``RANDOM`` all three maps are drawn as r is, and b_g and c as PyTorch does.
        seed: Draws the weights.
        channels_in: Channels of the images.
    """
    with seeded(seed, "weights"):
        model: nn.Module = resnet((8, 16, 32), 1, channels_in)
        inside = [name for name, part in model.named_modules() if isinstance(part, nn.Conv2d) and ".branch." in name]
        for part in (model.get_submodule(name) for name in inside):
            nn.init.kaiming_normal_(cast(nn.Conv2d, part).weight)
        if arm == CONVENTIONAL:
            return model
        model = quadratize(model, inside)
        if arm == RANDOM:
            for part in model.modules():
                if isinstance(part, QuadraticConv2d):
                    _draw_all(part)
    return model


@torch.no_grad()
def _draw_all(layer: QuadraticConv2d) -> None:
    nn.init.kaiming_normal_(layer.g.weight)
    nn.init.kaiming_normal_(layer.b.weight)
    bound = 1 / math.sqrt(layer.g.weight[0].numel())
    nn.init.uniform_(layer.g.bias, -bound, bound).sub_(1)  # the layer keeps b_g − 1
