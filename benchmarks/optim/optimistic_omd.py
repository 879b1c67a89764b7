"""Projections beside SciPy's SLSQP, runs beside the recursion written anew with NumPy, and what a step costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from benchmarks.timing import alternate
from provenn.optim import (
    Ball,
    Box,
    DynamicOptimisticOMD,
    OnlineGradientDescent,
    OptimisticOMD,
    SEAStream,
    Simplex,
    Trajectory,
    sea_report,
)
from provenn.optim._optimistic_omd_domains import Domain

DIM, POINTS, ROUNDS = 5, 200, 2000
DOMAINS: dict[str, Domain] = {"ball": Ball(1.0), "box": Box(-0.5, 0.5), "simplex": Simplex(1.0)}
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "ball": {"constraints": [{"type": "ineq", "fun": lambda u: 1 - u @ u, "jac": lambda u: -2 * u}]},
    "box": {"bounds": [(-0.5, 0.5)] * DIM},
    "simplex": {
        "bounds": [(0, None)] * DIM,
        "constraints": [{"type": "eq", "fun": lambda u: u.sum() - 1, "jac": np.ones_like}],
    },
}


def measure() -> dict[str, Any]:
    """Compare projections, iterates and regret, then time runs that take turns."""
    metric, points = _problem()
    projections = {
        name: max(
            float(np.abs(domain.project(point, metric).numpy() - _slsqp(name, point, metric)).max()) for point in points
        )
        for name, domain in DOMAINS.items()
    }
    gradients = 0.3 * torch.randn(ROUNDS, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    iterates = {
        mode: float(np.abs(_ours(mode, gradients).numpy() - _in_numpy(mode, gradients.numpy())).max())
        for mode in ("convex", "strongly-convex", "exp-concave")
    }
    regret = _regret_difference()
    agrees = max(projections.values()) <= 1e-6 and max(iterates.values()) <= 1e-9 and regret <= 1e-9
    few = points[:20]
    times = alternate(
        {
            **{f"ours, {name}": _each(domain.project, few, metric) for name, domain in DOMAINS.items()},
            **{f"SLSQP, {name}": _each(_solver(name), few, metric) for name in DOMAINS},
        },
        rounds=5,
    )
    runs = alternate(
        {"ours": lambda: _ours("convex", gradients), "NumPy": lambda: _in_numpy("convex", gradients.numpy())}, 5
    )
    steps = alternate(
        {
            "OGD": _steps(lambda x: OnlineGradientDescent([x], Ball(1.0), lipschitz=9.0)),
            "convex": _steps(lambda x: OptimisticOMD([x], Ball(1.0), lipschitz=9.0)),
            "exp-concave": _steps(lambda x: OptimisticOMD([x], Ball(1.0), "exp-concave", lipschitz=9.0, alpha=1.0)),
            "dynamic": _steps(lambda x: DynamicOptimisticOMD([x], Ball(1.0), 16_000, lipschitz=9.0)),
            "convex, 1 000 000 entries": _steps(lambda x: OptimisticOMD([x], Ball(1.0), lipschitz=9e9), 1_000_000),
            "convex, 4 000 000 entries": _steps(lambda x: OptimisticOMD([x], Ball(1.0), lipschitz=9e9), 4_000_000),
        },
        rounds=7,
    )
    return {
        "peer": "projections: SciPy's SLSQP; recursions and closed-form regret: written anew in NumPy, as there is "
        "no package",
        "agrees": agrees,
        "largest_difference": {
            **{f"projection in a full metric, {name}": found for name, found in projections.items()},
            **{f"iterates, {mode}": found for mode, found in iterates.items()},
            "regret, relative": regret,
        },
        "speed_ratio": math.prod(times[f"SLSQP, {name}"] / times[f"ours, {name}"] for name in DOMAINS) ** (1 / 3),
        "speed_ratio_by_set": {name: times[f"SLSQP, {name}"] / times[f"ours, {name}"] for name in DOMAINS},
        "speed_ratio_of_a_run_to_numpy": runs["NumPy"] / runs["ours"],
        "step_time_over_OGD": {name: steps[name] / steps["OGD"] for name in ("convex", "exp-concave", "dynamic")},
        "growth": {
            "convex step, entries ×4, time ×": steps["convex, 4 000 000 entries"] / steps["convex, 1 000 000 entries"]
        },
    }


def _problem() -> tuple[Tensor, Tensor]:
    """Draw a metric of condition number 30, and points most of which are outside."""
    draws = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(DIM, DIM, generator=draws, dtype=torch.float64)).Q
    metric = basis @ torch.diag(torch.logspace(0, math.log10(30), DIM, dtype=torch.float64)) @ basis.mT
    return metric, torch.randn(POINTS, DIM, generator=draws, dtype=torch.float64)


def _slsqp(name: str, point: Tensor, metric: Tensor) -> np.ndarray:
    H, y = metric.numpy(), point.numpy()
    found = scipy.optimize.minimize(
        lambda u: 0.5 * (u - y) @ H @ (u - y),
        np.full(DIM, 1 / DIM),
        jac=lambda u: H @ (u - y),
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
        **CONSTRAINTS[name],
    )
    solved: np.ndarray = found.x
    return solved


def _solver(name: str) -> Callable[[Tensor, Tensor], Any]:
    return lambda point, metric: _slsqp(name, point, metric)


def _each(project: Callable[[Tensor, Tensor], Any], points: Tensor, metric: Tensor) -> Callable[[], Any]:
    return lambda: [project(point, metric) for point in points]


def _ours(mode: str, gradients: Tensor) -> Tensor:
    """Play against gradients on the unit ball; return the points."""
    x = torch.nn.Parameter(torch.zeros(DIM, dtype=torch.float64))
    method = OptimisticOMD([x], Ball(1.0), mode, lipschitz=3.0, smoothness=0.1, strong_convexity=0.5, alpha=1.0)
    points = torch.empty_like(gradients)
    for place, gradient in enumerate(gradients):
        x.grad = gradient
        method.step()
        points[place] = x.detach()
    return points


def _in_numpy(mode: str, gradients: np.ndarray) -> np.ndarray:
    """The two steps written anew, the projection in a metric by bisection on the multiplier."""
    D, G, L, strong = 2.0, 3.0, 0.1, 0.5
    beta = min(1 / (4 * G * D), 1.0) / 2
    H, carried, last, variation = (1 + beta * G * G / 2) * np.eye(DIM), np.zeros(DIM), np.zeros(DIM), 0.0
    points = np.empty_like(gradients)

    def step(direction: np.ndarray, round_: int) -> np.ndarray:
        if mode == "exp-concave":
            return _on_ball(carried - np.linalg.solve(H, direction), H)
        eta = D / math.sqrt(10 * D * D * L * L + 4 * G * G + variation) if mode == "convex" else 2 / (strong * round_)
        moved = carried - eta * direction
        return moved / max(1.0, float(np.linalg.norm(moved)))

    for place, gradient in enumerate(gradients):
        carried = step(gradient, place + 1)
        variation += float(((gradient - last) ** 2).sum())
        H = H + beta / 2 * np.outer(gradient, gradient)
        last = gradient
        points[place] = step(gradient, place + 2)
    return points


def _on_ball(point: np.ndarray, H: np.ndarray) -> np.ndarray:
    if np.linalg.norm(point) <= 1:
        return point
    values, vectors = np.linalg.eigh(H)
    weighted = values * (vectors.T @ point)
    found = scipy.optimize.brentq(
        lambda shift: np.linalg.norm(weighted / (values + shift)) - 1, 0, np.linalg.norm(weighted), xtol=1e-14
    )
    projected: np.ndarray = vectors @ (weighted / (values + found))
    return projected


def _regret_difference() -> float:
    """Return the relative difference of the report's regret in self-play from the closed form, summed in NumPy."""
    draws = torch.Generator().manual_seed(3)
    stream = SEAStream("self-play", DIM, 300, sigma=0.5)
    points, opponents = torch.nn.functional.normalize(
        torch.randn(2, 300, DIM, generator=draws, dtype=torch.float64), dim=-1
    )
    matrices = stream.sample(1, draws)[0]
    found = sea_report(stream, Trajectory(points, matrices, opponents)).regret
    gradients = [Z @ y for Z, y in zip(matrices.numpy(), opponents.numpy(), strict=True)]
    played = sum(float(g @ x) for g, x in zip(gradients, points.numpy(), strict=True))
    wanted = played + float(np.linalg.norm(np.sum(gradients, axis=0)))
    return abs(found - wanted) / abs(wanted)


def _steps(make: Callable[[torch.nn.Parameter], torch.optim.Optimizer], size: int = DIM) -> Callable[[], Any]:
    """Build a few steps of a method on a vector, against the same gradient each time."""
    x = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
    method = make(x)
    x.grad = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    count = 200 if size == DIM else 2

    def run() -> None:
        for _ in range(count):
            method.step()

    return run
