"""The networks that NoProp trains: a branch for the data, one for the noised class, one for the time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number


def _layer(inputs: int, outputs: int, batch_norm: bool) -> nn.Sequential:
    norm = [nn.BatchNorm1d(outputs)] if batch_norm else []
    return nn.Sequential(nn.Linear(inputs, outputs), *norm, nn.ReLU())


def _convolutions(
    shape: tuple[int, int, int], channels: Sequence[int], hidden: int, batch_norm: bool, dropout: float
) -> nn.Sequential:
    """Convolutions that each halve the image, and a layer on what is left."""
    layers: list[nn.Module] = []
    before, height, width = shape
    for after in channels:
        layers.append(nn.Conv2d(before, after, 3, padding=1))
        layers += [nn.BatchNorm2d(after)] if batch_norm else []
        layers += [nn.ReLU(), nn.MaxPool2d(2), *([nn.Dropout(dropout)] if dropout else [])]
        before, height, width = after, height // 2, width // 2
    return nn.Sequential(*layers, nn.Flatten(), _layer(before * height * width, hidden, batch_norm))


class _SkipBranch(nn.Module):
    """Two layers on the noised class, the second with a skip around it."""

    def __init__(self, embed_dim: int, hidden: int, batch_norm: bool) -> None:
        super().__init__()
        self.first = _layer(embed_dim, hidden, batch_norm)
        self.second = _layer(hidden, hidden, batch_norm)

    def forward(self, z: Tensor) -> Tensor:
        z = self.first(z)
        return z + self.second(z)


class _TimeBranch(nn.Module):
    """A layer on sines and cosines of the time."""

    def __init__(self, time_dim: int, hidden: int) -> None:
        super().__init__()
        self.half = time_dim // 2
        self.layer = _layer(2 * self.half, hidden, batch_norm=False)

    def forward(self, t: Tensor) -> Tensor:
        places = torch.arange(self.half, device=t.device, dtype=t.dtype)
        angles = 1000 * t[:, None] * torch.exp(-math.log(10_000) * places / self.half)  # t in [0, 1], as 0 … 1000
        return self.layer(torch.cat([angles.sin(), angles.cos()], dim=1))


class _Block(nn.Module, ABC):
    """Branches for data, noised class and time, joined by a layer."""

    def __init__(
        self,
        features: nn.Module,
        feature_dim: int,
        embed_dim: int,
        num_classes: int,
        *,
        hidden: int = 256,
        z_features: nn.Module | None = None,
        batch_norm: bool = True,
        time_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_integer("feature_dim", feature_dim, at_least=1)
        check_integer("embed_dim", embed_dim, at_least=1)
        check_integer("num_classes", num_classes, at_least=2)
        check_integer("hidden", hidden, at_least=1)
        if time_dim is not None:
            check_integer("time_dim", time_dim, at_least=2)
        self.embed_dim, self.num_classes = embed_dim, num_classes
        self.features = features
        self.z_features = z_features or _SkipBranch(embed_dim, hidden, batch_norm)
        self.time = None if time_dim is None else _TimeBranch(time_dim, hidden)
        joined = feature_dim + hidden + (0 if time_dim is None else hidden)
        self.joint = nn.Sequential(_layer(joined, hidden, batch_norm), nn.Linear(hidden, self._outputs()))

    @abstractmethod
    def _outputs(self) -> int:
        """Return how many outputs the last layer has."""

    @property
    def timed(self) -> bool:
        """Whether the block takes a time."""
        return self.time is not None

    @classmethod
    def for_vectors(
        cls,
        in_features: int,
        embed_dim: int,
        num_classes: int,
        *,
        hidden: int = 256,
        batch_norm: bool = True,
        time_dim: int | None = None,
    ) -> Self:
        """Return a block for data that are vectors: two layers in the data's branch.

        Args:
            in_features: Length of a vector.
            embed_dim: As in the class.
            num_classes: As in the class.
            hidden: Units of every layer.
            batch_norm: As in the class.
            time_dim: As in the class.

        Raises:
            ValueError: A size below 1.
        """
        check_integer("in_features", in_features, at_least=1)
        check_integer("hidden", hidden, at_least=1)
        features = nn.Sequential(_layer(in_features, hidden, batch_norm), _layer(hidden, hidden, batch_norm))
        return cls(features, hidden, embed_dim, num_classes, hidden=hidden, batch_norm=batch_norm, time_dim=time_dim)

    @classmethod
    def for_images(
        cls,
        shape: tuple[int, int, int],
        embed_dim: int,
        num_classes: int,
        *,
        channels: Sequence[int] = (32, 64),
        hidden: int = 256,
        dropout: float = 0.2,
        batch_norm: bool = True,
        time_dim: int | None = None,
    ) -> Self:
        """Return a block for images; where z has as many entries as an image, it goes through convolutions as one.

        Args:
            shape: Channels, height and width of an image.
            embed_dim: As in the class.
            num_classes: As in the class.
            channels: Channels of the convolutions, each 3 × 3 and followed by a pooling of 2 × 2.
            hidden: Units of every layer.
            dropout: Probability of dropout after each pooling. The paper does not say how much.
            batch_norm: As in the class.
            time_dim: As in the class.

        Raises:
            ValueError: A size below 1, an image too small for the poolings, or ``dropout`` outside [0, 1).
        """
        if len(shape) != 3 or min(shape) < 1 or min(shape[1:]) >> len(channels) < 1:
            raise ValueError(f"shape must be (channels, height, width) large enough for {len(channels)} poolings, "
                             f"got {shape}")  # fmt: skip
        for count in channels:
            check_integer("channels", count, at_least=1)
        check_integer("hidden", hidden, at_least=1)
        check_number("dropout", dropout, at_least=0, below=1)
        as_image = embed_dim == math.prod(shape)
        z_features = _convolutions(shape, channels, hidden, batch_norm, dropout) if as_image else None
        return cls(
            _convolutions(shape, channels, hidden, batch_norm, dropout),
            hidden,
            embed_dim,
            num_classes,
            hidden=hidden,
            z_features=None if z_features is None else nn.Sequential(nn.Unflatten(1, shape), z_features),
            batch_norm=batch_norm,
            time_dim=time_dim,
        )

    def encode(self, x: Float[Tensor, "batch *data"]) -> Float[Tensor, "batch features"]:
        """Return the features of the data; of z and t they do not depend, so one call serves a whole diffusion."""
        return self.features(x)

    def joined(
        self,
        z: Float[Tensor, "batch embed"],
        encoded: Float[Tensor, "batch features"],
        t: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch outputs"]:
        """Return what the last layer makes of z, of the data's features and of the time."""
        if (t is None) is self.timed:
            raise ValueError(f"t must {'' if self.timed else 'not '}be given to this block, got {t}")
        branches = [encoded, self.z_features(z)]
        if self.time is not None:
            branches.append(self.time(t))
        return self.joint(torch.cat(branches, dim=1))


