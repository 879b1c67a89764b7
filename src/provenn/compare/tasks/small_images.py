"""Noisy 8×8 digits by small networks of equal size: dense layers, convolutions, norms; seconds a run."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from provenn.compare.layer_task import LayerTask
from provenn.compare.task import LogUniform, Split
from provenn.core.experiment.seeding import generator
from provenn.data.toys import noisy_digits, shift_and_noise

PIXELS, CLASSES, COPIES = 64, 10, 4


def _dense(layer: Callable[[int, int], nn.Module], width: int, activation: bool) -> nn.Module:
    """Return a perceptron of two layers; layers that bend their inputs themselves need no activation between."""
    between = [nn.ReLU()] if activation else []
    return nn.Sequential(nn.Flatten(), layer(PIXELS, width), *between, layer(width, CLASSES))


def _convolutional(
    conv: Callable[..., nn.Module],
    norm: Callable[[int], nn.Module],
    width: int,
    head: Callable[[int, int], nn.Module] = nn.Linear,
) -> nn.Module:
    """Return two convolutions, each followed by what normalises and activates, pooled between and after, and a head."""
    return nn.Sequential(
        conv(1, width, 3, padding=1),
        norm(width),
        nn.MaxPool2d(2),
        conv(width, width, 3, padding=1),
        norm(width),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        head(4 * width, CLASSES),
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


class ChannelsLast(nn.Module):
    """A layer of grids with channels last, in a network with channels first.

    Args:
        layer: (batch, height, width, channels) → the same.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the grid, mixed."""
        y: Tensor = self.layer(x.movedim(1, -1)).movedim(-1, 1)
        return y


def _grids(part: Callable[..., nn.Module], width: int) -> nn.Module:
    """Return two layers of grids, each after a norm; the first on 8 × 8 points, the second on 4 × 4."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.GroupNorm(1, width),
        ChannelsLast(part(width, 2)),
        nn.MaxPool2d(2),
        nn.GroupNorm(1, width),
        ChannelsLast(part(width, 2)),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, CLASSES),
    )


def _bending(part: Any, width: int) -> nn.Module:
    return _dense(part, width, activation=False)


def _linear(part: Any, width: int) -> nn.Module:
    return _dense(part, width, activation=True)


def _convolving(part: Any, width: int) -> nn.Module:
    return _convolutional(part, _activated(_unnormalised), width)


def _normalising(part: Any, width: int) -> nn.Module:
    return _convolutional(partial(nn.Conv2d, bias=False), _activated(part), width)


def _both(part: Any, width: int) -> nn.Module:
    """Use what normalises and activates."""
    return _convolutional(partial(nn.Conv2d, bias=False), part, width)


def _heading(part: Any, width: int, **options: int) -> nn.Module:
    return _convolutional(nn.Conv2d, _activated(_unnormalised), width, partial(part, **options))


def _refused(why: str) -> Callable[[Any, int], nn.Module]:
    """Return the place of what has none."""

    def refuse(part: Any, width: int) -> nn.Module:
        raise ValueError(why)

    return refuse


_KAN = ("AFKAN", "ReLUKAN", "BSplineKAN", "RBFKAN", "ChebyKAN", "FourierKAN", "WavKAN")
PLACES: Mapping[str, Callable[[Any, int], nn.Module]] = {
    **{f"{name}Layer": _bending for name in _KAN},
    "EvoNorm2d": _both,
    "_evonorm_s0": _both,
    "PLSTM2d": _grids,
    "CosineHead": _heading,
    "EBVHead": partial(_heading, dim=6),
    "SimplexETFHead": partial(_heading, dim=CLASSES - 1),
    "ICLRNNCell": _refused("is one step of a recurrence"),
    "NormActLayer": _refused("asks for a graph; EvoNorm2d, which fits, has those that the paper found"),
    "AFKAN": _refused("is a whole network; its layer AFKANLayer fits"),
    "QResNet": _refused("is a whole network; its layer QuadraticConv2d fits"),
    "PLSTMVision": _refused("is a whole network; its layer PLSTM2d fits"),
}
"""Where parts of this package stand that their calls alone do not tell; :func:`build` tries the others."""

_TRIED = {"convolution": _convolving, "dense layer": _linear, "norm": _normalising}
PLACE = (
    "convolutions part(inputs, outputs, 3, padding=1), dense layers part(inputs, outputs) and norms part(channels),"
    " each followed by a ReLU; and for what else of this package is listed as fitting"
)


def build(part: Any, width: int) -> nn.Module:
    """Return the network around a part: as a convolution, a dense layer or a norm, the first that it can be called as.

    Raises:
        ValueError: It is none of them.
    """
    ours = getattr(part, "__module__", "").startswith("provenn.")
    known = PLACES.get(getattr(part, "__name__", "")) if ours else None
    if known is not None:
        return known(part, width)
    place = _place_of(part)
    if not isinstance(place, str):
        return place(part, width)
    raise ValueError("can be called as no convolution, dense layer or norm" + ("" if ours else f": {place}"))


@cache
def _place_of(part: Any) -> Callable[[Any, int], nn.Module] | str:
    """Return the place in which a part works, by a batch of images; or why it works in none."""
    reasons = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name, place in _TRIED.items():
            try:
                given = tuple(place(part, 8)(torch.rand(2, 1, 8, 8)).shape)
                if given == (2, CLASSES):
                    return place
                reasons.append(f"as a {name}, gives {given}")
            except Exception as error:
                reasons.append(f"as a {name}, {str(error).partition(chr(10))[0] or type(error).__name__}")
    return "; ".join(reasons)


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
    place=PLACE,
)
