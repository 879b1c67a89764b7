"""EvoNorm's claim: every verdict that its judge can give, the edges of its rule, and what the arms share."""

import math

import pytest
import torch
from torch import nn

from provenn.claims import Evidence
from provenn.claims.nn.evonorm import B0, BN, CLAIM, GN, S0, TESTED, UNTESTED, judge, network
from provenn.nn import EvoNorm2d


def evidence(b0=0.5, s0=0.5, small=0.5, kept=0.75):
    """BN and GN reach 0.4 and the median of all proposals is 0.5, on each of three seeds."""
    spread = (-0.125, 0.0, 0.125)

    def around(value):
        return [value + one for one in spread]

    return Evidence.of(
        {
            ("images", B0): {"test_accuracy": around(b0)},
            ("images", BN): {"test_accuracy": around(0.4)},
            ("images", S0): {"test_accuracy": around(s0)},
            ("images", GN): {"test_accuracy": around(0.4)},
            ("small batches", S0): {"test_accuracy": around(small)},
            ("small batches", BN): {"test_accuracy": around(0.4)},
            ("search", TESTED): {"median_accuracy": around(kept)},
            ("search", UNTESTED): {"median_accuracy": around(0.5)},
        }
    )


@pytest.mark.parametrize(
    ("figures", "outcome"),
    [
        ({}, "reproduced"),
        ({"b0": 0.4}, "reproduced"),  # a tie is enough for B0
        ({"b0": 0.39}, "partly"),
        ({"s0": 0.4}, "partly"),  # and not for S0
        ({"small": 0.4}, "partly"),
        ({"kept": 0.69}, "partly"),
        ({"kept": 0.71}, "reproduced"),
        ({"b0": 0.3, "s0": 0.3}, "not reproduced"),
        ({"small": 0.3, "kept": 0.5}, "not reproduced"),
        ({"b0": 0.3, "s0": 0.3, "small": 0.3, "kept": 0.1}, "not reproduced"),
    ],
)
def test_verdicts(figures, outcome):
    verdict = judge(evidence(**figures))
    assert verdict.outcome == outcome
    assert len(verdict.margins) == 4


def test_the_reason_names_every_margin():
    reason = judge(evidence(b0=0.35, kept=0.875)).reason
    for figure in ("-5.00", "+10.00", "+37.5", "3 of 4"):
        assert figure in reason


def test_arms_share_the_weights_and_differ_in_the_layers():
    models = {}
    for arm in (B0, BN, S0, GN):
        torch.manual_seed(0)
        models[arm] = network(arm, 3, 8)
    for model in models.values():
        for one, other in zip(model.modules(), models[BN].modules(), strict=False):
            if isinstance(one, nn.Conv2d):
                assert torch.equal(one.weight, other.weight)
    kinds = {arm: {type(module) for module in model.modules()} for arm, model in models.items()}
    assert nn.BatchNorm2d in kinds[BN]
    assert not any(nn.BatchNorm2d in kinds[arm] for arm in (B0, S0, GN))
    assert {layer.kind for layer in models[S0].modules() if isinstance(layer, EvoNorm2d)} == {"S0"}
    groups = [one.num_channels // one.num_groups for one in models[GN].modules() if isinstance(one, nn.GroupNorm)]
    assert groups == [8] * 7
    pairs = [layer.apply_act for layer in models[B0].modules() if isinstance(layer, EvoNorm2d)]
    assert pairs == [True] * 7
    assert not any(isinstance(module, nn.ReLU) for module in models[B0].modules())


def test_arms_get_the_same_tuning_and_rates_follow_the_batch():
    large, small = (CLAIM.studies[name].tuning.settings for name in ("images", "small batches"))
    assert [one["lr"] for one in large] == [0.05, 0.15]
    assert all(math.isclose(a["lr"], 16 * b["lr"]) for a, b in zip(large, small, strict=True))
