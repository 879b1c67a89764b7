"""Algorithm 1 beside the authors' form of it written anew with SciPy, beside trust-exact, and what a step costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special
import torch
from torch import Tensor

from benchmarks.timing import alternate
from provenn.optim import GradientNormalizedNewton, LogSumExp, RankOne, minimize_gns
from provenn.optim._gradient_normalized_smoothness_systems import DampedSystem, Metric

ROWS, COLUMNS, MU, ITERATIONS = 500, 100, 0.25, 20


def measure() -> dict[str, Any]:
    """Compare iterates, γ and minima, then time runs that take turns."""
    oracle, start = _problem()
    differences, same_gamma = {}, True
    for exact in (True, False):
        for name, epsilon in (("γ", 0.0), ("γ + 1e-8", 1e-8)):
            points, gammas = _in_scipy(oracle, start, exact, epsilon, ITERATIONS)
            ours, our_gammas = _ours(oracle, start, exact)
            differences[f"{'exact' if exact else 'approximate'}, λ = ‖g‖/({name})"] = float(
                np.abs(ours[: len(points)] - points).max()
            )
            same_gamma = same_gamma and our_gammas[: len(gammas)] == gammas
    least, trust = _minima(oracle, start)
    # The authors' 1e-8 beside γ moves iterates by about as much; an exact run near its end amplifies that.
    close = all(found <= (1e-8 if "1e-8" not in name else 1e-6) for name, found in differences.items())
    runs = alternate(
        {
            "ours": lambda: _ours(oracle, start, False),
            "SciPy": lambda: _in_scipy(oracle, start, False, 1e-8, ITERATIONS),
            "ours, to the minimum": lambda: minimize_gns(oracle, start, grad_tol=1e-6),
            "trust-exact": lambda: _trust_exact(oracle, start),
        },
        rounds=7,
    )
    growth = alternate({str(n): _step(n) for n in (100, 400)}, rounds=7)
    solvers = alternate({name: _solve(name) for name in ("cholesky", "wsm", "cg")}, rounds=15)
    return {
        "peer": "the authors' loop (github.com/epfml/grad-norm-smooth, not a package) written anew with NumPy and "
        "SciPy; minima: scipy's trust-exact",
        "agrees": close and same_gamma and abs(least - trust) <= 1e-9,
        "largest_difference": differences,
        "same_gamma": same_gamma,
        "minimum_minus_trust_exact": least - trust,
        "speed_ratio": runs["SciPy"] / runs["ours"],
        "speed_ratio_to_trust_exact": runs["trust-exact"] / runs["ours, to the minimum"],
        "solve_time_over_cholesky, rank one, 1 000 variables": {
            name: solvers[name] / solvers["cholesky"] for name in ("wsm", "cg")
        },
        "growth": {"optimizer step, variables ×4, time ×": growth["400"] / growth["100"]},
    }


def _problem() -> tuple[LogSumExp, Tensor]:
    draws = torch.Generator().manual_seed(0)
    A = torch.randn(ROWS, COLUMNS, generator=draws, dtype=torch.float64)
    b = 2 * torch.rand(ROWS, generator=draws, dtype=torch.float64) - 1
    start = torch.randn(COLUMNS, generator=draws, dtype=torch.float64)
    return LogSumExp.centred(A, b, MU), 3 * start / start.norm()


def _ours(oracle: LogSumExp, start: Tensor, exact: bool) -> tuple[np.ndarray, list[float]]:
    points: list[np.ndarray] = []
    hessian = "exact" if exact else "approximate"
    run = minimize_gns(oracle, start, hessian, max_iter=ITERATIONS, callback=lambda x, line: points.append(x.numpy()))
    return np.array(points), [line.scale for line in run.history]


def _in_scipy(
    oracle: LogSumExp, start: Tensor, exact: bool, epsilon: float, iterations: int
) -> tuple[np.ndarray, list[float]]:
    """The loop of the authors' code, whose λ is ‖g‖/(γ + 1e-8), to a gradient of 1e-8 as ours."""
    A, b, x = oracle.A.numpy(), oracle.b.numpy(), start.numpy()

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        exponents = (A @ x - b) / MU
        pi = scipy.special.softmax(exponents)
        return MU * float(scipy.special.logsumexp(exponents)), A.T @ pi, pi

    gamma, points, gammas = 1.0, [x], [1.0]
    f, g, pi = evaluate(x)
    while len(points) <= iterations and np.linalg.norm(g) >= 1e-8:
        H = (A.T @ (pi[:, None] * A) - exact * np.outer(g, g)) / MU
        for _ in range(40):
            damping = float(np.linalg.norm(g)) / (gamma + epsilon)
            new = x - scipy.linalg.cho_solve(scipy.linalg.cho_factor(H + damping * np.eye(len(x))), g)
            found = evaluate(new)
            if f - found[0] >= found[1] @ found[1] / (8 * damping):
                break
            gamma /= 2
        x, (f, g, pi), gamma = new, found, max(2 * gamma, 1e-9)
        points.append(x)
        gammas.append(gamma)
    return np.array(points), gammas


def _trust_exact(oracle: LogSumExp, start: Tensor) -> float:
    found = scipy.optimize.minimize(
        lambda x: oracle.value(torch.from_numpy(x)).item(),
        start.numpy(),
        jac=lambda x: oracle.gradient(torch.from_numpy(x)).numpy(),
        hess=lambda x: oracle.hessian(torch.from_numpy(x)).numpy(),
        method="trust-exact",
        options={"gtol": 1e-6},
    )
    return float(found.fun)


def _minima(oracle: LogSumExp, start: Tensor) -> tuple[float, float]:
    return minimize_gns(oracle, start, grad_tol=1e-6).f, _trust_exact(oracle, start)


def _step(size: int) -> Callable[[], Any]:
    """A step of the optimizer on cosh of a linear map, from the same point each time."""
    draws = torch.Generator().manual_seed(0)
    A = torch.randn(size, size, generator=draws, dtype=torch.float64) / math.sqrt(size)
    start = torch.randn(size, generator=draws, dtype=torch.float64)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = GradientNormalizedNewton([parameter])

    def step() -> None:
        parameter.data.copy_(start)
        optimizer.step(lambda: (A @ parameter).cosh().mean())

    return step


def _solve(solver: str) -> Callable[[], Any]:
    draws = torch.Generator().manual_seed(0)
    vector, g = torch.randn(2, 1000, generator=draws, dtype=torch.float64)
    system = DampedSystem(RankOne(2.0, vector), g, Metric(None), solver)  # type: ignore[arg-type]
    return partial(system.solve, 0.1)
