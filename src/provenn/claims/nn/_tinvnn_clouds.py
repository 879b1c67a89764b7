"""Point clouds of eight shapes in canonical pose, and how they are turned, scaled and shifted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from provenn.core.experiment.seeding import generator
from provenn.data import local_archive
from provenn.nn._tinvnn_probe import random_rotations

POINTS = 128
JITTER = 0.03
MESHES = ("mesh_stanford_bunny", "mesh_spot", "mesh_homer")


def _uniform(count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    u, v = torch.rand(2, count, POINTS, generator=draws, dtype=torch.float64)
    return u, v


def _octant(count: int, draws: torch.Generator) -> Tensor:
    directions = torch.randn(count, POINTS, 3, generator=draws, dtype=torch.float64).abs()
    octant: Tensor = directions / directions.norm(dim=2, keepdim=True)
    return octant


def _torus(count: int, draws: torch.Generator) -> Tensor:
    u, v = _uniform(count, draws)
    a, b = 2 * math.pi * u, 2 * math.pi * v
    ring = 1 + 0.35 * b.cos()
    return torch.stack((ring * a.cos(), ring * a.sin(), 0.35 * b.sin()), 2)


def _cylinder(count: int, draws: torch.Generator) -> Tensor:
    u, v = _uniform(count, draws)
    a = 2 * math.pi * u
    return torch.stack((0.5 * a.cos(), 0.5 * a.sin(), 2 * v - 1), 2)


def _cone(count: int, draws: torch.Generator) -> Tensor:
    u, v = _uniform(count, draws)
    a, reach = 2 * math.pi * u, v.sqrt()
    return torch.stack((0.7 * reach * a.cos(), 0.7 * reach * a.sin(), 1.5 * (1 - reach)), 2)


def _box(count: int, draws: torch.Generator) -> Tensor:
    sizes = torch.tensor([1.0, 0.7, 0.4], dtype=torch.float64)
    points = (2 * torch.rand(count, POINTS, 3, generator=draws, dtype=torch.float64) - 1) * sizes
    areas = sizes.prod() / sizes
    face = torch.multinomial(areas, count * POINTS, replacement=True, generator=draws).view(count, POINTS, 1)
    side = torch.randint(0, 2, (count, POINTS, 1), generator=draws) * 2.0 - 1
    return points.scatter(2, face, side * sizes[face])


SURFACES: Mapping[str, Callable[[int, torch.Generator], Tensor]] = {
    "octant": _octant,
    "torus": _torus,
    "cylinder": _cylinder,
    "cone": _cone,
    "box": _box,
}


@cache
def _mesh(name: str) -> tuple[Tensor, Tensor]:
    vertices, faces = local_archive(
        name,
        "vertices (n, 3) and faces (m, 3) of a triangle mesh",
        lambda _, held: (held["vertices"], held["faces"].astype(np.int64)),
    )
    return torch.from_numpy(vertices).double(), torch.from_numpy(faces)


def _on_mesh(name: str, count: int, draws: torch.Generator) -> Tensor:
    """Draw points uniformly from a mesh's area."""
    vertices, faces = _mesh(name)
    corners = vertices[faces]
    areas = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=1)
    picked = corners[torch.multinomial(areas, count * POINTS, replacement=True, generator=draws)]
    u, v = torch.rand(2, count * POINTS, 1, generator=draws, dtype=torch.float64)
    root = u.sqrt()
    points: Tensor = (1 - root) * picked[:, 0] + root * (1 - v) * picked[:, 1] + root * v * picked[:, 2]
    return points.view(count, POINTS, 3)


def clouds(each: int, meshes: bool, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw clouds in canonical pose, centred and of radius 1 but for the jitter, and their classes.

    Args:
        each: Clouds of each shape.
        meshes: Whether the three meshes are among the shapes.
        draws: The generator.
    """
    found = [make(each, draws) for make in SURFACES.values()]
    found += [_on_mesh(name, each, draws) for name in MESHES] if meshes else []
    X = torch.cat(found)
    X = X - X.mean(1, keepdim=True)
    X = X / X.square().sum(2).mean(1).sqrt()[:, None, None]
    X = X + JITTER * torch.randn(X.shape, generator=draws, dtype=torch.float64)
    return X.float(), torch.arange(len(found)).repeat_interleave(each)


def turned(X: Tensor, draws: torch.Generator) -> Tensor:
    """Return clouds under random rotations."""
    return X @ random_rotations(len(X), X.shape[2], draws).to(X)


def moved(X: Tensor, draws: torch.Generator) -> Tensor:
    """Return clouds under random rotations, scales from ½ to 2 and shifts of about their radius."""
    size = 0.5 * 4 ** torch.rand(len(X), 1, 1, generator=draws, dtype=torch.float64)
    shift = torch.randn(len(X), 1, X.shape[2], generator=draws, dtype=torch.float64)
    return turned(X, draws) * size.to(X) + shift.to(X)


@cache
def data_set(name: str, seed: int, each: int, meshes: bool) -> tuple[Tensor, Tensor]:
    """Return the same clouds at every call."""
    return clouds(each, meshes, generator(seed, "clouds", name))
