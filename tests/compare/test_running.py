"""Comparisons on a planted task: equal budgets, same weights and data, right ranking, failures that stop nothing."""

from __future__ import annotations

import itertools
import math

import optuna
import pytest
import torch
from compare import planted

from provenn.claims.errors import UsageError
from provenn.claims.workers import Inline
from provenn.compare.lookup import find_task
from provenn.compare.ranking import rank
from provenn.compare.running import Comparison, PartResult, reason, run_comparison, spread_points


@pytest.fixture(autouse=True)
def log():
    planted.LOG.clear()
    yield planted.LOG
    planted.LOG.clear()


def compare(*parts: str, task: str = "compare.planted.UP", trials: int = 4, seeds: int = 3) -> list[PartResult]:
    return compare_named(*(f"compare.planted.{part}" for part in parts), task=task, trials=trials, seeds=seeds)


def compare_named(*parts: str, task: str, trials: int, seeds: int) -> list[PartResult]:
    return run_comparison(Comparison("optim", task, parts, trials, seeds), Inline())


def short(results: list[PartResult]) -> list[str]:
    return [one.part.rpartition(".")[2] for one in results]


def test_every_part_gets_the_same_runs_steps_weights_and_batches(log) -> None:
    results = compare("good", "poor", "rateless")
    runs = {name: [run for run in log if run.name == name] for name in ("good", "poor", "rateless")}
    for name, own in runs.items():
        assert len(own) == 4 + 3, name
        assert all(len(run.batches) == planted.STEPS for run in own)
    assert {run.steps for one in results for run in one.runs} == {planted.STEPS}
    assert [run.seed for run in results[0].runs] == [1, 2, 3]
    for first, *others in zip(*runs.values(), strict=True):
        for other in others:
            assert torch.equal(first.weights, other.weights)
            assert all(torch.equal(a, b) for a, b in zip(first.batches, other.batches, strict=True))


