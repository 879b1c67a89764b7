"""The proto-triplet and ICNN losses against loops over triples, closed forms, and invariances; episodes and trainer."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from provenn.claims import Evidence
from provenn.claims.losses import susana_losses as claim
from provenn.contracts import BadInput, FunctionCase, LossCase, TrainerCase
from provenn.core.experiment.seeding import generator
from provenn.losses import (
    Episode,
    EpisodeAccuracy,
    EpisodeLoss,
    EpisodeSampler,
    ICNNLoss,
    ProtoNetTrainer,
    ProtoNetTraining,
    ProtoTripletLoss,
    conv4,
    icnn_score,
)

N, D = 12, 3
Y = torch.arange(N) % 3


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


X = normal(N, D)


def distance(a, b) -> float:
    return math.sqrt(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) + 1e-6)


def neighbours(x, y, ref, ref_y, count: int) -> list[list[tuple[float, bool]]]:
    """Each anchor's nearest references, with whether they are of its class."""
    lists = []
    for i, (point, label) in enumerate(zip(x, y, strict=True)):
        all_of_them = [
            (distance(point, other), bool(label == other_label))
            for j, (other, other_label) in enumerate(zip(ref, ref_y, strict=True))
            if not (ref is x and i == j)
        ]
        lists.append(sorted(all_of_them)[:count])
    return lists


def loop_score(x, y, ref=None, ref_y=None, k: int = 4, ipc: int | None = None) -> float:
    """The score by plain loops over numbers."""
    x, y = x.tolist(), y.tolist()
    ref, ref_y = (x, y) if ref is None else (ref.tolist(), ref_y.tolist())
    fits = k + 2 < len(ref)
    if not fits:
        k = len(ref) - 2
    lists = neighbours(x, y, ref, ref_y, k + 1 if ipc is None else ipc)
    same, largest = [], 0.0
    for near in lists:
        others = [d for d, own in near if not own]
        scale = min(others) if others else math.inf
        row = [d / scale for d, _ in near[:k]]
        top = max(1.0, *row)
        own = [value / top for value, (_, mine) in zip(row, near[:k], strict=True) if mine]
        if own:
            same.append(sum(own) / len(own))
        largest = max([largest] + [d for d, mine in near[:k] if not mine])
    compact = 1 - (sum(same) / len(same) if same else 0.0)
    apart = []
    for near in lists:
        others = [d / largest for d, mine in near[:k] if not mine]
        if others:
            apart.append(sum(others) / len(others))
    spread = sum(apart) / len(apart) if apart else 1.0
    share = sum(mine for near in lists for _, mine in near[:k]) / (k * len(lists)) if fits else 1.0
    return ((compact + spread) / 2 + share) / 2


def loop_original(x, y, k: int, use_omega: bool) -> float:
    points, classes = x.tolist(), y.tolist()
    lists = neighbours(points, classes, points, classes, k)
    sums, own_all, other_all, shares = [], [], [], []
    for near in lists:
        low, high = near[0][0], near[-1][0]
        scaled = [((d - low) / (high - low + 1e-6), mine) for d, mine in near]
        own_all += [value if mine else 0.0 for value, mine in scaled]
        other_all += [0.0 if mine else value for value, mine in scaled]
        sums.append(sum(1 - value if mine else value for value, mine in scaled))
        shares.append(math.sqrt(sum(mine for _, mine in near) / k))
    compact = sum(math.sqrt(one / (max(sums) + 1e-6)) for one in sums) / len(sums)
    share = sum(shares) / len(shares)
    if not use_omega:
        return (compact + share) / 2
    omega = math.sqrt(1 - np.var(own_all, ddof=1) - np.var(other_all, ddof=1))
    return (compact + share + omega) / 3


def bad(argument: str, call, error: type[Exception] = ValueError) -> BadInput:
    return BadInput(argument, call, error)


P, Q, YQ = normal(4, D, seed=5), normal(6, D, seed=6), torch.tensor([0, 1, 2, 3, 0, 1])


def episode(draws: torch.Generator, dtype: torch.dtype):
    def draw(count: int) -> torch.Tensor:
        return torch.randn(count, D, generator=draws, dtype=torch.float64).to(dtype)

    return draw(6), torch.arange(6) % 3, draw(9), torch.arange(9) % 3


