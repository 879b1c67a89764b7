"""Sparse MeZO's claim: its rule on made-up evidence, its arms, and what a cell reports."""

import math

import pytest
import torch

from provenn.claims import Evidence
from provenn.claims.claim import Cell, Metric, Point, Trial
from provenn.claims.optim import _rotated_digits as task
from provenn.claims.optim import sparse_mezo as claim

FOUND = {"MeZO": 0.80, "smallest": 0.83, "random": 0.82, "largest": 0.78}


def figures(found=None, stable=None):
    found = FOUND | (found or {})
    stable = {"MeZO": [1e-3] * 3, "smallest": [2e-3, 4e-3, 2e-3]} | (stable or {})
    made = {}
    for arm in claim.ARMS:
        value = found[arm.split()[0]]
        shift = {"0.5": 0.002, "0.75": -0.002}.get(arm.split()[-1], 0.0)  # the mean of both counts
        made["fine-tuning", arm] = {
            "test_accuracy": [value + shift - 0.01, value + shift, value + shift + 0.01],
            "share_in_mask": [0.2, 0.3, 0.4],
        }
    for arm in (*claim.SMALLEST, claim.MEZO):
        made["step size", arm] = {"largest_stable_lr": stable[arm.split()[0]]}
    return made


@pytest.mark.parametrize(
    ("found", "stable", "outcome"),
    [
        ({}, {}, "reproduced"),
        ({"smallest": 0.811, "random": 0.81}, {}, "reproduced"),
        ({"smallest": 0.809, "random": 0.80}, {}, "partly"),  # less than a point
        ({"random": 0.831}, {}, "partly"),
        ({"smallest": 0.796, "random": 0.9}, {}, "partly"),
        ({"smallest": 0.794}, {}, "not reproduced"),
        ({"largest": 0.9}, {}, "reproduced"),  # it has no part in the rule
        # Twice as large, as a geometric mean.
        ({}, {"smallest": [2e-3, 2e-3, 2e-3]}, "reproduced"),
        ({}, {"smallest": [1e-3, 2e-3, 4e-3]}, "reproduced"),
        ({}, {"smallest": [1e-3, 2e-3, 2e-3]}, "not reproduced"),
        ({"smallest": 0.9}, {"smallest": [1e-3, 1e-3, 1e-3]}, "not reproduced"),
        ({}, {"smallest": [0.0, 1e-2, 1e-2]}, "not reproduced"),  # a seed without any stable one
    ],
)
def test_judge(found, stable, outcome):
    assert claim.judge(Evidence.of(figures(found, stable))).outcome == outcome


def test_judge_reports_steps_and_shares():
    evidence = Evidence.of(figures())
    assert "30 % (smallest 0.5)" in claim.judge(evidence).reason
    curves = {claim.MEZO: ((0, 0.5), (100, 0.6), (200, 0.7)), "smallest 0.5": ((0, 0.5), (100, 0.7), (200, 0.8))}
    cells = dict(evidence.cells)
    for arm, curve in curves.items():
        key = ("fine-tuning", arm)
        cells[key] = tuple(Cell(one.seed, one.metrics, {"validation accuracy": curve}) for one in cells[key])
    reason = claim.judge(Evidence(cells)).reason
    assert "smallest 0.5 needs 100 steps to MeZO's final validation accuracy, MeZO 200" in reason
    assert "smallest 0.75" not in reason.split(";")[-1]


def test_arms_are_tuned_alike():
    study = claim.CLAIM.studies["fine-tuning"]
    assert set(study.arms) == set(claim.ARMS)
    assert [one["lr"] for one in study.tuning.of(claim.MEZO)] == [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    assert all(study.tuning.of(arm) == study.tuning.of(claim.MEZO) for arm in study.arms)
    assert claim.ARMS["largest 0.75"] == claim.Arm("largest", 0.75)
    assert claim.ARMS[claim.MEZO].sparsity == 0
    assert list(claim.LADDER) == sorted(claim.LADDER)


def cell(arm, study="fine-tuning", *, tuning=False, lr=1e-3, **options):
    budget = {**claim.CLAIM.studies[study].tiers["smoke"].budget, **options}
    events = list(claim.run(Trial(study, arm, 0, "smoke", budget, {"lr": lr}, tuning)))
    return {event.name: event.value for event in events if isinstance(event, Metric)}, events


def test_a_cell_reports_accuracy_share_and_memory():
    figures, events = cell("smallest 0.75")
    assert figures.keys() == {
        "validation_accuracy", "test_accuracy", "share_in_mask", "forward_bytes", "step_bytes"
    }  # fmt: skip
    shares = [event.y for event in events if isinstance(event, Point) and event.curve == "share in the mask"]
    assert shares[0] == pytest.approx(0.25, abs=0.005)
    assert figures["share_in_mask"] == shares[-1]
    assert [event.x for event in events if isinstance(event, Point)][::2] == [0, 20, 40]
    assert cell("smallest 0.5", tuning=True)[0].keys() == {"validation_accuracy", "share_in_mask"}
    assert cell(claim.MEZO)[0]["share_in_mask"] == 1.0


def test_the_mask_drains_where_weights_are_moved_far():
    assert cell("smallest 0.75", lr=0.05)[0]["share_in_mask"] < 0.1


def test_a_run_that_diverges_counts_with_what_it_had():
    figures, _ = cell(claim.MEZO, lr=1e30)
    assert figures["validation_accuracy"] >= 0.5
    assert math.isfinite(figures["test_accuracy"])


def test_the_ladder_ends_where_training_does(monkeypatch):
    assert 1e-4 <= cell(claim.MEZO, "step size", steps=100)[0]["largest_stable_lr"] < claim.LADDER[-1]
    tried, bound = [], [1.0]

    class Optimizer:
        def __init__(self, model, lr):
            self.model, self.lr, self.skipped = model, lr, 0

        def step(self, _):
            self.skipped += self.lr > bound[0]
            self.model[-1].weight.data.mul_(-1.5 if self.lr > 1e-3 else 1.0)  # still, or worse

    def build(arm, model, lr, seed):
        tried.append(lr)
        return Optimizer(model, lr)

    monkeypatch.setattr(claim, "_optimizer", build)
    for top, expected in ((1.0, [1e-4, 2e-4, 5e-4, 1e-3, 2e-3]), (4e-4, [1e-4, 2e-4, 5e-4])):
        tried.clear()
        bound[0] = top
        found = cell(claim.MEZO, "step size", steps=3)[0]["largest_stable_lr"]
        assert (found, tried) == (expected[-2], expected)


def test_fine_tuning_leaves_the_best_weights_and_ends_at_bad_losses():
    rotated = task.fine_tuning(task.SMOKE, 3)
    model = rotated.model()
    good = model[0].bias.detach().clone()
    count = iter(range(100))

    def step(x, y):
        if next(count) >= 3:
            raise RuntimeError("10 steps in a row were skipped")
        with torch.no_grad():
            model[0].bias.add_(100.0)

    found = list(task.fine_tune(rotated, model, step, rotated.batches(0, 32), [1, 3, 5]))
    assert [done for done, _ in found] == [0, 1, 3]
    assert torch.equal(model[0].bias, good)

    def other(x, y):
        raise RuntimeError("other")

    with pytest.raises(RuntimeError, match="other"):
        list(task.fine_tune(rotated, model, other, rotated.batches(0, 32), [1]))
