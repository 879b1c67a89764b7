"""How far a region of high confidence extends across a path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.recording import evaluating
from provenn.core.experiment.reports import Report
from provenn.core.experiment.seeding import generator
from provenn.robust._level_set_traversal_scores import (
    Normalize,
    check_pairs,
    confidences,
    project_orthogonal,
    scores_and_slopes,
    unchanged,
)


@dataclass(frozen=True)
class WidthReport(Report):
    """Confidence around points of a path, at distances across it; one row a point."""

    distances: tuple[float, ...]
    centre: tuple[float, ...]
    low: tuple[tuple[float, ...], ...]
    """The 5 % quantile over directions, by distance."""
    high: tuple[tuple[float, ...], ...]
    """The 95 % quantile."""

    def plot(self) -> Figure:
        """Draw both quantiles over the distance, averaged over the points."""
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        places = (0.0, *self.distances)
        for name, rows in (("5 %", self.low), ("95 %", self.high)):
            means = torch.tensor([(at, *row) for at, row in zip(self.centre, rows, strict=True)]).mean(dim=0)
            axes.plot(places, means.tolist(), "o-", label=name)
        axes.set(xlabel="distance across the path", ylabel="confidence", ylim=(0, 1.02))
        axes.legend()
        return figure


class LevelSetWidthProbe:
    r"""Measure the confidence around points of a path, in random directions orthogonal to the path.

    The path's direction at a point is Δ_⊥, the step towards the target without its part along the gradient. Where it
    is zero, directions are free. Moved images are clipped to [0, 1], as the model never sees others.

    Args:
        num_vectors: Random directions a point.
        distances: How far to go along each, in Euclidean length.
        normalize: Maps images in [0, 1] to what the model takes.
        seed: Draws the directions.

    Shape:
        Called with (points, y, target): images on the path (batch, ...), the source's labels (batch,), and the targets
        (batch, ...).

    Returns:
        A :class:`WidthReport`.

    Raises:
        ValueError: ``num_vectors`` < 1, ``distances`` is empty or not positive, ``target`` has not the shape of
            ``points``, images leave [0, 1], or ``y`` are no labels of the model's.

    Cost: one gradient, and ``num_vectors`` × distances forward passes a point, point by point; memory of
    ``num_vectors`` images.

    Source: the paper's measurement of widths along the path.
    """

    def __init__(
        self,
        num_vectors: int = 256,
        distances: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
        normalize: Normalize = unchanged,
        seed: int = 0,
    ) -> None:
        check_integer("num_vectors", num_vectors, at_least=1)
        if len(distances) == 0:
            raise ValueError("distances must name one distance or more, got none")
        for place, distance in enumerate(distances):
            check_number(f"distances[{place}]", distance, above=0)
        self.num_vectors = num_vectors
        self.distances = tuple(distances)
        self.normalize = normalize
        self.seed = seed

    def __call__(self, model: nn.Module, data: tuple[Tensor, Tensor, Tensor]) -> WidthReport:
        """Go out from the points.

        Args:
            model: Left as it is found.
            data: (points, y, target).
        """
        points, y, target = data
        if target.shape != points.shape:
            raise ValueError(f"target must have the shape {tuple(points.shape)} of points, got {tuple(target.shape)}")
        check_pairs(points, y, target)
        draws = generator(self.seed, "directions")
        bounds = torch.tensor([0.05, 0.95], dtype=points.dtype, device=points.device)
        rows = []
        with evaluating(model):
            centre, slopes = scores_and_slopes(model, points, y, "confidence", self.normalize)
            paths = project_orthogonal((target - points).detach(), slopes)
            for point, path, label in zip(points.detach(), paths, y, strict=True):
                away = self.directions(path, draws)
                labels = label.repeat(self.num_vectors)
                found = [
                    confidences(model, (point + distance * away).clamp(0, 1), labels, self.normalize).quantile(bounds)
                    for distance in self.distances
                ]
                rows.append(torch.stack(found))
        low, high = (tuple(tuple(row[:, side].tolist()) for row in rows) for side in (0, 1))
        return WidthReport(self.distances, tuple(centre.tolist()), low, high)

    def directions(self, path: Tensor, draws: torch.Generator) -> Tensor:
        """Draw unit directions orthogonal to a path.

        Args:
            path: The path's direction at one point.
            draws: Where the directions are drawn from.

        Returns:
            The directions, (num_vectors, *path.shape).
        """
        drawn = torch.randn(self.num_vectors, *path.shape, generator=draws, device=draws.device, dtype=path.dtype)
        drawn = drawn.to(path.device)
        across = project_orthogonal(drawn, path.expand_as(drawn)).flatten(1)
        return nn.functional.normalize(across, dim=1).view_as(drawn)
