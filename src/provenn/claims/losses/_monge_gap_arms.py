"""What the Monge gap's claim trains on, and the arms: maps by a fitting loss with and without the gap, and rivals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import make_moons, make_s_curve
from torch import Tensor, nn

from provenn.claims.claim import Trial
from provenn.core.experiment.seeding import derive_seed, generator, seeded
from provenn.core.experiment.training import Epoch
from provenn.losses import (
    GradientMap,
    InputConvexNetwork,
    MongeGap,
    MongeMapEstimator,
    SinkhornDivergence,
    TransportMLP,
    entropic_map,
    gaussian_ot_map,
)

Map = Callable[[Tensor], Tensor]

WITH_GAP, ALONE, CONVEX, ENTROPIC = "Δ + gap", "Δ alone", "ICNN gradient + Δ", "entropic map"
EUCLIDEAN, SQUARED = "Δ + gap, Euclidean", "Δ + gap, squared"
WEIGHTS = {EUCLIDEAN: ("euclidean", 2.0), SQUARED: ("sqeuclidean", 0.1), ALONE: ("sqeuclidean", 0.0)}
"""Cost and weight of the gap between the two curves, as in the authors' tutorial."""
TOLERANCE = 1e-2
ENTROPIC_POINTS = 1024


@dataclass(frozen=True)
class Task:
    """Samples to train on, samples held back to choose by and to judge by, and the optimal map if it is known."""

    source: Tensor
    target: Tensor
    chosen_by: tuple[Tensor, Tensor]
    judged_by: tuple[Tensor, Tensor]
    truth: Map | None


def gaussians(trial: Trial, d: int) -> Task:
    """Draw two Gaussians by the trial's seed, and samples of both.

    Args:
        trial: Gives seed and sizes.
        d: Dimension.
    """
    draws = generator(trial.seed, "gaussians", d)
    (m0, S0), (m1, S1) = ((torch.randn(d, generator=draws), _covariance(d, draws)) for _ in range(2))

    def sample(mean: Tensor, covariance: Tensor, count: int) -> Tensor:
        points: Tensor = mean + torch.randn(count, d, generator=draws) @ torch.linalg.cholesky(covariance).T
        return points

    counts = (int(trial.budget["samples"]), int(trial.budget["held back"]), int(trial.budget["held back"]))
    pairs = [(sample(m0, S0, n).to(trial.device), sample(m1, S1, n).to(trial.device)) for n in counts]
    truth = gaussian_ot_map(*(part.to(trial.device) for part in (m0, S0, m1, S1)))
    return Task(*pairs[0], pairs[1], pairs[2], truth)


def _covariance(d: int, draws: torch.Generator) -> Tensor:
    """Return a covariance of random axes, with variances from ¼ to 4, uniform in their logarithm."""
    axes = torch.linalg.qr(torch.randn(d, d, generator=draws))[0]
    variances = 4.0 ** (2 * torch.rand(d, generator=draws) - 1)
    covariance: Tensor = axes * variances @ axes.T
    return covariance


def curves(trial: Trial) -> Task:
    """Draw two moons and an S-curve, placed as in the authors' tutorial.

    Args:
        trial: Gives seed and sizes.
    """

    def sample(name: str, count: int) -> tuple[Tensor, Tensor]:
        first, second = (derive_seed(trial.seed, name, which) % 2**32 for which in ("moons", "s"))
        moons = make_moons(count, noise=0.05, random_state=first)[0]
        s = make_s_curve(count, noise=0.05, random_state=second)[0][:, [2, 0]]
        return (
            _placed(moons, math.pi / 6, 1.0, (0.0, -0.5)).to(trial.device),
            _placed(s, math.pi / 2, 0.6, (1.0, -2.0)).to(trial.device),
        )

    held = int(trial.budget["held back"])
    return Task(*sample("train", int(trial.budget["samples"])), sample("choose", held), sample("judge", held), None)


def _placed(points: object, angle: float, scale: float, middle: tuple[float, float]) -> Tensor:
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return torch.tensor(middle) + scale * torch.as_tensor(points, dtype=torch.float32) @ turn


def fitted(trial: Trial, task: Task) -> tuple[Map, list[Epoch]]:
    """Fit the trial's arm between Gaussians, with the trial's settings.

    Args:
        trial: Gives arm, settings, steps and seed.
        task: Gives the samples.
    """
    if trial.arm == ENTROPIC:
        share = float(trial.settings["relative_epsilon"])
        some = (task.source[:ENTROPIC_POINTS], task.target[:ENTROPIC_POINTS])
        return entropic_map(*some, relative_epsilon=share, tol=TOLERANCE), []
    d = task.source.shape[1]
    hidden = (32, 64, 32) if d == 2 else (128, 64, 64)
    with seeded(trial.seed, "weights", d):
        network = GradientMap(InputConvexNetwork(d, hidden)) if trial.arm == CONVEX else TransportMLP(d, hidden)
    weight = float(trial.settings["gap_weight"]) if trial.arm == WITH_GAP else 0.0
    return _trained(trial, task, network, "sqeuclidean", weight, float(trial.settings["lr"]))


def fitted_between_curves(trial: Trial, task: Task) -> tuple[Map, list[Epoch]]:
    """Fit the trial's arm from the moons to the S-curve.

    Args:
        trial: Gives arm, rate, steps and seed.
        task: Gives the samples.
    """
    with seeded(trial.seed, "weights"):
        network = TransportMLP(2, residual=True)
    cost, weight = WEIGHTS[trial.arm]
    return _trained(trial, task, network, cost, weight, float(trial.budget["lr"]))


def _trained(
    trial: Trial, task: Task, network: nn.Module, cost: str, weight: float, lr: float
) -> tuple[Map, list[Epoch]]:
    steps = int(trial.budget["tuning steps" if trial.tuning else "steps"])
    estimator = MongeMapEstimator(
        network.to(trial.device),
        SinkhornDivergence(tol=TOLERANCE),
        MongeGap(cost, tol=TOLERANCE, scaling=0.5, relaxation=1.7) if weight else None,
        gap_weight=weight,
        lr=lr,
        steps=steps,
        batch=int(trial.budget["batch"]),
        log_every=max(1, steps // 20),
        seed=derive_seed(trial.seed, "training"),
    )
    return estimator.transform, estimator.fit(task.source, task.target).history


def crossings(x: Tensor, y: Tensor) -> int:
    """Count the pairs of segments from x_i to y_i in the plane that cross inside.

    Args:
        x: Where segments start, (n, 2).
        y: Where they end, (n, 2).
    """

    def side(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        one, other = b - a, c - a
        return (one[..., 0] * other[..., 1] - one[..., 1] * other[..., 0]).sign()

    a, b = x.double()[:, None], y.double()[:, None]
    c, d = x.double()[None], y.double()[None]
    crossed = (side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)
    return int(crossed.triu(1).sum())
