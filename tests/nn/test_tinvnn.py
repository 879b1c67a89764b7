"""Invariant coordinates against NumPy's eigenvectors, scikit-learn, brute force and moved clouds."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

from provenn.contracts import BadInput, ModuleCase, ProbeCase, Symmetry
from provenn.nn import (
    DGCNNBackbone,
    InvariantMDS,
    PointNetBackbone,
    TinvWrapper,
    TSPAttention,
    probe_invariance,
)
from provenn.nn._tinvnn_probe import GROUPS, random_rotations
from provenn.nn._tinvnn_tsp import tour_length


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def clouds(generator, dtype, batch, points=9, dim=3):
    """Clouds of three different extents and skewed, so that no moment and no gap between eigenvalues is small."""
    X = torch.randn(batch, points, dim, generator=generator, dtype=torch.float64)
    X = (X + 0.4 * X.square()) * torch.tensor([3.0, 2.0, 1.0])[:dim]
    return (X.to(dtype),)


def some(batch=4, points=9, dim=3, seed=0, dtype=torch.float64):
    return clouds(draws(seed), dtype, batch, points, dim)[0]


def moved(name, seed=0):
    def before(inputs):
        return (GROUPS[name](inputs[0], draws(seed)), *inputs[1:])

    return before


def same(output):
    return output


INVARIANCES = tuple(Symmetry(name, moved(name), same, 1e-7) for name in ("translate", "rotate", "reflect", "scale"))
ORDER = Symmetry("permute", moved("permute"), same, 1e-7)


def flipped(inputs):
    return (inputs[0].flip(1), *inputs[1:])


def rows(output):
    return output.flip(1)


def tinv(backbone, **options):
    return TinvWrapper(backbone, InvariantMDS(differentiable=True, **options))


def point_net(**options):
    return PointNetBackbone(**{"in_features": 3, "out_features": 4, "widths": (8, 8), "head": (8,), **options})


def edge_net(**options):
    return DGCNNBackbone(**{"in_features": 3, "out_features": 4, "k": 3, "widths": (6, 6), "head": (8,), **options})


MDS_BAD = (
    BadInput("dim", lambda: InvariantMDS(dim=0)),
    BadInput("sign", lambda: InvariantMDS(sign="first")),
    BadInput("method", lambda: InvariantMDS(method="svd")),
    BadInput("tol", lambda: InvariantMDS(tol=-1.0)),
    BadInput("X", lambda: InvariantMDS()(torch.ones(2, 1, 3))),
    BadInput("X", lambda: InvariantMDS()(torch.ones(2, 5, 3))),
    BadInput("X", lambda: InvariantMDS()(torch.full((2, 5, 3), torch.nan))),
    BadInput("mask", lambda: InvariantMDS()(some(), torch.ones(4, 8, dtype=torch.bool))),
    BadInput("mask", lambda: InvariantMDS()(some(), torch.arange(9).expand(4, 9) < 1)),
    BadInput("dim", lambda: InvariantMDS().from_distances(torch.ones(1, 3, 3))),
    BadInput("squares", lambda: InvariantMDS(2).from_distances(torch.ones(1, 3, 4))),
    BadInput("squares", lambda: InvariantMDS(2).from_distances(torch.zeros(1, 3, 3))),
)
BACKBONE_BAD = (
    ("in_features", {"in_features": 0}),
    ("out_features", {"out_features": 0}),
    ("widths", {"widths": ()}),
    ("widths", {"widths": (0,)}),
    ("head", {"head": (0,)}),
)
CASES = [
    *(
        ModuleCase(
            "provenn.nn.InvariantMDS",
            lambda method=method: InvariantMDS(method=method, differentiable=True),
            clouds,
            label=method,
            symmetries=(*INVARIANCES, Symmetry("order of the points", flipped, rows, 1e-7)),
            bfloat16_tolerance=0.2,
            bad_input=MDS_BAD,
        )
        for method in ("gram", "covariance")
    ),
    ModuleCase(
        "provenn.nn.TinvWrapper",
        lambda: tinv(point_net()),
        clouds,
        label="PointNet",
        symmetries=(*INVARIANCES, ORDER),
        bfloat16_tolerance=0.3,
        bad_input=(
            BadInput("backbone", lambda: TinvWrapper(same, InvariantMDS()), TypeError),
            BadInput("mds", lambda: TinvWrapper(point_net(), point_net()), TypeError),
            BadInput("features", lambda: tinv(point_net())(some(), torch.ones(4, 8, 1, dtype=torch.float64))),
        ),
    ),
    ModuleCase(
        "provenn.nn.TinvWrapper",
        lambda: tinv(edge_net(), sign="frame"),
        clouds,
        label="DGCNN, frame",
        symmetries=(*INVARIANCES, ORDER),
        bfloat16_tolerance=0.5,
        bad_input=(BadInput("X", lambda: tinv(edge_net(), sign="frame")(torch.ones(2, 5, 3))),),
    ),
    ModuleCase(
        "provenn.nn.PointNetBackbone",
        point_net,
        clouds,
        symmetries=(ORDER,),
        bfloat16_tolerance=0.1,
        bad_input=(
            *(BadInput(name, lambda options=options: point_net(**options)) for name, options in BACKBONE_BAD),
            BadInput("x", lambda: point_net()(torch.ones(2, 5, 2))),
        ),
    ),
    *(
        ModuleCase(
            "provenn.nn.DGCNNBackbone",
            lambda dynamic=dynamic: edge_net(dynamic=dynamic),
            clouds,
            label="dynamic" if dynamic else "graph of the points",
            symmetries=(ORDER,),
            bfloat16_tolerance=0.5,  # rounding exchanges neighbours
            bad_input=(
                *(BadInput(name, lambda options=options: edge_net(**options)) for name, options in BACKBONE_BAD),
                BadInput("k", lambda: edge_net(k=0)),
                BadInput("x", lambda: edge_net()(torch.ones(2, 5, 2))),
                BadInput("x", lambda: edge_net()(torch.ones(2, 2, 3))),
            ),
        )
        for dynamic in (True, False)
    ),
    ModuleCase(
        "provenn.nn.TSPAttention",
        lambda: TSPAttention(dim=8, num_heads=2, num_layers=1),
        lambda generator, dtype, batch: (torch.rand(batch, 5, 2, generator=generator, dtype=dtype),),
        training_equals_eval=False,
        training_equals_eval_reason="training draws tours",
        bfloat16_tolerance=3.0,  # a tour that rounding turns is another one
        bad_input=(
            BadInput("dim", lambda: TSPAttention(dim=0)),
            BadInput("num_heads", lambda: TSPAttention(dim=8, num_heads=3)),
            BadInput("num_layers", lambda: TSPAttention(num_layers=0)),
            BadInput("in_features", lambda: TSPAttention(in_features=0)),
            BadInput("clip", lambda: TSPAttention(clip=0.0)),
            BadInput("x", lambda: TSPAttention(dim=8)(torch.ones(2, 5, 3))),
            BadInput("tours", lambda: TSPAttention(dim=8)(torch.ones(2, 5, 2), torch.zeros(2, 4, dtype=torch.long))),
        ),
    ),
    ProbeCase(
        "provenn.nn.probe_invariance",
        run=lambda model, data: probe_invariance(model, data),
        model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(27, 2)).double(),
        data=lambda generator: clouds(generator, torch.float64, 4)[0],
        brute_force=lambda model, data: {"size": max(abs(v) for v in model(data).flatten().tolist()), "draws": 8},
        bad_input=(
            BadInput("groups", lambda: probe_invariance(nn.Identity(), some(), groups=("turn",))),
            BadInput("draws", lambda: probe_invariance(nn.Identity(), some(), draws=0)),
            BadInput("model", lambda: probe_invariance(same, some()), TypeError),
        ),
    ),
]


def distances(X):
    return torch.cdist(X, X, compute_mode="donot_use_mm_for_euclid_dist")


# The coordinates


@pytest.mark.parametrize("method", ["gram", "covariance", "auto"])
@pytest.mark.parametrize(("points", "dim"), [(9, 3), (3, 5), (40, 2), (2, 2)])
def test_distances_are_kept_up_to_the_common_scale(method, points, dim):
    X = torch.randn(4, points, dim, generator=draws(1), dtype=torch.float64)
    Z = InvariantMDS(scale=False, method=method)(X)
    torch.testing.assert_close(distances(Z), distances(X), rtol=1e-9, atol=1e-7)
    scaled = InvariantMDS(method=method)(X)
    torch.testing.assert_close(scaled.square().sum(2).mean(1), torch.ones(4, dtype=torch.float64))
    single = InvariantMDS(scale=False, method=method)(X.float())
    torch.testing.assert_close(distances(single), distances(X.float()), rtol=1e-4, atol=2e-3 if points == 2 else 1e-4)


def test_fewer_columns_are_the_best_approximation_of_the_gram_matrix():
    X = some()
    centred = X - X.mean(1, keepdim=True)
    for cloud, z in zip(centred.numpy(), InvariantMDS(2, scale=False, method="gram")(X).numpy(), strict=True):
        values, vectors = np.linalg.eigh(cloud @ cloud.T)
        best = (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].T
        np.testing.assert_allclose(z @ z.T, best, atol=1e-9)


def test_covariance_scores_are_scikit_learns_up_to_sign():
    X = some()
    for cloud, z in zip(X.numpy(), InvariantMDS(scale=False, method="covariance")(X).numpy(), strict=True):
        theirs = PCA().fit_transform(cloud)
        np.testing.assert_allclose(np.abs(z), np.abs(theirs), atol=1e-9)


def test_both_methods_agree_once_signs_are_fixed():
    X = some(batch=20, seed=5)
    torch.testing.assert_close(InvariantMDS(method="gram")(X), InvariantMDS(method="covariance")(X))


def test_the_third_moment_of_every_column_is_positive():
    Z = InvariantMDS()(some(batch=50, seed=2))
    assert (Z.pow(3).sum(1) > 0).all()


def test_a_vanishing_third_moment_gives_the_word_to_the_fifth():
    column = torch.tensor([-9.0, -5.0, -1.0, 7.0, 8.0], dtype=torch.float64)
    assert column.sum() == column.pow(3).sum() == 0 > column.pow(5).sum()
    mds = InvariantMDS(scale=False)
    Z = mds(column[None, :, None])
    assert not mds.last_ambiguity.sign.any()
    torch.testing.assert_close(Z[0, :, 0], -column)
    torch.testing.assert_close(mds(-column[None, :, None]), Z)


@pytest.mark.parametrize("seed", range(3))
def test_a_symmetric_cloud_is_told_ambiguous_and_its_frame_average_is_not(seed):
    half = torch.randn(1, 5, 3, generator=draws(seed), dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0])
    X = torch.cat((half, -half), 1)
    mds = InvariantMDS()
    mds(X)
    assert mds.last_ambiguity.sign.all()
    assert not mds.last_ambiguity.rotation.any()
    torch.manual_seed(seed)
    model = tinv(point_net(), sign="frame").double()
    assert probe_invariance(model, X).changes["reflect"] < 1e-9


def test_two_points_are_ambiguous_in_sign_alone():
    X = torch.tensor([[[0.0, 0.0], [1.0, 2.0]]], dtype=torch.float64)
    mds = InvariantMDS()
    Z = mds(X)
    assert mds.last_ambiguity.sign.tolist() == [[True, True]]
    assert not mds.last_ambiguity.rotation.any()
    assert Z[0, :, 1].abs().max() < 1e-7


@pytest.mark.parametrize("method", ["gram", "covariance"])
def test_equal_eigenvalues_are_reported(method):
    square = torch.tensor([[[1.0, 1.0, 0.3], [1, -1, -0.3], [-1, 1, -0.3], [-1, -1, 0.3]]], dtype=torch.float64)
    mds = InvariantMDS(method=method)
    mds(square)
    assert mds.last_ambiguity.rotation.tolist() == [[True, True, False]]
    mds(some(batch=1))
    assert mds.last_ambiguity.rotation.tolist() == [[False, False, False]]


def test_random_signs_are_drawn_in_training_alone():
    X, mds = some(batch=200, seed=3), InvariantMDS(sign="random")
    fixed = mds.eval()(X)
    torch.testing.assert_close(fixed, InvariantMDS()(X))
    torch.manual_seed(0)
    ratio = (mds.train()(X) / fixed)[:, 0]
    torch.testing.assert_close(ratio.abs(), torch.ones_like(ratio))
    assert ((ratio > 0).double().mean(0) - 0.5).abs().max() < 0.1


@pytest.mark.parametrize("method", ["gram", "covariance"])
def test_padded_points_change_nothing(method):
    X = some(points=6)
    padded = torch.cat((X, torch.full((4, 3, 3), 1e3, dtype=torch.float64)), 1)
    mask = torch.arange(9).expand(4, 9) < 6
    mds = InvariantMDS(method=method)
    torch.testing.assert_close(mds(padded, mask)[:, :6], mds(X))
    assert (mds(padded, mask)[:, 6:] == 0).all()
    for backbone in (point_net(), edge_net()):
        model = tinv(backbone, method=method).double()
        torch.testing.assert_close(model(padded, mask=mask), model(X))


def test_a_cloud_smaller_than_k_repeats_its_nearest_point():
    X = some(points=5)
    mask = torch.arange(5).expand(4, 5) < 2
    model = edge_net(k=4).double()
    torch.testing.assert_close(model(X, mask), edge_net_like(model, k=2)(X[:, :2]))


def edge_net_like(model, k):
    other = edge_net(k=k).double()
    other.load_state_dict(model.state_dict())
    return other


def test_a_mirror_image_has_the_same_coordinates():
    X = some()
    torch.testing.assert_close(InvariantMDS()(X * torch.tensor([-1.0, 1.0, 1.0])), InvariantMDS()(X))


def test_columns_beyond_the_rank_are_zero_and_warned_of():
    with pytest.warns(UserWarning, match="dim 5 exceeds the rank 3"):
        Z = InvariantMDS(5)(some())
    assert (Z[..., 3:] == 0).all()
    with pytest.warns(UserWarning, match="exceeds the rank"):
        gram = InvariantMDS(5, method="gram")(some())
    assert gram[..., 3:].abs().max() < 1e-6


def test_distances_alone_are_enough():
    X = some()
    mds = InvariantMDS(3)
    torch.testing.assert_close(mds.from_distances(distances(X).square()), mds(X))
    mask = torch.arange(9).expand(4, 9) < 6
    torch.testing.assert_close(mds.from_distances(distances(X).square(), mask), mds(X, mask))
    # A path metric is not Euclidean: negative eigenvalues count as 0.
    hops = (torch.arange(6)[:, None] - torch.arange(6)).abs().remainder(6)
    ring = torch.minimum(hops, 6 - hops).double()[None]
    assert InvariantMDS(6, scale=False).from_distances(ring.square()).isfinite().all()


def test_no_gradient_unless_asked_and_a_right_one_if_asked():
    X = some(batch=2).requires_grad_()
    assert not InvariantMDS()(X).requires_grad
    assert torch.autograd.gradcheck(InvariantMDS(differentiable=True), (X,))


# The wrapper


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [point_net, edge_net])
def test_moves_change_nothing_in_single_precision(make, seed):
    torch.manual_seed(seed)
    X = some(batch=20, points=30, seed=seed, dtype=torch.float32)
    report = probe_invariance(TinvWrapper(make(), InvariantMDS()), X)
    assert max(report.changes.values()) < 1e-4
    raw = probe_invariance(make(), X)
    assert raw.changes["permute"] < 1e-5
    assert min(raw.changes[name] for name in ("translate", "rotate", "reflect", "scale")) > 1e-2


def test_features_follow_the_coordinates():
    class Last(nn.Module):
        def forward(self, points):
            return points[..., 3:].sum(1)

    features = torch.rand(4, 9, 2, dtype=torch.float64)
    for sign in ("moment", "frame"):
        model = TinvWrapper(Last(), InvariantMDS(sign=sign))
        torch.testing.assert_close(model(some(), features), features.sum(1))


def test_frame_averages_over_all_signs():
    class Odd(nn.Module):
        def forward(self, points):
            return torch.stack((points[..., 0].max(1).values, points[:, 0, 0]), 1)

    X = some()
    Z = InvariantMDS()(X)[..., 0]
    ours = TinvWrapper(Odd(), InvariantMDS(sign="frame"))(X)
    expected = (Z.max(1).values + (-Z).max(1).values) / 2
    torch.testing.assert_close(ours, torch.stack((expected, torch.zeros_like(expected)), 1))


@pytest.mark.parametrize("proper", [True, False])
def test_predictions_are_mapped_back_to_where_the_points_are(proper):
    X = some()
    model = TinvWrapper(nn.Identity(), InvariantMDS())
    torch.testing.assert_close(model.inverse(model(X), X), X)
    place = torch.randn(4, 2, 3, generator=draws(7), dtype=torch.float64)
    R = random_rotations(4, 3, draws(8), proper)
    shift = torch.randn(4, 1, 3, generator=draws(9), dtype=torch.float64)
    expected = 1.7 * model.inverse(place, X) @ R + shift
    torch.testing.assert_close(model.inverse(place, 1.7 * X @ R + shift), expected)
    mask = torch.arange(9).expand(4, 9) < 6
    torch.testing.assert_close(model.inverse(model.mds(X, mask), X, mask)[:, :6], X[:, :6])


def test_rotations_are_what_they_say_and_uniform():
    for proper in (True, False):
        R = random_rotations(2000, 3, draws(0), proper)
        torch.testing.assert_close(R @ R.mT, torch.eye(3, dtype=torch.float64).expand_as(R))
        torch.testing.assert_close(torch.linalg.det(R), torch.full((2000,), 1.0 if proper else -1.0).double())
        assert R.mean(0).abs().max() < 4 / math.sqrt(3 * 2000)
        torch.testing.assert_close(R.square().mean(0), torch.full((3, 3), 1 / 3).double(), rtol=0, atol=0.03)


# Tours


def test_tours_visit_every_point_and_their_probabilities_sum_to_one():
    torch.manual_seed(0)
    model = TSPAttention(dim=8, num_heads=2, num_layers=1).double()
    x = torch.rand(1, 4, 2, generator=draws(1), dtype=torch.float64)
    every = torch.tensor(list(itertools.permutations(range(4))))
    _, chances = model(x.expand(24, -1, -1), every)
    assert chances.exp().sum().item() == pytest.approx(1)
    tour, chance = model.train()(x, generator=draws(2))
    assert sorted(tour[0].tolist()) == [0, 1, 2, 3]
    place = every.tolist().index(tour[0].tolist())
    assert chance.item() == pytest.approx(chances[place].item())


def test_drawn_tours_have_the_probabilities_that_are_told():
    torch.manual_seed(0)
    model = TSPAttention(dim=8, num_heads=2, num_layers=1).double().train()
    x = torch.rand(1, 3, 2, generator=draws(1), dtype=torch.float64)
    tours, chances = model(x.expand(4000, -1, -1), generator=draws(3))
    for tour in itertools.permutations(range(3)):
        picked = (tours == torch.tensor(tour)).all(1)
        told = chances[picked][0].exp().item() if picked.any() else 0.0
        assert picked.double().mean().item() == pytest.approx(told, abs=4 * math.sqrt(0.25 / 4000))


def test_greedy_tours_take_the_most_probable_step_and_lengths_are_round():
    torch.manual_seed(0)
    model = TSPAttention(dim=8, num_heads=2, num_layers=1).double().eval()
    x = torch.rand(6, 5, 2, generator=draws(1), dtype=torch.float64)
    tours, chances = model(x)
    again, told = model(x, tours)
    assert torch.equal(tours, again)
    torch.testing.assert_close(chances, told)
    # The first step is the most probable one, summed over all tours that begin so.
    every = torch.tensor(list(itertools.permutations(range(5))))
    chances = model(x[:1].expand(120, -1, -1), every)[1].exp()
    firsts = [chances[every[:, 0] == one].sum().item() for one in range(5)]
    assert int(np.argmax(firsts)) == tours[0, 0].item()
    for row in range(6):
        path = [*tours[row].tolist(), tours[row, 0].item()]
        length = sum(math.dist(x[row, a], x[row, b]) for a, b in itertools.pairwise(path))
        assert tour_length(x, tours)[row].item() == pytest.approx(length)


def test_a_wrapped_tour_model_is_invariant():
    torch.manual_seed(0)
    model = TinvWrapper(TSPAttention(dim=8, num_heads=2, num_layers=1), InvariantMDS()).double().eval()
    x = torch.rand(20, 7, 2, generator=draws(1), dtype=torch.float64)
    tours, _ = model(x)
    for name in ("translate", "rotate", "reflect", "scale"):
        assert torch.equal(model(GROUPS[name](x, draws(4)))[0], tours)


# The probe


def test_changes_are_those_of_known_functions():
    class Spread(nn.Module):
        def forward(self, X):
            return (X - X.mean(1, keepdim=True)).norm(dim=2).max(1).values

    report = probe_invariance(Spread(), some(), draws=4)
    assert max(report.changes[name] for name in ("translate", "rotate", "reflect", "permute")) < 1e-12
    largest = report.size
    assert 0 < report.changes["scale"] <= largest
    turned = probe_invariance(nn.Flatten(), some(), groups=("permute",))
    assert set(turned.changes) == {"permute"}
    assert turned.changes["permute"] > 0.1
    assert probe_invariance(nn.Flatten(), some()) == probe_invariance(nn.Flatten(), some())


def test_moves_are_drawn_where_the_generator_is():
    X = some()
    expected = probe_invariance(nn.Flatten(), X, draws=2)
    with torch.device("meta"):  # the default device, where what is made without one would be, without values
        assert probe_invariance(nn.Flatten(), X, draws=2) == expected


@pytest.mark.parametrize("method", ["gram", "covariance"])
def test_autocast_does_not_narrow_the_coordinates(method):
    X = some().float()
    squares = torch.cdist(X.double(), X.double()).square().float()
    mds = InvariantMDS(dim=X.shape[2], method=method)
    expected, by_distances = mds(X), mds.from_distances(squares)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mds(X), expected)
        assert torch.equal(mds.from_distances(squares), by_distances)
