"""The verdict's rule on made-up evidence, its edges, and the rounds that the claim plays."""

import math

import pytest
import torch

from provenn.claims import Evidence
from provenn.claims.claim import Metric, Point, Trial
from provenn.claims.optim import _optimistic_omd_games as games
from provenn.claims.optim import optimistic_omd as claim
from provenn.optim import Ball, OptimisticOMD, SEAStream

GOOD = {
    **{(study, "OptimisticOMD"): {"slope": 0.0, "regret": 10.0} for study in claim.NOISES},
    **{(study, "OGD"): {"slope": 0.5, "regret": 40.0} for study in claim.NOISES},
    (claim.CURVED, "OptimisticOMD"): {"largest share of the bound": 0.2},
    (claim.MOVING, "DynamicOptimisticOMD"): {"regret, P = 64": 100.0},
    (claim.MOVING, "OptimisticOMD"): {"regret, P = 64": 400.0},
}
GOOD[claim.LOUD, "OptimisticOMD"]["slope"] = 0.45


def verdict(**cell):
    """The verdict where all goes well, but for one figure of one arm of one study."""
    figures = {key: {name: [value, value] for name, value in metrics.items()} for key, metrics in GOOD.items()}
    if cell:
        figures[cell["study"], cell["arm"]][cell["metric"]] = cell["values"]
    return claim.judge(Evidence.of(figures))


def outcome(study, arm, metric, value):
    return verdict(study=study, arm=arm, metric=metric, values=[value, value]).outcome


def test_all_well_is_reproduced():
    assert verdict().outcome == "reproduced"
    assert verdict().margins["least ratio of OGD's regret to ours"] == 4.0
    assert verdict().margins["dynamic over static regret"] == 0.25


@pytest.mark.parametrize(
    ("study", "arm", "metric", "inside", "outside"),
    [
        (claim.QUIET, "OptimisticOMD", "slope", 0.15, 0.16),
        (claim.QUIET, "OptimisticOMD", "slope", -1.0, 0.2),
        (claim.LOUD, "OptimisticOMD", "slope", 0.3, 0.29),
        (claim.LOUD, "OptimisticOMD", "slope", 0.55, 0.56),
        *((study, "OGD", "slope", 0.4, 0.39) for study in claim.NOISES),
        *((study, "OGD", "slope", 0.6, 0.61) for study in claim.NOISES),
        *((study, "OGD", "regret", 30.0, 29.9) for study in claim.NOISES),
        *((study, "OptimisticOMD", "regret", -5.0, 13.4) for study in claim.NOISES),
    ],
)
def test_the_games_decide_between_something_and_nothing(study, arm, metric, inside, outside):
    assert outcome(study, arm, metric, inside) == "reproduced"
    assert outcome(study, arm, metric, outside) == "not reproduced"


def test_bound_and_moving_comparator_decide_between_whole_and_part():
    share = {"study": claim.CURVED, "arm": "OptimisticOMD", "metric": "largest share of the bound"}
    assert verdict(**share, values=[0.2, 0.99]).outcome == "reproduced"
    assert verdict(**share, values=[0.2, 1.0]).outcome == "partly"
    assert verdict(**share, values=[-3.0, -2.0]).outcome == "reproduced"
    assert outcome(claim.MOVING, "DynamicOptimisticOMD", "regret, P = 64", 200.0) == "reproduced"
    assert outcome(claim.MOVING, "DynamicOptimisticOMD", "regret, P = 64", 201.0) == "partly"


def test_the_slope_between_noise_levels_is_shown_not_judged():
    assert outcome("self-play, σ = 0.1", "OptimisticOMD", "slope", 0.9) == "reproduced"


def test_the_verdict_names_what_was_missed():
    made = verdict(study=claim.LOUD, arm="OGD", metric="slope", values=[0.1, 0.1])
    assert "missed: OGD's slopes" in made.reason


def test_the_slope_is_of_logarithms_with_a_floor():
    marks = [250 * 2**k for k in range(7)]
    assert claim.slope(marks, [3 * mark**0.4 for mark in marks]) == pytest.approx(0.4)
    assert claim.slope(marks, [-1.0] * 7) == pytest.approx(0.0)


@pytest.mark.parametrize(("path", "pieces"), [(1, 2), (4, 3), (16, 9), (64, 33)])
def test_the_comparator_moves_by_its_path_length(path, pieces):
    directions = games.jumping_directions(660, path, seed=3)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(660, dtype=torch.float64))
    moves = directions.diff(dim=0).norm(dim=-1)
    assert moves.sum().item() == pytest.approx(path)
    assert int((moves > 1e-9).sum()) == pieces - 1


def test_dynamic_regret_of_a_player_who_stays():
    directions = games.jumping_directions(10, 4, seed=0)
    found = games.dynamic_regret(directions, 0.5, 0, lambda x: torch.optim.SGD([x], lr=0.0))
    assert found == pytest.approx(float((directions @ games.starting_point(0, "x").detach() + 1).sum()))


def test_players_face_the_same_draws_and_the_other_ones_last_point():
    stream = SEAStream("self-play", 5, 20, sigma=0.3)
    met = []

    class Watch(OptimisticOMD):
        def step(self, closure=None):
            met.append(self.param_groups[0]["params"][0].grad.clone())
            return super().step(closure)

    trajectory = games.self_play(stream, 1, lambda x: Watch([x], Ball(1.0), lipschitz=2.0))
    for t in range(20):
        torch.testing.assert_close(met[2 * t], trajectory.draws[t] @ trajectory.opponents[t])
        torch.testing.assert_close(met[2 * t + 1], -trajectory.draws[t].mT @ trajectory.points[t])
    again = games.self_play(stream, 1, lambda x: torch.optim.SGD([x], lr=0.1))
    torch.testing.assert_close(again.draws, trajectory.draws)
    torch.testing.assert_close(again.points[0], trajectory.points[0])


def test_every_study_runs_and_reports_what_the_judge_reads():
    for study, plan in claim.CLAIM.studies.items():
        for arm in plan.arms:
            events = list(claim.run(Trial(study, arm, 0, "smoke", {"rounds": 64})))
            figures = {event.name: event.value for event in events if isinstance(event, Metric)}
            assert all(math.isfinite(value) for value in figures.values())
            assert any(isinstance(event, Point) for event in events)
            wanted = {claim.CURVED: "largest share of the bound", claim.MOVING: "regret, P = 64"}.get(study, "slope")
            assert wanted in figures
