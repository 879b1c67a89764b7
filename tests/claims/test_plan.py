"""The plan: which cells, in which order, and which setting tuning picks."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from claims.fake_claims import PAIR, QUICK, TIERS, TUNED, TWO_STUDIES, claim

from provenn.claims import Comparison, Study, Tuning
from provenn.claims.errors import UsageError
from provenn.claims.ledger import CellKey, Record
from provenn.claims.plan import Plan

SETTINGS = tuple({"lr": value} for value in (0.1, 0.2, 0.3))


def tuned(maximize=True, settings=SETTINGS, tiers=("small",)):
    return claim("fake", Study(PAIR, TIERS, Tuning(settings, "validation", maximize, tiers)))


def tuning_done(plan, arm, values):
    keys = plan.tuning("main", arm)
    return {key: Record({"validation": value}) for key, value in zip(keys, values, strict=True)}


@pytest.mark.parametrize(
    ("values", "maximize", "picked"),
    [
        ((1.0, 3.0, 2.0), True, 1),
        ((1.0, 3.0, 2.0), False, 0),
        ((2.0, 3.0, 3.0), True, 1),  # the earlier among equals
        ((2.0, 1.0, 1.0), False, 1),
        ((math.nan, 1.0, 2.0), True, 2),
        ((math.inf, 1.0, 2.0), True, 2),
        ((-math.inf, 2.0, 1.0), False, 2),
        ((1.0, math.nan, math.nan), True, 0),
    ],
)
def test_tuning_picks_the_best_finite_value_and_the_earlier_among_equals(values, maximize, picked):
    plan = Plan(tuned(maximize), "small")
    choice = plan.choice("main", "method", tuning_done(plan, "method", values))
    assert choice.index == picked
    assert json.loads(choice.settings) == SETTINGS[picked]


def test_no_choice_where_every_setting_diverged():
    plan = Plan(tuned(), "small")
    finished = tuning_done(plan, "method", (math.nan, math.inf, -math.inf))
    assert plan.choice("main", "method", finished) is None
    assert not [key for key in plan.runnable(finished) if key.arm == "method"]
    assert "study main, arm method, seed 0 (every setting diverged in tuning)" in plan.missing(finished)


def test_tuning_comes_first_on_one_seed():
    plan = Plan(tuned(), "small")
    keys = plan.runnable({})
    assert len(keys) == 6
    assert {(key.seed, key.tuning) for key in keys} == {(0, True)}
    assert all(plan.trial(key, "cpu").tuning for key in keys)


def test_seeds_of_an_arm_wait_for_its_own_tuning_alone():
    plan = Plan(tuned(), "small")
    keys = plan.runnable(tuning_done(plan, "method", (1.0, 3.0, 2.0)))
    assert [(key.arm, key.tuning) for key in keys] == [("baseline", True)] * 3 + [("method", False)] * 3
    assert {key.settings for key in keys if key.arm == "method"} == {'{"lr":0.2}'}


def test_seeds_run_seed_by_seed_so_that_arms_keep_level():
    keys = Plan(QUICK, "small").runnable({})
    assert [(key.seed, key.arm) for key in keys] == [(seed, arm) for seed in range(3) for arm in PAIR]


@pytest.mark.parametrize(("settings", "tier"), [(SETTINGS, "smoke"), (SETTINGS[:1], "small")])
def test_without_anything_to_pick_the_first_setting_runs(settings, tier):
    plan = Plan(tuned(settings=settings), tier)
    keys = plan.runnable({})
    assert not any(key.tuning for key in keys)
    assert {key.settings for key in keys} == {'{"lr":0.1}'}


def test_settings_of_each_arm():
    own = {"method": ({"lr": 1},), "baseline": ({"beta": 2},)}
    plan = Plan(claim("fake", Study(PAIR, TIERS, Tuning(own, "validation"))), "small")
    assert {key.arm: key.settings for key in plan.runnable({})} == {"method": '{"lr":1}', "baseline": '{"beta":2}'}


def test_a_finished_cell_is_not_runnable_again():
    plan = Plan(QUICK, "small")
    first, *rest = plan.runnable({})
    assert plan.runnable({first: Record({"score": 1.0})}) == rest
    assert plan.done({first: Record({"score": 1.0})}) == 1
    assert plan.size == 6


def test_the_trial_carries_budget_settings_and_device():
    plan = Plan(tuned(), "small")
    key = CellKey("main", "method", '{"lr":0.2}', 2, False)
    trial = plan.trial(key, "cuda:1")
    assert (trial.study, trial.arm, trial.seed, trial.tier, trial.tuning) == ("main", "method", 2, "small", False)
    assert (dict(trial.budget), dict(trial.settings), trial.device) == ({"steps": 20}, {"lr": 0.2}, "cuda:1")


def test_needed_metrics():
    rows = (Comparison("main", "score", *PAIR), Comparison("main", "loss", *PAIR), Comparison("main", "score", *PAIR))
    plan = Plan(replace(tuned(), comparisons=rows), "small")
    assert plan.needed(CellKey("main", "method", "{}", 0, False)) == ("score", "loss")
    assert plan.needed(CellKey("main", "method", "{}", 0, True)) == ("validation",)


def test_more_seeds_are_allowed_and_fewer_are_not():
    assert Plan(QUICK, "small", seeds=5).size == 10
    with pytest.raises(UsageError, match="at least the tier's 3, got 2"):
        Plan(QUICK, "small", seeds=2)


def test_a_tier_or_study_that_is_not_there_lists_those_that_are():
    with pytest.raises(UsageError, match="fake-quick has no tier 'full'; it has smoke, small"):
        Plan(QUICK, "full")
    with pytest.raises(UsageError, match="no study 'third' at tier small; it has main, other"):
        Plan(TWO_STUDIES, "small", ("third",))
    with pytest.raises(UsageError, match="no study 'other' at tier smoke; it has main"):
        Plan(TWO_STUDIES, "smoke", ("other",))


def test_a_tier_runs_the_studies_that_have_it():
    assert Plan(TWO_STUDIES, "smoke").studies == ("main",)
    assert Plan(TWO_STUDIES, "small").studies == ("main", "other")
    assert Plan(TWO_STUDIES, "small").size == 10


def test_evidence_holds_the_seeds_of_the_tier_alone():
    plan = Plan(TUNED, "small")
    finished = {}
    for arm in PAIR:
        finished |= tuning_done(plan, arm, (0.0, 1.0, 0.0, 0.0))
    more = Plan(TUNED, "small", seeds=5)
    finished |= {key: Record({"score": float(key.seed)}) for key in more.runnable(finished)}
    # A cell of a setting that was not picked is no evidence.
    finished[CellKey("main", "method", '{"gain":9.0}', 1, False)] = Record({"score": 99.0})
    assert plan.missing(finished) == []
    assert plan.evidence(finished).values("main", "method", "score").tolist() == [0.0, 1.0, 2.0]
    assert more.evidence(finished).values("main", "method", "score").tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
