"""Residual networks of quadratic convolutions, for small images."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer
from provenn.nn._quadratic_networks_layers import QuadraticConv2d


class QuadraticBlock(nn.Module):
    """Two quadratic 3×3 convolutions with batch norm, and a skip without parameters.

    Where the shape changes, the skip takes every second pixel, and adds channels of zeros on both sides.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        stride: Stride of the first convolution and of the skip.
        compact: Whether the convolutions are compact.
        rezero: Whether the branch has a learned factor, which starts at 0.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int, compact: bool, rezero: bool) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            QuadraticConv2d(channels_in, channels_out, 3, stride, 1, compact=compact),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            QuadraticConv2d(channels_out, channels_out, 3, 1, 1, compact=compact),
            nn.BatchNorm2d(channels_out),
        )
        self.stride, self.widened = stride, channels_out - channels_in
        self.register_parameter("factor", nn.Parameter(torch.zeros(())) if rezero else None)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out high wide"]:
        """Return the block's output; height and width are divided by the stride, rounded up.

        Args:
            x: Features.
        """
        y = self.branch(x)
        if self.factor is not None:
            y = self.factor * y
        before = self.widened // 2
        skip = x[..., :: self.stride, :: self.stride]
        skip = nn.functional.pad(skip, (0, 0, 0, 0, before, self.widened - before))
        return nn.functional.relu(y + skip)


class QResNet(nn.Module):
    """A residual network for small images whose blocks are quadratic; its stem and its classifier are linear.

    Three stages of (depth − 2)/6 blocks with 16, 32 and 64 channels; it starts as an ordinary ResNet.

    Args:
        depth: Layers with weights: 20, 32 and 56 in the paper, in general 6k + 2 with k ≥ 1.
        classes: Outputs.
        channels_in: Channels of the images.
        width: Channels of the first stage; the paper's is 16.
        compact: Whether the quadratic convolutions are compact.
        rezero: Whether every branch has a learned factor, which starts at 0 (ReLinear + ReZero).

    Shape:
        x (batch, channels_in, height, width) → (batch, classes), for images of any size.

    Raises:
        ValueError: ``depth`` is not 6k + 2, or a size < 1.

    Cost: as ResNet's, with three (compactly two) convolutions in the place of each.

    Source: section V of https://arxiv.org/abs/2110.06081; the authors' ``qresnet``, ``qresnet_smaller`` and
    ``qresnet_rezero``.
    """

    def __init__(
        self,
        depth: int,
        classes: int = 10,
        channels_in: int = 3,
        width: int = 16,
        compact: bool = False,
        rezero: bool = False,
    ) -> None:
        super().__init__()
        check_integer("depth", depth, at_least=8)
        if depth % 6 != 2:
            raise ValueError(f"depth must be 6k + 2, such as 20, 32 or 56, got {depth}")
        for name, size in (("classes", classes), ("channels_in", channels_in), ("width", width)):
            check_integer(name, size, at_least=1)
        self.stem = nn.Sequential(nn.Conv2d(channels_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        blocks: list[nn.Module] = []
        for stage in range(3):
            for block in range((depth - 2) // 6):
                first = stage > 0 and block == 0
                wide = width * 2**stage
                blocks.append(QuadraticBlock(wide // 2 if first else wide, wide, 2 if first else 1, compact, rezero))
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(4 * width, classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the classes' logits.

        Args:
            x: The images.

        Returns:
            One row an image.
        """
        y: Tensor = self.blocks(nn.functional.relu(self.stem(x)))
        logits: Tensor = self.classifier(y.mean(dim=(2, 3)))
        return logits
