"""The streams' dials, the report's quantities, and regret below the bounds that they imply."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from provenn.optim import (
    Ball,
    Box,
    DynamicOptimisticOMD,
    OptimisticOMD,
    SEAReport,
    SEAStream,
    Trajectory,
    sea_report,
)

ROUNDS = 256


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def start(dim, seed=5):
    x = torch.randn(dim, generator=seeded(seed), dtype=torch.float64)
    return nn.Parameter(0.3 * x / x.norm())


def against(stream, make, seed=0):
    """Play a method against a stream, in self-play the same method against it."""
    draws = stream.sample(1, seeded(seed))[0]
    x, y = start(stream.dim), start(stream.dim, seed=6)
    one, other = make([x]), make([y])
    points, opponents = [], []
    for z in draws:
        points.append(x.detach().clone())
        opponents.append(y.detach().clone())
        x.grad = stream.gradient(points[-1], z, opponents[-1]).clone()
        one.step()
        if stream.kind == "self-play":
            y.grad = -(points[-1] @ z)
            other.step()
    return Trajectory(torch.stack(points), draws, torch.stack(opponents))


def means(kind, **options):
    return SEAStream(kind, **{"dim": 3, "rounds": 40, "drift": 0.3, **options}).means


def test_each_kind_moves_its_means_as_it_says():
    assert means("iid").diff(dim=0).abs().max() == 0
    assert means("iid").norm(dim=-1)[0].item() == pytest.approx(0.5)
    torch.testing.assert_close(means("switch").diff(dim=0).norm(dim=-1), torch.full((39,), 0.3, dtype=torch.float64))
    moved = means("switch", period=5).diff(dim=0).norm(dim=-1)
    assert moved.nonzero().flatten().tolist() == [4, 9, 14, 19, 24, 29, 34]
    torch.testing.assert_close(means("drifting").diff(dim=0).norm(dim=-1), torch.full((39,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(means("drifting").norm(dim=-1), torch.full((40,), 0.5, dtype=torch.float64))
    for kind, options, wanted in (
        ("adversarial", {"count": 7}, 7),
        ("corrupted", {"rate": 0.25, "rounds": 4000}, 1000),
    ):
        away = (means(kind, **options) - means(kind, **{**options, "count": 0, "rate": 0.0})).norm(dim=-1)
        found = int((away > 0.29).sum())
        assert found == wanted if kind == "adversarial" else abs(found - wanted) < 5 * math.sqrt(750)
        assert ((away < 1e-12) | ((away - 0.3).abs() < 1e-12)).all()
    A = means("self-play")
    assert A.shape == (40, 3, 3)
    assert np.linalg.norm(A[0].numpy(), 2) == pytest.approx(1.0)


def test_another_seed_is_another_adversary_and_noise_has_one_length():
    assert not torch.equal(SEAStream("drifting", seed=1).means, SEAStream("drifting", seed=2).means)
    for kind, length in (("switch", 0.7), ("self-play", 0.7 * math.sqrt(3))):
        stream = SEAStream(kind, dim=3, sigma=0.7)
        noise = (stream.sample(4, seeded()) - stream.means).flatten(2)
        torch.testing.assert_close(noise.norm(dim=-1), torch.full((4, 100), length, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["switch", "drifting", "self-play"])
@pytest.mark.parametrize("loss", ["linear", "quadratic"])
def test_gradients_are_those_of_the_losses_and_below_their_bound(kind, loss):
    stream = SEAStream(kind, dim=3, rounds=50, sigma=0.4, loss=loss, curvature=1.7)
    z = stream.sample(1, seeded())[0]
    x = torch.nn.functional.normalize(torch.randn(50, 3, generator=seeded(1), dtype=torch.float64), dim=-1)
    y = torch.nn.functional.normalize(torch.randn(50, 3, generator=seeded(2), dtype=torch.float64), dim=-1)
    point = x.clone().requires_grad_()
    value = {
        "linear": lambda: (point * z).sum(),
        "quadratic": lambda: 1.7 / 2 * (point - z).square().sum(),
        "bilinear": lambda: torch.einsum("ti,tij,tj->", point, z, y),
    }[stream.loss]()
    value.backward()
    found = stream.gradient(x, z, y)
    torch.testing.assert_close(found, point.grad)
    assert found.norm(dim=-1).max().item() <= stream.lipschitz + 1e-12


def test_regret_online_equals_the_offline_sum():
    for kind in ("iid", "drifting", "self-play"):
        stream = SEAStream(kind, dim=4, rounds=60, sigma=0.5)
        trajectory = against(stream, lambda p: OptimisticOMD(p, Ball(1.0)))
        report = sea_report(stream, trajectory)
        online, gradients = 0.0, []
        for t in range(60):
            opponent = trajectory.opponents[t]
            gradients.append(stream.gradient(trajectory.points[t], trajectory.draws[t], opponent))
            online += float(gradients[-1] @ trajectory.points[t])
        total = torch.stack(gradients).sum(0)
        best = -total / total.norm()
        assert report.regret == pytest.approx(online - float(total @ best))
        assert report.regret == pytest.approx(online + float(total.norm()))
        assert report.checkpoints == (1, 2, 4, 8, 16, 32, 60)
        assert report.regrets[-1] == pytest.approx(report.regret)
        first = torch.stack(gradients[:8])
        assert report.regrets[3] == pytest.approx(
            float((first * trajectory.points[:8]).sum() + first.sum(0).norm()), abs=1e-12
        )


def test_expected_regret_is_of_the_means():
    stream = SEAStream("drifting", dim=3, rounds=30, sigma=0.6, loss="quadratic")
    trajectory = against(stream, lambda p: OptimisticOMD(p, stream.domain, smoothness=1.0))
    of_means = sea_report(stream, trajectory._replace(draws=stream.means))
    assert sea_report(stream, trajectory).expected_regret == pytest.approx(of_means.regret)
    u = stream.means.mean(0)
    u = u / max(1.0, u.norm().item())
    by_hand = 0.5 * ((trajectory.points - stream.means) ** 2).sum() - 0.5 * ((u - stream.means) ** 2).sum()
    assert of_means.regret == pytest.approx(by_hand.item())


@pytest.mark.parametrize(
    ("kind", "loss"), [("drifting", "linear"), ("drifting", "quadratic"), ("self-play", "bilinear")]
)
def test_sampled_quantities_are_near_the_exact_ones(kind, loss):
    options = {} if kind == "self-play" else {"loss": loss}
    stream = SEAStream(kind, dim=3, rounds=50, sigma=0.3, drift=0.4, curvature=2.0, **options)
    trajectory = against(stream, lambda p: OptimisticOMD(p, stream.domain, lipschitz=stream.lipschitz))
    exact = sea_report(stream, trajectory)
    before = torch.random.get_rng_state()
    sampled = sea_report(stream, trajectory, samples=400, generator=seeded(3))
    assert torch.equal(before, torch.random.get_rng_state())
    assert exact.exact
    assert not sampled.exact
    # 50 rounds of 400 draws: a relative error of 1/√20 000 each for the variance, more for the small drift.
    assert sampled.variance == pytest.approx(exact.variance, rel=0.03)
    assert sampled.drift == pytest.approx(exact.drift, rel=0.06, abs=0.05)
    scale = 4.0 if loss == "quadratic" else 1.0
    if kind == "drifting":
        assert exact.variance == pytest.approx(50 * 0.09 * scale)
        assert exact.drift == pytest.approx(49 * 0.16 * scale)
    else:
        squares = trajectory.opponents.square().sum(-1)
        assert exact.variance == pytest.approx(0.09 * squares.sum().item())
        moves = trajectory.opponents.diff(dim=0) @ stream.means[0].mT
        assert exact.drift == pytest.approx(moves.square().sum().item())


def test_two_samples_a_round_are_enough_for_estimates_without_bias():
    stream = SEAStream("drifting", dim=3, rounds=2000, sigma=0.3, drift=0.1)
    points = torch.zeros(2000, 3, dtype=torch.float64)
    trajectory = Trajectory(points, stream.means)
    sampled = sea_report(stream, trajectory, samples=2, generator=seeded(4))
    # Without the correction the drift of 20 would be found as 200, with half of it as 110.
    assert sampled.drift == pytest.approx(1999 * 0.01, abs=15)
    assert sampled.variance == pytest.approx(2000 * 0.09, rel=0.05)


KINDS = ("iid", "switch", "corrupted", "drifting", "adversarial", "self-play")


@pytest.mark.parametrize("kind", KINDS)
def test_convex_regret_is_below_the_bounds(kind):
    for loss in ("linear", "quadratic"):
        stream = SEAStream(kind, dim=3, rounds=ROUNDS, sigma=0.4, drift=0.6, loss=loss)
        options = {"lipschitz": stream.lipschitz, "smoothness": stream.smoothness}
        report = sea_report(stream, against(stream, lambda p, o=options: OptimisticOMD(p, Ball(1.0), **o)))
        assert report.regret <= report.path_bound
        assert report.expected_regret <= report.convex_bound


def test_the_bounds_written_out():
    stream = SEAStream("drifting", dim=3, rounds=10, sigma=0.4, drift=0.2, loss="quadratic")
    report = sea_report(stream, against(stream, lambda p: OptimisticOMD(p, stream.domain)))
    D, G = 2.0, stream.lipschitz
    wanted = 5 * 10**0.5 * D**2 + 2.5 * 5**0.5 * D * G + 5 * D * ((2 * 10 * 0.16) ** 0.5 + (9 * 0.04) ** 0.5)
    assert report.convex_bound == pytest.approx(wanted)
    # Written out for λ = L = 1: (16/λ)(2σ²max + Σ²max)(1 + log(1 + …)) and the three constants.
    a, total = 2 * 0.16 + 0.04, 2 * 1.6 + 0.36
    wanted = 16 * a * (1 + math.log(1 + total / a)) + 64 * math.log(1 + 8 * 2**0.5) + 4 * G * G + 1
    assert report.strongly_convex_bound == pytest.approx(wanted)
    beta = min(1 / (8 * G), 1 / G**2) / 2
    inner = 1 + beta / 3 * 1.6 + beta / 6 * 0.36 + beta / 24 * G**2
    wanted = 48 / beta * (math.log(inner) + math.log(33)) + 2 * (1 + beta / 2 * G**2)
    assert report.exp_concave_bound == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ["iid", "drifting", "adversarial"])
def test_curved_losses_have_regret_below_their_bounds(kind):
    stream = SEAStream(kind, dim=3, rounds=ROUNDS, sigma=0.4, drift=0.6, loss="quadratic")
    strongly = sea_report(
        stream,
        against(stream, lambda p: OptimisticOMD(p, stream.domain, mode="strongly-convex", strong_convexity=1.0)),
    )
    assert strongly.expected_regret <= strongly.strongly_convex_bound
    G = stream.lipschitz
    concave = sea_report(
        stream,
        against(stream, lambda p: OptimisticOMD(p, stream.domain, mode="exp-concave", lipschitz=G, alpha=1 / G**2)),
    )
    assert concave.expected_regret <= concave.exp_concave_bound


def test_a_fixed_smooth_loss_is_learnt_at_the_rate_of_its_constant():
    stream = SEAStream("iid", dim=3, rounds=1024, sigma=0.0, loss="quadratic")
    report = sea_report(
        stream, against(stream, lambda p: OptimisticOMD(p, stream.domain, lipschitz=stream.lipschitz, smoothness=1.0))
    )
    assert (report.variance, report.drift) == (0.0, 0.0)
    rounds, regrets = (np.array(values[6:], dtype=float) for values in (report.checkpoints, report.regrets))
    slope = np.polyfit(np.log(rounds), np.log(regrets / rounds), 1)[0]
    assert slope == pytest.approx(-1.0, abs=0.1)


def test_the_guess_pays_where_gradients_move_slowly():
    stream = SEAStream("self-play", dim=5, rounds=1000, sigma=0.0)
    regrets = {
        guess: sea_report(
            stream,
            against(stream, lambda p, g=guess: OptimisticOMD(p, stream.domain, lipschitz=1.0, optimism=g)),
        ).regret
        for guess in ("last", "none")
    }
    assert regrets["last"] < 0.5 * regrets["none"]


def test_the_dynamic_version_plays_streams_on_any_domain():
    stream = SEAStream("switch", dim=3, rounds=64, loss="quadratic")
    trajectory = against(
        stream, lambda p: DynamicOptimisticOMD(p, Box(-0.5, 0.5), 64, lipschitz=stream.lipschitz, smoothness=1.0)
    )
    assert trajectory.points.abs().max().item() <= 0.5


def test_the_report_comes_back_from_json_and_plots():
    stream = SEAStream("iid", dim=3, rounds=8)
    report = sea_report(stream, against(stream, lambda p: OptimisticOMD(p, stream.domain)))
    assert math.isnan(report.strongly_convex_bound)
    assert math.isnan(report.exp_concave_bound)
    assert SEAReport.from_json(report.to_json()).regrets == report.regrets
    assert report.plot().axes[0].get_xlabel() == "rounds"


def test_self_play_needs_an_opponent():
    stream = SEAStream("self-play", dim=3, rounds=4)
    with pytest.raises(ValueError, match="opponent"):
        stream.gradient(torch.zeros(3, dtype=torch.float64), stream.means[0])
