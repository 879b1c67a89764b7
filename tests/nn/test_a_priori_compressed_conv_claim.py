"""The claim's verdicts on made-up evidence, its networks, and its data."""

import pytest
import torch
from torch import nn

from provenn.claims import Evidence, Metric, Trial
from provenn.claims.nn import a_priori_compressed_conv as claim
from provenn.core.experiment.accounting import model_size
from provenn.core.experiment.seeding import seeded


def evidence(two=0.2, one=0.2, dense=0.2, narrow=0.3, shares=(0.15, 0.08)):
    errors = {claim.TWO: two, claim.ONE: one, claim.DENSE: dense}
    counts = {claim.DENSE: 1000, claim.TWO: 1000 * shares[0], claim.ONE: 1000 * shares[1]}
    return Evidence.of(
        {
            (claim.STUDY, arm): {
                claim.ERROR: [errors.get(arm, narrow)] * 3,
                "parameters": [counts.get(arm, 300)] * 3,
                claim.KEPT: [4000.0 if arm == claim.TWO else 1000.0] * 3,
            }
            for arm in claim.ARMS
        }
    )


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "reproduced"),
        ({"two": 0.2199, "one": 1.0}, "reproduced"),
        ({"two": 0.2201, "one": 1.0}, "partly"),
        ({"two": 1.0, "one": 0.2299}, "reproduced"),
        ({"two": 1.0, "one": 0.2301}, "partly"),
        ({"two": 0.2599, "one": 1.0}, "partly"),
        ({"two": 1.0, "one": 0.2599}, "partly"),
        ({"two": 0.2601, "one": 0.2601}, "not reproduced"),
        ({"shares": (0.25, 0.125)}, "reproduced"),
        ({"shares": (0.26, 0.13)}, "not reproduced"),  # good, but not small
        ({"shares": (0.26, 0.12), "one": 0.24}, "partly"),
        ({"dense": 0.5, "two": 0.2, "one": 0.2}, "not reproduced"),  # void
        ({"dense": 0.49, "two": 0.5, "one": 0.5}, "reproduced"),
    ],
)
def test_verdicts(changes, outcome):
    verdict = claim.judge(evidence(**changes))
    assert verdict.outcome == outcome
    assert len(verdict.margins) == 4
    assert ("Void" in verdict.reason) == (changes.get("dense") == 0.5)


def test_the_reason_says_who_loses_to_a_narrow_network():
    reason = claim.judge(evidence(two=0.25, one=0.35)).reason
    assert "one-way, R = 2 is no worse than a dense network of as many parameters, 0.250 to 0.300" in reason
    assert "one-way, R = 1 loses to a dense network of as many parameters, 0.350 to 0.300" in reason
    assert "one-way, R = 2 1.25 at 15.0%" in reason
    assert "over dense: one-way, R = 2 4.0, one-way, R = 1 1.0" in reason


def surrogate(arm):
    with seeded(0):
        return claim.surrogate(arm, 16, 5)


def test_the_networks_have_the_sizes_that_the_rule_asks_for():
    count = {arm: model_size(surrogate(arm)).parameters for arm in claim.ARMS}
    assert count[claim.DENSE] == 25 * (3 * 16 + 2 * 16 * 16 + 16 * 8) + 56
    assert count[claim.TWO] == 2 * (16 * 13 + 2 * 16 * 26 + 8 * 26) + 56
    assert count[claim.ONE] == 16 * 13 + 2 * 16 * 26 + 8 * 26 + 56
    for arm, narrow in claim.NARROW_OF.items():
        assert count[arm] <= count[claim.DENSE] * claim.LIMITS[arm][0]
        assert count[narrow] == pytest.approx(count[arm], rel=0.06)
    assert count[claim.CP] == pytest.approx(count[claim.TWO], rel=0.03)
    assert count[claim.TUCKER] <= count[claim.TWO]


@pytest.mark.parametrize("arm", claim.ARMS)
def test_every_network_keeps_the_image_and_starts_alike(arm):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = surrogate(arm)(x)
    assert out.shape == (2, 8, 32, 32)
    assert all(isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.ReLU | nn.Sequential) for part in surrogate(arm))


def test_dense_networks_start_with_the_variance_of_he():
    model = claim.surrogate(claim.DENSE, 200, 5)
    for layer, shares in zip((model[2], model[4]), (1, 4), strict=True):
        assert layer.weight.var().item() == pytest.approx(2 * shares / (200 * 25), rel=0.02)
        assert not layer.bias.any()


def test_the_waves_are_split_without_overlap():
    split = claim.waves(6, 2, 16)
    assert [tuple(x.shape) for x, _ in split] == [(6, 3, 16, 16), (2, 3, 16, 16), (2, 3, 16, 16)]
    assert split.train[1].shape == (6, 8, 16, 16)
    rows = torch.cat([x.flatten(1) for x, _ in split])
    assert len(rows.unique(dim=0)) == 10
    field = split.train[0][:, 0]
    assert field.abs().max() <= 1
    assert (field == 0).float().mean() > 0.8


def test_the_error_is_relative_to_each_field():
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    y = torch.randn(5, 8, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6).view(5, 1, 1, 1)
    assert claim.relative_error(Twice(), y, y) == pytest.approx(1.0, rel=1e-6)
    assert claim.relative_error(nn.Identity(), y, y) == 0


def test_memory_counts_what_a_wave_needs_and_no_other_data():
    budget = {"train": 4, "held": 2, "resolution": 16, "width": 16, "kernel": 5, "epochs": 1, "batch": 4}
    trial = Trial(
        study=claim.STUDY, arm=claim.DENSE, seed=0, tier="smoke", budget=budget, settings={"lr": 1e-3}, device="cpu"
    )
    found = {event.name: event.value for event in claim.run(trial) if isinstance(event, Metric)}
    # the inputs of the four layers: 3 × 16², 16 × 8², 16 × 4², 16 × 8² numbers; what ReLU gives is the next one's input
    floats = 3 * 256 + 16 * 64 + 16 * 16 + 16 * 64
    assert found[claim.KEPT] == pytest.approx(4 * floats, abs=56 * 4)
    assert found["bytes"] == 4 * (25 * (3 * 16 + 2 * 16 * 16 + 16 * 8) + 56)
