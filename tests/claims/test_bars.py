"""Bars: from a run through the ledger and the summary to the page."""

from __future__ import annotations

import json
import re

import pytest
from claims.running import go

from provenn.claims import Bar, figures
from provenn.claims.harness import judged
from provenn.claims.registry import find
from provenn.claims.reporting import page
from provenn.claims.summary import Summary, summarise


@pytest.fixture(scope="module")
def summary(tmp_path_factory) -> Summary:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROVENN_DB", str(tmp_path_factory.mktemp("ledger") / "ledger.sqlite"))
        ran = go("DRAWS")
    return summarise(ran, judged(ran.plan.claim, ran.plan.evidence(ran.finished)))


def test_a_curve_is_named_after_bars_and_back():
    assert Bar.place(Bar("chart", "row", "kind", 0, 1).curve) == ("chart", "row", "kind")
    assert Bar.place("loss") is None
    assert Bar.place("") is None


def test_the_first_seed_s_bars_are_kept_and_are_no_curves(summary):
    bars = summary["bars"]["main"]
    assert list(summary["curves"]["main"]) == ["level"]
    assert sorted(bars) == ["other chart", "schedule, in ms"]
    wanted = {("stage 0", "forward", 0, 0.5), ("stage 1", "forward", 1, 1.5), ("stage 0", "backward", 2, 2.5)}
    for arm in ("method", "baseline"):
        rows = bars["schedule, in ms"][arm]
        assert len(rows) == 3
        assert {(one["row"], one["kind"], one["start"], one["end"]) for one in rows} == wanted
    assert bars["other chart"] == {"method": [{"row": "row <b>", "kind": "kind & kind", "start": 0.0, "end": 1.0}]}
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_the_page_shows_a_chart_for_every_arm(summary):
    text = page(find("claims.fake_claims:DRAWS"), "small", summary)
    for words in ("schedule, in ms · method", "schedule, in ms · baseline", "other chart · method", "kind &amp; kind"):
        assert words in text
    assert "other chart · baseline" not in text
    assert "<b>" not in text


def test_a_summary_from_before_there_were_bars_is_shown(summary):
    older = {name: value for name, value in summary.items() if name != "bars"}
    assert "schedule" not in page(find("claims.fake_claims:DRAWS"), "small", older)


def test_bars_stand_where_they_belong():
    rows = [
        {"row": "b", "kind": "x", "start": 0.0, "end": 1.0},
        {"row": "a", "kind": "y", "start": 1.0, "end": 3.0},
        {"row": "b", "kind": "x", "start": 3.0, "end": 4.0},
    ]
    text = figures.bars(rows, "time", "name")
    assert text.count("var(--series-0)") >= 2
    assert text.count("var(--series-1)") >= 1
    assert re.search(r'aria-label="time, a row for each of a, b"', text)
    assert figures.bars(rows, "time", "name") == text
