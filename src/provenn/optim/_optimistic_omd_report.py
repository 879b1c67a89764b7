"""Regret on a stream, the quantities that bound it, and the bounds; see arXiv 2302.04552."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from provenn.core.experiment.checks import check_integer
from provenn.core.experiment.reports import Report
from provenn.optim._optimistic_omd_projections import project_ball
from provenn.optim._optimistic_omd_stream import SEAStream, Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SEAReport(Report):
    """Regret of a trajectory on a stream, and what bounds it.

    Attributes:
        rounds: T.
        exact: Whether σ² and Σ² are the stream's own; otherwise they are estimated from samples.
        variance: σ²_{1:T}, the sum of the gradients' variances.
        largest_variance: σ²_max.
        drift: Σ²_{1:T}, the sum of ‖∇F_t − ∇F_{t−1}‖² from the second round on.
        largest_drift: Σ²_max.
        variation: V_T = Σ ‖g_t − g_{t−1}‖², with g_0 = 0.
        diameter: D.
        lipschitz: G.
        smoothness: L.
        regret: Σ f_t(x_t) − min_u Σ f_t(u) over the ball.
        expected_regret: The same of the expected losses F_t, at the same points.
        checkpoints: Powers of 2, and T.
        regrets: ``regret`` of the rounds up to each of them.
        convex_bound: Of the expected regret in convex mode.
        strongly_convex_bound: In strongly convex mode; NaN for losses that are linear.
        exp_concave_bound: In exp-concave mode, with α = λ/G²; NaN for losses that are linear.
        path_bound: Of the regret in convex mode on this very path: (D/2)√(δ + 4G² + V_T) + 2D√(δ + V_T) with
            δ = 10 D²L².
    """

    rounds: int
    exact: bool
    variance: float
    largest_variance: float
    drift: float
    largest_drift: float
    variation: float
    diameter: float
    lipschitz: float
    smoothness: float
    regret: float
    expected_regret: float
    checkpoints: tuple[int, ...]
    regrets: tuple[float, ...]
    convex_bound: float
    strongly_convex_bound: float
    exp_concave_bound: float
    path_bound: float

    def plot(self) -> Figure:
        """Draw the regret against the rounds, with the bounds as lines."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.checkpoints, self.regrets, marker="o", label="regret")
        for name in ("convex_bound", "strongly_convex_bound", "exp_concave_bound"):
            bound = getattr(self, name)
            if math.isfinite(bound):
                axes.axhline(bound, linestyle="--", linewidth=1, label=name.replace("_", " "))
        axes.set(xscale="log", yscale="symlog", xlabel="rounds", ylabel="regret")
        axes.legend()
        return figure


def sea_report(
    stream: SEAStream,
    trajectory: Trajectory,
    samples: int | None = None,
    generator: torch.Generator | None = None,
) -> SEAReport:
    """Measure the regret of a trajectory, σ²_{1:T} and Σ²_{1:T}, and state the bounds that follow.

    Args:
        stream: The stream that was played against.
        trajectory: Points, draws and opponents.
        samples: Estimates σ² and Σ² from this many fresh samples a round, without bias, instead of taking them from
            the stream.
        generator: Draws them.

    Shape:
        Trajectory as :class:`Trajectory`.

    Returns:
        The report.

    Raises:
        ValueError: The trajectory's tensors do not fit the stream, opponents are missing, or ``samples`` < 2.
        TypeError: ``samples`` is no integer.

    Cost: O(T d), in self-play O(T d²); times ``samples`` where those are asked for.

    Source: arXiv 2302.04552, the definitions and the three theorems. The bounds are derived anew along the theorems'
    proofs, with all constants; Σ² counts from the second round, the first gradient counts in the terms with G.
    """
    if samples is not None:
        check_integer("samples", samples, at_least=2)
    _check_fit(stream, trajectory)
    points, draws, opponents = trajectory
    gradients = stream.gradient(points, draws, opponents)
    regrets = _regrets(stream, points, draws, gradients)
    means = stream.means.to(points)
    expected = _regrets(stream, points, means, stream.gradient(points, means, opponents))
    if samples is None:
        variances, drifts = _exact(stream, points, opponents)
    else:
        variances, drifts = _sampled(stream, trajectory, samples, generator)
    figures = {
        "variance": max(0.0, float(variances.sum())),
        "largest_variance": max(0.0, float(variances.max())),
        "drift": max(0.0, float(drifts.sum())),
        "largest_drift": max(0.0, float(drifts.max())) if len(drifts) else 0.0,
    }
    first = gradients[:1].square().sum()
    variation = float(first + gradients.diff(dim=0).square().sum())
    marks = sorted({*(2**k for k in range(int(math.log2(stream.rounds)) + 1)), stream.rounds})
    D, G, L = stream.diameter, stream.lipschitz, stream.smoothness
    delta = 10 * D * D * L * L
    return SEAReport(
        rounds=stream.rounds,
        exact=samples is None,
        **figures,
        variation=variation,
        diameter=D,
        lipschitz=G,
        smoothness=L,
        regret=float(regrets[-1]),
        expected_regret=float(expected[-1]),
        checkpoints=tuple(marks),
        regrets=tuple(float(regrets[mark - 1]) for mark in marks),
        convex_bound=_convex_bound(D, G, L, figures["variance"], figures["drift"]),
        strongly_convex_bound=_strongly_convex_bound(D, G, L, **figures),
        exp_concave_bound=_exp_concave_bound(D, G, L, stream.dim, figures["variance"], figures["drift"]),
        path_bound=D / 2 * math.sqrt(delta + 4 * G * G + variation) + 2 * D * math.sqrt(delta + variation),
    )