class DenoisingBlock(_Block):
    """û(z, x): guess a class from the data and its noised embedding; return the guess's mean embedding.

    û = softmax(logits) W_E, which lies in the convex hull of the embeddings.

    Args:
        features: Maps the data to vectors.
        feature_dim: Their length.
        embed_dim: d, length of a class embedding.
        num_classes: m.
        hidden: Units of the layers on z, on the time, and on all together.
        z_features: Maps z to ``hidden`` features, instead of two layers with a skip.
        batch_norm: Whether the layers normalise; the paper's do in discrete time, not in continuous time.
        time_dim: Length of the time's embedding; ``None`` for a block of discrete time, which takes no time.

    Shape: z (batch, d), x (batch, …), embeddings (m, d), t (batch) in [0, 1] → (batch, d).

    Raises:
        ValueError: A size below 1, or, in a call, a time too many or missing.

    Cost: that of ``features`` and O(hidden (d + hidden + m)) a sample.

    Source: NoProp, section 4 and figure 6.
    """

    def _outputs(self) -> int:
        return self.num_classes

    def forward(
        self,
        z: Float[Tensor, "batch embed"],
        x: Float[Tensor, "batch *data"],
        embeddings: Float[Tensor, "classes embed"],
        t: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch embed"]:
        """Return û.

        Args:
            z: Noised embeddings of the classes.
            x: The data.
            embeddings: W_E.
            t: Times; only where the block takes one.

        Returns:
            û.
        """
        return self.step(z, self.encode(x), embeddings, t)

    def step(
        self,
        z: Float[Tensor, "batch embed"],
        encoded: Float[Tensor, "batch features"],
        embeddings: Float[Tensor, "classes embed"],
        t: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch embed"]:
        """Return û of data that are encoded already.

        Args:
            z: Noised embeddings of the classes.
            encoded: What :meth:`encode` made of the data.
            embeddings: W_E.
            t: Times; only where the block takes one.
        """
        return self.joined(z, encoded, t).softmax(dim=1) @ embeddings


class VelocityBlock(_Block):
    """v(z, x, t): the velocity that carries noise to a class embedding, for NoProp-FM.

    A :class:`DenoisingBlock` without the softmax: a velocity is no mean of embeddings.

    Args:
        features: Maps the data to vectors.
        feature_dim: Their length.
        embed_dim: d, length of a class embedding.
        num_classes: m.
        hidden: Units of the layers on z, on the time, and on all together.
        z_features: Maps z to ``hidden`` features, instead of two layers with a skip.
        batch_norm: Whether the layers normalise.
        time_dim: Length of the time's embedding; :class:`NoPropFM` needs one.

    Shape: z (batch, d), x (batch, …), t (batch) in [0, 1] → (batch, d).

    Raises:
        ValueError: A size below 1, or, in a call, a time too many or missing.

    Cost: as :class:`DenoisingBlock`.

    Source: NoProp, section on flow matching. That the last layer is linear is this library's reading.
    """

    def _outputs(self) -> int:
        return self.embed_dim

    def forward(
        self,
        z: Float[Tensor, "batch embed"],
        x: Float[Tensor, "batch *data"],
        t: Float[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch embed"]:
        """Return v.

        Args:
            z: Points between noise and class embeddings.
            x: The data.
            t: Times; only where the block takes one.

        Returns:
            v.
        """
        return self.joined(z, self.encode(x), t)