def test_seeds_differ_in_weights_order_and_augmentation_and_tuning_has_its_own(log) -> None:
    compare("good", "poor", trials=2, seeds=3)
    own = [run for run in log if run.name == "good"]
    tuning, seeds = own[:2], own[2:]
    assert torch.equal(tuning[0].weights, tuning[1].weights)
    for a in range(4):
        for b in range(a):
            one, other = [tuning[0], *seeds][a], [tuning[0], *seeds][b]
            assert not torch.equal(one.weights, other.weights)
            assert not torch.equal(one.batches[0], other.batches[0])
    # Every epoch has its own order and noise, and its batches come from the training data.
    per_epoch = planted.STEPS // planted.EPOCHS
    epochs = [torch.cat(seeds[0].batches[i : i + per_epoch]) for i in range(0, planted.STEPS, per_epoch)]
    train = planted.data().x_train
    orders = [torch.cdist(epoch, train).argmin(dim=1).tolist() for epoch in epochs]
    assert all(sorted(order) == list(range(planted.SAMPLES)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    noise = [epoch - train[order] for epoch, order in zip(epochs, orders, strict=True)]
    assert not torch.allclose(noise[0], noise[1], atol=1e-4)
    assert not torch.allclose(noise[1], noise[2], atol=1e-4)


def test_tuning_sees_validation_data_alone_and_seeds_test_data_alone(log) -> None:
    compare("good", "poor", trials=2, seeds=2)
    own = [run for run in log if run.name == "good"]
    assert [run.judged_by for run in own] == [[7], [7], [11], [11]]


def test_the_ranking_is_the_planted_one_both_ways() -> None:
    for task in ("UP", "DOWN"):
        results = compare("poor", "seedy", "good", task=f"compare.planted.{task}")
        by_name = dict(zip(short(results), results, strict=True))
        # The seedy part's scores lie in (−½, ½): below 1 and 3.
        expected = ["good", "poor", "seedy"] if task == "UP" else ["seedy", "poor", "good"]
        rows = rank(results, maximize=task == "UP")
        assert short([row.result for row in rows]) == expected
        assert [row.rank for row in rows] == [1, 2, 3]
        assert {run.score for run in by_name["good"].runs} == {3.0}
        assert rows[0].behind is None
        assert all(row.behind is not None and row.behind.low > 0 and row.beaten for row in rows[1:])


def test_the_paired_difference_is_taken_seed_by_seed() -> None:
    results = compare("good", "seedy")
    weights = [run.weights[0, 0].item() for run in planted.LOG if run.name == "seedy"][4:]
    row = rank(results, maximize=True)[1]
    assert row.score is not None
    assert row.behind is not None
    assert [run.score for run in row.result.runs] == pytest.approx(weights)
    assert row.score.estimate == pytest.approx(sum(weights) / 3)
    assert row.behind.estimate == pytest.approx(3 - sum(weights) / 3)
    assert row.behind.high == pytest.approx(3 - min(weights), abs=0.3)


def test_equal_means_share_a_rank() -> None:
    rows = rank(compare("poor", "good", "twin"), maximize=True)
    assert short([row.result for row in rows]) == ["good", "twin", "poor"]
    assert [row.rank for row in rows] == [1, 1, 3]
    assert not rows[1].beaten


def test_the_best_setting_that_was_tried_is_the_one_that_runs(log) -> None:
    for task, worst in (("UP", False), ("DOWN", True)):
        log.clear()
        (result, *_) = compare("peaked", "good", task=f"compare.planted.{task}", trials=8)
        tried = [(settings["lr"], score) for settings, score in result.tried]
        assert len({lr for lr, _ in tried}) == 8
        assert all(score == pytest.approx(-abs(math.log10(lr / 0.03)), abs=1e-5) for lr, score in tried)
        chosen = (min if worst else max)(tried, key=lambda one: one[1])[0]
        assert result.settings == {"lr": chosen}
        assert {run.lr for run in log if run.name == "peaked"} == {lr for lr, _ in tried}
        assert [run.lr for run in log if run.name == "peaked"][8:] == [chosen] * 3
    # Half the trials cover four decades evenly, so one lies within half a decade of the best.
    best = min(abs(math.log10(run.lr / 0.03)) for run in log if run.name == "peaked")
    assert best < 0.5


def test_the_first_half_of_the_trials_is_the_same_for_every_part() -> None:
    results = compare("good", "peaked", "poor", trials=6)
    settings = [[one["lr"] for one, _ in result.tried] for result in results]
    assert settings[0][:3] == settings[1][:3] == settings[2][:3]
    again = compare("peaked", "good", trials=6)
    assert [one for one, _ in again[0].tried] == [one for one, _ in results[1].tried]


@pytest.mark.parametrize("trials", [2, 3, 4])
def test_few_trials_are_spread_and_not_repeated(trials) -> None:
    (result, _) = compare("peaked", "good", trials=trials, seeds=1)
    rates = sorted(math.log10(settings["lr"]) for settings, _ in result.tried)
    assert len(rates) == trials
    # The range has four decades.
    assert min(b - a for a, b in itertools.pairwise(rates)) > 0.4


def test_without_trials_parts_run_with_their_defaults(log) -> None:
    results = compare("good", "rateless", trials=0)
    assert [run.lr for run in log] == [0.5] * 3 + [0.25] * 3
    assert results[0].settings == {}
    assert results[0].tried == []


def test_a_part_that_fails_gets_its_reason_and_stops_no_other() -> None:
    results = compare("raising", "good", "diverging", "poor", "unlucky")
    by_name = dict(zip(short(results), results, strict=True))
    assert "planted <b>fault</b>" in by_name["raising"].failure
    assert "every tuning run" in by_name["raising"].failure
    assert "nan" in by_name["diverging"].failure
    weights = {run.weights[0, 0].item() for run in planted.LOG if run.name == "good"}
    assert max(weights) > 0
    assert by_name["unlucky"].failure.startswith("seed ")
    assert "nan" in by_name["unlucky"].failure
    rows = rank(results, maximize=True)
    assert short([row.result for row in rows]) == ["good", "poor", "raising", "diverging", "unlucky"]
    assert [row.rank for row in rows] == [1, 2, None, None, None]


def test_a_setting_that_diverges_is_not_picked_but_counts(log) -> None:
    (result, _) = compare("fragile", "good", trials=6)
    assert result.failure is None
    assert len(result.tried) == 6
    assert any(math.isnan(score) for _, score in result.tried)
    assert result.settings["lr"] <= 0.02
    assert {run.score for run in result.runs} == {2.5}
    assert len([run for run in log if run.name == "fragile"]) == 6 + 3


def test_progress_adds_up_to_the_runs() -> None:
    told: dict[str, float] = {}
    parts = ("compare.planted.good", "compare.planted.raising")
    comparison = Comparison("optim", "compare.planted.UP", parts, 2, 3)
    run_comparison(comparison, Inline(), lambda part, share: told.update({part: told.get(part, 0) + share}))
    assert told == pytest.approx({parts[0]: 5.0, parts[1]: 2.0})


def test_a_task_may_be_made_by_a_call() -> None:
    assert find_task("compare.planted.made") is planted.UP


def test_a_part_of_the_catalogue_and_one_of_torch_learn_the_digits() -> None:
    results = compare_named("DiffGrad", "torch.optim.Adam", task="digits-mlp", trials=0, seeds=1)
    assert [one.failure for one in results] == [None, None]
    assert [one.runs[0].steps for one in results] == [640, 640]  # 40 epochs of 16 batches
    assert all(0.4 < one.runs[0].score <= 1 for one in results)


def test_an_optimizer_that_asks_for_a_closure_gets_one(log) -> None:
    (closing, _) = compare("closing", "good", trials=0, seeds=1)
    assert closing.failure is None
    # Its steps are counted, not its calls of the closure; each call sees the step's one batch.
    assert closing.runs[0].steps == planted.STEPS
    (run,) = [run for run in log if run.name == "closing"]
    assert len(run.batches) == 3 * planted.STEPS
    assert torch.equal(run.batches[0], run.batches[2])
    assert not torch.equal(run.batches[2], run.batches[3])
    assert closing.runs[0].score == 1.0  # gradients came where they were enabled, and only there


def test_a_wrapper_gets_an_optimizer_to_wrap() -> None:
    (wrapped, plain) = compare("wrapping", "good", trials=0, seeds=1)
    assert wrapped.failure is None
    assert wrapped.runs[0].score == plain.runs[0].score == 3.0


def test_names_are_checked_before_anything_runs(log) -> None:
    cases = [
        (Comparison("optm", "digits-mlp", ("a", "b"), 1, 1), "optim"),
        (Comparison("optim", "digit-mlp", ("a", "b"), 1, 1), "digits-mlp"),
        (Comparison("optim", "digits-mlp", ("torch.optim.Adam", "DifGrad"), 1, 1), "DiffGrad"),
        (Comparison("compress", "compare.planted.UP", ("magnitude", "random"), 1, 1), "not compress"),
    ]
    for comparison, word in cases:
        with pytest.raises(UsageError, match=word):
            run_comparison(comparison, Inline())
    assert log == []


def test_optuna_is_as_talkative_after_as_before(capsys) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    try:
        compare("good", "poor")
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
    assert capsys.readouterr() == ("", "")


def test_a_cause_is_told_in_one_line() -> None:
    assert reason("raised ValueError: lr must be > 0\nTraceback (most recent call last):\n  ...\n") == (
        "ValueError: lr must be > 0"
    )
    assert reason("worker was killed by SIGKILL") == "worker was killed by SIGKILL"


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_spread_points_fill_the_cube(dimensions) -> None:
    for count in (1, 4, 16):
        points = spread_points(count, dimensions)
        assert len(points) == count
        assert all(0 <= share < 1 for point in points for share in point)
    first = spread_points(16, dimensions)
    assert first[0] == [0.5] * dimensions
    for axis in range(dimensions):
        quarters = [int(point[axis] * 4) for point in spread_points(64, dimensions)]
        assert all(12 <= quarters.count(quarter) <= 20 for quarter in range(4))
    if dimensions == 1:
        gaps = sorted(point[0] for point in first)
        assert max(b - a for a, b in itertools.pairwise(gaps)) < 2 / 16
