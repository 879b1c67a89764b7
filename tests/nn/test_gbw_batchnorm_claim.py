"""The claim on GBW batch normalisation: every verdict, the edges of its rule, its arms and its simulator."""

import pytest
import torch

from provenn.claims import Evidence
from provenn.claims.claim import Metric, Trial
from provenn.claims.nn import gbw_batchnorm as claim
from provenn.claims.nn._gbw_batchnorm_covariances import simulate
from provenn.claims.nn.gbw_batchnorm import AIM, ARMS, BW, CLAIM, GBW, ILL, LEM, NONE, WELL, judge, norm_of
from provenn.nn import GBWBatchNorm, SPDBatchNorm


def evidence(**points):
    """Accuracies in points, on each of three seeds; the well-conditioned study has its own and does not count."""
    means = {GBW: 80.0, BW: 79.0, AIM: 77.0, LEM: 95.0, NONE: 75.0} | points
    figures = {}
    for study, shift in ((ILL, 0.0), (WELL, 5.0)):
        for arm, mean in means.items():
            sign = 1 if study == ILL else -1
            values = [(50 + sign * (mean - 50) + shift + spread) / 100 for spread in (-2.0, 0.0, 2.0)]
            figures[study, arm] = {"test_accuracy": values}
    return Evidence.of(figures)


@pytest.mark.parametrize(
    ("points", "outcome"),
    [
        ({}, "reproduced"),
        ({BW: 80.0}, "reproduced"),  # a tie is enough
        ({BW: 80.1}, "not reproduced"),
        ({BW: 76.5}, "reproduced"),
        ({BW: 76.4}, "not reproduced"),
        ({AIM: 79.0, BW: 79.0}, "reproduced"),
        ({AIM: 79.1, BW: 79.0}, "partly"),
        ({AIM: 79.1, BW: 82.0}, "partly"),  # the order is asked for above alone
        ({AIM: 81.0}, "partly"),
        ({AIM: 81.1}, "not reproduced"),
        ({NONE: 79.0}, "reproduced"),
        ({NONE: 79.1}, "not reproduced"),
        ({NONE: 79.1, AIM: 80.0}, "not reproduced"),
        ({NONE: 79.0, AIM: 80.0}, "partly"),
        ({LEM: 0.0}, "reproduced"),  # is reported, and not asked about
    ],
)
def test_verdicts(points, outcome):
    verdict = judge(evidence(**points))
    assert verdict.outcome == outcome
    assert len(verdict.margins) == 6


def test_the_reason_names_every_margin():
    reason = judge(evidence(**{GBW: 80.25, BW: 79.0, AIM: 77.5, NONE: 70.0})).reason
    for figure in ("+1.25", "+1.50", "+10.25", "+2.75", "-2.75", "-10.25"):
        assert figure in reason


def test_arms_differ_in_the_norm_alone_and_get_as_many_settings():
    assert norm_of(NONE) is None
    assert [norm_of(arm)(4).geometry for arm in (AIM, LEM, BW)] == ["aim", "lem", "bw"]
    layer = norm_of(GBW, 0.5)(4)
    assert isinstance(layer, GBWBatchNorm)
    assert layer.theta == 0.5
    assert layer.metric is not None
    assert isinstance(norm_of(AIM)(4), SPDBatchNorm)
    for study in (ILL, WELL):
        tuning = CLAIM.studies[study].tuning
        settings = {arm: tuning.of(arm) for arm in ARMS}
        assert {len(one) for one in settings.values()} == {6}
        rates = {one["lr"] for one in settings[GBW]}
        assert rates == {5e-3, 1e-2, 5e-2}
        assert {one["theta"] for one in settings[GBW]} == {0.5, 1.0}
        assert all(rates < {one["lr"] for one in settings[arm]} for arm in ARMS if arm != GBW)


def test_small_budgets_are_the_cards():
    for study, decades in ((ILL, 6.0), (WELL, 1.0)):
        tier = CLAIM.studies[study].tiers["small"]
        assert tier.seeds == 5
        asked = {"train": 300, "test": 600, "epochs": 25, "tuning_epochs": 10, "decades": decades}
        assert {name: tier.budget[name] for name in asked} == asked


def test_simulated_covariances_are_as_conditioned_as_they_should_be():
    for seed in range(3):
        found = simulate(seed, (50, 10, 20), 6.0, 0.1, 0.5, 48)
        assert torch.linalg.cond(found.train[0]).median() >= 1e5
        copy = simulate(seed, (50, 10, 20), 1.0, 0.1, 0.5, 48)
        assert torch.linalg.cond(copy.train[0]).median() < 1e3
        assert [len(x) for x, _ in (found.train, found.validation, found.test)] == [50, 10, 20]
        assert found.train[0].shape[1:] == (1, 12, 12)
        assert set(found.train[1].tolist()) == {0, 1, 2, 3}


def test_simulation_depends_on_the_seed_alone():
    first, again, other = (simulate(seed, (5, 2, 3), 6.0, 0.1, 0.5, 48) for seed in (0, 0, 1))
    assert torch.equal(first.test[0], again.test[0])
    assert not torch.allclose(first.test[0], other.test[0])


def test_without_turns_classes_share_their_covariance():
    found = simulate(0, (4000, 1, 1), 1.0, 0.0, 0.0, 48, sessions=1)
    x, y = found.train
    means = torch.stack([x[y == label].mean(0) for label in range(4)])
    assert (means - means[0]).abs().max() < 0.05 * means.abs().max()


def test_tuning_sees_no_test_data_and_has_its_own_seed():
    budget = {**CLAIM.studies[ILL].tiers["smoke"].budget, "tuning_epochs": 1, "epochs": 1}
    found = []
    for seed, tuning in ((0, True), (1, True), (0, False)):
        trial = Trial(ILL, AIM, seed, "smoke", budget, {"lr": 1e-2}, tuning)
        found.append({event.name: event.value for event in claim.run(trial) if isinstance(event, Metric)})
    assert found[0] == found[1]
    assert "test_accuracy" not in found[0]
    assert found[2]["diverged"] == 0.0
    assert 0 <= found[2]["test_accuracy"] <= 1
    assert found[2]["median_condition_number"] > 1e5
