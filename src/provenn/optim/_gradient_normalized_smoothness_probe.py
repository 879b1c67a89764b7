"""The Gradient-Normalized Smoothness γ(x) itself: an estimate at given points, and how it goes with the gradient.

Source: arXiv 2506.13710.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from provenn.core.experiment.checks import check_integer
from provenn.core.experiment.reports import Report
from provenn.core.experiment.seeding import generator
from provenn.optim._gradient_normalized_smoothness_oracles import HessianChoice, Oracle, check_hessian, curvature_at
from provenn.optim._gradient_normalized_smoothness_search import gradient_of
from provenn.optim._gradient_normalized_smoothness_systems import Metric, dense

_DECADES, _HALVINGS = 12, 48
"""Radii reach from 1e-12 to 1e12 lengths of the point; so many halvings of that range leave rounding alone."""

_NUMBERS = 1 << 22
"""Numbers in one batch of steps: bounds the memory."""


@dataclass(frozen=True)
class GNSReport(Report):
    """Estimates of γ at one or more points, and the law γ ≈ c ‖g‖_*^ν fitted to them.

    Args:
        gamma: The estimate at each point, an upper bound of γ(x); infinite where no remainder was seen.
        grad_norm: ‖∇f‖_* at each point.
        exponent: ν of the fit; NaN with fewer than two different gradients.
        constant: c of the fit.
        r_squared: Share of the variance of log γ that the fit explains.
        local_exponents: Slope of log γ over log ‖g‖_* from each point to the next.
        directions: Random directions at each point.
    """

    gamma: tuple[float, ...]
    grad_norm: tuple[float, ...]
    exponent: float
    constant: float
    r_squared: float
    local_exponents: tuple[float, ...]
    directions: int

    def plot(self) -> Figure:
        """Draw γ over the gradient's norm, both logarithmic, with the fitted law."""
        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.loglog(self.grad_norm, self.gamma, "o", label="γ(x), estimated")
        if math.isfinite(self.exponent):
            ends = np.array([min(self.grad_norm), max(self.grad_norm)])
            axes.loglog(ends, self.constant * ends**self.exponent, label=f"ν = {self.exponent:.2f}")
        axes.set(xlabel="norm of the gradient", ylabel="γ")
        axes.legend()
        return figure


