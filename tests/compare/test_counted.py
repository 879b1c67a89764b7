"""Tasks with a budget of evaluations: what counts, when a run ends, and what is noted on the way."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from compare.planted_counted import PROBLEMS, SLOPE, STEPS, Guessing
from scipy.optimize import minimize
from torch import nn

from provenn.claims.workers import Inline
from provenn.compare.kinds.optim import MARKS, make, unfit
from provenn.compare.lookup import find_kind, find_part, find_task, fitting_parts
from provenn.compare.ranking import rank
from provenn.compare.reporting import write
from provenn.compare.running import Comparison, PartResult, run_comparison
from provenn.compare.tasks import bilevel_tv, convex_logistic, finetune_mlp, shakespeare_gpt


@pytest.fixture(autouse=True)
def clean():
    PROBLEMS.clear()
    STEPS.clear()


def compared(*parts: str, trials: int = 0, seeds: int = 2) -> tuple[Comparison, list[PartResult]]:
    names = tuple(part if "." in part or part == "plain" else f"compare.planted_counted.{part}" for part in parts)
    comparison = Comparison("optim", "compare.planted_counted.SLOPE", names, trials, seeds)
    return comparison, run_comparison(comparison, Inline())


def test_a_gradient_counts_one_and_a_loss_a_third() -> None:
    _, (gradients, losses) = compared("torch.optim.SGD", "Guessing", seeds=1)
    assert gradients.runs[0].steps == 40
    assert losses.runs[0].steps == 60
    assert [problem.spent for problem in PROBLEMS] == pytest.approx([40, 40])
    assert STEPS[:3] == [0, 1, 2]
    assert STEPS[40:44] == [0, 0, 1, 1]  # both losses of a step see its batch


def test_the_course_follows_the_closed_form_at_marks_that_all_share() -> None:
    _, (result,) = compared("plain", trials=1, seeds=1)
    lr, run = result.settings["lr"], result.runs[0]
    assert lr == pytest.approx(math.sqrt(0.05 * 0.5))
    assert [x for x, _ in run.course] == pytest.approx([2 * k for k in range(1, MARKS + 1)])
    # w − 1 shrinks by 1 − lr a step, from −2 on.
    expected = [1 - 2 * (1 - lr) ** (2 * k) for k in range(1, MARKS + 1)]
    assert [y for _, y in run.course] == pytest.approx(expected, abs=1e-5)
    assert run.score == pytest.approx(expected[-1], abs=1e-5)
    seconds = [x for x, _ in run.front]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    assert [y for _, y in run.front] == [y for _, y in run.course]


def test_seeds_start_alike_for_every_part() -> None:
    compared("plain", "torch.optim.SGD", seeds=2)
    assert len(PROBLEMS) == 4


def test_a_part_that_never_evaluates_is_a_failure_and_no_endless_run() -> None:
    _, (idle, plain) = compared("Idle", "plain")
    assert "without evaluating its closure" in idle.failure
    assert plain.failure is None


def test_both_axes_are_drawn_and_written(tmp_path) -> None:
    comparison, results = compared("plain", "Guessing")
    paths = {path.suffix: path for path in write(comparison, rank(results, True), tmp_path)}
    assert paths[".png"].read_bytes().startswith(b"\x89PNG")
    written = json.loads(paths[".json"].read_text())
    assert written["cost"] == "seconds"
    assert written["over"].startswith("evaluations of the gradient")


def test_a_part_gets_parameters_the_model_or_an_optimizer_by_what_it_takes() -> None:
    model, seen = nn.Linear(2, 1), []

    def noted(*given) -> torch.optim.Optimizer:
        seen.append(given)
        return torch.optim.SGD(model.parameters())

    def plain(params, lr):
        return noted(list(params), lr)

    def whole(model, lr):
        return noted(model, lr)

    def named(params, model=None):
        return noted(list(params), model)

    def wraps(optimizer):
        return noted(optimizer.param_groups[0]["lr"])

    for part in (plain, whole, named, wraps):
        make(part, model, {"lr": 0.25})
    weights = list(model.parameters())
    assert seen[0][1] == seen[1][1] == seen[3][0] == 0.25
    assert all(a is b for a, b in zip(seen[0][0], weights, strict=True))
    assert seen[1][0] is seen[2][1] is model


def test_what_does_not_fit_is_told_apart() -> None:
    def whole(model, loss): ...
    def game(players, lr): ...
    def asks(params, horizon, lr): ...

    def network(model, lr=0.1):
        return torch.optim.SGD(model.parameters(), lr)

    def open_ended(params, lr=0.1, **more):
        return torch.optim.SGD(params, lr)

    def wraps(optimizer, eta=0.3):
        return optimizer

    def refuses(params, lr=0.1):
        raise ValueError("params must be planted\nand more")

    assert unfit(SLOPE, whole) == "needs loss"
    assert unfit(SLOPE, game) == "takes players first, not parameters or a model"
    assert unfit(SLOPE, asks) == "needs horizon"
    assert unfit(SLOPE, refuses) == "cannot take a step: params must be planted"
    for fitting in (network, open_ended, wraps, Guessing):
        assert unfit(SLOPE, fitting) is None
        assert unfit(find_task("digits-mlp"), fitting) is None
    assert unfit(find_task("digits-mlp"), refuses) == "cannot take a step: params must be planted"


def test_all_that_fits_a_task_is_found() -> None:
    kind, task = find_kind("optim"), find_task("convex-logistic")
    names, reasons = fitting_parts(kind, task)
    assert {"DiffGrad", "sgd", "lbfgs"} <= set(names)
    assert not set(names) & set(reasons)
    assert find_part(kind, "lbfgs", task) is convex_logistic.LBFGS


def test_the_least_logistic_loss_is_that_of_another_solver() -> None:
    x, y = convex_logistic.table()

    def value(w: np.ndarray) -> float:
        return float(np.log1p(np.exp(-y * (x @ w))).mean() + 0.0005 * (w**2).sum())

    start = convex_logistic.problem(1, "cpu", False)
    weights = start.model.weight.detach().numpy()[0]
    assert np.linalg.norm(weights) == pytest.approx(3)
    assert start.measure() == pytest.approx(math.log10(value(weights) - convex_logistic.minimum()), abs=1e-9)
    other = minimize(value, np.zeros(x.shape[1]), method="BFGS", options={"gtol": 1e-9, "maxiter": 3000})
    assert convex_logistic.minimum() == pytest.approx(other.fun, abs=1e-12)
    assert convex_logistic.minimum() <= other.fun + 1e-14


def test_second_order_beats_first_order_where_it_should() -> None:
    parts = ("lbfgs", "sgd")
    results = run_comparison(Comparison("optim", "convex-logistic", parts, 0, 1), Inline())
    assert [one.failure for one in results] == [None, None]
    assert results[0].runs[0].score < -10 < -1.5 < results[1].runs[0].score


def test_windows_of_a_text_do_not_overlap_and_are_told_one_token_later() -> None:
    tokens = torch.arange(103)
    x, y = shakespeare_gpt.windows(tokens, 10, 1000)
    assert torch.equal(x.flatten(), torch.arange(100))
    assert torch.equal(y, x + 1)
    few, later = shakespeare_gpt.windows(tokens, 10, 4)
    assert few[:, 0].tolist() == [0, 20, 50, 70]
    assert torch.equal(later, few + 1)
    assert shakespeare_gpt.windows(torch.arange(100), 10, 99)[1].max() == 90  # the last window would lack its target


def test_the_language_models_of_both_devices_have_their_sizes() -> None:
    model = shakespeare_gpt.SMALL()
    assert model(torch.zeros(2, 64, dtype=torch.int64)).shape == (2, 64, 65)
    guess = shakespeare_gpt.nats(model, torch.zeros(3, 64, dtype=torch.int64), torch.ones(3, 64, dtype=torch.int64))
    assert guess == pytest.approx(math.log(65), abs=0.2)


def test_fine_tuning_sees_each_steps_batch_again_and_starts_where_pretraining_left(monkeypatch) -> None:
    monkeypatch.setattr(finetune_mlp, "SIZES", finetune_mlp.SMOKE)
    problem = finetune_mlp.problem(1, "cpu", True)
    with torch.no_grad():
        first, again, second = problem.evaluate(0), problem.evaluate(0), problem.evaluate(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert problem.spent == pytest.approx(1)
    before = problem.measure()
    assert 0.3 < before < 1  # it knows upright digits
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    for step in range(100):
        optimizer.step(partial(problem.evaluate, step))
    assert problem.measure() > before
    assert finetune_mlp.problem(1, "cpu", False).measure() != before  # another set


def test_hypergradients_of_denoising_are_slopes_of_the_measured_loss(monkeypatch) -> None:
    monkeypatch.setattr(bilevel_tv, "TOLERANCE", 1e-7)
    monkeypatch.setattr(bilevel_tv, "SIDE", 12)
    problem = bilevel_tv.problem(1, "cpu", False)
    with torch.no_grad():
        problem.evaluate(0)
    losses_alone = problem.spent
    assert losses_alone > 0
    value = problem.evaluate(0)
    assert problem.spent > losses_alone
    theta = problem.model.theta
    assert problem.measure() == pytest.approx(value.item(), rel=1e-4)
    slopes = theta.grad.clone()
    for index in range(2):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                theta[index] += sign * 1e-2
            sides.append(problem.measure())
            with torch.no_grad():
                theta[index] -= sign * 1e-2
        assert slopes[index].item() == pytest.approx((sides[0] - sides[1]) / 2e-2, rel=0.02, abs=1e-4)


def test_bilevel_methods_count_their_own_iterations_and_move_theta() -> None:
    for make_method in (bilevel_tv.maid, bilevel_tv.hoag):
        problem = bilevel_tv.problem(1, "cpu", False)
        start, before = problem.model.theta.detach().clone(), problem.measure()
        method = make_method(problem.model, lr=0.1)
        for _ in range(4):
            method.step()
        assert problem.spent > 4
        assert not torch.equal(problem.model.theta, start)
        assert problem.measure() < before
