"""How far a region of high confidence extends: along lines from the source, and over triangles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.recording import evaluating
from provenn.core.experiment.reports import Report
from provenn.robust._level_set_traversal_scores import (
    Normalize,
    check_pairs,
    confidences,
    unchanged,
)


@dataclass(frozen=True)
class StarShapeReport(Report):
    """Confidence along the straight lines from sources to outputs, one entry a pair."""

    delta: float
    source: tuple[float, ...]
    output: tuple[float, ...]
    lowest: tuple[float, ...]
    star_like: tuple[bool, ...]
    """Whether the lowest confidence on the line is at least the source's minus ``delta``."""
    share: float
    """The share of lines for which that is so."""
    mean_line: tuple[float, ...]
    """The mean over pairs at each point of the line."""

    def plot(self) -> Figure:
        """Draw the mean confidence along the line, and the distribution of its lowest value."""
        figure = Figure(figsize=(8, 3), layout="constrained")
        line, lowest = figure.subplots(1, 2)
        last = len(self.mean_line) - 1
        line.plot([place / last for place in range(last + 1)], self.mean_line, "o-")
        line.set(xlabel="share of the way from source to output", ylabel="mean confidence", ylim=(0, 1.02))
        lowest.hist(self.lowest, bins=20, range=(0, 1))
        lowest.set(xlabel="lowest confidence on the line", ylabel="pairs")
        return figure


class StarShapeProbe:
    r"""Measure whether the straight line from each source to an output stays confident.

    If it does for outputs near any target, the region is star-shaped around the source.

    Args:
        num_points: Points on the line, both ends among them.
        delta: δ, the drop below the source's confidence that a line may have.
        normalize: Maps images in [0, 1] to what the model takes.

    Shape:
        Called with (source, y, output): images (batch, ...), labels (batch,), images (batch, ...).

    Returns:
        A :class:`StarShapeReport`.

    Raises:
        ValueError: ``num_points`` < 2, ``delta`` < 0, ``output`` has not the shape of ``source``, images leave [0, 1],
            or ``y`` are no labels of the model's.

    Cost: one forward pass over ``num_points`` images a pair, in chunks.

    Source: the paper's section on star-like connectivity.
    """

    def __init__(self, num_points: int = 11, delta: float = 0.2, normalize: Normalize = unchanged) -> None:
        check_integer("num_points", num_points, at_least=2)
        check_number("delta", delta, at_least=0)
        self.num_points = num_points
        self.delta = delta
        self.normalize = normalize

    def __call__(self, model: nn.Module, data: tuple[Tensor, Tensor, Tensor]) -> StarShapeReport:
        """Walk along the lines.

        Args:
            model: Left as it is found.
            data: (source, y, output).
        """
        source, y, output = data
        if output.shape != source.shape:
            raise ValueError(f"output must have the shape {tuple(source.shape)} of source, got {tuple(output.shape)}")
        check_pairs(source, y, output)
        shares = torch.linspace(0, 1, self.num_points, dtype=source.dtype, device=source.device)
        points = torch.lerp(source[None], output[None], shares.view(-1, *[1] * source.dim()))
        with evaluating(model):
            line = _confidences(model, points.transpose(0, 1), y, self.normalize)
        lowest = line.amin(dim=1)
        star_like = lowest >= line[:, 0] - self.delta
        return StarShapeReport(
            self.delta,
            tuple(line[:, 0].tolist()),
            tuple(line[:, -1].tolist()),
            tuple(lowest.tolist()),
            tuple(star_like.tolist()),
            star_like.double().mean().item(),
            tuple(line.mean(dim=0).tolist()),
        )


@dataclass(frozen=True)
class TriangleReport(Report):
    """Confidence over triangles of a source and the outputs for two targets; averages over a source's triangles."""

    drops: tuple[float, ...]
    source: tuple[float, ...]
    mean: tuple[float, ...]
    fractions: tuple[tuple[float, ...], ...]
    """For each source and each drop d, the share of grid points with a confidence strictly above the source's − d."""
    edge_mean_drop: tuple[float, ...]
    """The mean drop below the source's confidence along the two edges from it."""
    edge_largest_drop: tuple[float, ...]
    """The largest drop there, over all of a source's triangles."""
    weights: tuple[tuple[float, float], ...]
    """The barycentric coordinates of the grid points that belong to the two outputs."""
    grid: tuple[float, ...]
    """The mean confidence at each grid point, over triangles and sources."""

    def plot(self) -> Figure:
        """Draw the mean confidence over the triangle; the source is at the lower left."""
        figure = Figure(figsize=(4.5, 3.5), layout="constrained")
        axes = figure.subplots()
        across = [first + second / 2 for first, second in self.weights]
        up = [second * 3**0.5 / 2 for _, second in self.weights]
        drawn = axes.tripcolor(across, up, self.grid, shading="gouraud", vmin=0, vmax=1)
        figure.colorbar(drawn, ax=axes, label="mean confidence of the source's class")
        axes.set(aspect="equal", xticks=[], yticks=[], xlabel="source (left), two outputs (right, top)")
        return figure


