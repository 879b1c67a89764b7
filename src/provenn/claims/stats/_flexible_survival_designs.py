"""Simulated survival data whose law is known, and Cox regression as a baseline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from provenn.core.experiment.seeding import generator
from provenn.stats import APGW


@dataclass(frozen=True)
class Design:
    """A law of times given one binary and one normal covariate, and of exponential censoring.

    The unit of time is the median observed time, which the fits of models without φ take for theirs; intercepts and
    censoring are set so that this median is 1 and 30 % are censored.

    Args:
        scale: The scale with covariates.
        kappa: κ.
        effects: Coefficients of (binary, normal) by parameter.
        intercepts: Logarithms of φ, λ and γ without covariates; default 0.
        censoring: Rate of censoring.
    """

    scale: str
    kappa: float
    effects: dict[str, tuple[float, float]]
    intercepts: dict[str, float]
    censoring: float

    @property
    def shape(self) -> tuple[str, ...]:
        """The shapes with covariates."""
        return tuple(name for name in self.effects if name != self.scale)

    def law_of(self, covariates: np.ndarray) -> APGW:
        """Return the distribution of each sample's time."""
        X = torch.from_numpy(covariates)
        logs = {
            name: self.intercepts.get(name, 0.0) + X @ X.new_tensor(self.effects.get(name, (0.0, 0.0)))
            for name in ("phi", "lam", "gamma")
        }
        return APGW(logs["phi"].exp(), logs["lam"].exp(), logs["gamma"].exp(), self.kappa)

    def draw(self, samples: int, *keys: int | str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return covariates, times and events of a data set that the keys seed."""
        draws = generator("flexible-survival", *keys)
        binary = (torch.rand(samples, generator=draws, dtype=torch.float64) < 0.5).double()
        X = torch.stack([binary, torch.randn(samples, generator=draws, dtype=torch.float64)], dim=1)
        times = self.law_of(X.numpy()).sample(1, draws)[0]
        censored = torch.empty(samples, dtype=torch.float64).exponential_(self.censoring, generator=draws)
        return X.numpy(), torch.minimum(times, censored).numpy(), (times <= censored).double().numpy()


DESIGNS = {
    "A: proportional hazards": Design("lam", 4.0, {"lam": (0.7, -0.5)}, {"lam": -1.514}, 0.233),
    "B: accelerated log-logistic": Design("phi", 0.0, {"phi": (0.7, -0.5)}, {"phi": -0.639, "gamma": 0.7}, 0.198),
    "C: crossing hazards": Design(
        "phi", 0.5, {"phi": (0.5, -0.3), "gamma": (0.5, 0.2)}, {"phi": -0.726, "gamma": 0.2}, 0.222
    ),
    "D: cure": Design("lam", -0.4, {"lam": (0.5, -0.4)}, {"lam": -0.041, "gamma": 0.4}, 0.071),
}


def cox(X: np.ndarray, T: np.ndarray, event: np.ndarray, steps: int = 20) -> np.ndarray:
    """Return the coefficients that maximise Cox's partial likelihood (Breslow's, for ties).

    Args:
        X: Covariates.
        T: Times of event or censoring.
        event: 1 or 0.
        steps: Newton's steps.
    """
    order = np.argsort(-T, kind="stable")
    X, T, event = X[order] - X.mean(axis=0), T[order], event[order]
    last = np.searchsorted(-T, -T, side="right") - 1  # the last row still at risk at each time
    beta = np.zeros(X.shape[1])
    for _ in range(steps):
        risk = np.exp(X @ beta)
        total = np.cumsum(risk)[last]
        mean = np.cumsum(risk[:, None] * X, axis=0)[last] / total[:, None]
        squares = np.cumsum(risk[:, None, None] * X[:, :, None] * X[:, None], axis=0)[last] / total[:, None, None]
        variance = squares - mean[:, :, None] * mean[:, None]
        beta = beta + np.linalg.solve((event[:, None, None] * variance).sum(axis=0), event @ (X - mean))
    return beta
