"""MAID beside a derivation of its own in NumPy with dense matrices, and what hypergradients cost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import alternate
from provenn.claims.optim._maid_bilevel_tasks import denoising, digits, quadratic
from provenn.optim import HOAG, MAID, BilevelProblem, BilevelQuadratic, TVDenoising, hypergradient

STEPS = 40
EPS0, STEP0, RHO, TAU, NU, ETA, TRIALS = 0.1, 0.1, 0.5, 0.5, 1.05, 1e-4, 10
UNROLLED = 100


def measure() -> dict[str, Any]:
    """Compare 40 outer iterations on three quadratics, then time both, and hypergradients on two other problems."""
    problems = [_centred(quadratic(seed, rows=200)) for seed in range(3)]
    apart = [_differences(problem) for problem in problems]
    largest = {name: max(one[name] for one in apart) for name in apart[0]}
    one = problems[0]
    times = alternate({"torch": lambda: _ours(one), "NumPy": lambda: _theirs(one)}, rounds=3)
    tv, logistic = denoising(0), digits(0)[0]
    implicit = {
        name: alternate(
            {"implicit": lambda p=problem: _implicit(p), "unrolled": lambda p=problem: _unrolled(p)}, rounds=3
        )
        for name, problem in (("denoising", tv), ("digits", logistic))
    }
    sides = {str(side): denoising(0, 2, side) for side in (64, 256)}
    growth = alternate({side: lambda p=problem: _implicit(p, 10) for side, problem in sides.items()}, rounds=3)
    outer = _work_of_an_outer_iteration(tv)
    return {
        "peer": "MAID derived anew in NumPy: dense Hessian and Jacobian, exact norms, its own FISTA and CG (the "
        "authors' scripts need torchvision and torch.symeig; hoag is not installed here)",
        "agrees": max(largest.values()) <= 1e-4,
        "largest_difference": largest["theta"],
        "largest_difference_of_accuracy_and_step": largest["words"],
        "counts_differ_by": largest["counts"],
        "speed_ratio": times["NumPy"] / times["torch"],
        "speed": "10 unknowns: the calls of autograd are the cost, which products with dense 10 × 10 matrices avoid",
        "unrolled_over_implicit": {name: found["unrolled"] / found["implicit"] for name, found in implicit.items()},
        "growth": {"pixels ×16, time of a hypergradient ×": growth["256"] / growth["64"]},
        "work_of_an_outer_iteration": outer,
    }


def _centred(problem: BilevelQuadratic) -> BilevelQuadratic:
    """Take the mean off the matrices: with its one large eigenvalue CG would amplify rounding until histories part."""
    return BilevelQuadratic(problem.A1 - 0.5, problem.b1, problem.A2 - 0.5, problem.A3 - 0.5, problem.b2)


def _ours(problem: BilevelQuadratic) -> list[tuple[np.ndarray, float, float, int]]:
    method = MAID.for_problem(problem, eps0=EPS0, delta0=EPS0, step0=STEP0, rho=RHO, tau=TAU, nu=NU)
    found = []
    for _ in range(STEPS):
        record = method.step()
        work = record.lower_iterations + record.cg_iterations
        found.append((method.theta.numpy().copy(), method.epsilon, method.step_size, work))
    return found


class _Numpy:
    """The same quadratic as matrices."""

    def __init__(self, problem: BilevelQuadratic) -> None:
        A1, b1, A2, A3, b2 = (getattr(problem, name).numpy() for name in ("A1", "b1", "A2", "A3", "b2"))
        self.H, self.J, self.c = A2.T @ A2, A2.T @ A3, A2.T @ b2
        self.G, self.d, self.e = A1.T @ A1, A1.T @ b1, 0.5 * b1 @ b1
        spectrum = np.linalg.eigvalsh(self.H)
        self.mu, self.L = spectrum[0], spectrum[-1]
        self.L_g = np.linalg.eigvalsh(self.G)[-1]
        self.J_norm = np.linalg.norm(self.J, 2)
        self.count = 0

    def g(self, x: np.ndarray) -> float:
        return float(0.5 * x @ self.G @ x - self.d @ x + self.e)

    def slope(self, x: np.ndarray) -> np.ndarray:
        return self.G @ x - self.d

    def lower(self, theta: np.ndarray, x: np.ndarray, eps: float) -> np.ndarray:
        q, t, old, y = self.mu / self.L, 1.0, x, x
        while True:
            gradient = self.H @ y + self.J @ theta - self.c
            self.count += 1
            if np.linalg.norm(gradient) / self.mu <= eps:
                return y
            new = y - gradient / self.L
            t_new = 0.5 * (1 - q * t**2 + math.sqrt((1 - q * t**2) ** 2 + 4 * t**2))
            y = new + (t - 1) / t_new * (1 - t_new * q) / (1 - q) * (new - old)
            old, t = new, t_new

    def adjoint(self, b: np.ndarray, delta: float) -> np.ndarray:
        q, r = np.zeros_like(b), b.copy()
        p = r.copy()
        while np.linalg.norm(r) >= delta:
            Hp, before = self.H @ p, r @ r
            q, r = q + before / (p @ Hp) * p, r - before / (p @ Hp) * Hp
            p = r + (r @ r) / before * p
            self.count += 1
        return q


def _theirs(problem: BilevelQuadratic) -> list[tuple[np.ndarray, float, float, int]]:
    one = _Numpy(problem)
    theta, x = problem.theta0.numpy().copy(), problem.x0.numpy().copy()
    eps = delta = EPS0
    beta, failures, found = STEP0, 0, []
    for _ in range(STEPS):
        for _ in range(3):
            while True:
                x = one.lower(theta, x, eps)
                b = one.slope(x)
                z = -one.J.T @ one.adjoint(b, delta)
                omega = one.J_norm / one.mu * (one.L_g * eps + delta)
                if omega <= (1 - ETA) * np.linalg.norm(z):
                    break
                eps, delta = TAU * eps, TAU * delta
            moved = False
            for i in range(TRIALS + failures):
                step = beta * RHO**i
                x_new = one.lower(theta - step * z, x, eps)
                rise = one.g(x_new) - one.g(x) + eps * (np.linalg.norm(one.slope(x_new)) + np.linalg.norm(b))
                if rise + 0.5 * one.L_g * eps**2 <= -(ETA**2) * step * (z @ z):
                    theta, x, beta, moved = theta - step * z, x_new, 10 / 9 * step, True
                    break
            if moved:
                eps, delta, failures = NU * eps, NU * delta, 0
                break
            eps, delta, failures = TAU * eps, TAU * delta, failures + 1
        found.append((theta, eps, beta, one.count))
    return found


def _differences(problem: BilevelQuadratic) -> dict[str, float]:
    theta, words, counts = 0.0, 0.0, 0.0
    for ours, theirs in zip(_ours(problem), _theirs(problem), strict=True):
        theta = max(theta, float(np.linalg.norm(ours[0] - theirs[0]) / np.linalg.norm(theirs[0])))
        words = max(words, abs(ours[1] / theirs[1] - 1), abs(ours[2] / theirs[2] - 1))
        counts = max(counts, abs(ours[3] - theirs[3]) / theirs[3])
    return {"theta": theta, "words": words, "counts": counts}


def _implicit(problem: BilevelProblem, max_iter: int = 2000) -> Tensor:
    """A hypergradient at the start, to a millionth."""
    return hypergradient(problem.lower, problem.upper, problem.x0, problem.theta0, 1e-6, max_iter=max_iter).gradient


def _unrolled(problem: BilevelProblem) -> Tensor:
    """A hypergradient through unrolled gradient descent."""
    theta = problem.theta0.clone().requires_grad_()
    x, rate = problem.x0, 1 / (problem.smoothness(problem.theta0) or 1.0)
    for _ in range(UNROLLED):
        leaf = x if x.requires_grad else x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(problem.lower(leaf, theta), leaf, create_graph=True)
        x = leaf - rate * slope
    (gradient,) = torch.autograd.grad(problem.upper(x), theta)
    return gradient


def _work_of_an_outer_iteration(problem: TVDenoising) -> dict[str, float]:
    """Lower-level plus CG iterations of an outer iteration, in the mean over a budget of 1000."""
    found = {}
    for name, method in (
        ("MAID", MAID.for_problem(problem, rho=RHO, lower_max_iter=300)),
        ("HOAG", HOAG.for_problem(problem, step0=0.1, lower_max_iter=300)),
    ):
        history = method.solve(budget=1000).history
        found[name] = (history[-1].lower_iterations + history[-1].cg_iterations) / max(1, len(history) - 1)
    return found
