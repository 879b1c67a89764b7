"""Arrow pointing: does the arrow in the image point at the circle?"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number

CONE = math.pi / 8
"""Half the angle within which an arrow points at the circle: 22.5°."""


class Scene(NamedTuple):
    """Where arrow and circle are, (n, 2), where the arrow points, in radians from the first axis, and the labels."""

    arrow: Tensor
    circle: Tensor
    direction: Tensor
    label: Tensor


def aimed(arrow: Tensor, circle: Tensor, generator: torch.Generator | None) -> Scene:
    """Toss a coin for every label and draw directions to match: within the cone round the circle, or outside it."""
    label = torch.randint(0, 2, (len(arrow),), generator=generator, device=arrow.device)
    share = 2 * torch.rand(len(arrow), generator=generator, device=arrow.device) - 1
    outside = torch.sign(share) * (CONE + (math.pi - CONE) * share.abs())
    towards = circle - arrow
    bearing = torch.atan2(towards[:, 1], towards[:, 0])
    return Scene(arrow, circle, bearing + torch.where(label == 1, CONE * share, outside), label)


def arrow_pointing(
    n: int, size: int, generator: torch.Generator | None = None, *, length: float = 8.0
) -> tuple[Float[Tensor, "n size size 1"], Int[Tensor, " n"]]:
    """Draw images with an arrow and a circle, labelled by whether the arrow points at the circle.

    It does if the circle's centre lies within ±22.5° of the ray from the arrow's middle along the arrow. Half the
    labels are 1 on average, and no place of arrow or circle tells which. Objects keep their size in pixels, so that a
    larger image means longer ways.

    Args:
        n: Images.
        size: Their side, in pixels.
        generator: Draws them, where it is; default torch's global one.
        length: The arrow's length; the circle's radius is 3/10 of it.

    Shape:
        Images (n, size, size, 1) in [0, 1], labels (n,).

    Returns:
        Images, and labels 0 or 1.

    Raises:
        TypeError: ``n`` or ``size`` is no integer.
        ValueError: ``n`` < 0, ``length`` not positive, or ``size`` below four lengths.

    Cost: O(n · size²).

    Source: Pöppel et al., "pLSTM", 2025, section 5 (the task; its images have 192 × 192 and 384 × 384 pixels).
    """
    check_integer("n", n, at_least=0)
    check_number("length", length, above=0)
    check_integer("size", size, at_least=math.ceil(4 * length))
    places = _apart(n, size, length, generator)
    scene = aimed(*places, generator)
    axis = torch.arange(size, device=scene.arrow.device) + 0.5
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    along = torch.stack((scene.direction.cos(), scene.direction.sin()), -1)
    tip, end = (scene.arrow + sign * length / 2 * along for sign in (1, -1))
    across = torch.stack((-along[:, 1], along[:, 0]), -1)
    barbs = [tip + length / 3 * (side * across - along) for side in (1, -1)]
    strokes = [_distance(pixels, tip, other) for other in (end, *barbs)]
    ring = ((pixels - scene.circle[:, None, None]).norm(dim=-1) - 0.3 * length).abs()
    # Lines a pixel wide, with edges that fade over one.
    nearest = torch.stack((*strokes, ring)).amin(0)
    return (1.0 - (nearest - 0.25)).clamp(0, 1)[..., None], scene.label


def _apart(n: int, size: int, length: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Draw the middles of arrow and circle, whole within the image and at least a length from each other."""
    margin = length / 2 + 1
    device = None if generator is None else generator.device
    places = torch.empty(n, 2, 2, device=device)
    waiting = torch.arange(n, device=places.device)
    while len(waiting):
        drawn = torch.rand(len(waiting), 2, 2, generator=generator, device=places.device)
        places[waiting] = margin + (size - 2 * margin) * drawn
        waiting = waiting[(places[waiting, 0] - places[waiting, 1]).norm(dim=-1) < length]
    return places[:, 0], places[:, 1]


def _distance(pixels: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Return each pixel's distance from the segments: (n, size, size)."""
    way = (end - start)[:, None, None]
    offset = pixels - start[:, None, None]
    share = ((offset * way).sum(-1) / way.square().sum(-1)).clamp(0, 1)
    return (offset - share[..., None] * way).norm(dim=-1)
