"""What holds of every claim that is built: its place, its tiers, its seeds, and a smoke run to the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from claims.running import Silent, result
from claims.test_reporting import Reader

from provenn.catalog.card import card
from provenn.claims.harness import run_cells
from provenn.claims.ledger import Ledger
from provenn.claims.plan import Plan
from provenn.claims.registry import built, find
from provenn.claims.reporting import page
from provenn.claims.summary import summarise
from provenn.claims.workers import Inline

TESTS = Path(__file__).parent.parent
FEWEST_SEEDS = 3


@pytest.fixture(params=built())
def slug(request) -> str:
    return request.param


def test_there_are_claims():
    assert built()


def test_a_claim_says_whose_it_is_and_what_it_claims(slug):
    claim = find(slug).claim
    assert claim.slug == slug
    assert claim.statement.strip()
    assert claim.rule.strip()
    assert claim.figures
    assert all(figure.text.strip() and figure.where.strip() for figure in claim.figures)


def test_a_claim_has_both_short_tiers_and_enough_seeds(slug):
    claim = find(slug).claim
    assert {"smoke", "small"} <= set(claim.tiers)
    # Where CI lacks a study's data, its smoke run is a study of its own, of the same arms on a simulator.
    smoked, judged = (
        {study.arms for study in claim.studies.values() if tier in study.tiers} for tier in ("smoke", "small")
    )
    for name, study in claim.studies.items():
        if set(study.tiers) == {"full"}:  # what only the paper's scale can show
            continue
        assert study.arms in smoked, name
        assert study.arms in judged, name
        assert "small" in study.tiers or set(study.tiers) == {"smoke"}, name
        if "small" in study.tiers:
            assert study.tiers["small"].seeds >= FEWEST_SEEDS, name


def test_the_method_comes_first_in_every_study(slug):
    claim = find(slug).claim
    for name, study in claim.studies.items():
        rows = [row for row in claim.comparisons if row.study == name]
        compares = len(study.arms) > 1 and "small" in study.tiers  # an arm alone is held to a bound by the judge
        assert rows or not compares, f"study {name} is in no comparison"
        assert all(row.method == study.arms[0] for row in rows[:1]), name


def test_the_judge_is_tested_for_every_outcome(slug):
    paper = card(slug)
    files = (TESTS / paper.area).glob(f"test_{paper.module_name}*.py")
    source = "".join(file.read_text() for file in files)
    for outcome in ("reproduced", "partly", "not reproduced"):
        assert f'"{outcome}"' in source, f"no test mentions {outcome!r}"


def test_the_smoke_tier_runs_to_the_end_and_leaves_what_the_rule_needs(slug):
    found = find(slug)
    plan = Plan(found.claim, "smoke")
    with Ledger() as ledger:
        ran = run_cells(found, plan, ledger, Inline(), Silent())
    assert not ran.failures
    assert plan.missing(ran.finished) == []
    assert result(ran)["outcome"] in ("reproduced", "partly", "not reproduced")  # the judge finds its metrics
    assert sum(record.seconds for record in ran.finished.values()) < 60
    assert Reader(page(found, "smoke", summarise(ran, None))).open == []
