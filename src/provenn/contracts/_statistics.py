"""Comparing means with what is promised of them, at a stated rate of false alarms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy.stats import chi2, t
from torch import Tensor

from provenn.contracts.suite import expect

FALSE_ALARM = 1e-6
"""The probability that one check fails though the part is right, by the normal approximation to means."""


@dataclass(frozen=True)
class Estimate:
    """Independent estimates of something, a row each, and what they should be on average.

    Args:
        rows: The estimates (rows, components).
        expected: Their expectation (components).
        bias: How far the expectation may be off.
    """

    rows: Tensor
    expected: Tensor
    bias: float = 0.0


def expect_means(estimates: Mapping[str, Estimate]) -> None:
    """Expect every mean within sampling error of its expectation: Student's t, two-sided, Bonferroni over all."""
    tests = sum(estimate.expected.numel() for estimate in estimates.values())
    for name, estimate in estimates.items():
        rows, expected = estimate.rows.double(), estimate.expected.double()
        count = len(rows)
        error = (rows.mean(dim=0) - expected).abs()
        quantile = float(t.isf(FALSE_ALARM / (2 * tests), count - 1))
        rounding = 1e-6 * expected.abs() + 1e-12
        allowed = quantile * rows.std(dim=0) / math.sqrt(count) + estimate.bias + rounding
        worst = int((error - allowed).nan_to_num(nan=math.inf).argmax())
        expect(
            bool(error[worst] <= allowed[worst]),
            f"{name}, component {worst}: the mean is {float(rows.mean(dim=0)[worst]):.6g} ± "
            f"{float(rows.std(dim=0)[worst]) / math.sqrt(count):.2g}, promised {float(expected[worst]):.6g}",
        )


def expect_independent(name: str, samples: Tensor) -> None:
    """Expect that the means of calls scatter as those of independent samples do: χ², two-sided, Bonferroni.

    Args:
        name: What is sampled.
        samples: Numbers (calls, samples of a call, components).
    """
    calls, count, components = samples.shape
    within = samples.double().var(dim=1).mean(dim=0)
    between = samples.double().mean(dim=1).var(dim=0) * count
    ratio = torch.where(within > 0, between / within.clamp(min=1e-300), torch.where(between > 0, math.inf, 1.0))
    rate = FALSE_ALARM / (2 * components)
    low, high = (float(bound) / (calls - 1) for bound in (chi2.ppf(rate, calls - 1), chi2.isf(rate, calls - 1)))
    worst = int(torch.maximum(ratio / high, low / ratio.clamp(min=1e-300)).argmax())
    expect(
        bool(low <= ratio[worst] <= high),
        f"{name}, component {worst}: the means of calls vary {float(ratio[worst]):.3g} times as much as they would "
        f"with independent samples ({low:.2g} to {high:.2g} is within sampling error)",
    )
