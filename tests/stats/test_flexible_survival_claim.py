"""The claim of flexible survival: designs, Cox regression, and the rule on made-up evidence."""

import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter

from provenn.claims import Evidence, Metric, Trial
from provenn.claims.stats import flexible_survival as claim
from provenn.claims.stats._flexible_survival_designs import DESIGNS, cox


@pytest.mark.parametrize("name", DESIGNS)
def test_designs_censor_as_they_say(name):
    """30 % censored and a median of 1, within sampling error and the rounding of the constants."""
    X, T, event = DESIGNS[name].draw(40_000, name, "test")
    assert event.mean() == pytest.approx(0.7, abs=0.012)
    assert np.median(T) == pytest.approx(1, abs=0.03)
    assert X[:, 0].mean() == pytest.approx(0.5, abs=0.02)
    assert set(np.unique(X[:, 0])) == {0, 1}
    again = DESIGNS[name].draw(100, name, "test")
    assert not np.array_equal(again[1], DESIGNS[name].draw(100, name, "other")[1])
    np.testing.assert_array_equal(again[1], DESIGNS[name].draw(100, name, "test")[1])


def test_effects_are_where_the_design_puts_them():
    """The law is that of the four parameters, sample by sample."""
    design = DESIGNS["C: crossing hazards"]
    law = design.law_of(np.array([[1.0, 2.0]]))
    assert law.phi.log().item() == pytest.approx(-0.726 + 0.5 - 0.6)
    assert law.gamma.log().item() == pytest.approx(0.2 + 0.5 + 0.4)
    assert law.lam.item() == 1
    assert [claim.true_model(one) for one in DESIGNS.values()] == ["M(λ)", "M(φ)", "M(φγ)", "M(λ)"]


def test_cox_against_lifelines():
    X, T, event = DESIGNS["A: proportional hazards"].draw(300, "cox")
    table = pd.DataFrame({"x0": X[:, 0], "x1": X[:, 1], "T": T, "event": event})
    np.testing.assert_allclose(cox(X, T, event), CoxPHFitter().fit(table, "T", "event").params_, atol=1e-5)


def test_cox_with_ties_by_hand():
    """Breslow's score, Σ over events of x less the risk set's mean, is zero at the estimate."""
    X, T, event = DESIGNS["A: proportional hazards"].draw(80, "ties")
    T = np.ceil(4 * T)
    beta = cox(X, T, event)
    score = np.zeros(2)
    for i in np.flatnonzero(event):
        weights = np.exp(X @ beta) * (T[i] <= T)
        score += X[i] - weights @ X / weights.sum()
    np.testing.assert_allclose(score, 0, atol=1e-8)


def evidence(**changes):
    """Evidence on which every criterion holds; a change names study's letter and metric."""
    figures = {}
    for study, design in DESIGNS.items():
        metrics = {f"picked {name}": 0.0 for name in claim.FITS}
        metrics[f"picked {claim.true_model(design)}"] = 1.0
        metrics |= {f"relative error {place}": 0.02 for place in range(2 * len(design.effects))}
        metrics |= {"covered": 0.95, "cure fraction error": 0.01}
        metrics |= changes.get(study[0], {})
        figures[study, "APGW"] = {name: [value] * 2 for name, value in metrics.items()}
    return Evidence.of(figures)


@pytest.mark.parametrize(
    "changes",
    [
        {"A": {"picked M(λ)": 0.7, "picked M(φ)": 0.3}},
        {"B": {"picked M(φ)": 0.7, "picked M(λγ)": 0.3}},
        {"C": {"picked M(φγ)": 0.85, "picked M(φ)": 0.15}},
        {"C": {"relative error 3": -0.12}},
        {"D": {"relative error 1": 0.12}},
        {"D": {"covered": 0.89}},
        {"B": {"covered": 1.0}},
        {"D": {"cure fraction error": -0.03}},
        {"C": {"picked M(φγ)": 0.7, "picked M(φλγ)": 0.3}},
    ],
)
def test_one_failure_is_partly(changes):
    assert claim.judge(evidence(**changes)).outcome == "partly"


def test_all_or_too_few():
    verdict = claim.judge(evidence())
    assert verdict.outcome == "reproduced"
    assert verdict.margins["right scale in A"] == 1
    within = {"A": {"picked M(λ)": 0.5, "picked M(λγ)": 0.35, "picked M(φ)": 0.15}, "D": {"cure fraction error": -0.02}}
    assert claim.judge(evidence(**within)).outcome == "reproduced"
    two = {"A": {"covered": 0.8}, "D": {"cure fraction error": 0.05}}
    assert claim.judge(evidence(**two)).outcome == "not reproduced"


def test_both_scales_count_where_the_rule_says():
    """M(φλγ) in A is no model of the right scale alone; in D it does not count."""
    spread = {"D": {"picked M(φλγ)": 1.0, "picked M(λ)": 0.0}}
    assert claim.judge(evidence(**spread)).outcome == "reproduced"
    twice = {"A": {"picked M(φλγ)": 0.3, "picked M(λ)": 0.7}}
    assert claim.judge(evidence(**twice)).outcome == "not reproduced"


@pytest.mark.parametrize("study", DESIGNS)
def test_every_arm_leaves_what_is_compared(study):
    rows = [row for row in claim.CLAIM.comparisons if row.study == study]
    for arm in claim.CLAIM.studies[study].arms:
        trial = Trial(study, arm, 0, "smoke", {"samples": 120, "replicates": 1})
        left = {event.name: event.value for event in claim.run(trial) if isinstance(event, Metric)}
        assert all(np.isfinite(value) for value in left.values())
        for row in rows:
            if arm in (row.method, row.baseline):
                assert row.metric in left
