"""TinvNN's claim: the rule's edges, the shapes, the shortest tours and what training sees."""

import itertools
import math

import pytest
import torch

from provenn.claims import Evidence
from provenn.claims.nn import _tinvnn_clouds as clouds
from provenn.claims.nn import _tinvnn_tours as tours
from provenn.claims.nn import tinvnn as claim
from provenn.nn import TSPAttention


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def evidence(tinv=(0.9, 0.9), augmented=0.91, raw=0.5, tinv_gap=(0.05, 0.05), raw_gap=(0.05, 0.2)):
    def shapes(canonical, turned):
        return {"canonical accuracy": [canonical] * 3, "moved accuracy": [turned] * 3, "turned accuracy": [turned] * 3}

    def gaps(plain, turned):
        return {"gap": [plain] * 3, "gap, moved": [turned] * 3}

    return Evidence.of(
        {
            (claim.SHAPES, claim.TINV): shapes(*tinv),
            (claim.SHAPES, claim.AUGMENTED): shapes(0.92, augmented),
            (claim.SHAPES, claim.RAW): shapes(0.99, raw),
            (claim.TOURS, claim.TINV): gaps(*tinv_gap),
            (claim.TOURS, claim.RAW): gaps(*raw_gap),
        }
    )


@pytest.mark.parametrize(
    ("options", "outcome"),
    [
        ({}, "reproduced"),
        ({"augmented": 0.92}, "reproduced"),
        ({"augmented": 0.921}, "partly"),
        ({"tinv": (0.905, 0.9)}, "reproduced"),
        ({"tinv": (0.895, 0.9)}, "reproduced"),
        ({"tinv": (0.906, 0.9)}, "not reproduced"),
        ({"raw": 0.7}, "reproduced"),
        ({"raw": 0.701}, "not reproduced"),
        ({"tinv_gap": (0.05, 0.0501)}, "reproduced"),
        ({"tinv_gap": (0.05, 0.0502)}, "not reproduced"),
        ({"tinv_gap": (0.05, 0.0498)}, "not reproduced"),
        ({"raw_gap": (0.05, 0.05)}, "not reproduced"),
    ],
)
def test_the_rule(options, outcome):
    assert claim.judge(evidence(**options)).outcome == outcome


def test_shapes_lie_on_their_surfaces():
    count = 3
    octant, torus, cylinder, cone, box = (make(count, draws(1)) for make in clouds.SURFACES.values())
    assert (octant >= 0).all()
    torch.testing.assert_close(octant.norm(dim=2), torch.ones(3, clouds.POINTS, dtype=torch.float64))
    ring = (torus[..., :2].norm(dim=2) - 1).square() + torus[..., 2].square()
    torch.testing.assert_close(ring, torch.full_like(ring, 0.35**2))
    torch.testing.assert_close(cylinder[..., :2].norm(dim=2), torch.full_like(ring, 0.5))
    torch.testing.assert_close(cone[..., :2].norm(dim=2) / 0.7 + cone[..., 2] / 1.5, torch.ones_like(ring))
    sizes = torch.tensor([1.0, 0.7, 0.4], dtype=torch.float64)
    assert (((box.abs() - sizes).abs() < 1e-9).sum(2) >= 1).all()
    assert (box.abs() <= sizes + 1e-9).all()


def test_clouds_are_centred_balanced_and_always_the_same():
    X, y = clouds.clouds(6, False, draws(2))
    assert X.shape == (30, clouds.POINTS, 3)
    assert y.bincount().tolist() == [6] * 5
    assert X.mean(1).abs().max() < 0.02
    torch.testing.assert_close(X.square().sum(2).mean(1).sqrt(), torch.ones(30), rtol=0, atol=0.02)
    assert torch.equal(clouds.data_set("train", 1, 2, False)[0], clouds.data_set("train", 1, 2, False)[0])
    assert not torch.equal(clouds.data_set("train", 1, 2, False)[0], clouds.data_set("test", 1, 2, False)[0])


def test_moves_keep_shapes_up_to_scale():
    X, _ = clouds.clouds(2, False, draws(2))
    Y = clouds.moved(X, draws(3))
    ratio = torch.cdist(Y, Y).sum((1, 2)) / torch.cdist(X, X).sum((1, 2))
    assert 0.5 <= ratio.min() < ratio.max() <= 2.0
    assert (Y.mean(1) - X.mean(1)).norm(dim=1).min() > 0.1


@pytest.mark.parametrize("points", [3, 5, 7])
def test_shortest_tours_are_those_of_all_permutations(points):
    x = torch.rand(4, points, 2, generator=draws(4))
    for one, length in zip(x.tolist(), tours.shortest_tours(x).tolist(), strict=True):
        every = (
            sum(math.dist(one[a], one[b]) for a, b in itertools.pairwise((0, *order, 0)))
            for order in itertools.permutations(range(1, points))
        )
        assert length == pytest.approx(min(every), rel=1e-6)


def test_training_shortens_tours_and_leaves_the_global_generator():
    torch.manual_seed(3)
    model = TSPAttention(dim=16, num_heads=2, num_layers=1)
    before = torch.get_rng_state()
    lengths = [length for _, length in tours.train(model, 60, 32, 5, 3e-3, draws(5), "cpu")]
    assert torch.equal(before, torch.get_rng_state())
    assert sum(lengths[-10:]) < 0.97 * sum(lengths[:10])
    x = torch.rand(50, 5, 2, generator=draws(6))
    gap = tours.gap(model, x, tours.shortest_tours(x), lambda points: points)
    assert 0 <= gap < 0.2
