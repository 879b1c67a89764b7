"""Means with their uncertainty: bootstrap intervals over seeds, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from provenn.core.experiment.checks import check_integer


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its confidence interval."""

    estimate: float
    low: float
    high: float

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is below zero."""
        return self.high < 0

    def __str__(self) -> str:
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap_mean(
    values: Sequence[float] | np.ndarray, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the mean with its percentile-bootstrap interval.

    Args:
        values: One value a seed.
        confidence: Share of resampled means inside the interval.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling, fixed so that the same values give the same interval.

    Returns:
        The mean and its bounds; with one value the bounds are the value itself.

    Raises:
        ValueError: ``values`` is empty, ``confidence`` is not in (0, 1), or ``resamples`` < 1.

    Source: Efron, "Bootstrap methods: another look at the jackknife", Ann. Statist. 7 (1979).
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise ValueError(f"values must be a non-empty sequence of numbers, got shape {sample.shape}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    check_integer("resamples", resamples, at_least=1)
    mean = float(sample.mean())
    if sample.size == 1:
        return Interval(mean, mean, mean)
    picks = np.random.default_rng(seed).integers(0, sample.size, size=(resamples, sample.size))
    means = sample[picks].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high))


def paired_difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the mean of ``first - second`` with its paired-bootstrap interval.

    Pairs share a seed, so what the seed does to both arms cancels.

    Args:
        first: One value a seed.
        second: Values of the same seeds in the same order.
        confidence: As in :func:`bootstrap_mean`.
        resamples: As in :func:`bootstrap_mean`.
        seed: As in :func:`bootstrap_mean`.

    Returns:
        The mean difference and its bounds.

    Raises:
        ValueError: The two differ in length, or are empty.
    """
    if len(first) != len(second):
        raise ValueError(f"paired values must be equally many, got {len(first)} and {len(second)}")
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return bootstrap_mean(difference, confidence, resamples, seed)
