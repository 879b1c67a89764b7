"""Networks on point clouds: a shared perceptron with a maximum, and convolutions over edges to nearest points."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer


def _perceptron(sizes: Sequence[int]) -> nn.Sequential:
    """Return linear layers, each with layer norm and ReLU; norms over features mix no points, padded ones neither."""
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [nn.Linear(wide, narrow), nn.LayerNorm(narrow), nn.ReLU()]
    return nn.Sequential(*layers)


def _largest(h: Float[Tensor, "batch points features"], mask: Bool[Tensor, "batch points"] | None) -> Tensor:
    if mask is not None:
        h = h.masked_fill(~mask[..., None], -torch.inf)
    return h.amax(1)


class PointNetBackbone(nn.Module):
    """Classify a cloud by the maximum over its points of a shared perceptron.

    Args:
        in_features: Numbers a point: its coordinates, and features if there are any.
        out_features: Outputs, such as classes.
        widths: Of the shared perceptron.
        head: Of the perceptron after the maximum.

    Shape:
        Points (batch, N, in_features), ``mask`` (batch, N); output (batch, out_features).

    Returns:
        The outputs; the order of points changes nothing.

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: A number out of range; on a call, points of another width.

    Cost: one pass of the perceptron a point.

    Source: Qi et al., "PointNet", CVPR 2017, without its transformation networks; layer norm for batch norm, so that
    padded points have no effect.
    """

    def __init__(
        self, in_features: int, out_features: int, widths: Sequence[int] = (64, 128, 256), head: Sequence[int] = (128,)
    ) -> None:
        super().__init__()
        _check_sizes(in_features, out_features, widths, head)
        self.in_features = in_features
        self.points = _perceptron((in_features, *widths))
        self.head = nn.Sequential(_perceptron((widths[-1], *head)), nn.Linear((*widths, *head)[-1], out_features))

    def forward(
        self, x: Float[Tensor, "batch points features"], mask: Bool[Tensor, "batch points"] | None = None
    ) -> Float[Tensor, "batch out"]:
        """Return the outputs.

        Args:
            x: Points.
            mask: Which of them are points; all without it.
        """
        _check_width(x, self.in_features)
        y: Tensor = self.head(_largest(self.points(x), mask))
        return y


class DGCNNBackbone(nn.Module):
    """Classify a cloud by convolutions over the edges from each point to its nearest ones.

    h_i ← max_j MLP(h_i, h_j − h_i) over the k nearest j, found anew in each layer's features, or once in the
    coordinates, which makes a graph network on the nearest-neighbour graph.

    Args:
        in_features: Numbers a point.
        out_features: Outputs.
        k: Neighbours of a point, itself included.
        widths: Of the layers.
        head: Of the perceptron after the maximum over points.
        dynamic: Whether each layer finds neighbours among its own features.

    Shape:
        Points (batch, N, in_features), ``mask`` (batch, N); output (batch, out_features).

    Returns:
        The outputs; the order of points changes nothing.

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: A number out of range; on a call, points of another width, fewer points than k.

    Cost: O(N²) distances a layer, and k passes of a layer's perceptron a point.

    Source: Wang et al., "Dynamic graph CNN for learning on point clouds", ACM TOG 38 (2019).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        k: int = 16,
        widths: Sequence[int] = (64, 64, 128),
        head: Sequence[int] = (128,),
        dynamic: bool = True,
    ) -> None:
        super().__init__()
        check_integer("k", k, at_least=1)
        _check_sizes(in_features, out_features, widths, head)
        self.in_features, self.k, self.dynamic = in_features, k, dynamic
        self.layers = nn.ModuleList(
            _perceptron((2 * wide, narrow)) for wide, narrow in pairwise((in_features, *widths))
        )
        found = (sum(widths), *head)
        self.head = nn.Sequential(_perceptron(found), nn.Linear(found[-1], out_features))

    def forward(
        self, x: Float[Tensor, "batch points features"], mask: Bool[Tensor, "batch points"] | None = None
    ) -> Float[Tensor, "batch out"]:
        """Return the outputs.

        Args:
            x: Points.
            mask: Which of them are points; all without it.
        """
        _check_width(x, self.in_features)
        if x.shape[1] < self.k:
            raise ValueError(f"x must have at least k = {self.k} points, got {x.shape[1]}")
        neighbours, h, found = self._nearest(x, mask), x, []
        for place, layer in enumerate(self.layers):
            if self.dynamic and place > 0:
                neighbours = self._nearest(h, mask)
            near = h.gather(1, neighbours.flatten(1)[..., None].expand(-1, -1, h.shape[2])).unflatten(1, (-1, self.k))
            edges = layer(torch.cat((h[:, :, None].expand_as(near), near - h[:, :, None]), -1))
            h = edges.amax(2)
            found.append(h)
        y: Tensor = self.head(_largest(torch.cat(found, -1), mask))
        return y

    @torch.no_grad()
    def _nearest(self, h: Tensor, mask: Tensor | None) -> Int[Tensor, "batch points k"]:
        """Return the nearest points; where there are fewer than k, the nearest stands in for the missing."""
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        distances = (h[:, :, None] - h[:, None]).square().sum(-1)
        if mask is not None:
            distances = distances.masked_fill(~mask[:, None], torch.inf)
        least, index = distances.topk(self.k, dim=2, largest=False)
        return torch.where(least.isinf(), index[..., :1], index)


def _check_sizes(in_features: int, out_features: int, widths: Sequence[int], head: Sequence[int]) -> None:
    check_integer("in_features", in_features, at_least=1)
    check_integer("out_features", out_features, at_least=1)
    if len(widths) == 0:
        raise ValueError("widths must name one layer or more, got none")
    for name, sizes in (("widths", widths), ("head", head)):
        for index, size in enumerate(sizes):
            check_integer(f"{name}[{index}]", size, at_least=1)


def _check_width(x: Tensor, features: int) -> None:
    if x.shape[2] != features:
        raise ValueError(f"x must have {features} numbers a point, got {x.shape[2]}")