def estimate_gns(
    oracle: Oracle,
    x: Float[Tensor, "*points n"],
    hessian: HessianChoice = "exact",
    directions: int = 64,
    metric: Float[Tensor, "n n"] | None = None,
    seed: int = 0,
) -> GNSReport:
    """Estimate the Gradient-Normalized Smoothness at given points, and the law that it follows along them.

    γ(x) is the largest γ with ‖∇f(x + h) − ∇f(x) − H h‖_* ≤ ‖∇f(x)‖_* ‖h‖/γ for all ‖h‖ ≤ γ. Each h that is tried
    bounds it by max(‖h‖, ‖∇f(x)‖_* ‖h‖/‖remainder‖_*); the estimate is the least of these bounds, over random
    directions and the two along the gradient, with radii halved towards where the two terms are equal.

    The exponent ν of γ ≈ c‖g‖_*^ν tells the class that the function behaves like: 1, smooth with H = 0; 1/2, Lipschitz
    Hessian with the exact H; 0, quasi-self-concordant.

    Args:
        oracle: The function.
        x: A point, or some, one a row, such as the iterates of a run.
        hessian: H: ``"exact"``, ``"approximate"``, ``"zero"``, or x ↦ H.
        directions: Random directions at each point.
        metric: B; ``None``: the identity.
        seed: Seed of the directions.

    Shape:
        ``x`` (n,) or (points, n), ``metric`` (n, n).

    Returns:
        The report.

    Raises:
        ValueError: ``directions`` < 1, ``x`` is not finite or empty, ``hessian`` is unknown, or the metric is not
            positive definite.

    Cost: at each point 49 · (directions + 2) gradients, in batches over points too, and one H as a matrix.

    Source: the paper's definition of the Gradient-Normalized Smoothness.
    """
    check_integer("directions", directions, at_least=1)
    check_hessian(hessian, ("exact", "approximate", "zero"))
    points = x.detach().unsqueeze(0) if x.dim() == 1 else x.detach()
    if points.dim() != 2 or points.numel() == 0 or not points.isfinite().all():
        raise ValueError(f"x must hold finite points (points, n), at least one, got shape {tuple(x.shape)}")
    norm = Metric(metric).to(points[0])
    source = generator(seed, "directions", device=x.device)
    draws = torch.randn(directions, points.shape[1], generator=source, dtype=x.dtype, device=x.device)
    units = norm.unit(draws)
    at_once = max(1, _NUMBERS // ((directions + 2) * points.shape[1]))
    found = [_bounds(oracle, some, hessian, norm, units) for some in points.split(at_once)]
    gamma, grad_norm = (tuple(torch.cat(column).tolist()) for column in zip(*found, strict=True))
    return GNSReport(gamma, grad_norm, *_law(gamma, grad_norm), _local(gamma, grad_norm), directions)


def _bounds(oracle: Oracle, x: Tensor, hessian: HessianChoice, norm: Metric, units: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least bound of γ that the directions show at each point, and ‖∇f‖_* there."""
    g = gradient_of(oracle, x)
    slope = norm.dual_norm(g)
    along = norm.solve(g) / slope.clamp(min=torch.finfo(x.dtype).tiny).unsqueeze(-1)
    units = torch.cat((units.expand(len(x), *units.shape), along.unsqueeze(1), -along.unsqueeze(1)), dim=1)
    bent = torch.stack(
        [some @ dense(curvature_at(oracle, point, hessian), point) for some, point in zip(units, x, strict=True)]
    )
    reach = norm.norm(x).clamp(min=1.0).log().unsqueeze(-1).expand(units.shape[:2])
    low, high = reach - _DECADES * math.log(10), reach + _DECADES * math.log(10)
    least = torch.full_like(slope, math.inf)
    log_radius = high
    for _ in range(_HALVINGS + 1):
        radius = log_radius.exp()
        remainder = _remainder(oracle, x, g, bent, units, radius, norm)
        limit = torch.where(remainder > 0, slope.unsqueeze(-1) * radius / remainder, math.inf)
        least = torch.minimum(least, torch.maximum(radius, limit).amin(1))
        beyond = radius > limit
        high, low = torch.where(beyond, log_radius, high), torch.where(beyond, low, log_radius)
        log_radius = (low + high) / 2
    return torch.where(slope > 0, least, 0.0), slope


def _remainder(
    oracle: Oracle, x: Tensor, g: Tensor, bent: Tensor, units: Tensor, radius: Tensor, norm: Metric
) -> Tensor:
    """Return ‖∇f(x + h) − ∇f(x) − H h‖_* for h = radius · units; 0 where it is rounding, infinite where undefined."""
    there = x.unsqueeze(1) + radius.unsqueeze(-1) * units
    there = gradient_of(oracle, there.flatten(0, 1)).view_as(units)
    linear = radius.unsqueeze(-1) * bent
    size = norm.dual_norm(there - g.unsqueeze(1) - linear)
    # x + h itself is rounded, which moves the gradient about as much as H does.
    stretch = norm.dual_norm(bent) * torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    terms = norm.dual_norm(there) + norm.dual_norm(g).unsqueeze(-1) + norm.dual_norm(linear) + stretch
    rounding = 16 * x.shape[1] ** 0.5 * torch.finfo(x.dtype).eps * terms
    return torch.where(size.isfinite(), torch.where(size <= rounding, 0.0, size), math.inf)


def _law(gamma: tuple[float, ...], grad_norm: tuple[float, ...]) -> tuple[float, float, float]:
    """Fit log γ = log c + ν log ‖g‖ by least squares; return ν, c and R²."""
    pairs = [
        (math.log(g), math.log(one)) for g, one in zip(grad_norm, gamma, strict=True) if g > 0 and 0 < one < math.inf
    ]
    if len({g for g, _ in pairs}) < 2:
        return math.nan, math.nan, math.nan
    logs, values = np.array(pairs).T
    exponent, shift = np.polyfit(logs, values, 1)
    spread = ((values - values.mean()) ** 2).sum()
    left = ((values - shift - exponent * logs) ** 2).sum()
    return float(exponent), math.exp(shift), float(1 - left / spread) if spread > 0 else 1.0


def _local(gamma: tuple[float, ...], grad_norm: tuple[float, ...]) -> tuple[float, ...]:
    slopes = []
    for (one, g), (other, k) in itertools.pairwise(zip(gamma, grad_norm, strict=True)):
        known = min(g, k) > 0 and g != k and all(0 < value < math.inf for value in (one, other))
        slopes.append(math.log(other / one) / math.log(k / g) if known else math.nan)
    return tuple(slopes)
