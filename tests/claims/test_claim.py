"""Evidence and claims: what ``judge`` sees, and what a claim may not be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from claims.fake_claims import GAINS, PAIR, QUICK, TIERS, judge, train

from provenn.claims import Claim, Comparison, Evidence, Study, Tier, Tuning
from provenn.claims.claim import Cell


def made_up(method, baseline):
    return Evidence.of({("main", "method"): {"score": method}, ("main", "baseline"): {"score": baseline}})


def test_values_go_by_ascending_seed_whatever_the_order_of_cells():
    cells = tuple(Cell(seed, {"score": 10.0 * seed}) for seed in (2, 0, 1))
    evidence = Evidence({("main", "method"): cells})
    np.testing.assert_array_equal(evidence.values("main", "method", "score"), [0.0, 10.0, 20.0])
    assert evidence.mean("main", "method", "score") == 10.0


def test_difference_pairs_the_seeds():
    # Seeds spread by hundreds, the arms differ by exactly one: only a paired difference has no width.
    margin = made_up([1.0, 101.0, 901.0], [0.0, 100.0, 900.0]).difference("main", "method", "baseline", "score")
    assert (margin.estimate, margin.low, margin.high) == (1.0, 1.0, 1.0)


def test_difference_is_method_minus_baseline():
    margin = made_up([3.0, 4.0, 5.0], [1.0, 1.0, 1.0]).difference("main", "method", "baseline", "score")
    assert margin.estimate == 3.0
    assert 2.0 <= margin.low <= 3.0 <= margin.high <= 4.0


def test_evidence_names_what_it_lacks():
    evidence = Evidence({("main", "method"): (Cell(0, {"score": 1.0}), Cell(1, {"loss": 1.0}))})
    with pytest.raises(KeyError, match="no cells of study 'other', arm 'method'"):
        evidence.values("other", "method", "score")
    with pytest.raises(KeyError, match=r"seeds \[1\] left no metric 'score'"):
        evidence.values("main", "method", "score")


def test_made_up_evidence_needs_equally_many_seeds():
    with pytest.raises(ValueError, match="the same number of seeds"):
        Evidence.of({("main", "method"): {"score": [1.0], "loss": [1.0, 2.0]}})


@pytest.mark.parametrize(("method", "outcome"), [([1.0, 1.1, 1.2], "reproduced"), ([-1.0, 0.1, 0.0], "not reproduced")])
def test_judge_of_the_fakes(method, outcome):
    assert judge(made_up(method, [0.0, 0.05, 0.1])).outcome == outcome


@pytest.mark.parametrize(
    ("study", "words"),
    [
        (Study((), TIERS), "at least one"),
        (Study(("method", "method"), TIERS), "distinct"),
        (Study(PAIR, {"tiny": Tier(1)}), "unknown tier 'tiny'"),
        (Study(PAIR, {"small": Tier(0)}), "seeds must be ≥ 1"),
        (Study(PAIR, TIERS, Tuning({"method": GAINS, "baseline": GAINS[:1]}, "validation")), "same number of settings"),
        (Study(PAIR, TIERS, Tuning((), "validation")), "at least one"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(study, words):
    with pytest.raises(ValueError, match=words):
        replace(QUICK, studies={"main": study}, comparisons=())


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (Comparison("other", "score", *PAIR), "unknown study 'other'"),
        (Comparison("main", "score", "method", "nobody"), "unknown arm 'nobody'"),
    ],
)
def test_a_comparison_of_what_does_not_exist_is_refused(row, words):
    with pytest.raises(ValueError, match=words):
        replace(QUICK, comparisons=(row,))


def test_tiers_are_listed_from_the_shortest():
    studies = {"a": Study(PAIR, {"full": Tier(1)}), "b": Study(PAIR, {"smoke": Tier(1)})}
    claim = Claim("c", "", (), "", studies, (), train, judge)
    assert claim.tiers == ("smoke", "full")
