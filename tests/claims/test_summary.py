"""The summary: plain JSON, exact where it must be, thinned out where it is only drawn."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from claims.fake_claims import QUICK, TUNED

from provenn.claims import Verdict
from provenn.claims.harness import Ran
from provenn.claims.ledger import Record, RunKey
from provenn.claims.plan import Plan
from provenn.claims.summary import CURVE_POINTS, environments, summarise
from provenn.core.experiment.statistics import Interval

WHERE = {
    "versions": {"torch": "2"},
    "hardware": {"cpu": "a cpu"},
    "platform": "p",
    "threads": 1,
    "device": "cpu",
}
VERDICT = Verdict("reproduced", "because", {"interval": Interval(1.0, 0.5, 1.5), "number": 2.0, "broken": math.nan})


def ran(claim=QUICK, tier="small", curves=lambda key: {}, **more):
    """A run whose scores are 10·seed, and 1 more for the method; each cell takes 2 s, one after another by 1 s."""
    plan = Plan(claim, tier)
    finished = {}
    for _ in range(2):  # tuning, then seeds
        for key in plan.runnable(finished):
            metrics = {"score": 10.0 * key.seed + (key.arm == "method")}
            if key.tuning:
                metrics = {"validation": math.nan if "3.0" in key.settings else len(key.settings)}
            started = f"2024-05-06T00:00:{len(finished):02}.000+00:00"
            finished[key] = Record(metrics, curves(key), started, 2.0, 100 + key.seed, None, {**WHERE, **more})
    return Ran(plan, RunKey(claim.slug, tier, "f"), finished, ())


def test_the_table_and_the_values_by_seed():
    summary = summarise(ran(), VERDICT)
    (row,) = summary["comparisons"]
    assert (row["method_mean"], row["baseline_mean"]) == (11.0, 10.0)
    assert (row["difference"], row["low"], row["high"]) == (1.0, 1.0, 1.0)
    assert (row["study"], row["metric"], row["label"], row["maximize"]) == ("main", "score", "score", True)
    assert summary["arms"]["main"] == {
        "method": {"score": [1.0, 11.0, 21.0]},
        "baseline": {"score": [0.0, 10.0, 20.0]},
    }
    assert summary["seeds"] == 3


def test_verdict_and_margins():
    summary = summarise(ran(), VERDICT)
    assert (summary["outcome"], summary["reason"]) == ("reproduced", "because")
    assert summary["margins"] == {"interval": {"estimate": 1.0, "low": 0.5, "high": 1.5}, "number": 2.0, "broken": None}
    nothing = summarise(ran(tier="smoke"), None)
    assert (nothing["outcome"], nothing["reason"], nothing["margins"]) == (None, None, {})


def test_it_is_strict_json():
    summary = summarise(ran(TUNED), VERDICT)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_tuning_shows_every_setting_and_the_one_picked():
    table = summarise(ran(TUNED), VERDICT)["tuning"]["main"]
    assert (table["metric"], table["maximize"]) == ("validation", True)
    assert [one["picked"] for one in table["arms"]["method"]] == [True, False, False, False]
    assert table["arms"]["method"][2] == {"settings": {"gain": 3.0}, "value": None, "picked": False}
    assert summarise(ran(TUNED), VERDICT)["settings"]["main"]["method"] == {"gain": 1.0}


def test_times_and_peaks():
    summary = summarise(ran(), VERDICT)
    assert summary["cell_seconds"] == 12.0
    assert summary["wall_seconds"] == 7.0  # six cells of 2 s, begun 1 s apart
    assert summary["peak_memory"] == 102
    assert summary["peak_cuda"] is None
    assert summary["date"] == "2024-05-06"


def test_wall_time_leaves_out_the_pause_between_two_runs():
    left = ran()
    keys = list(left.finished)
    late = {key: index >= 3 for index, key in enumerate(keys)}
    finished = {
        key: Record(
            one.metrics, {}, one.started.replace("00:00:", "09:00:") if late[key] else one.started, 2.0, 1, None, WHERE
        )
        for key, one in left.finished.items()
    }
    summary = summarise(Ran(left.plan, left.key, finished, ()), VERDICT)
    assert summary["wall_seconds"] == 4.0 + 4.0


def curve(key, points=1000):
    return {"loss": tuple((float(x), key.seed + x / 7) for x in range(points))}


def test_curves_are_thinned_with_their_ends_and_hold_mean_and_range():
    band = summarise(ran(curves=curve), VERDICT)["curves"]["main"]["loss"]["method"]
    assert len(band["x"]) == CURVE_POINTS
    assert (band["x"][0], band["x"][-1]) == (0.0, 999.0)
    x = np.array(band["x"])
    np.testing.assert_allclose(band["mean"], 1.0 + x / 7, rtol=1e-4)
    np.testing.assert_allclose(band["low"], 0.0 + x / 7, rtol=1e-4)
    np.testing.assert_allclose(band["high"], 2.0 + x / 7, rtol=1e-4)


def test_short_curves_are_whole():
    band = summarise(ran(curves=lambda key: curve(key, 5)), VERDICT)["curves"]["main"]["loss"]["method"]
    assert band["x"] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_curves_at_other_abscissas_are_interpolated():
    shifted = lambda key: {"loss": tuple((x + 0.5 * key.seed, 2.0 * (x + 0.5 * key.seed)) for x in range(20))}  # noqa: E731
    band = summarise(ran(curves=shifted), VERDICT)["curves"]["main"]["loss"]["baseline"]
    # y = 2 x for every seed, wherever all three seeds have points.
    assert band["mean"][5:] == pytest.approx([2 * x for x in band["x"][5:]])
    assert band["low"][5:] == pytest.approx(band["high"][5:])


def test_a_curve_that_diverges_draws_up_to_there():
    broken = lambda key: {"loss": ((0.0, 1.0), (1.0, math.inf), (2.0, math.nan))}  # noqa: E731
    band = summarise(ran(curves=broken), VERDICT)["curves"]["main"]["loss"]["method"]
    assert band["mean"] == [1.0, None, None]


def test_environments_differ_by_versions_and_threads_alone():
    assert len(environments(ran())) == 1
    left = ran()
    first, second, *_ = left.finished
    more = {**left.finished, first: Record({"score": 1.0}, environment={**WHERE, "hardware": {"cpu": "another"}})}
    assert len(environments(Ran(left.plan, left.key, more, ()))) == 1
    more[second] = Record({"score": 1.0}, environment={**WHERE, "threads": 2})
    assert len(environments(Ran(left.plan, left.key, more, ()))) == 2
