"""Each check of the suite of estimators catches an estimator that is broken in that way."""

from dataclasses import replace

import numpy as np
import pytest
from contracts.broken import DOCUMENTED_ELSEWHERE, assert_caught, broken_runs, good_runs, own_checks
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.neighbors import NearestCentroid
from sklearn.utils.estimator_checks import check_estimator as check_with_scikit_learn

from provenn.contracts import BadInput, ContractError, EstimatorCase, check_estimator, checks_of, exclusions_of


class Bare:
    def fit(self, X, y):
        return self


class Majority(ClassifierMixin, BaseEstimator):
    """Says the commonest class, and checks nothing that it is given."""

    def fit(self, X, y):
        self.classes_, counts = np.unique(y, return_counts=True)
        self.most_ = self.classes_[counts.argmax()]
        return self

    def predict(self, X):
        return np.full(len(X), self.most_)


GOOD = EstimatorCase(
    "sklearn.neighbors.NearestCentroid",
    NearestCentroid,
    bad_input=(BadInput("metric", lambda: NearestCentroid(metric="none").fit([[0], [1]], [0, 1])),),
    excluded=DOCUMENTED_ELSEWHERE,
)
STALE = {**DOCUMENTED_ELSEWHERE, "check_fit2d_1sample": "said to fail, but passes"}
BROKEN = {
    "is_estimator": [replace(GOOD, make=Bare, label="bare")],
    "scikit_learn": [replace(GOOD, make=Majority, label="majority"), replace(GOOD, excluded=STALE, label="stale")],
}


@pytest.mark.parametrize("check", good_runs(GOOD))
def test_good_estimator_passes(check):
    check()


@pytest.mark.parametrize(("name", "case"), broken_runs(BROKEN))
def test_broken_estimators_are_caught(name, case):
    assert_caught(name, case)


def test_every_check_has_a_broken_estimator():
    assert set(BROKEN) == own_checks("estimator")


def test_exclusions_are_expected_to_fail():
    """With the very checks excluded that fail, the majority passes, and the reasons are shown."""
    results = check_with_scikit_learn(Majority(), on_fail=None, on_skip=None)
    failing = sorted({result["check_name"] for result in results if result["status"] == "failed"})
    assert len(failing) > 3
    excluded = {**DOCUMENTED_ELSEWHERE, **dict.fromkeys(failing, "checks nothing that it is given")}
    case = replace(GOOD, make=Majority, excluded=excluded)
    checks_of(case)["scikit_learn"]()
    assert exclusions_of(case) == excluded


def test_check_estimator_lists_failures():
    with pytest.raises(ContractError, match="'is_estimator'"):
        check_estimator(BROKEN["is_estimator"][0])