class TriangleProbe:
    r"""Measure how much of the triangle between a source and two outputs keeps the source's confidence.

    Args:
        spacing: The grid's spacing in barycentric coordinates; 1/spacing must be a whole number. 0.1 gives 66 points.
        drops: d in the fractions of points with p > p(source) − d. The inequality is strict: where nothing changes,
            the fraction is 0 at d = 0 and 1 above.
        normalize: Maps images in [0, 1] to what the model takes.

    Shape:
        Called with (source, y, outputs): images (batch, ...), labels (batch,), and images (targets, batch, ...) for
        two targets or more. Every pair of targets gives a triangle.

    Returns:
        A :class:`TriangleReport`.

    Raises:
        ValueError: ``spacing`` does not divide 1, ``drops`` is empty or negative, ``outputs`` has fewer than two
            targets or another shape than ``source``, images leave [0, 1], or ``y`` are no labels of the model's.

    Cost: for T targets T (T − 1)/2 × 66 forward passes an image, in chunks.

    Source: the paper's Table 2; the averages are those of its code (which counts the source on both edges), whose
    last column is minus the largest drop.
    """

    def __init__(
        self,
        spacing: float = 0.1,
        drops: Sequence[float] = (0.0, 0.1, 0.2, 0.3),
        normalize: Normalize = unchanged,
    ) -> None:
        check_number("spacing", spacing, above=0, at_most=1)
        if abs(1 / spacing - round(1 / spacing)) > 1e-6:
            raise ValueError(f"spacing must divide 1, got {spacing}")
        if len(drops) == 0:
            raise ValueError("drops must name one drop or more, got none")
        for place, drop in enumerate(drops):
            check_number(f"drops[{place}]", drop, at_least=0)
        self.parts = round(1 / spacing)
        self.drops = tuple(drops)
        self.normalize = normalize

    def __call__(self, model: nn.Module, data: tuple[Tensor, Tensor, Tensor]) -> TriangleReport:
        """Cover the triangles.

        Args:
            model: Left as it is found.
            data: (source, y, outputs).
        """
        source, y, outputs = data
        if len(outputs) < 2 or outputs.shape[1:] != source.shape:
            raise ValueError(
                f"outputs must hold images of shape {tuple(source.shape)} for two targets or more, "
                f"got {tuple(outputs.shape)}"
            )
        check_pairs(source, y, outputs)
        whole = range(self.parts + 1)
        places = [(i, j) for i in whole for j in whole if i + j <= self.parts]
        weights = torch.tensor(places, dtype=source.dtype, device=source.device) / self.parts
        with evaluating(model):
            grids = torch.stack(
                [self._grid(model, source, y, outputs[a], outputs[b], weights) for a, b in _pairs(len(outputs))]
            )
        grids = grids.double()
        start = grids[..., :1]  # (pairs, batch, points): the first point is the source
        fractions = torch.stack([(grids > start - drop).double().mean(dim=2).mean(dim=0) for drop in self.drops], dim=1)
        edges = torch.cat([grids[..., weights[:, side] == 0] for side in (0, 1)], dim=2)
        return TriangleReport(
            self.drops,
            tuple(start[0, :, 0].tolist()),
            tuple(grids.mean(dim=(0, 2)).tolist()),
            tuple(map(tuple, fractions.tolist())),
            tuple((start - edges).mean(dim=(0, 2)).tolist()),
            tuple((start - edges).amax(dim=(0, 2)).tolist()),
            tuple((i / self.parts, j / self.parts) for i, j in places),
            tuple(grids.mean(dim=(0, 1)).tolist()),
        )

    def _grid(self, model: nn.Module, source: Tensor, y: Tensor, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
        """Return the confidence at every point of every triangle, (batch, points)."""
        towards_a, towards_b = weights.view(-1, 2, *[1] * (source.dim() - 1)).unbind(1)
        points = source[:, None] + towards_a * (a - source)[:, None] + towards_b * (b - source)[:, None]
        return _confidences(model, points.clamp(0, 1), y, self.normalize)


def _confidences(model: nn.Module, points: Tensor, y: Tensor, normalize: Normalize) -> Tensor:
    """Return the confidences of (batch, points, ...) images in their row's class, (batch, points)."""
    batch, many = points.shape[:2]
    return confidences(model, points.flatten(0, 1), y.repeat_interleave(many), normalize).view(batch, many)


def _pairs(targets: int) -> list[tuple[int, int]]:
    return list(combinations(range(targets), 2))
