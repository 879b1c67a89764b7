"""Conjugate gradients against SciPy's, and iterations and times of all solvers on boxes of growing size."""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Any

import numpy as np
import pyamg
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from benchmarks.timing import alternate
from provenn.claims.science._deep_conjugate_direction_scenes import obstacles, right_hand_side
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.numerics.incomplete_cholesky import IncompleteCholesky
from provenn.science import (
    ConjugateGradient,
    DCDMNet,
    DCDMSolver,
    DCDMTrainer,
    DeflatedCG,
    ICPreconditionedCG,
    LinearProblem,
    poisson_matrix,
)

SIDES = (32, 64, 128)
CASES = 5
EPOCHS = 24
TOLERANCE = 1e-6


def measure() -> dict[str, Any]:
    """Compare iterates with SciPy's, then iterations to 1e-6 and times of one solve, by turns."""
    problems = {side: _problems(side) for side in SIDES}
    difference = _largest_difference(problems[64][0])
    net = _trained()
    options = {"tol": TOLERANCE, "max_iter": 1000}
    solvers = {
        "DCDM": DCDMSolver(net, **options),
        "CG": ConjugateGradient(**options),
        "DeflatedCG": DeflatedCG(**options),
        "IC-PCG": ICPreconditionedCG(**options),
    }
    iterations: dict[str, dict[str, float]] = {}
    times: dict[str, dict[str, float]] = {}
    for side, some in problems.items():
        counts = {name: [solver.solve(one).certificate.iterations for one in some] for name, solver in solvers.items()}
        counts["PyAMG's Ruge-Stüben with CG"] = [_pyamg_iterations(one) for one in some]
        iterations[f"{side}²"] = {name: _geometric_mean(found) for name, found in counts.items()}
        one = some[0]
        calls = {name: lambda solver=solver, one=one: solver.solve(one) for name, solver in solvers.items()}
        calls["SciPy's CG"] = lambda one=one: _scipy(one, TOLERANCE, 1000)
        calls["IC factorisation"] = lambda one=one: IncompleteCholesky(one.A)
        taken = alternate(calls, rounds=15)
        times[f"{side}²"] = {name: round(value / taken["CG"], 3) for name, value in taken.items()}
        if side == 64:
            speed = taken["SciPy's CG"] / taken["CG"]
    return {
        "peer": f"scipy.sparse.linalg.cg {version('scipy')}, pyamg {version('pyamg')}",
        "agrees": difference <= 1e-9,
        "largest_difference": difference,
        "speed_ratio": speed,
        "iterations_to_1e-6": iterations,
        "time_over_cg": times,
        "ic_sweeps": {f"{side}²": IncompleteCholesky(some[0].A).sweeps for side, some in problems.items()},
        "growth": {
            f"{name}: 32² to 128², iterations ×": iterations["128²"][name] / iterations["32²"][name]
            for name in iterations["32²"]
        },
        "training": f"32² empty box, 2000 samples of 400 Ritz vectors, {EPOCHS} epochs",
    }


def _problems(side: int) -> list[LinearProblem]:
    flags = obstacles((side, side), generator("benchmark", "obstacles", side))
    A = poisson_matrix(flags, 1 / side)
    draws = [generator("benchmark", "velocity", case, side) for case in range(CASES)]
    return [LinearProblem(A, right_hand_side(flags, one), (side, side)) for one in draws]


def _trained() -> DCDMNet:
    with seeded("benchmark", "weights"):
        net = DCDMNet(dim=2)
    trainer = DCDMTrainer(net, (32, 32), n_ritz=400, n_samples=2000, theta=20, epochs=EPOCHS)
    trainer.fit(poisson_matrix(torch.zeros(32, 32, dtype=torch.int64)))
    return net


def _matrix(problem: LinearProblem) -> scipy.sparse.csr_matrix:
    A = problem.A
    return scipy.sparse.csr_matrix(
        (A.values().numpy(), A.col_indices().numpy(), A.crow_indices().numpy()), shape=tuple(A.shape)
    )


def _scipy(problem: LinearProblem, tolerance: float, most: int) -> Tensor:
    x, _ = scipy.sparse.linalg.cg(_matrix(problem), problem.b.numpy(), rtol=tolerance, maxiter=most)
    return torch.from_numpy(x)


def _largest_difference(problem: LinearProblem) -> float:
    """Compare the iterate after 1, 2, 5, … steps, relative to its own length."""
    apart = []
    for count in (1, 2, 5, 10, 20, 40):
        ours = ConjugateGradient(tol=1e-15, max_iter=count).solve(problem).x
        theirs = _scipy(problem, 1e-15, count)
        apart.append(((ours - theirs).norm() / theirs.norm()).item())
    return max(apart)


def _pyamg_iterations(problem: LinearProblem) -> int:
    active = problem.active.numpy()
    norms: list[float] = []
    hierarchy = pyamg.ruge_stuben_solver(_matrix(problem)[active][:, active])
    hierarchy.solve(problem.b.numpy()[active], tol=TOLERANCE, accel="cg", residuals=norms)
    return len(norms) - 1


def _geometric_mean(counts: list[int]) -> float:
    return round(math.exp(float(np.log(counts).mean())), 1)
