"""Noisy 8×8 digits by small networks of equal size: dense layers, convolutions, norms; seconds a run."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from provenn.compare.layer_task import LayerTask
from provenn.compare.task import LogUniform, Split
from provenn.core.experiment.seeding import generator
from provenn.data.toys import noisy_digits, shift_and_noise

PIXELS, CLASSES, COPIES = 64, 10, 4


def _dense(layer: Callable[[int, int], nn.Module], width: int, activation: bool) -> nn.Module:
    """Return a perceptron of two layers; layers that bend their inputs themselves need no activation between."""
    between = [nn.ReLU()] if activation else []
    return nn.Sequential(nn.Flatten(), layer(PIXELS, width), *between, layer(width, CLASSES))


def _convolutional(conv: Callable[..., nn.Module], norm: Callable[[int], nn.Module], width: int) -> nn.Module:
    """Return two convolutions, each followed by what normalises and activates, pooled between and after."""
    return nn.Sequential(
        conv(1, width, 3, padding=1),
        norm(width),
        nn.MaxPool2d(2),
        conv(width, width, 3, padding=1),
        norm(width),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, CLASSES),
    )


def _activated(norm: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    return lambda width: nn.Sequential(norm(width), nn.ReLU())


def _unnormalised(width: int) -> nn.Module:
    return nn.Identity()


class GroupNorm(nn.GroupNorm):
    """Group norm in pairs of channels.

    Args:
        width: Channels, an even number.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width // 2, width)


def _evonorm_s0(width: int) -> nn.Module:
    from provenn.nn import EvoNorm2d

    return EvoNorm2d(width, "S0", group_size=2)


_DENSE = (
    "AFKANLayer",
    "ReLUKANLayer",
    "BSplineKANLayer",
    "RBFKANLayer",
    "ChebyKANLayer",
    "FourierKANLayer",
    "WavKANLayer",
)
_NORMS = ("BatchNorm2d", "GroupNorm")


def build(part: Any, width: int) -> nn.Module:
    """Return the network around a part, by what kind of layer it is.

    Raises:
        ValueError: It is no layer that the task knows a place for.
    """
    name = getattr(part, "__name__", "")
    if name in _DENSE:
        return _dense(part, width, activation=False)
    if name in ("Linear", "QuadraticLinear"):
        return _dense(part, width, activation=True)
    if name in ("Conv2d", "QuadraticConv2d"):
        return _convolutional(part, _activated(_unnormalised), width)
    if name in _NORMS:
        return _convolutional(partial(nn.Conv2d, bias=False), _activated(part), width)
    if name in ("EvoNorm2d", "_evonorm_s0"):
        return _convolutional(partial(nn.Conv2d, bias=False), part, width)
    raise ValueError("is no dense layer, convolution or norm that this task knows")


@cache
def data() -> Split:
    """Return 4 disturbed copies of 1000 training images, 300 validation and 497 test images."""
    digits = noisy_digits()
    noise = generator("small images")
    x = torch.cat([shift_and_noise(digits.x_train, noise) for _ in range(COPIES)])
    parts = {**vars(digits), "x_train": x, "y_train": digits.y_train.repeat(COPIES)}
    return Split(**parts)


REFERENCES: Mapping[str, Any] = {
    "mlp": nn.Linear,
    "conv": nn.Conv2d,
    "batch-norm": nn.BatchNorm2d,
    "group-norm": GroupNorm,
    "evonorm-s0": _evonorm_s0,
}

TASK = LayerTask(
    name="small-images",
    summary="networks of 6000 parameters on noisy 8×8 digits, 1000 images in 4 copies, 10 epochs of batch 64",
    kinds={"nn": {"lr": LogUniform(3e-4, 3e-2)}},
    build=build,
    data=data,
    epochs=10,
    batch_size=64,
    parameters=6000,
    step=2,
    references=REFERENCES,
)
