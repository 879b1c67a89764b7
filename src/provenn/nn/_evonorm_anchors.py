"""The small networks that candidate layers are tried in, and how they train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import accuracy, minibatches
from provenn.nn._evonorm_graph import NormActGraph

Layer = Callable[[int, bool], nn.Module]
"""Makes a layer from its channels and whether it activates."""


class PreActivationBlock(nn.Module):
    """Twice layer and 3×3 convolution, beside a skip."""

    def __init__(self, layer: Layer, wide: int, out: int, stride: int) -> None:
        super().__init__()
        self.before = layer(wide, True)
        self.branch = nn.Sequential(
            nn.Conv2d(wide, out, 3, stride, padding=1, bias=False),
            layer(out, True),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
        )
        self.skip = nn.Identity() if stride == 1 and wide == out else nn.Conv2d(wide, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y: Tensor = self.before(x)
        total: Tensor = self.branch(y) + (x if isinstance(self.skip, nn.Identity) else self.skip(y))
        return total


class SqueezeExcite(nn.Module):
    """Weights of the channels, from their means over the pixels."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, inner, 1), nn.SiLU(), nn.Conv2d(inner, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted channels."""
        weighted: Tensor = x * self.weigh(x).sigmoid()
        return weighted


class InvertedBlock(nn.Module):
    """1×1 expansion by 3, depthwise 3×3 convolution, 1×1 projection that does not activate, beside a skip."""

    def __init__(self, layer: Layer, wide: int, out: int, stride: int, squeeze: bool) -> None:
        super().__init__()
        inner = 3 * wide
        self.branch = nn.Sequential(
            nn.Conv2d(wide, inner, 1, bias=False),
            layer(inner, True),
            nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False),
            layer(inner, True),
            SqueezeExcite(inner, max(1, wide // 4)) if squeeze else nn.Identity(),
            nn.Conv2d(inner, out, 1, bias=False),
            layer(out, False),
        )
        self.keeps = stride == 1 and wide == out

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y: Tensor = self.branch(x)
        return x + y if self.keeps else y


def residual(layer: Layer, channels_in: int, classes: int, width: int) -> nn.Module:
    """Build a pre-activation residual network of three blocks."""
    widths = (width, width, 2 * width, 4 * width)
    blocks = [PreActivationBlock(layer, a, b, 1 if a == b else 2) for a, b in pairwise(widths)]
    stem = nn.Conv2d(channels_in, width, 3, padding=1, bias=False)
    return nn.Sequential(stem, *blocks, layer(4 * width, True), *_head(4 * width, classes))


def _inverted(layer: Layer, channels_in: int, classes: int, width: int, squeeze: bool) -> nn.Module:
    widths = (width, width, 2 * width, 4 * width)
    blocks = [InvertedBlock(layer, a, b, 1 if a == b else 2, squeeze) for a, b in pairwise(widths)]
    stem = (nn.Conv2d(channels_in, width, 3, padding=1, bias=False), layer(width, True))
    last = (nn.Conv2d(4 * width, 8 * width, 1, bias=False), layer(8 * width, True))
    return nn.Sequential(*stem, *blocks, *last, *_head(8 * width, classes))


def mobile(layer: Layer, channels_in: int, classes: int, width: int) -> nn.Module:
    """Build a network of three inverted residual blocks, as MobileNetV2 has them."""
    return _inverted(layer, channels_in, classes, width, squeeze=False)


def efficient(layer: Layer, channels_in: int, classes: int, width: int) -> nn.Module:
    """Build a network of three inverted residual blocks that weigh their channels, as EfficientNet has them."""
    return _inverted(layer, channels_in, classes, width, squeeze=True)


def _head(channels: int, classes: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)


ARCHITECTURES: Mapping[str, Callable[[Layer, int, int, int], nn.Module]] = {
    "resnet": residual,
    "mobilenet": mobile,
    "efficientnet": efficient,
}


@dataclass(frozen=True, eq=False)
class NormActAnchor:
    """A small network on images, which a candidate layer is trained in to be scored.

    Training is SGD with Nesterov momentum 0.9, weight decay 1e-4 and a rate that falls as a cosine. Weights and order
    of the data derive from the seed and are the same for every candidate.

    Args:
        architecture: ``"resnet"`` (pre-activation), ``"mobilenet"`` (inverted residuals) or ``"efficientnet"`` (with
            weights of the channels): three blocks each, at full, half and quarter size.
        x: Training images.
        y: Their classes, from 0.
        x_validation: Images that the accuracy is measured on.
        y_validation: Their classes.
        width: Channels of the first block; the others have twice and four times as many.
        steps: Steps of a full training.
        batch_size: Images a step.
        lr: The first rate.
        group_size: Channels of a group, for layers that aggregate over groups; must divide ``width``.
        momentum: The weight of the newest batch in running values; trainings of few steps need more than 0.1.
        seed: As said above.

    Shape: images (n, channels, height, width), classes (n,).

    Raises:
        ValueError: An unknown architecture, a number out of range, no images, or images and classes of other lengths.
        TypeError: A number of the wrong type.

    Cost: of :meth:`accuracy`, O(steps · batch_size) passes forward and backward.

    Source: arXiv 2004.02967, on evaluation: ResNet, MobileNetV2 and EfficientNet for CIFAR-10, 2000 steps of 128.
    """

    architecture: str
    x: Float[Tensor, "n channels height width"]
    y: Int[Tensor, " n"]
    x_validation: Float[Tensor, "m channels height width"]
    y_validation: Int[Tensor, " m"]
    width: int = 16
    steps: int = 2000
    batch_size: int = 128
    lr: float = 0.1
    group_size: int = 8
    momentum: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("architecture", self.architecture, ARCHITECTURES)
        for name in ("width", "steps", "batch_size", "group_size"):
            check_integer(name, getattr(self, name), at_least=1)
        check_number("lr", self.lr, above=0)
        check_number("momentum", self.momentum, at_least=0, at_most=1)
        check_integer("seed", self.seed)
        if self.width % self.group_size:
            raise ValueError(f"group_size must divide width = {self.width}, got {self.group_size}")
        for images, classes in (("x", "y"), ("x_validation", "y_validation")):
            count = len(getattr(self, images))
            if count == 0 or len(getattr(self, classes)) != count:
                raise ValueError(f"{images} and {classes} must be of one length, at least 1")

    def build(self, graph: NormActGraph) -> nn.Module:
        """Return the network with a candidate in every place, on the images' device.

        Args:
            graph: The candidate.
        """
        classes = int(self.y.max()) + 1

        def layer(channels: int, apply_act: bool) -> nn.Module:
            options = {"group_size": self.group_size, "momentum": self.momentum}
            return graph.to_module(channels, apply_act=apply_act, **options)

        with seeded(self.seed, "weights"):
            network = ARCHITECTURES[self.architecture](layer, self.x.shape[1], classes, self.width)
        return network.to(self.x.device, self.x.dtype)

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield batches without end, epoch by epoch in another order."""
        epoch = 0
        while True:
            yield from minibatches((self.x, self.y), self.batch_size, generator(self.seed, "order", epoch))
            epoch += 1

    def accuracy(self, graph: NormActGraph, steps: int | None = None) -> float:
        """Train the network with a candidate, and return its validation accuracy; 0 if the training diverges.

        Args:
            graph: The candidate.
            steps: Steps; ``None`` for a full training.
        """
        total = self.steps if steps is None else steps
        network = self.build(graph)
        sgd = torch.optim.SGD(network.parameters(), lr=self.lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
        for step, (x, y) in zip(range(total), self.batches(), strict=False):
            for group in sgd.param_groups:
                group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * step / total))
            sgd.zero_grad()
            loss = functional.cross_entropy(network(x), y)
            if not math.isfinite(loss.item()):
                return 0.0
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            sgd.step()
        return accuracy(network, self.x_validation, self.y_validation)
