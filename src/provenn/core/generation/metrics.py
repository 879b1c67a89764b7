"""How far generated samples are from data: the Fréchet distance of features, and sliced Wasserstein distances."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number


def frechet_distance(x: Float[Tensor, "n features"], y: Float[Tensor, "m features"]) -> Float[Tensor, ""]:
    """Return the squared Fréchet distance between Gaussians fitted to two sets of features.

    ‖μ_x − μ_y‖² + tr(Σ_x + Σ_y − 2 (Σ_x Σ_y)^½), in float64. The trace of the root is the nuclear norm of X Yᵀ for
    centred, scaled features, so no root of a singular matrix is taken: few samples are no numerical trouble (their
    bias is: compare sets of equal size).

    Args:
        x: Features of one set, a sample a row.
        y: Features of the other.

    Returns:
        A float64 scalar ≥ 0 on the features' device.

    Raises:
        ValueError: A set has fewer than two samples, the numbers of features differ, or a feature is not finite.

    Cost: O((n + m) features²) time and O(features²) memory beside the input.

    Source: Dowson and Landau, "The Fréchet distance between multivariate normal distributions" (1982); Heusel et al.,
    arXiv 1706.08500, for images.
    """
    _check_sets(x, y, at_least=2)
    (mean_x, root_x), (mean_y, root_y) = _moments(x), _moments(y)
    shared = torch.linalg.matrix_norm(root_x @ root_y.T, "nuc")
    spread = root_x.square().sum() + root_y.square().sum() - 2 * shared
    distance: Tensor = (mean_x - mean_y).square().sum() + spread
    return distance.clamp(min=0)  # rounding may leave it just below


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and a root R of the covariance, RᵀR = Σ, of at most ``features`` rows."""
    x = x.detach().to(torch.float64)
    mean = x.mean(dim=0)
    return mean, torch.linalg.qr((x - mean) / math.sqrt(len(x) - 1), mode="r").R


def sliced_wasserstein(
    x: Float[Tensor, "n features"],
    y: Float[Tensor, "m features"],
    num_projections: int = 256,
    p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """Return the sliced Wasserstein distance of order p between two sets of points.

    The mean over random directions of the one-dimensional distance W_p^p, to the power 1/p. Sets of different size are
    compared by their quantile functions, exactly.

    Args:
        x: One set, a point a row.
        y: The other.
        num_projections: Random directions.
        p: The order, ≥ 1.
        generator: Draws the directions; ``None``: torch's global generator.

    Returns:
        A scalar ≥ 0, differentiable in both sets.

    Raises:
        ValueError: A set is empty, the numbers of features differ, a value is not finite, ``num_projections`` < 1 or
            ``p`` < 1.

    Cost: O(num_projections · (n + m) (features + log(n + m))) time, O(num_projections · (n + m)) memory.

    Source: Rabin et al., "Wasserstein barycenter and its application to texture mixing" (2011).
    """
    _check_sets(x, y, at_least=1)
    check_integer("num_projections", num_projections, at_least=1)
    check_number("p", p, at_least=1)
    device = x.device if generator is None else generator.device
    drawn = torch.randn(x.shape[1], num_projections, dtype=x.dtype, device=device, generator=generator)
    directions = (drawn / drawn.norm(dim=0)).to(x.device)
    along_x, along_y = ((points @ directions).sort(dim=0).values for points in (x, y))
    rank_x, rank_y, width = _shared_quantiles(len(x), len(y), x)
    gaps = (along_x[rank_x] - along_y[rank_y]).abs() ** p
    distance: Tensor = (width @ gaps).mean() ** (1 / p)
    return distance


def _shared_quantiles(n: int, m: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cut [0, 1] at all multiples of 1/n and 1/m; return the rank in each set that holds on a piece, and its width."""
    cuts = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique()  # in units of 1/(n m): no rounding
    width = (cuts.diff().to(torch.float64) / (n * m)).to(like)
    return (cuts[:-1] // m).to(like.device), (cuts[:-1] // n).to(like.device), width


def _check_sets(x: Tensor, y: Tensor, at_least: int) -> None:
    for name, points in (("x", x), ("y", y)):
        if points.dim() != 2 or len(points) < at_least:
            raise ValueError(f"{name} must be (samples ≥ {at_least}, features), got shape {tuple(points.shape)}")
        if not points.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinite values")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have equally many features, got {x.shape[1]} and {y.shape[1]}")
