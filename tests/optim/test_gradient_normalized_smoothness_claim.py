"""The verdict's rule on made-up evidence, its edges, and the problems that the claim is tested on."""

import itertools

import numpy as np
import pytest
import torch

from provenn.claims import Evidence
from provenn.claims.claim import Metric, Trial
from provenn.claims.optim import gradient_normalized_smoothness as claim

GOOD = {"reached": 1, "iterations": 20, "trials per iteration": 2.0, "linearity": 0.95}
ARMS = {
    "approximate": GOOD,
    "exact": {**GOOD, "iterations": 10},
    "zero": {**GOOD, "iterations": 400},
    "SuperUniversalNewton": {**GOOD, "iterations": 10},
}


def verdict(**changes):
    """The verdict where every problem goes well, but for changes ``{(study, arm): {metric: values}}``."""
    changed = changes.get("changes", {})
    figures = {}
    for study, (arm, metrics) in itertools.product(claim.CONVEX, ARMS.items()):
        figures[study, arm] = {
            name: [value, value] for name, value in {**metrics, **changed.get((study, arm), {})}.items()
        }
    return claim.judge(Evidence.of(figures))


def outcome(study, arm, metric, value):
    return verdict(changes={(study, arm): {metric: value}}).outcome


def test_all_well_is_reproduced():
    assert verdict().outcome == "reproduced"
    assert verdict().margins["largest ratio to exact"] == 2.0
    assert verdict().margins["largest ratio to zero"] == 0.05


@pytest.mark.parametrize("study", claim.CONVEX)
def test_edges_of_the_first_two_conditions(study):
    assert outcome(study, "exact", "iterations", 4) == "reproduced"
    assert outcome(study, "exact", "iterations", 3.9) == "not reproduced"
    assert outcome(study, "zero", "iterations", 200) == "reproduced"
    assert outcome(study, "zero", "iterations", 199) == "not reproduced"
    assert outcome(study, "approximate", "reached", 0) == "not reproduced"


@pytest.mark.parametrize("study", claim.CONVEX)
def test_edges_of_the_rest(study):
    assert outcome(study, "approximate", "trials per iteration", 2.2) == "reproduced"
    assert outcome(study, "approximate", "trials per iteration", 2.21) == "partly"
    assert outcome(study, "exact", "iterations", 12) == "reproduced"
    assert outcome(study, "exact", "iterations", 12.1) == "partly"
    assert outcome(study, "approximate", "linearity", 0.79) == ("partly" if study in claim.SOFT else "reproduced")
    assert outcome(study, "approximate", "linearity", 0.8) == "reproduced"


def test_the_verdict_names_what_was_missed():
    made = verdict(changes={("linear", "approximate"): {"reached": 0}})
    assert "misses the gap on linear" in made.reason


def test_the_line_is_fitted_to_the_middle_half():
    steps = np.arange(41)
    assert claim.linearity(list(np.exp(-0.3 * steps))) == pytest.approx(1.0)
    bent = np.exp(-0.3 * steps)
    bent[:9] = 5.0
    bent[33:] = 1e-16
    assert claim.linearity(list(bent)) == pytest.approx(1.0)
    assert claim.linearity(list(np.exp(np.cos(steps)))) < 0.3
    assert claim.linearity([1.0, 1e-9]) == 0.0


@pytest.mark.parametrize("study", claim.CLAIM.studies)
def test_minima_are_minima(study):
    problem = claim.build(study, claim.CLAIM.studies[study].tiers["smoke"].budget)
    x = torch.zeros(problem.size, dtype=torch.float64)
    found = claim.minimize("exact", problem, x, 300)
    assert found.certificate.status == "gap"
    # Nothing lies below: further steps from there find no more than rounding.
    more = claim.minimize_gns(problem.oracle, found.x, grad_tol=1e-9, max_iter=30)
    assert more.f >= problem.minimum - 1e-9 * max(1, abs(problem.minimum))


def test_every_arm_runs_from_the_same_start_to_the_gap():
    for arm in claim.ARMS:
        for study in ("linear", "linear, Fisher term", claim.SOFT[1]):
            budget = claim.CLAIM.studies[study].tiers["smoke"].budget
            events = list(claim.run(Trial(study, arm, 0, "smoke", budget)))
            figures = {event.name: event.value for event in events if isinstance(event, Metric)}
            assert figures["reached"] == 1, (arm, study)
            first = next(event for event in events if getattr(event, "curve", "") == "log10 of the gap")
            problem = claim.build(study, budget)
            start = torch.randn(problem.size, generator=claim.generator(0, "start"), dtype=torch.float64)
            f = problem.oracle.value(3 * start / start.norm()).item()
            assert first.y == pytest.approx(np.log10(f - problem.minimum))


def test_the_fisher_term_is_run_on_the_same_function():
    budget = claim.CLAIM.studies["linear"].tiers["small"].budget
    plain, fisher = (claim.build(study, budget) for study in ("linear", "linear, Fisher term"))
    x = torch.ones(plain.size, dtype=torch.float64)
    assert plain.oracle.value(x) == fisher.oracle.value(x)
    assert plain.minimum == pytest.approx(fisher.minimum, rel=1e-13)
