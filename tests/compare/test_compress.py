"""Comparing compressors: the same dense network, densities met, equal fine-tuning, the hypervolume recomputed."""

from __future__ import annotations

import math

import pytest
import torch
from compare import planted
from compare.planted_compressors import FINE_STEPS, LOSS_CALLS, SEEN
from torch import nn

from provenn.claims.workers import Inline
from provenn.compare.kinds import compress as kind
from provenn.compare.running import Comparison, PartResult, run_comparison


@pytest.fixture(autouse=True)
def clean():
    SEEN.clear()
    LOSS_CALLS[0] = 0


def compare(*parts: str, trials: int = 0, seeds: int = 2) -> list[PartResult]:
    names = tuple(part if part in kind.KIND.references else f"compare.planted_compressors.{part}" for part in parts)
    return run_comparison(Comparison("compress", "compare.planted_compressors.TASK", names, trials, seeds), Inline())


def test_every_part_gets_the_same_trained_network_untouched_by_the_others() -> None:
    results = compare("first", "second", "Sparsifier", "Rounds")
    assert [one.failure for one in results] == [None] * 4
    module = SEEN["second"]
    assert len(module) == 2 * len(kind.DENSITIES)
    for name in ("first", "Sparsifier", "Rounds"):
        for (mine, _, _), (other, _, _) in zip(SEEN[name], module, strict=True):
            assert all(torch.equal(mine[key], other[key]) for key in other)
    seeds = [SEEN["first"][0][0], SEEN["first"][len(kind.DENSITIES)][0]]
    assert not torch.equal(seeds[0]["weight"], seeds[1]["weight"])
    # It is trained, and not the initial network.
    from provenn.core.experiment.seeding import seeded

    with seeded(1, "weights"):
        initial = nn.Linear(4, 2)
    assert not torch.equal(initial.weight, seeds[0]["weight"])


def test_budgets_reach_parts_in_the_form_they_take() -> None:
    compare("second", "Sparsifier", "Rounds", seeds=1)
    assert [density for _, density, _ in SEEN["second"]] == [0.5, 0.2, 0.1, 0.05]
    assert [density for _, density, _ in SEEN["Sparsifier"]] == pytest.approx([0.5, 0.8, 0.9, 0.95])
    assert [density for _, density, _ in SEEN["Rounds"]] == [0.5, 0.2, 0.1, 0.05]
    assert [rounds for _, rounds, _ in SEEN["spent"]] == [4, 8, 11, 14]
    for _, rounds, _ in SEEN["spent"]:
        assert 0.8**rounds <= [0.5, 0.2, 0.1, 0.05][[4, 8, 11, 14].index(rounds)] < 0.8 ** (rounds - 1)


def test_fine_tuning_is_equal_however_often_it_is_called() -> None:
    results = compare("first", "second", "Sparsifier", seeds=1)
    assert [one.runs[0].steps for one in results] == [4 * FINE_STEPS] * 3
    # The dense network is trained once for the seed, or was by an earlier test of this process.
    dense = planted.STEPS
    assert LOSS_CALLS[0] in (3 * 4 * FINE_STEPS, 3 * 4 * FINE_STEPS + dense)
    (rounds,) = [one for one in compare("Rounds", "second", seeds=1) if one.part.endswith("Rounds")]
    assert rounds.runs[0].steps <= 4 * FINE_STEPS
    for spent, _, _ in SEEN["spent"]:
        assert sum(spent) <= FINE_STEPS
        assert max(spent) == max(1, FINE_STEPS // len(spent))


def test_the_score_is_the_hypervolume_of_the_front() -> None:
    (magnitude, random) = compare("magnitude", "random", seeds=2)
    full = 4 * 10
    for run in [*magnitude.runs, *random.runs]:
        assert len(run.front) == 4
        area, height = 0.0, 0.0
        for left, accuracy in sorted(run.front):  # the smallest reach furthest
            gain = accuracy - 0.25
            if gain > height and left < full:
                area += math.log10(full / left) * (gain - height)
                height = gain
        assert run.score == pytest.approx(area)


def test_what_is_no_module_fails_in_words() -> None:
    (bad, good) = compare("wrong", "magnitude", seeds=1)
    assert bad.failure == "seed 1: TypeError: a compressor must return a module, or a module and its report, got str"
    assert good.failure is None


@pytest.mark.parametrize(("name", "ordered"), [("magnitude", True), ("random", False)])
def test_reference_parts_keep_the_share_and_only_magnitude_keeps_the_largest(name, ordered) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    before = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).abs()
    pruned = kind.KIND.references[name](model, 0.1, lambda _: None)
    after = torch.cat([pruned[0].weight.flatten(), pruned[2].weight.flatten()])
    assert torch.count_nonzero(after) == 90
    assert (before[after != 0].min() >= before[after == 0].max()) == ordered
    assert torch.count_nonzero(pruned[0].bias) == 30
    assert {type(module) for module in pruned} == {nn.Linear, nn.ReLU}
    assert not any("mask" in key or "orig" in key for key in pruned.state_dict())


def test_pruned_weights_stay_zero_through_fine_tuning() -> None:
    model = nn.Linear(20, 30)

    def train(given: nn.Module) -> None:
        optimizer = torch.optim.Adam(given.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            given(torch.ones(2, 20)).square().sum().backward()
            optimizer.step()

    pruned = kind.KIND.references["magnitude"](model, 0.2, train)
    assert torch.count_nonzero(pruned.weight) == 120


def test_stored_bytes_takes_the_smaller_of_dense_and_packed() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(1.0)
        model[1].bias.zero_()
    buffers = 4 * 4 + 4 * 4 + 8
    # Weight and bias of the linear map and the norm's weight dense; the norm's bias packed, all zero: one byte.
    assert kind.stored_bytes(model) == 32 * 4 + 4 * 4 + 4 * 4 + 1 + buffers
    with torch.no_grad():
        model[0].weight.zero_()[0, :3] = 1.0
    assert kind.stored_bytes(model) == (4 + 3 * 4) + 4 * 4 + 4 * 4 + 1 + buffers
    assert kind.stored_bytes(nn.Linear(8, 4, bias=False).double()) == 32 * 8


def test_the_catalogues_pruner_fits() -> None:
    comparison = Comparison("compress", "compare.planted_compressors.TASK", ("SAPPruner", "magnitude"), 1, 1)
    results = run_comparison(comparison, Inline())
    assert [one.failure for one in results] == [None, None]
