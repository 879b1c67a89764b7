"""The Monge gap's claim: the rule on made-up figures, the crossings, the data, and what the arms share."""

import itertools

import numpy as np
import pytest
import torch

from provenn.claims import Evidence
from provenn.claims.claim import Metric, Trial
from provenn.claims.losses import _monge_gap_arms as arms
from provenn.claims.losses import monge_gap as claim
from provenn.losses import l2_uvp, transport_cost_ratio

D2, D8, D16 = claim.DIMENSIONS


def judged(uvp=None, fit=None, crossed=(20.0, 60.0, 100.0)):
    """Judge figures {study: (with the gap, alone)} and crossings (Euclidean, squared, alone)."""
    uvp = {D2: (5.0, 20.0), D8: (10.0, 50.0), D16: (15.0, 60.0)} | (uvp or {})
    fit = dict.fromkeys(claim.DIMENSIONS, (1.0, 1.0)) | (fit or {})
    figures = {}
    for study in claim.DIMENSIONS:
        for place, arm in enumerate((arms.WITH_GAP, arms.ALONE, arms.CONVEX, arms.ENTROPIC)):
            one, other = uvp[study][min(place, 1)], fit[study][min(place, 1)]
            figures[study, arm] = {claim.UVP: [one - 1, one, one + 1], claim.FIT: [other, other, other]}
    for arm, count in zip((arms.EUCLIDEAN, arms.SQUARED, arms.ALONE), crossed, strict=True):
        figures[claim.CURVES, arm] = {claim.CROSSINGS: [count - 1, count, count + 1]}
    return claim.judge(Evidence.of(figures))


def test_reproduced_and_its_edges():
    verdict = judged()
    assert verdict.outcome == "reproduced"
    assert "15.0 % with the gap, 60.0 % without" in verdict.reason
    assert verdict.margins[f"UVP, {D8}"].estimate == pytest.approx(-40)
    assert verdict.margins[f"crossing pairs, {claim.CURVES}"].estimate == pytest.approx(-80)
    assert judged({D2: (15.0, 30.0)}, {D8: (1.2, 1.0)}).outcome == "reproduced"


@pytest.mark.parametrize(
    "change",
    [
        {"uvp": {D2: (5.01, 10.0)}},  # not halved in one dimension
        {"uvp": {D16: (15.01, 60.0)}},  # halved, and not close
        {"fit": {D8: (1.21, 1.0)}},  # closer at the expense of the fit
        {"crossed": (20.1, 60.0, 100.0)},
        {"crossed": (0.0, 0.0, 0.0)},  # nothing to fall
    ],
)
def test_one_condition_short_is_partly(change):
    assert judged(**change).outcome == "partly"


def test_halved_in_one_dimension_is_not_reproduced():
    assert judged({D2: (6.0, 10.0), D8: (30.0, 50.0)}).outcome == "not reproduced"
    assert judged({D2: (90.0, 200.0), D8: (90.0, 200.0), D16: (9.0, 9.0)}).outcome == "partly"


def test_crossings_by_solving_for_the_crossing_point():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 14, 2, generator=generator, dtype=torch.float64)
    found = 0
    for i, j in itertools.combinations(range(14), 2):
        s, t = torch.linalg.solve(torch.stack([y[i] - x[i], x[j] - y[j]], 1), x[j] - x[i]).tolist()
        found += 0 < s < 1 and 0 < t < 1
    assert arms.crossings(x, y) == found > 5
    assert arms.crossings(x, x + 1) == 0


def trial(study, arm, tuning=False, seed=0, **budget):
    tier = claim.CLAIM.studies[study].tiers["smoke"].budget
    settings = claim.SETTINGS[arm][0] if study != claim.CURVES else {}
    return Trial(study, arm, seed, "smoke", {**tier, **budget}, settings, tuning)


def test_gaussians_have_the_map_that_is_said_to_be_true():
    task = arms.gaussians(trial(D8, arms.WITH_GAP, **{"samples": 20_000, "held back": 300}), 8)
    moved = task.truth(task.source)
    for one, other in ((moved.mean(0), task.target.mean(0)), (moved.T.cov(), task.target.T.cov())):
        torch.testing.assert_close(one, other, rtol=0, atol=0.2)  # of up to 4, from 20 000 samples
    assert l2_uvp(task.truth, task.truth, task.source) == 0
    x, y = task.judged_by
    assert 0.8 < transport_cost_ratio(task.truth, x, y) < 1.25
    assert not torch.equal(task.judged_by[0], task.chosen_by[0])
    variances = torch.linalg.eigvalsh(arms._covariance(50, torch.Generator().manual_seed(0)))
    assert 0.25 <= variances.min() < 0.5
    assert 2 < variances.max() <= 4


def test_arms_share_samples_and_first_weights(monkeypatch):
    seen = []

    class StopError(Exception):
        pass

    def fit(self, source, target):
        seen.append((source, [p.clone() for p in self.model.parameters()], self))
        raise StopError

    monkeypatch.setattr(arms.MongeMapEstimator, "fit", fit)
    for arm in (arms.WITH_GAP, arms.ALONE, arms.CONVEX):
        with pytest.raises(StopError):
            list(claim.run(trial(D2, arm)))
    (source, first, one), (again, second, other), (third, _, convex) = seen
    assert torch.equal(source, again)
    assert torch.equal(source, third)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    assert one.gap_weight > 0
    assert one.gap is not None
    assert other.gap is convex.gap is None
    assert one.seed == other.seed == convex.seed
    assert one.steps == other.steps == convex.steps == 10


def test_every_arm_tries_nine_settings():
    assert {len(settings) for settings in claim.SETTINGS.values()} == {9}
    for settings in claim.SETTINGS.values():
        assert len({tuple(one.items()) for one in settings}) == 9
    assert {one["lr"] for one in claim.SETTINGS[arms.WITH_GAP]} <= {one["lr"] for one in claim.SETTINGS[arms.ALONE]}


@pytest.mark.parametrize("arm", [arms.EUCLIDEAN, arms.SQUARED, arms.ALONE])
def test_curves_run(arm):
    metrics = {event.name: event.value for event in claim.run(trial(claim.CURVES, arm)) if isinstance(event, Metric)}
    assert {claim.CROSSINGS, claim.FIT} <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("arm", [arms.WITH_GAP, arms.CONVEX, arms.ENTROPIC])
def test_gaussians_run_and_tune_without_the_judges_samples(arm, monkeypatch):
    metrics = {event.name: event.value for event in claim.run(trial(D2, arm)) if isinstance(event, Metric)}
    assert {claim.UVP, claim.FIT} <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    (chosen,) = claim.run(trial(D2, arm, tuning=True))
    assert chosen.name == claim.CHOSEN
    assert chosen.value > 0


def test_a_diverged_setting_loses_quietly(monkeypatch):
    def diverge(*args):
        raise FloatingPointError

    monkeypatch.setattr(claim, "fitted", diverge)
    (chosen,) = claim.run(trial(D2, arms.ALONE, tuning=True))
    assert np.isfinite(chosen.value)
    assert {event.name for event in claim.run(trial(D2, arms.ALONE))} >= {claim.UVP, claim.FIT}
