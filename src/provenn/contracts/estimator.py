"""The suite of estimators: scikit-learn's own checks, exclusions listed with reasons."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.estimator_checks import check_estimator as check_with_scikit_learn

from provenn.contracts.case import EstimatorCase
from provenn.contracts.suite import check_part, expect
from provenn.contracts.watch import seeded


def names_of_libraries(name: str) -> bool:
    """Return whether an excluded name is one of scikit-learn's checks."""
    return name.startswith("check_")


def exercise(case: EstimatorCase) -> Callable[[], object]:
    """Return a call that builds the estimator and fits it to two small classes."""
    features = np.random.default_rng(0).normal(size=(30, 4))
    labels = 1 + (features[:, 0] > 0)  # above 0, as the targets of some regressions must be
    return lambda: case.make().fit(features, labels)


def check_is_estimator(case: EstimatorCase) -> None:
    """It is a scikit-learn estimator."""
    made = case.make()
    expect(isinstance(made, BaseEstimator), f"make gave a {type(made).__name__}, which is no BaseEstimator")


def check_scikit_learn(case: EstimatorCase) -> None:
    """scikit-learn's check_estimator passes, but for the checks excluded, which fail."""
    expected = {name: reason for name, reason in case.excluded.items() if names_of_libraries(name)}
    with seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_with_scikit_learn(case.make(), expected_failed_checks=expected, on_fail=None, on_skip=None)
    failed = [f"{r['check_name']} ({str(r['exception']).strip()[:200]})" for r in results if r["status"] == "failed"]
    expect(not failed, f"{len(failed)} fail: {'; '.join(failed)}")
    stale = sorted(set(expected) - {r["check_name"] for r in results if r["status"] == "xfail"})
    expect(not stale, f"excluded, but not failing: {', '.join(stale)}")


CHECKS: dict[str, Callable[[EstimatorCase], None]] = {
    "is_estimator": check_is_estimator,
    "scikit_learn": check_scikit_learn,
}


def check_estimator(case_or_make: EstimatorCase | Callable[..., Any], **options: Any) -> None:
    """Hold an estimator to the contract of its kind.

    Args:
        case_or_make: A case, or what builds the estimator.
        **options: Fields of :class:`~provenn.contracts.EstimatorCase`; ``part`` defaults to the factory's own name.

    Raises:
        ContractError: At least one check fails; the message lists all that do.
    """
    check_part(EstimatorCase, case_or_make, options)
