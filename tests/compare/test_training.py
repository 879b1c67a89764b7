"""Comparing trainers: same weights, batches and epochs; what they predict is what counts."""

from __future__ import annotations

import pytest
import torch
from compare import planted
from compare.planted_trainers import EASY, SEEN
from torch import nn

from provenn.claims.workers import Inline
from provenn.compare.kinds import _trainers as trainers
from provenn.compare.kinds.training import KIND, Loader, Predictions, build
from provenn.compare.lookup import find_part
from provenn.compare.running import Comparison, PartResult, run_comparison

CATALOGUE = ("NoPropDT", "NoPropCT", "NoPropFM", "ForwardForwardTrainer", "DifferenceTargetPropagation")


@pytest.fixture(autouse=True)
def clean():
    SEEN.clear()


def compared(*parts: str, task: str, trials: int = 0, seeds: int = 2) -> list[PartResult]:
    return run_comparison(Comparison("training", task, parts, trials, seeds), Inline())


def test_settings_reach_parts_and_passes_get_batches_of_their_own() -> None:
    names = ("compare.planted_trainers.Constant", "compare.planted_trainers.Unlearned")
    results = compared(*names, task="compare.planted_trainers.TASK", trials=2)
    assert [one.failure for one in results] == [None, None]
    full = [one for one in SEEN if one.epochs == planted.EPOCHS]
    assert {one.seed for one in full} == {0, 1, 2}
    assert len({one.lr for one in full}) >= 2
    (counted,) = [one for one in full if one.seed == 1]
    per_pass = planted.STEPS // planted.EPOCHS
    assert len(counted.batches) == 2 * planted.STEPS
    assert not torch.equal(counted.batches[0], counted.batches[per_pass])  # the next pass has another order
    assert results[0].runs[0].steps == 2 * planted.STEPS
    (other,) = [one for one in SEEN if one.epochs == 1 and torch.equal(one.weight, counted.weight)][:1]
    assert torch.equal(other.batches[0], counted.batches[0])
    share = (planted.data().y_test == 1).double().mean().item()
    assert [run.score for one in results for run in one.runs] == [share] * 4


def test_sizes_are_read_off_a_perceptron() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    assert trainers.sizes_of(network) == [6, 5, 4, 3]
    with pytest.raises(ValueError, match="must be a perceptron"):
        trainers.sizes_of(nn.Conv2d(1, 1, 3))
    with pytest.raises(ValueError, match="must be a perceptron"):
        trainers.sizes_of(nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)]))


@pytest.mark.parametrize("name", CATALOGUE)
def test_trainers_of_the_catalogue_are_built_from_the_seed_and_learn(name: str) -> None:
    setup = EASY.setup(1, "cpu", tuning=False)
    settings = {"epochs": 15, "batch_size": 32, "seed": 1, "lr": 3e-3}
    one, two = (build(setup, find_part(KIND, name), settings) for _ in range(2))
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    loader, losses = Loader(setup), []
    one.fit(loader, progress=losses.append)
    assert len(losses) == 15
    assert loader.steps >= 15 * 8  # more where blocks pass over the data each on its own
    predicted = Predictions(one, setup)(setup.split.x_test[:7])
    assert predicted.shape == (7, 4)
    assert torch.equal(predicted.sum(1), torch.ones(7))
    assert setup.measure(Predictions(one, setup)) > 0.9  # chance is 0.25


def test_back_propagation_and_a_catalogued_trainer_on_the_digits() -> None:
    (one, two) = compared("backpropagation", "ForwardForwardTrainer", task="digits-mlp", seeds=1)
    assert [one.failure, two.failure] == [None, None]
    assert one.runs[0].score > 0.5
    assert one.runs[0].steps == two.runs[0].steps == 640
