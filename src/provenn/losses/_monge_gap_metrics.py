"""How good a map is where the best one is known, or its cost."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.losses._monge_gap_costs import Cost, check_clouds, cost_matrix
from provenn.losses._monge_gap_loss import assignment_cost
from provenn.losses._monge_gap_maps import Map


def _images(name: str, one: Map, x: Tensor) -> Tensor:
    check_clouds(x, x)
    with torch.no_grad():
        y = one(x)
    if y.shape != x.shape:
        raise ValueError(f"{name} must keep the shape {tuple(x.shape)}, got {tuple(y.shape)}")
    return y


def l2_uvp(map: Map, true_map: Map, x: Float[Tensor, "n d"]) -> float:  # noqa: A002 - the field's name
    """Return the unexplained variance percentage of a map, 100 E‖T(X) − T*(X)‖² / Var(T*(X)).

    Args:
        map: T.
        true_map: T*.
        x: Samples of the source, at least two.

    Shape:
        x (n, d).

    Returns:
        The percentage: 0 for T*, 100 for the constant map to the target's mean.

    Raises:
        ValueError: A map changes the shape, or the images under T* are all one point.
        TypeError: x are no floating-point numbers.

    Cost: a call of both maps.

    Source: Korotin et al., NeurIPS 2021 (arXiv 2106.01954), section 4.
    """
    y, wanted = _images("map", map, x), _images("true_map", true_map, x)
    variance = wanted.var(dim=0, correction=0).sum()
    if variance <= 0:
        raise ValueError("true_map must have more than one image, got a variance of 0")
    return 100 * float((y - wanted).square().sum(dim=1).mean() / variance)


def transport_cost_ratio(
    map: Map,  # noqa: A002 - the field's name
    source: Float[Tensor, "n d"],
    target: Float[Tensor, "n d"],
    cost: Cost = "sqeuclidean",
) -> float:
    """Return what a map costs over the least cost of moving the source's samples to the target's.

    Args:
        map: T.
        source: Samples.
        target: As many samples.
        cost: As in :class:`MongeGap`.

    Shape:
        source and target (n, d).

    Returns:
        The ratio; around 1 for an optimal map, below 1 for one that falls short of the target.

    Raises:
        ValueError: Clouds of different sizes, a map that changes the shape, or target and source are the same points.
        TypeError: The points are no floating-point numbers.

    Cost: O(n³), on the CPU.

    Source: arXiv 2302.04953, section 6.
    """
    check_clouds(source, target, ("source", "target"))
    if len(source) != len(target):
        raise ValueError(f"target must have as many points as source, {len(source)}, got {len(target)}")
    moved = cost_matrix(cost, source, _images("map", map, source)).diagonal().mean()
    least = cast("float", assignment_cost(cost_matrix(cost, source, target)).item())
    if least <= 0:
        raise ValueError("target must be other points than source, got a least cost of 0")
    return float(moved) / least
