"""Comparing searchers: equal budgets and noise, regret without noise, and the searchers that come with the kind."""

from __future__ import annotations

import math

import pytest
import torch
from compare.planted_searchers import EVALUATIONS, QUIET, SEEN, Hill

from provenn.claims.workers import Inline
from provenn.compare.kinds._searchers import BoTorchSearch, RandomSearch, SobolSearch
from provenn.compare.kinds.search import KIND
from provenn.compare.lookup import find_task
from provenn.compare.ranking import rank
from provenn.compare.reporting import table, write
from provenn.compare.running import Comparison, PartResult, run_comparison


@pytest.fixture(autouse=True)
def clean():
    SEEN.clear()


def compared(*parts: str, task: str = "QUIET", seeds: int = 2) -> tuple[Comparison, list[PartResult]]:
    names = tuple(part if part in KIND.references else f"compare.planted_searchers.{part}" for part in parts)
    comparison = Comparison("search", f"compare.planted_searchers.{task}", names, trials=5, seeds=seeds)
    return comparison, run_comparison(comparison, Inline())


def test_there_is_nothing_to_tune_and_every_searcher_gets_the_same_budget() -> None:
    _, results = compared("Walker", "Seedless")
    assert [one.failure for one in results] == [None, None]
    assert [one.tried for one in results] == [[], []]
    assert [(run.seed, run.steps) for one in results for run in one.runs] == [(1, 6), (2, 6)] * 2
    assert [seed for name, seed, _ in SEEN if name == "walker"] == [1] * EVALUATIONS + [2] * EVALUATIONS
    assert [seed for name, seed, _ in SEEN if name == "seedless"] == [-1] * 2 * EVALUATIONS


def test_the_course_is_the_regret_of_what_is_recommended() -> None:
    _, results = compared("Walker", "Seedless", seeds=1)
    walker, seedless = (dict(one.runs[0].course) for one in results)
    wanted = {n + 1: (0.25 * (n % 4) - 0.25) ** 2 for n in range(EVALUATIONS)}
    for n, regret in wanted.items():
        assert walker[n] == pytest.approx(math.log10(max(regret, 1e-12)), abs=1e-9)
        assert seedless[n] == pytest.approx(math.log10(regret + 0.01), abs=1e-9)
    assert results[0].runs[0].score == walker[EVALUATIONS]


def test_values_are_told_with_noise_that_depends_on_seed_and_turn_alone_and_judged_without() -> None:
    compared("Walker", "Seedless", task="NOISY")
    noise = {}
    for name, off in (("walker", 0.0), ("seedless", 0.01)):
        told = [value for one, _, value in SEEN if one == name]
        places = [n % EVALUATIONS for n in range(2 * EVALUATIONS)]
        noise[name] = [value - (3 - (0.25 * (n % 4) - 0.25) ** 2 - off) for value, n in zip(told, places, strict=True)]
    assert noise["walker"] == pytest.approx(noise["seedless"], abs=1e-9)
    spread = torch.tensor(noise["walker"])
    assert len(set(noise["walker"])) == 12
    assert 0.25 < spread.std().item() < 1.0  # of 0.5; twelve draws
    assert {run.course for one in compared("Walker", "Seedless")[1] for run in one.runs} == {
        run.course for one in compared("Walker", "Seedless", task="NOISY")[1] for run in one.runs
    }


def test_less_regret_ranks_first_and_a_fault_stops_nothing(tmp_path) -> None:
    comparison, results = compared("Seedless", "Stuck", "Walker")
    rows = rank(results, KIND.maximize(QUIET))
    assert [row.result.part.rpartition(".")[2] for row in rows] == ["Walker", "Seedless", "Stuck"]
    assert "planted fault" in rows[-1].result.failure
    assert "no tuning" in str(table(comparison, rows).caption)
    paths = {path.suffix: path for path in write(comparison, rows, tmp_path)}
    assert paths[".png"].read_bytes().startswith(b"\x89PNG")
    assert '"course": [' in paths[".json"].read_text()
    assert '"over": "evaluations"' in paths[".json"].read_text()


@pytest.mark.parametrize("searcher", [RandomSearch, SobolSearch])
def test_plain_searchers_fill_the_bounds_and_follow_their_seed(searcher) -> None:
    bounds = torch.tensor([[0.0, -1.0], [10.0, 0.0]])
    one, same, other = (searcher(bounds, seed) for seed in (1, 1, 2))
    points = one.ask(200)
    assert torch.equal(points, same.ask(200))
    assert not torch.equal(points, other.ask(200))
    assert ((points >= bounds[0]) & (points <= bounds[1])).all()
    shares = (points - bounds[0]) / (bounds[1] - bounds[0])
    assert shares.amin() < 0.05
    assert shares.amax() > 0.95
    assert not torch.equal(one.ask(3), points[:3])


def test_the_best_of_what_was_told_leaves_failures_out() -> None:
    searcher = RandomSearch(Hill.bounds)
    points = searcher.ask(4)
    searcher.tell(points, [1.0, math.nan, 2.0, math.inf])
    assert searcher.best.value == 2.0
    assert torch.equal(searcher.best.point, points[2])
    with pytest.raises(RuntimeError, match="nothing was told"):
        RandomSearch(Hill.bounds).best  # noqa: B018


@pytest.mark.parametrize("name", ["ackley", "branin", "branin-noisy", "hartmann6", "hartmann6-noisy"])
def test_the_tasks_that_ship_have_their_optimum_where_it_is_published(name) -> None:
    task = find_task(name)
    assert task.kinds == {"search": {}}
    setup = task.setup(1, "cpu", tuning=False)
    for optimum in setup.objective.optimum:
        assert setup.regret(optimum) < 1e-4
    assert setup.regret(setup.bounds[0]) > 0.5
    assert (task.noise > 0) == name.endswith("noisy")
    points = SobolSearch(setup.bounds).ask(500)
    values = torch.tensor([setup.value(point) for point in points])
    assert 0.7 < values.std().item() < 1.4  # unit variance, 500 points
    assert values.max() < setup.objective.maximum


def test_botorch_searches_better_than_its_first_points() -> None:
    _, results = compared("botorch", "sobol", seeds=1)
    botorch, sobol = (dict(one.runs[0].course) for one in results)
    assert [one.failure for one in results] == [None, None]
    assert {n: botorch[n] for n in (1,)} == {n: sobol[n] for n in (1,)}
    before = torch.get_rng_state()
    regrets = []
    for searcher in (BoTorchSearch(Hill.bounds, seed=3), SobolSearch(Hill.bounds, seed=3)):
        for _ in range(13):
            points = searcher.ask(1)
            searcher.tell(points, Hill()(points).tolist())
        regrets.append(Hill.maximum - Hill()(searcher.best.point[None]).item())
    assert regrets[0] < 0.005 < regrets[1]  # the hill is 0.8 high
    assert torch.equal(before, torch.get_rng_state())
