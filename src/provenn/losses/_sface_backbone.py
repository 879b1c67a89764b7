"""The networks that the paper trains: residual networks of pre-normalised units, and the layers that embed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number


def scale_pixels(images: Shaped[Tensor, "samples *image"]) -> Float[Tensor, "samples *image"]:
    """Return (x − 127.5)/128 of pixels 0 … 255, in floating point.

    Args:
        images: Pixels, of any type.

    Shape:
        ``images`` (N, …); output the same.

    Returns:
        Values in [−1, 1].

    Raises:
        ValueError: A pixel outside 0 … 255.

    Source: arXiv 2205.12010, the training settings; the authors' code for PyTorch divides by 12.8, a slip.
    """
    if images.numel() and not bool(((images >= 0) & (images <= 255)).all()):
        raise ValueError(f"images must hold 0 … 255, got {images.min().item():g} … {images.max().item():g}")
    return ((images if images.is_floating_point() else images.float()) - 127.5) / 128


class ImprovedResidualUnit(nn.Module):
    """BN – 3×3 – PReLU – 3×3 with the stride – BN, beside a skip: subsampling, or 1×1 – BN where channels change.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        stride: Of the second convolution and of the skip.

    Shape:
        (batch, channels_in, H, W) → (batch, channels_out, ⌈H/stride⌉, ⌈W/stride⌉).

    Source: Deng et al., arXiv 1801.07698, the improved residual unit.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(channels_in),
            nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
            nn.PReLU(channels_out),
            nn.Conv2d(channels_out, channels_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.skip: nn.Module = nn.MaxPool2d(1, stride)
        if channels_in != channels_out:
            self.skip = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out high wide"]:
        """Return the unit's output.

        Args:
            x: Features.
        """
        return self.branch(x) + self.skip(x)


def embedding_layer(channels: int, height: int, width: int, features: int = 512, dropout: float = 0.5) -> nn.Sequential:
    """Build what turns feature maps to embeddings: BN, dropout, a linear map, BN.

    Args:
        channels: Channels of the maps.
        height: Their height.
        width: Their width.
        features: Width of the embeddings.
        dropout: Share of the entries that are dropped in training, in [0, 1).

    Returns:
        The layers, (batch, channels, height, width) → (batch, features).

    Raises:
        ValueError: A number out of range.

    Source: arXiv 2205.12010, the training settings; as in the authors' code for PyTorch the last scale is learned.
    """
    check_number("dropout", dropout, at_least=0, below=1)
    for name, count in {"channels": channels, "height": height, "width": width, "features": features}.items():
        check_integer(name, count, at_least=1)
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(channels * height * width, features),
        nn.BatchNorm1d(features),
    )


def improved_resnet(
    blocks: Sequence[int] = (3, 4, 14, 3),
    channels: Sequence[int] = (64, 128, 256, 512),
    size: tuple[int, int] = (112, 112),
    channels_in: int = 3,
    features: int = 512,
    dropout: float = 0.5,
) -> nn.Sequential:
    """Build a residual network for aligned faces; by default IR-50.

    A 3×3 stem, stages of improved residual units that halve the image each, and an :func:`embedding_layer`.
    ``blocks=(3, 13, 30, 3)`` is IR-100.

    Args:
        blocks: Units a stage.
        channels: Channels of each stage; the stem has the first.
        size: Height and width of the images.
        channels_in: Channels of the images.
        features: Width of the embeddings.
        dropout: As in :func:`embedding_layer`.

    Returns:
        The network, (batch, channels_in, height, width) → (batch, features). Weights are Xavier-normal on fan-out with
        gain 2, biases 0.

    Raises:
        ValueError: A number out of range, no stage, or as many ``blocks`` as ``channels`` are not given.

    Source: arXiv 2205.12010, the training settings, with the authors' initialisation.
    """
    if len(blocks) != len(channels) or not blocks:
        raise ValueError(f"blocks must be as many as channels and at least 1, got {len(blocks)} and {len(channels)}")
    for count in (*blocks, *channels):
        check_integer("blocks and channels", count, at_least=1)
    stem = [
        nn.Conv2d(channels_in, channels[0], 3, padding=1, bias=False),
        nn.BatchNorm2d(channels[0]),
        nn.PReLU(channels[0]),
    ]
    units: list[nn.Module] = []
    width = channels[0]
    high, wide = size
    for count, deep in zip(blocks, channels, strict=True):
        for unit in range(count):
            units.append(ImprovedResidualUnit(width, deep, stride=2 if unit == 0 else 1))
            width = deep
        high, wide = math.ceil(high / 2), math.ceil(wide / 2)
    network = nn.Sequential(*stem, *units, embedding_layer(width, high, wide, features, dropout))
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            _, fan_out = nn.init._calculate_fan_in_and_fan_out(module.weight)
            nn.init.normal_(module.weight, std=2 * math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
