"""Faces for SFace's claim: photographs of 40 people, or a simulator; people to train on, and people never seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.seeding import generator
from provenn.data import local_archive
from provenn.losses import embedding_layer, random_mirror, scale_pixels

HEIGHT, WIDTH, SHIFT = 28, 23, 2
SHOTS = 10
"""Images a person."""
EMBEDDING = 64


@dataclass(frozen=True)
class Faces:
    """Images (N, 1, 28, 23), scaled, and who they show, 0 … people − 1."""

    images: Tensor
    people: Tensor

    def of(self, chosen: Tensor) -> Faces:
        """Return the images of some people, renamed 0, 1, … in the order given."""
        new = torch.full((int(self.people.max()) + 1,), -1, device=self.people.device)
        new[chosen] = torch.arange(len(chosen), device=self.people.device)
        people = new[self.people]
        return Faces(self.images[people >= 0], people[people >= 0])


def load_faces(name: str, people: int, device: str) -> Faces:
    """Return ``"orl_faces"``, or ``"simulated"`` ones.

    Raises:
        DataUnavailableError: The photographs are not in the data folder.
    """
    if name == "simulated":
        images, who = _simulated(people)
    else:
        holds = "x (400, 28, 23), bytes, and y (400,), the people of the ORL faces"
        pixels, labels = local_archive(name, holds, _orl)
        images, who = scale_pixels(torch.from_numpy(pixels)[:, None]), torch.from_numpy(labels)
    return Faces(images.to(device), who.to(device))


def _orl(name: str, archive: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    x, y = archive["x"], archive["y"].astype(np.int64)
    if x.shape[1:] != (HEIGHT, WIDTH) or y.shape != x.shape[:1]:
        raise ValueError(f"its images are {x.shape} with labels {y.shape}")
    return x, y


def _simulated(people: int) -> tuple[Tensor, Tensor]:
    """Draw smooth patterns, one a person, under light from a side, noise and small shifts."""
    draws = generator("simulated faces")
    who = torch.arange(people * SHOTS) // SHOTS
    patterns = torch.randn(people, 1, 7, 6, generator=draws)
    images = F.interpolate(patterns, size=(HEIGHT, WIDTH), mode="bilinear")[who]
    light = torch.randn(len(who), 1, 1, 1, generator=draws) * torch.linspace(-1, 1, WIDTH)
    noise = torch.randn(images.shape, generator=draws)
    return shifted(0.4 * images + 0.2 * light + 0.1 * noise, draws), who


def shifted(images: Tensor, draws: torch.Generator) -> Tensor:
    """Shift each image by up to two pixels each way; what comes in continues the border."""
    padded = F.pad(images, (SHIFT,) * 4, mode="replicate")
    windows = padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
    size = (2, len(images))
    down, right = torch.randint(2 * SHIFT + 1, size, generator=draws, device=draws.device).to(images.device)
    moved: Tensor = windows[torch.arange(len(images), device=images.device), :, down, right]
    return moved


def augmented(images: Tensor, draws: torch.Generator) -> Tensor:
    """Mirror and shift images at random."""
    return shifted(random_mirror(images, draws), draws)


def network() -> nn.Sequential:
    """Build four convolutions of 16, 32, 64 and 64 channels, and an embedding of 64."""
    layers: list[nn.Module] = []
    width = 1
    for channels, stride in ((16, 2), (32, 2), (64, 2), (64, 1)):
        layers += [nn.Conv2d(width, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        width = channels
    return nn.Sequential(*layers, embedding_layer(width, 4, 3, EMBEDDING))