def _check_fit(stream: SEAStream, trajectory: Trajectory) -> None:
    points, draws, opponents = trajectory
    wanted = (stream.rounds, stream.dim)
    if points.shape != wanted:
        raise ValueError(f"trajectory must have points of shape {wanted}, got {tuple(points.shape)}")
    if draws.shape != stream.means.shape:
        raise ValueError(f"trajectory must have draws of shape {tuple(stream.means.shape)}, got {tuple(draws.shape)}")
    if stream.loss == "bilinear" and (opponents is None or opponents.shape != wanted):
        raise ValueError(f"trajectory must have opponents of shape {wanted} in self-play")


def _regrets(stream: SEAStream, points: Tensor, draws: Tensor, gradients: Tensor) -> Tensor:
    """Return the regret against the best point of the ball, after each round."""
    if stream.loss != "quadratic":
        return (gradients * points).sum(-1).cumsum(0) + stream.radius * gradients.cumsum(0).norm(dim=-1)
    counts = torch.arange(1, len(points) + 1, dtype=points.dtype, device=points.device).unsqueeze(1)
    total = draws.cumsum(0)
    best = project_ball(total / counts, stream.radius)
    # Σ‖x_t − z_t‖² − Σ‖u − z_t‖² without the large Σ‖z_t‖².
    played = (points.square() - 2 * points * draws).sum(-1).cumsum(0)
    compared = (counts * best.square() - 2 * best * total).sum(-1)
    return stream.curvature / 2 * (played - compared)


def _exact(stream: SEAStream, points: Tensor, opponents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return σ_t² of all rounds and Σ_t² from the second on; neither depends on x for these losses."""
    means = stream.means.to(points)
    variances = torch.full_like(points[:, 0], stream.sigma**2)
    if opponents is not None and stream.loss == "bilinear":
        moves = stream.gradient(points, means, opponents)
        return variances * opponents.square().sum(-1), moves.diff(dim=0).square().sum(-1)
    scale = stream.smoothness**2 if stream.loss == "quadratic" else 1.0
    return variances * scale, means.diff(dim=0).square().sum(-1) * scale


def _sampled(
    stream: SEAStream, trajectory: Trajectory, samples: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Estimate σ_t² and Σ_t² without bias from fresh draws."""
    points, _, opponents = trajectory
    gradients = stream.gradient(points, stream.sample(samples, generator).to(points), opponents)
    # At one point throughout, so that what moves is the expected loss.
    if stream.loss == "quadratic":
        gradients = gradients - stream.curvature * points
    variances = gradients.var(dim=0).sum(-1)
    errors = variances / samples
    return variances, gradients.mean(dim=0).diff(dim=0).square().sum(-1) - errors[1:] - errors[:-1]


def _convex_bound(D: float, G: float, L: float, variance: float, drift: float) -> float:
    constant = 5 * math.sqrt(10) * D * D * L + 2.5 * math.sqrt(5) * D * G
    return constant + 5 * math.sqrt(2) * D * math.sqrt(variance) + 5 * D * math.sqrt(drift)


def _strongly_convex_bound(
    D: float, G: float, L: float, variance: float, largest_variance: float, drift: float, largest_drift: float
) -> float:
    if L == 0:
        return math.nan
    # λ = L for these losses. Σ a_t/t ≤ a_max (1 + log(1 + Σ a_t/a_max)), a_t = 2σ_t² + Σ_t².
    largest, total = 2 * largest_variance + largest_drift, 2 * variance + drift
    growing = 16 / L * largest * (1 + math.log1p(total / largest)) if largest else 0.0
    return growing + 16 * L * D * D * math.log1p(8 * math.sqrt(2)) + 4 * G * G / L + L * D * D / 4


def _exp_concave_bound(D: float, G: float, L: float, size: int, variance: float, drift: float) -> float:
    if L == 0:
        return math.nan
    beta = min(1 / (4 * G * D), L / (G * G)) / 2
    inner = beta / size * (variance + drift / 2 + G * G / 8)
    return 16 * size / beta * (math.log1p(inner) + math.log1p(32 * L * L)) + D * D / 2 * (1 + beta * G * G / 2)
