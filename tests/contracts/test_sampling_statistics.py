"""The comparison of means: its rate of false alarms, what it finds, and what it lets pass."""

import pytest
import torch
from scipy.stats import norm

from provenn.contracts import ContractError
from provenn.contracts import _statistics as statistics
from provenn.contracts._statistics import Estimate, expect_independent, expect_means


def fails(check, *arguments):
    try:
        check(*arguments)
    except ContractError:
        return True
    return False


@pytest.fixture
def noisy(monkeypatch):
    """A rate at which false alarms can be counted."""
    monkeypatch.setattr(statistics, "FALSE_ALARM", 0.1)


def rows(seed, calls=64, components=3, mean=0.0):
    return mean + torch.randn(calls, components, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_false_alarms_of_means_are_as_stated(noisy):
    alarms = [fails(expect_means, {"x": Estimate(rows(seed), torch.zeros(3))}) for seed in range(1000)]
    assert 70 <= sum(alarms) <= 130  # 3 standard deviations around 100, less what Bonferroni gives away


def test_false_alarms_are_shared_by_all_that_is_compared(noisy):
    alarms = [
        fails(expect_means, {str(name): Estimate(rows(10 * seed + name), torch.zeros(3)) for name in range(10)})
        for seed in range(1000)
    ]
    assert 65 <= sum(alarms) <= 130


def test_false_alarms_of_independence_are_as_stated(noisy):
    alarms = []
    for seed in range(1000):
        source = torch.Generator().manual_seed(seed)
        alarms.append(fails(expect_independent, "x", torch.randn(32, 64, 2, generator=source)))
    assert 60 <= sum(alarms) <= 140  # the spread within calls is estimated too


def test_a_shift_of_seven_standard_errors_is_found_and_one_of_three_is_not():
    error = 1 / 64**0.5
    assert norm.isf(statistics.FALSE_ALARM / 6) < 6
    assert fails(expect_means, {"x": Estimate(rows(0, mean=7 * error), torch.zeros(3))})
    assert not fails(expect_means, {"x": Estimate(rows(0, mean=3 * error), torch.zeros(3))})
    assert not fails(expect_means, {"x": Estimate(rows(0, mean=7 * error), torch.zeros(3), bias=7 * error)})


def test_constants_are_compared_exactly_and_nan_never_passes():
    ones = torch.ones(10, 1)
    assert not fails(expect_means, {"x": Estimate(ones, torch.ones(1))})
    assert fails(expect_means, {"x": Estimate(ones, torch.full((1,), 1.0001))})
    assert fails(expect_means, {"x": Estimate(ones * torch.nan, torch.ones(1))})


def test_one_component_among_many_is_found_and_named():
    found = rows(1, components=50)
    found[:, 37] += 2
    with pytest.raises(ContractError, match="x, component 37"):
        expect_means({"x": Estimate(found, torch.zeros(50))})


def test_repeated_and_stratified_samples_are_not_independent():
    source = torch.Generator().manual_seed(0)
    free = torch.randn(32, 64, 2, generator=source)
    assert not fails(expect_independent, "x", free)
    assert fails(expect_independent, "x", free[:, :8].repeat(1, 8, 1))
    assert fails(expect_independent, "x", torch.cat([free, -free], dim=1))
    assert fails(expect_independent, "x", free[:, :1].expand(-1, 64, -1))
    assert not fails(expect_independent, "x", torch.ones(32, 64, 2))