def clusters(draws: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes around their own centres."""
    labels = torch.arange(48) % 4
    centres = torch.randn(4, 5, generator=draws)
    return centres[labels] + 0.3 * torch.randn(48, 5, generator=draws), labels


def trainer(encoder: nn.Module | None = None, seed: int = 0, **options) -> ProtoNetTrainer:
    options = {"way": 3, "shot": 2, "query": 3, "epochs": 4, "episodes": 3, "step_size": 2, "lr": 0.01, **options}
    return ProtoNetTrainer(nn.Linear(5, 4) if encoder is None else encoder, EpisodeLoss(), seed=seed, **options)


CASES = [
    LossCase(
        part="provenn.losses.ProtoTripletLoss",
        make=lambda **options: ProtoTripletLoss(**options),
        inputs=lambda generator, dtype: (
            torch.randn(6, D, generator=generator, dtype=torch.float64).to(dtype),
            YQ,
            torch.randn(4, D, generator=generator, dtype=torch.float64).to(dtype),
        ),
        extremes=(
            lambda: (1e4 * Q, YQ, P),
            lambda: (-1e4 * Q, YQ, P),
            lambda: (torch.ones(6, D), YQ, torch.ones(4, D)),
            lambda: (Q, torch.zeros(6, dtype=torch.int64), P),
            lambda: (Q[:1], YQ[:1], P),
        ),
        bad_input=(
            bad("margin", lambda: ProtoTripletLoss(0.0)),
            bad("reduction", lambda: ProtoTripletLoss(reduction="median")),
            bad("prototypes", lambda: ProtoTripletLoss()(Q, YQ * 0, P[:1])),
            bad("query_labels", lambda: ProtoTripletLoss()(Q, YQ, P[:3])),
            bad("query_labels", lambda: ProtoTripletLoss()(Q, YQ[:5], P)),
            bad("query_labels", lambda: ProtoTripletLoss()(Q, YQ.double(), P), TypeError),
        ),
    ),
    LossCase(
        part="provenn.losses.ICNNLoss",
        make=lambda **options: ICNNLoss(**options),
        inputs=lambda generator, dtype: (
            torch.randn(2, N, D, generator=generator, dtype=torch.float64).to(dtype),
            Y.expand(2, N),
        ),
        extremes=(
            lambda: (1e4 * X, Y),
            lambda: (-1e4 * X, Y),
            lambda: (torch.ones(N, D), Y),
            lambda: (X, torch.zeros(N, dtype=torch.int64)),
            lambda: (X, torch.arange(N)),
            lambda: (X[:1], Y[:1], X, Y),
        ),
        bad_input=(
            bad("k", lambda: ICNNLoss(k=0)),
            bad("ipc", lambda: ICNNLoss(ipc=1)),
            bad("variant", lambda: ICNNLoss(variant="new")),
            bad("use_omega", lambda: ICNNLoss(use_omega=True)),
            bad("reduction", lambda: ICNNLoss(reduction="max")),
            bad("ipc", lambda: ICNNLoss(k=4, ipc=4)(X, Y)),
            bad("ipc", lambda: ICNNLoss(k=4, ipc=N)(X, Y)),
            bad("y", lambda: ICNNLoss()(X, Y[:5])),
            bad("x", lambda: ICNNLoss()(X[:0], Y[:0], X, Y)),
        ),
    ),
    FunctionCase(
        part="provenn.losses.icnn_score",
        call=lambda: icnn_score(X, Y),
        bad_input=(
            bad("ref", lambda: icnn_score(X, Y, X)),
            bad("ref_y", lambda: icnn_score(X, Y, X, Y[:3])),
            bad("ref", lambda: icnn_score(X, Y, X[:2], Y[:2])),
            bad("ref", lambda: icnn_score(X, Y, X.expand(2, N, D), Y.expand(2, N))),
            bad("k", lambda: icnn_score(X, Y, k=0)),
            bad("variant", lambda: icnn_score(X, Y, variant="other")),
            bad("use_omega", lambda: icnn_score(X, Y, use_omega=True)),
        ),
    ),
    LossCase(
        part="provenn.losses.EpisodeLoss",
        make=lambda **options: EpisodeLoss(k=2, **options),
        inputs=episode,
        reductions=False,
        reductions_reason="the loss of one episode is one number",
        extremes=(
            lambda: (1e4 * X[:6], Y[:6], 1e4 * Q, YQ % 3),
            lambda: (-1e4 * X[:6], Y[:6], -1e4 * Q, YQ % 3),
            lambda: (torch.ones(6, D), Y[:6], torch.ones(6, D), YQ % 3),
            lambda: (X[:3], Y[:3], Q, YQ % 3),
            lambda: (X[:6], Y[:6], Q[:1], YQ[:1]),
        ),
        bad_input=(
            bad("terms", lambda: EpisodeLoss(("cross", "other"))),
            bad("terms", lambda: EpisodeLoss(())),
            bad("weights", lambda: EpisodeLoss(("cross",), weights=(1.0, 2.0))),
            bad("weights", lambda: EpisodeLoss(("cross",), weights=(0.0,))),
            bad("temperature", lambda: EpisodeLoss(temperature=0.0)),
            bad("k", lambda: EpisodeLoss(k=0)),
            bad("margin", lambda: EpisodeLoss(margin=-1.0)),
            bad("support_labels", lambda: EpisodeLoss(("cross",))(X[:4], Y[:4] * 0, Q, YQ * 0)),
            bad("support_labels", lambda: EpisodeLoss(("cross",))(X[:4], torch.tensor([0, 0, 2, 2]), Q, YQ % 3)),
            bad("query_labels", lambda: EpisodeLoss(("cross",))(X[:6], Y[:6], Q, YQ)),
            bad("support", lambda: EpisodeLoss(("cross",))(X[:0], Y[:0], Q, YQ)),
        ),
    ),
    FunctionCase(
        part="provenn.losses.EpisodeSampler",
        call=lambda: EpisodeSampler(Y, 2, 1, 2, torch.Generator().manual_seed(0)).sample(),
        bad_input=(
            bad("way", lambda: EpisodeSampler(Y, 1, 1, 1)),
            bad("shot", lambda: EpisodeSampler(Y, 2, 0, 1)),
            bad("query", lambda: EpisodeSampler(Y, 2, 1, 0)),
            bad("labels", lambda: EpisodeSampler(Y, 4, 1, 1)),
            bad("labels", lambda: EpisodeSampler(Y, 3, 2, 3)),
            bad("way", lambda: EpisodeSampler(Y, 2.0, 1, 1), TypeError),
        ),
    ),
    FunctionCase(
        part="provenn.losses.Episode",
        call=lambda: Episode(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64), YQ[:2]),
        bad_input_reason="a plain tuple of three tensors",
    ),
    FunctionCase(
        part="provenn.losses.EpisodeAccuracy",
        call=lambda: EpisodeAccuracy(0.5, 0.01, 100),
        bad_input_reason="a plain tuple of three numbers",
    ),
    FunctionCase(
        part="provenn.losses.ProtoNetTraining",
        call=lambda: ProtoNetTraining([], nn.Identity()),
        bad_input_reason="a plain tuple of history and encoder",
    ),
    FunctionCase(
        part="provenn.losses.conv4",
        call=lambda: conv4(1, 4)(torch.zeros(2, 1, 16, 16)),
        bad_input=(bad("channels_in", lambda: conv4(0)), bad("width", lambda: conv4(1, 0))),
    ),
    TrainerCase(
        part="provenn.losses.ProtoNetTrainer",
        make=trainer,
        model=lambda: nn.Linear(5, 4),
        data=clusters,
        rounds=4,
        bad_input=(
            *(
                bad(name, lambda name=name, value=value: trainer(**{name: value}))
                for name, value in {
                    "way": 1, "shot": 0, "query": 0, "epochs": 0, "episodes": 0, "step_size": 0, "lr": 0.0, "gamma": 2,
                }.items()
            ),
            bad("labels", lambda: trainer(way=5).fit(*clusters(torch.Generator().manual_seed(0)))),
            bad("labels", lambda: trainer().fit(torch.zeros(4, 5), Y[:3])),
            bad("episodes", lambda: trainer().evaluate(*clusters(torch.Generator()), way=3, query=3, episodes=1)),
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("k", "ipc"), [(4, None), (1, None), (3, 8), (9, None), (2, 11)])
def test_the_score_equals_loops_over_triples(seed: int, k: int, ipc: int | None) -> None:
    x = normal(N, D, seed=seed)
    y = torch.randint(3, (N,), generator=torch.Generator().manual_seed(seed))
    assert icnn_score(x, y, k=k, ipc=ipc).item() == pytest.approx(loop_score(x, y, k=k, ipc=ipc), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_other_references_keep_their_nearest(seed: int) -> None:
    x, ref = normal(5, D, seed=seed), normal(9, D, seed=seed + 50)
    y, ref_y = torch.arange(5) % 3, torch.arange(9) % 3
    assert icnn_score(x, y, ref, ref_y).item() == pytest.approx(loop_score(x, y, ref, ref_y), abs=1e-12)
    # A reference on the anchor itself is a neighbour at √1e-6, not skipped as the anchor would be.
    on_top = torch.cat([x[:1], ref + 10])
    classes = torch.cat([y[:1], ref_y])
    assert icnn_score(x[:1], y[:1], on_top, classes, k=1, ipc=9).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("use_omega", [False, True])
@pytest.mark.parametrize("k", [3, 5])
def test_the_original_score_equals_loops(use_omega: bool, k: int) -> None:
    for seed in range(4):
        x, y = normal(N, D, seed=seed), torch.randint(3, (N,), generator=torch.Generator().manual_seed(seed))
        found = icnn_score(x, y, k=k, variant="original", use_omega=use_omega).item()
        assert found == pytest.approx(loop_original(x, y, k, use_omega), abs=1e-12)
    with pytest.warns(UserWarning, match="3 are rated"):
        reduced = icnn_score(X, Y, k=N, variant="original")
    assert reduced == icnn_score(X, Y, k=3, variant="original")


def test_perfect_clusters_score_one() -> None:
    centres = 10 * torch.eye(3, dtype=torch.float64)
    y = torch.arange(18) % 3
    loss = ICNNLoss()(centres[y], y)
    assert loss.item() == pytest.approx(0.0, abs=1e-3)
    assert icnn_score(centres[y], y).item() <= 1
    five = torch.arange(15) % 3  # k + 1 of each: the next neighbour is of another class, far away
    assert icnn_score(centres[five], five).item() == pytest.approx(1.0, abs=1e-3)


def test_all_on_one_point_have_no_separation() -> None:
    # A billionth apart, so that no neighbours are tied: λ_same = 0 and λ_diff = 1, and the score is (½ + γ)/2.
    y = torch.arange(12) % 2
    x = 1e-9 * normal(12, D)
    near = distance_order(x)[:, :9]
    gamma = (y[near] == y[:, None]).double().mean().item()
    assert icnn_score(x, y, k=9, ipc=10).item() == pytest.approx((0.5 + gamma) / 2, abs=1e-6)


def test_random_labels_share_neighbours_by_chance() -> None:
    # With labels drawn anew, γ is (n_class − 1)/(n − 1) on the mean.
    draws, found = torch.Generator().manual_seed(0), []
    x = normal(12, 2)
    for _ in range(400):
        y = (torch.arange(12) % 3)[torch.randperm(12, generator=draws)]
        near = distance_order(x)[:, :4]
        share = (y[near] == y[:, None]).double().mean().item()
        assert icnn_score(x, y).item() == pytest.approx(loop_score(x, y), abs=1e-12)
        found.append(share)
    assert np.mean(found) == pytest.approx(3 / 11, abs=4 * np.std(found) / math.sqrt(len(found)))


def distance_order(x: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x, x).fill_diagonal_(torch.inf).argsort(dim=1)


def test_the_score_ignores_rotation_translation_scale_and_order() -> None:
    rotation = torch.linalg.qr(normal(D, D, seed=9))[0]
    base = icnn_score(X, Y)
    torch.testing.assert_close(icnn_score(X @ rotation + 5, Y), base, rtol=0, atol=1e-9)
    torch.testing.assert_close(icnn_score(100 * X, Y), base, rtol=0, atol=1e-5)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(icnn_score(X[order], Y[order]), base)
    torch.testing.assert_close(icnn_score(X, (Y + 1) % 3), base)


def test_sets_are_rated_one_by_one_and_reduced() -> None:
    many = normal(4, N, D, seed=3)
    labels = Y.expand(4, N)
    found = icnn_score(many, labels)
    for one, value in zip(many, found, strict=True):
        torch.testing.assert_close(icnn_score(one, Y), value)
    losses = ICNNLoss(reduction="none")(many, labels)
    torch.testing.assert_close(losses, -found.log())
    torch.testing.assert_close(ICNNLoss()(many, labels), losses.mean())
    torch.testing.assert_close(ICNNLoss(reduction="sum")(many, labels), losses.sum())


def test_the_share_of_neighbours_carries_no_gradient_but_counts() -> None:
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(icnn_score(x, Y), x)
    eps, numeric = 1e-6, torch.zeros_like(X)
    for i, j in itertools.product(range(N), range(D)):
        moved = X.clone()
        moved[i, j] += eps
        numeric[i, j] = (icnn_score(moved, Y) - icnn_score(X, Y)) / eps
    torch.testing.assert_close(slope, numeric, rtol=1e-4, atol=1e-6)


def test_too_many_neighbours_are_reduced_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="k = 4 is too many for 5 references: 3 are rated"):
        found = icnn_score(X, Y, X[:5] + 1, Y[:5])
    assert found.item() == pytest.approx(loop_score(X, Y, X[:5] + 1, Y[:5]), abs=1e-12)


def test_no_neighbour_of_the_own_class_is_defined() -> None:
    x = X.clone().requires_grad_()
    loss = ICNNLoss()(x, torch.arange(N))
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    assert loss.item() == pytest.approx(-math.log(loop_score(X, torch.arange(N))), abs=1e-12)


def test_the_triplet_equals_a_loop_and_its_gradient_the_formula() -> None:
    q = Q.clone().requires_grad_()
    losses = ProtoTripletLoss(0.7, "none")(q, YQ, P)
    for i, label in enumerate(YQ.tolist()):
        to = [distance(Q[i].tolist(), p) for p in P.tolist()]
        wrong = min((d, k) for k, d in enumerate(to) if k != label)
        assert losses[i].item() == pytest.approx(max(0.0, to[label] - wrong[0] + 0.7), abs=1e-12)
        (slope,) = torch.autograd.grad(losses[i], q, retain_graph=True)
        pull = (Q[i] - P[label]) / to[label] - (Q[i] - P[wrong[1]]) / wrong[0]
        torch.testing.assert_close(slope[i], pull if losses[i] > 0 else 0 * pull)
    torch.testing.assert_close(ProtoTripletLoss(0.7)(Q, YQ, P), losses.mean())
    torch.testing.assert_close(ProtoTripletLoss(0.7, "sum")(Q, YQ, P), losses.sum())


def test_moving_towards_the_own_prototype_never_hurts_and_far_queries_rest() -> None:
    loss = ProtoTripletLoss(reduction="none")
    terms = torch.stack([loss(Q + t * (P[YQ] - Q), YQ, P) for t in torch.linspace(0, 1, 21)])
    assert (terms.diff(dim=0) <= 1e-12).all()
    prototypes = torch.tensor([[0.0, 0.0], [10.0, 0.0]], dtype=torch.float64)
    query = torch.tensor([[1.0, 0.0], [5.1, 0.0]], dtype=torch.float64, requires_grad=True)
    values = loss(query, torch.tensor([0, 0]), prototypes)
    values.sum().backward()
    assert values.tolist() == pytest.approx([0.0, 5.1 - 4.9 + 0.5], abs=1e-6)
    assert not query.grad[0].any()
    assert query.grad[1].tolist() == pytest.approx([2.0, 0.0], abs=1e-6)


def test_an_episode_is_the_mean_of_its_terms() -> None:
    support, ys = X[:6], Y[:6]
    query, yq = Q, YQ % 3
    means = torch.stack([support[ys == c].mean(0) for c in range(3)])
    squares = torch.tensor(
        [[sum((a - b) ** 2 for a, b in zip(q, m, strict=True)) for m in means.tolist()] for q in query.tolist()],
        dtype=torch.float64,
    )
    expected = {
        "cross": (squares / 2 + (-squares / 2).logsumexp(1, keepdim=True))[torch.arange(6), yq].mean(),
        "support": -math.log(loop_score(support, ys)),
        "query": -math.log(loop_score(query, yq, support, ys)),
        "prototypes": -math.log(loop_score(query, yq, means, torch.arange(3))),
        "full": -math.log(loop_score(torch.cat([support, query]), torch.cat([ys, yq]), ipc=5)),
        "triplet": ProtoTripletLoss(0.5)(query, yq, means),
    }
    for term, value in expected.items():
        assert EpisodeLoss((term,), temperature=2.0)(support, ys, query, yq).item() == pytest.approx(
            float(value), abs=1e-10
        )
    pair = EpisodeLoss(("cross", "triplet"), temperature=2.0)(support, ys, query, yq)
    assert pair.item() == pytest.approx(float(expected["cross"] + expected["triplet"]) / 2, abs=1e-10)
    weighted = EpisodeLoss(("cross", "triplet"), (3.0, 1.0), temperature=2.0)(support, ys, query, yq)
    assert weighted.item() == pytest.approx(float(3 * expected["cross"] + expected["triplet"]) / 4, abs=1e-10)


def test_episodes_hold_classes_once_and_no_sample_twice() -> None:
    labels = torch.tensor([5] * 7 + [2] * 7 + [9] * 7 + [4] * 3)
    sampler = EpisodeSampler(labels, 3, 2, 4, torch.Generator().manual_seed(0))
    seen = set()
    for drawn in itertools.islice(sampler, 40):
        assert drawn.support.shape == (3, 2)
        assert drawn.query.shape == (3, 4)
        everything = torch.cat([drawn.support, drawn.query], dim=1)
        assert len(set(everything.flatten().tolist())) == 18
        assert torch.equal(labels[everything], drawn.classes[:, None].expand(3, 6))
        assert set(drawn.classes.tolist()) == {5, 2, 9}  # class 4 is too small
        seen |= set(everything.flatten().tolist())
    assert seen == set(range(21))
    again = EpisodeSampler(labels, 3, 2, 4, torch.Generator().manual_seed(0)).sample()
    first = EpisodeSampler(labels, 3, 2, 4, torch.Generator().manual_seed(0)).sample()
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_training_separates_classes_and_evaluation_counts_right_queries() -> None:
    x, labels = clusters(torch.Generator().manual_seed(1))
    unmixed = trainer(nn.Identity())
    sampler = EpisodeSampler(labels, 3, 2, 5, None)
    assert sampler.sample().query.shape == (3, 5)
    found = unmixed.evaluate(x, labels, way=3, query=5, episodes=60, seed=4)
    again = unmixed.evaluate(x, labels, way=3, query=5, episodes=60, seed=4)
    assert found == again
    shares = []
    replay = EpisodeSampler(labels, 3, 2, 5, generator(4, "test episodes"))
    for drawn in itertools.islice(replay, 60):
        right = 0
        for row, queries in enumerate(drawn.query):
            for q in queries:
                to = [(x[q] - x[support].mean(0)).norm().item() for support in drawn.support]
                right += to.index(min(to)) == row
        shares.append(right / 15)
    assert found.mean == pytest.approx(np.mean(shares))
    assert found.half_width == pytest.approx(1.96 * np.std(shares, ddof=1) / math.sqrt(60))
    noisy = torch.cat([x, 6 * normal(48, 20, seed=8, dtype=torch.float32)], dim=1)  # the classes are in five of 25
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = nn.Linear(25, 5)
    learner = trainer(encoder, epochs=10, episodes=20, step_size=20)
    before = learner.evaluate(noisy, labels, way=3, query=5, episodes=100).mean
    history = learner.fit(noisy, labels).history
    assert learner.evaluate(noisy, labels, way=3, query=5, episodes=100).mean > before + 0.2
    assert history[-1].loss < history[0].loss


def test_the_rate_falls_by_steps_of_epochs() -> None:
    rates = []

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    x, labels = clusters(torch.Generator().manual_seed(1))
    trainer(epochs=4, episodes=3, step_size=2, gamma=0.5, lr=0.1, optimizer=Watching).fit(x, labels)
    assert rates == pytest.approx([0.1] * 6 + [0.05] * 6)


def test_the_encoder_has_four_blocks_and_a_mean_over_places() -> None:
    encoder = conv4(1, 8)
    assert sum(isinstance(layer, nn.Conv2d) for layer in encoder) == 4
    assert encoder(torch.zeros(2, 1, 28, 28)).shape == (2, 8)
    assert sum(p.numel() for p in encoder.parameters()) == (9 * 8 + 8) + 3 * (9 * 64 + 8) + 4 * 16


def evidence(gains: dict[str, tuple[float, float]]) -> Evidence:
    figures = {}
    for index, study in enumerate(claim.STUDIES):
        for arm in claim.ARMS:
            value = 0.6 + gains.get(arm, (0.0, 0.0))[index]
            figures[study, arm] = {"test accuracy": [value - 0.01, value, value + 0.01], "silhouette": [0.1, 0.1, 0.1]}
    return Evidence.of(figures)


@pytest.mark.parametrize(
    ("triplet", "query", "outcome"),
    [
        ((0.0101, 0.0051), (0.0, 0.0), "reproduced"),
        ((0.0101, 0.0051), (-0.001, 0.02), "partly"),
        ((0.0099, 0.0500), (0.001, 0.0), "partly"),
        ((0.0500, 0.0049), (0.0, 0.0), "partly"),
        ((0.0500, 0.0049), (0.0, -0.001), "not reproduced"),
        ((-0.05, -0.05), (-0.02, -0.02), "not reproduced"),
    ],
)
def test_the_verdict_follows_the_rule(triplet, query, outcome) -> None:
    assert claim.judge(evidence({claim.TRIPLET: triplet, claim.QUERY: query})).outcome == outcome
