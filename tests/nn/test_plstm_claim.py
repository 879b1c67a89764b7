"""pLSTM's claim: its verdicts on made-up evidence, its task and models."""

import math

import pytest
import torch

from provenn.claims.claim import Evidence, Metric, Trial
from provenn.claims.nn import plstm as claim
from provenn.claims.nn._plstm_models import ARMS, CONSTANT, GATED, INTERPOLATED, NO_POSITION, classifier, tokens
from provenn.core.experiment.seeding import seeded


def evidence(test=0.9, larger=0.85, interpolated=0.6, none=0.55, constant=0.99, seen=0.9):
    """Means over three seeds that differ; constant gates, however good, must not matter."""
    wanted = {
        GATED: (test, larger),
        CONSTANT: (0.99, constant),
        INTERPOLATED: (seen, interpolated),
        NO_POSITION: (0.5, none),
    }
    return Evidence.of(
        {
            ("tokens", arm): {
                "test_accuracy": [at - 0.01, at, at + 0.01],
                "accuracy at twice the size": [twice + 0.01, twice - 0.01, twice],
                "drop": [at - twice - 0.02, at - twice + 0.01, at - twice + 0.01],
            }
            for arm, (at, twice) in wanted.items()
        }
    )


@pytest.mark.parametrize(
    ("options", "outcome"),
    [
        ({}, "reproduced"),
        ({"larger": 0.8}, "reproduced"),  # a drop of 10, whichever way it rounds
        ({"larger": 0.799}, "not reproduced"),
        ({"interpolated": 0.8}, "reproduced"),  # a gap of 5
        ({"interpolated": 0.801}, "partly"),
        ({"none": 0.801}, "partly"),  # the better of the two
        ({"none": 0.849}, "partly"),
        ({"none": 0.851}, "not reproduced"),
        ({"test": 0.99, "larger": 0.84, "none": 0.8}, "partly"),  # the drop matters for the first verdict only
        ({"test": 0.64, "larger": 0.62, "interpolated": 0.5, "none": 0.5, "seen": 0.64}, "not reproduced"),
        ({"test": 0.66, "larger": 0.62, "interpolated": 0.5, "none": 0.5, "seen": 0.64}, "reproduced"),
        ({"test": 0.64, "larger": 0.62, "interpolated": 0.5, "none": 0.5, "seen": 0.66}, "reproduced"),
    ],
)
def test_judge(options, outcome):
    verdict = claim.judge(evidence(**options))
    assert verdict.outcome == outcome
    assert ("Void" in verdict.reason) is (options.get("test") == 0.64 and options["seen"] == 0.64)


def test_labels_of_tokens_by_geometry():
    grids, labels = tokens(2000, 8, torch.Generator().manual_seed(0))
    assert labels.double().mean().item() == pytest.approx(0.5, abs=0.05)
    turns = []
    for grid, label in zip(grids, labels.tolist(), strict=True):
        (arrow,), (circle,) = torch.nonzero(grid[..., 0]).tolist(), torch.nonzero(grid[..., 3]).tolist()
        assert arrow != circle
        heading = grid[arrow[0], arrow[1], 1:3]
        towards = torch.tensor([circle[0] - arrow[0], circle[1] - arrow[1]]).float()
        side = heading[0] * towards[1] - heading[1] * towards[0]
        turn = math.acos((heading @ towards / towards.norm()).clamp(-1, 1))
        assert (turn <= math.pi / 8 + 1e-3) if label else (turn >= math.pi / 8 - 1e-3)
        turns.append(turn * side.sign().item())
    missed = torch.tensor(turns)[labels == 0]
    assert missed.abs().min() < 0.45
    assert missed.abs().max() > 3.0
    assert (missed > 0).double().mean().item() == pytest.approx(0.5, abs=0.06)  # to either side
    hit = torch.tensor(turns)[labels == 1]
    assert hit.abs().min() < 0.05
    assert (hit > 0).double().mean().item() == pytest.approx(0.5, abs=0.06)


def test_arms_have_equal_parameters():
    sizes = [sum(p.numel() for p in classifier(arm, 8, 24, 2, 4, 6, 1).parameters()) for arm in ARMS]
    assert max(sizes) <= 1.1 * min(sizes)


@pytest.mark.parametrize("arm", ARMS)
def test_models_take_both_sizes(arm):
    with seeded(0):
        model = classifier(arm, 8, 24, 2, 4, 6, 1).double()
    x = tokens(3, 8, torch.Generator().manual_seed(0))[0].double()
    assert model(x).shape == (3, 2)
    assert model(tokens(2, 16, torch.Generator().manual_seed(0))[0].double()).shape == (2, 2)
    turned = (model(x.flip(1)) - model(x)).abs().max().item()
    if arm == NO_POSITION:
        assert turned < 1e-12  # sees a set of cells
    else:
        assert turned > 1e-9


def test_run_reports_what_the_rule_needs():
    trial = Trial(
        "tokens", INTERPOLATED, 0, "smoke", {**claim.CLAIM.studies["tokens"].tiers["smoke"].budget}, {"lr": 1e-3}
    )
    metrics = {event.name: event.value for event in claim.run(trial) if isinstance(event, Metric)}
    assert metrics["drop"] == pytest.approx(metrics["test_accuracy"] - metrics["accuracy at twice the size"])
    tuned = Trial("tokens", INTERPOLATED, 0, "smoke", trial.budget, {"lr": 1e-3}, tuning=True)
    names = {event.name for event in claim.run(tuned) if isinstance(event, Metric)}
    assert names == {"parameters", "validation_accuracy"}
