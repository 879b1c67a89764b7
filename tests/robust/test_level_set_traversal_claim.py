"""The claim of level set traversal: its baselines by hand, and its judge on made-up evidence."""

import pytest
import torch
from torch import nn

from provenn.claims import Evidence
from provenn.claims.robust import level_set_traversal as claim
from provenn.core.experiment.seeding import generator


class Brightness(nn.Module):
    """The confidence of class 1 is the mean brightness, by logits (log(1 − m), log m)."""

    def forward(self, x):
        mean = x.flatten(1).mean(1)
        return torch.stack([1 - mean, mean], dim=1).log()


def test_interpolation_stops_before_the_drop():
    x = torch.full((2, 1, 2, 2), 0.9)
    target = torch.stack([torch.full((1, 2, 2), 0.1), torch.full((1, 2, 2), 0.75)])
    ends = claim.interpolation(Brightness(), x, torch.tensor([1, 1]), target, steps=30)
    # 0.8 / 30 a step: seven and a half steps take 0.2. The second target is never refused.
    assert ends[0].flatten().tolist() == pytest.approx([0.9 - 7 * 0.8 / 30] * 4, abs=1e-5)
    assert ends[1].flatten().tolist() == pytest.approx([0.75] * 4, abs=1e-5)


class Valley(nn.Module):
    """Confident everywhere but around the middle of the way."""

    def forward(self, x):
        mean = x.flatten(1).mean(1)
        kept = torch.where((mean - 0.5).abs() < 0.1, 0.1, 0.9)
        return torch.stack([1 - kept, kept], dim=1).log()


def test_interpolation_does_not_jump_over_a_valley():
    x, target = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    ends = claim.interpolation(Valley(), x, torch.tensor([1]), target, steps=100)
    assert ends.mean().item() == pytest.approx(0.4, abs=0.011)


def test_random_walk_moves_and_stays_within_the_drop():
    x = torch.full((5, 1, 2, 2), 0.6)
    target = torch.ones(5, 1, 2, 2)
    ends = claim.random_walk(Brightness(), x, torch.ones(5, dtype=torch.long), target, 300, 0.2, generator(0))
    assert (ends != x).flatten(1).any(1).all()
    assert ends.flatten(1).mean(1).min() > 0.6 - 0.2 - 1e-6


def evidence(rmse=0.02, straight=0.2, within=1.0, star=0.9, robust=(0.6, 0.5, 0.7), normal=(0.3, 0.4, 0.5)):
    seeds = len(robust)

    def arm(rmse, triangles):
        return {
            "median RMSE to the target": [rmse] * seeds,
            "share within the drop": [1.0] * (seeds - 1) + [within],
            "share of star-like lines": [star] * seeds,
            "triangle fraction": triangles,
        }

    return Evidence.of(
        {
            ("robust", "LST"): arm(rmse, robust),
            ("robust", "interpolation"): arm(straight, normal),
            ("normal", "LST"): arm(rmse, normal),
        }
    )


@pytest.mark.parametrize(
    ("changed", "outcome"),
    [
        ({}, "reproduced"),
        ({"rmse": 0.0999}, "reproduced"),
        ({"star": 0.8}, "reproduced"),
        ({"normal": (0.3, 0.51, 0.5)}, "partly"),
        ({"normal": (0.3, 0.5, 0.5)}, "partly"),
        ({"rmse": 0.101}, "not reproduced"),
        ({"within": 0.975}, "not reproduced"),
        ({"star": 0.79}, "not reproduced"),
        ({"robust": (0.6,), "normal": (0.3,)}, "reproduced"),
    ],
)
def test_judge(changed, outcome):
    assert claim.judge(evidence(**changed)).outcome == outcome
