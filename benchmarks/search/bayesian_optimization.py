"""Posteriors and acquisitions beside BoTorch's, scikit-learn's and scikit-optimize's, and the time of one scoring."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from botorch.acquisition import (
    ExpectedImprovement,
    ProbabilityOfImprovement,
    UpperConfidenceBound,
    qExpectedImprovement,
)
from botorch.models import SingleTaskGP
from botorch.sampling.normal import SobolQMCNormalSampler
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.means import ZeroMean
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel
from sklearn.gaussian_process.kernels import Matern as TheirMatern
from skopt.acquisition import gaussian_ei
from torch import Tensor

from benchmarks.search._bayesian_optimization_regret import NOISE as REGRET_NOISE
from benchmarks.search._bayesian_optimization_regret import SEEDS, differences
from benchmarks.timing import alternate
from provenn.core.numerics.covariance_functions import Hyperparameters, Matern
from provenn.core.numerics.gaussian_processes import GaussianPosterior
from provenn.core.numerics.objectives import hartmann
from provenn.search.acquisition import expected_improvement, probability_of_improvement, q_expected_improvement, ucb

SCALE, NOISE = 1.3, 0.05
LENGTHS = torch.linspace(0.3, 0.8, 6, dtype=torch.float64)
COUNT, SCORED = 40, 320


def measure() -> dict[str, Any]:
    """Compare values on one posterior, and time a scoring of 320 points with its gradient, by turns."""
    draws = torch.Generator().manual_seed(0)
    X = torch.rand(COUNT, 6, dtype=torch.float64, generator=draws)
    y = hartmann()(X)
    Q = torch.rand(SCORED, 6, dtype=torch.float64, generator=draws)
    ours, botorch = our_posterior(X, y), botorch_model(X, y)
    best = y.max().item()
    found = _differences(ours, botorch, X, y, Q, best)
    taken = alternate(
        {"ours": lambda: _scored(ours, Q, best), "botorch": lambda: _scored_by_botorch(botorch, Q, best)}, rounds=15
    )
    growth = {}
    for count in (50, 100, 200, 400):
        many = torch.rand(count, 6, dtype=torch.float64, generator=draws)
        fitted = our_posterior(many, hartmann()(many))
        growth[count] = alternate({"score": lambda fitted=fitted: _scored(fitted, Q, best)}, rounds=5)["score"]
    largest = max(found.values())
    return {
        "peer": ", ".join(f"{name} {version(name)}" for name in ("botorch", "scikit-learn", "scikit-optimize")),
        "agrees": largest <= 1e-6,
        "largest_difference": largest,
        "differences": found,
        f"log10 regret minus BoTorch's, {SEEDS} seeds, noise {REGRET_NOISE}": {
            pair: str(interval) for pair, interval in differences().items()
        },
        "speed_ratio": taken["botorch"] / taken["ours"],
        "growth": {f"EI with gradient, n 50 to {count}, time ×": value / growth[50] for count, value in growth.items()},
    }


def our_posterior(X: Tensor, y: Tensor) -> GaussianPosterior:
    """Return our posterior at fixed hyperparameters."""
    values = torch.tensor([SCALE, NOISE], dtype=torch.float64)
    return GaussianPosterior(Matern(2.5), Hyperparameters(values[0], LENGTHS**-2, values[1]), X, y)


def botorch_model(X: Tensor, y: Tensor) -> SingleTaskGP:
    """Return BoTorch's model with the same hyperparameters, untransformed."""
    kernel = ScaleKernel(MaternKernel(nu=2.5, ard_num_dims=X.shape[1])).double()
    kernel.outputscale = SCALE
    kernel.base_kernel.lengthscale = LENGTHS[: X.shape[1]]
    noises = torch.full_like(y, NOISE).unsqueeze(-1)
    model = SingleTaskGP(
        X, y.unsqueeze(-1), noises, covar_module=kernel, mean_module=ZeroMean(), outcome_transform=None
    )
    return model.eval()


def _differences(
    ours: GaussianPosterior, model: SingleTaskGP, X: Tensor, y: Tensor, Q: Tensor, best: float
) -> dict[str, float]:
    mean, variance = ours.mean_variance(Q)
    sd = variance.sqrt()
    points = Q.unsqueeze(1)
    with torch.no_grad():
        theirs = model.posterior(Q)
        pairs = {
            "posterior mean, BoTorch": (mean, theirs.mean.squeeze(-1)),
            "posterior variance, BoTorch": (variance, theirs.variance.squeeze(-1)),
            "EI, BoTorch": (expected_improvement(mean, sd, best), ExpectedImprovement(model, best)(points)),
            "PI, BoTorch": (probability_of_improvement(mean, sd, best), ProbabilityOfImprovement(model, best)(points)),
            "UCB, BoTorch": (ucb(mean, sd, 4.0), UpperConfidenceBound(model, beta=4.0)(points)),
            "q-EI, BoTorch": _batches(ours, model, Q, best),
            "EI, scikit-optimize": (expected_improvement(mean, sd, best), _skopt(X, y, Q, best)),
        }
    return {name: (one - torch.as_tensor(other)).abs().max().item() for name, (one, other) in pairs.items()}


def _batches(ours: GaussianPosterior, model: SingleTaskGP, Q: Tensor, best: float) -> tuple[Tensor, Tensor]:
    """Return q-EI of batches of four with BoTorch's own base samples."""
    batches = Q[:80].unflatten(0, (20, 4))
    sampler = SobolQMCNormalSampler(torch.Size([256]), seed=0)
    theirs = qExpectedImprovement(model, best, sampler)(batches)
    base = sampler.base_samples.reshape(256, 4)
    return q_expected_improvement(ours.mean(batches), ours.covariance(batches), best, base), theirs


def _skopt(X: Tensor, y: Tensor, Q: Tensor, best: float) -> np.ndarray:
    """Return scikit-optimize's EI, which minimises, on scikit-learn's posterior of the negated values."""
    kernel = ConstantKernel(SCALE) * TheirMatern(LENGTHS.tolist(), nu=2.5)
    model = GaussianProcessRegressor(kernel, alpha=NOISE, optimizer=None).fit(X.numpy(), -y.numpy())
    return gaussian_ei(Q.numpy(), model, y_opt=-best, xi=0.0)


def _scored(ours: GaussianPosterior, Q: Tensor, best: float) -> Tensor:
    leaf = Q.clone().requires_grad_()
    mean, variance = ours.mean_variance(leaf)
    return torch.autograd.grad(expected_improvement(mean, variance.sqrt(), best).sum(), leaf)[0]


def _scored_by_botorch(model: SingleTaskGP, Q: Tensor, best: float) -> Tensor:
    leaf = Q.clone().requires_grad_()
    return torch.autograd.grad(ExpectedImprovement(model, best)(leaf.unsqueeze(1)).sum(), leaf)[0]
