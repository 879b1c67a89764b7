"""Logistic regression with a ridge on breast_cancer: deterministic and convex, for second-order methods too."""

import math
from functools import cache, partial

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

from provenn.compare.counted_task import CountedTask, LossProblem
from provenn.compare.task import LogUniform
from provenn.core.experiment.seeding import generator

RIDGE = 1e-3
DISTANCE = 3.0
"""Norm of the weights at the start."""
FLOOR = 1e-14
"""The gap below which rounding decides."""


@cache
def table() -> tuple[np.ndarray, np.ndarray]:
    """Return standardised features with a column of ones, and classes as −1 and 1."""
    bundle = load_breast_cancer()
    x = (bundle.data - bundle.data.mean(axis=0)) / bundle.data.std(axis=0)
    return np.column_stack([x, np.ones(len(x))]), 2.0 * bundle.target - 1


@cache
def minimum() -> float:
    """Return the least loss, found by Newton's method in a trust region, to the rounding of float64."""
    x, y = table()

    def value(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = y * (x @ w)
        loss = np.logaddexp(0, -margin).mean() + RIDGE / 2 * w @ w
        return float(loss), -(x.T @ (y * expit(-margin))) / len(x) + RIDGE * w

    def hessian(w: np.ndarray) -> np.ndarray:
        share = expit(y * (x @ w))
        curved: np.ndarray = (x.T * (share * (1 - share))) @ x / len(x) + RIDGE * np.eye(len(w))
        return curved

    found = minimize(value, np.zeros(x.shape[1]), jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-13})
    return float(found.fun)


def loss(model: nn.Linear, x: Tensor, y: Tensor) -> Float[Tensor, ""]:
    """Return the mean logistic loss with the ridge."""
    margin = y * model(x).squeeze(-1)
    return nn.functional.softplus(-margin).mean() + RIDGE / 2 * model.weight.square().sum()


def problem(seed: int, device: str, tuning: bool) -> LossProblem:
    """Return the problem from a random start."""
    x, y = (torch.from_numpy(part).to(device) for part in table())
    model = nn.Linear(x.shape[1], 1, bias=False, dtype=torch.float64, device=device)
    start = torch.randn(x.shape[1], generator=generator(seed, "start"), dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(DISTANCE * start / start.norm())

    def gap(trained: nn.Module) -> float:
        with torch.no_grad():
            reached = loss(model, x, y).item()
        return math.log10(max(reached - minimum(), FLOOR)) if math.isfinite(reached) else math.nan

    return LossProblem(model, loss, lambda step: (x, y), gap)


LBFGS = partial(
    torch.optim.LBFGS,
    max_iter=5,  # a step overshoots the budget by what is left of it, so steps are short; state lives on between them
    history_size=20,
    line_search_fn="strong_wolfe",
    tolerance_grad=0,  # its defaults stop far above the floor of the gap
    tolerance_change=0,
)

TASK = CountedTask(
    name="convex-logistic",
    summary=f"logistic regression with ridge {RIDGE:g} on breast_cancer, full batch, 100 gradients",
    kinds={"optim": {"lr": LogUniform(1e-2, 1e2)}},
    problem=problem,
    evaluations=100,
    metric="log10 of the loss above the minimum",
    maximize=False,
    references={"lbfgs": LBFGS},
)
