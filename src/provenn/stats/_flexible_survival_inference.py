"""Tables, delta-method intervals and tests of a fitted APGW regression."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from provenn.core.experiment.checks import check_number


class Estimates(NamedTuple):
    """Estimates with the bounds of their confidence intervals, arrays of one shape."""

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Coefficient(NamedTuple):
    """A row of a summary: a coefficient on the log scale of its parameter (κ: of κ + 1), and its Wald test."""

    parameter: str
    covariate: str
    estimate: float
    standard_error: float
    z: float
    p_value: float
    low: float
    high: float


class RatioTest(NamedTuple):
    """A likelihood-ratio test: twice the difference of log-likelihoods, degrees of freedom, χ² tail probability."""

    statistic: float
    degrees: int
    p_value: float


def half_width(confidence: float) -> float:
    """Return how many standard errors an interval reaches to either side.

    Raises:
        ValueError: ``confidence`` is not in (0, 1).
    """
    check_number("confidence", confidence, above=0, below=1)
    return float(scipy.stats.norm.ppf((1 + confidence) / 2))


def delta_method(
    of: Callable[[Tensor], Tensor],
    back: Callable[[np.ndarray], np.ndarray],
    theta: Tensor,
    covariance: np.ndarray,
    confidence: float,
) -> Estimates:
    """Return back(of(θ)) with bounds that are symmetric on the scale of ``of``.

    Args:
        of: A differentiable function of the coefficients.
        back: A monotone function, from the scale of ``of`` to the scale of the result.
        theta: The estimated coefficients.
        covariance: Their covariance.
        confidence: In (0, 1).

    Cost: one forward derivative for each coefficient.
    """
    reach = half_width(confidence)
    directions = torch.eye(len(theta), dtype=theta.dtype)
    slopes = torch.stack([torch.func.jvp(of, (theta,), (one,))[1] for one in directions], dim=-1)
    variance = ((slopes @ torch.from_numpy(covariance)) * slopes).sum(-1)
    value, half = of(theta), reach * variance.clamp(min=0).sqrt()
    ends = back((value - half).numpy()), back((value + half).numpy())
    return Estimates(back(value.numpy()), np.minimum(*ends), np.maximum(*ends))


def coefficients(
    places: list[tuple[str, str]], theta: Tensor, covariance: np.ndarray, confidence: float
) -> Iterator[Coefficient]:
    """Yield a row for each coefficient."""
    reach = half_width(confidence)
    errors = np.sqrt(np.diag(covariance).clip(min=0))
    for (name, covariate), value, error in zip(places, theta.tolist(), errors.tolist(), strict=True):
        z = value / error if error else float("nan")
        p_value = float(2 * scipy.stats.norm.sf(abs(z)))
        yield Coefficient(name, covariate, value, error, z, p_value, value - reach * error, value + reach * error)
