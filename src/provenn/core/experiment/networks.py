"""The small reference networks that claims and tasks train: a multi-layer perceptron and a residual network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Build a perceptron ``sizes[0] → … → sizes[-1]`` with an activation between linear layers.

    Args:
        sizes: Widths, input and output included; at least two.
        activation: Makes the activation modules.

    Returns:
        The network, (batch, sizes[0]) → (batch, sizes[-1]).

    Raises:
        ValueError: Fewer than two sizes, or a size < 1.
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes must name input and output, got {list(sizes)}")
    for index, size in enumerate(sizes):
        check_integer(f"sizes[{index}]", size, at_least=1)
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [nn.Linear(wide, narrow), activation()]
    return nn.Sequential(*layers[:-1])


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch norm and a skip, projected by 1×1 where the shape changes.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        stride: Stride of the first convolution and of the skip.

    Source: He et al., "Deep residual learning for image recognition", CVPR 2016.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.skip = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )
        self.activation = nn.ReLU()

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out high wide"]:
        """Return the block's output; height and width are divided by the stride, rounded up.

        Args:
            x: Images or features.
        """
        y: Tensor = self.activation(self.branch(x) + self.skip(x))
        return y


def resnet(
    channels: Sequence[int] = (8, 16, 32), blocks: int = 1, channels_in: int = 1, classes: int = 10
) -> nn.Sequential:
    """Build a residual network for small images: a 3×3 stem, stages that halve the image, mean pooling, a linear map.

    ``resnet()`` is ResNet-8 with 8, 16 and 32 channels; ``resnet((64, 128, 256, 512), 2, 3)`` is ResNet-18 for
    32×32 images.

    Args:
        channels: Channels of each stage; every stage but the first halves height and width.
        blocks: Residual blocks a stage.
        channels_in: Channels of the images.
        classes: Outputs.

    Returns:
        The network, (batch, channels_in, height, width) → (batch, classes), for images of any size.

    Raises:
        ValueError: ``channels`` is empty, or a number < 1.
    """
    if len(channels) == 0:
        raise ValueError("channels must name one stage or more, got none")
    counts = {f"channels[{stage}]": wide for stage, wide in enumerate(channels)}
    counts |= {"blocks": blocks, "channels_in": channels_in, "classes": classes}
    for name, count in counts.items():
        check_integer(name, count, at_least=1)
    stem = nn.Sequential(
        nn.Conv2d(channels_in, channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()
    )
    layers: list[nn.Module] = [stem]
    width = channels[0]
    for stage, wide in enumerate(channels):
        for block in range(blocks):
            layers.append(ResidualBlock(width, wide, stride=2 if stage > 0 and block == 0 else 1))
            width = wide
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
