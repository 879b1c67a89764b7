"""The Monge gap and its fitting losses against brute force, closed forms, finite differences and invariances."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.spatial.distance
import scipy.stats
import torch

from provenn.losses import (
    ElasticCost,
    EnergyDistance,
    MaximumMeanDiscrepancy,
    MongeGap,
    PNormCost,
    SinkhornDivergence,
    _monge_gap_fitting,
)
from provenn.losses._monge_gap_costs import COSTS, cost_matrix


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def cloud(n, d=2, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=seeded(seed), dtype=torch.float64).to(dtype)


X, Y = cloud(6), cloud(6, seed=1)
SHEAR = torch.tensor([[1.0, 0.8], [-0.3, 0.6]], dtype=torch.float64)


def weights(*values):
    return torch.tensor(values, dtype=torch.float64) / sum(values)


def exact_gap(x, y, cost="sqeuclidean"):
    return MongeGap(cost, epsilon=0)(x, y).item()


# The gap without entropy


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", PNormCost(3.0)])
def test_three_points_against_all_permutations(cost):
    for seed in range(5):
        x, y = cloud(3, seed=seed), cloud(3, seed=seed + 50)
        p = {"sqeuclidean": None, "euclidean": 2.0}.get(cost, 3.0)

        def c(u, v, p=p):
            moved = (u - v).abs()
            return moved.square().sum() if p is None else moved.norm() if p == 2 else (moved**p).sum()

        own = sum(c(x[i], y[i]) for i in range(3)) / 3
        least = min(sum(c(x[i], y[j]) for i, j in enumerate(order)) / 3 for order in itertools.permutations(range(3)))
        assert exact_gap(x, y, cost) == pytest.approx((own - least).item(), abs=1e-12)


def test_optimal_maps_have_no_gap():
    x = cloud(40, 3)
    convex = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.7]], dtype=torch.float64)
    for y in (x, x + torch.tensor([3.0, -1.0, 2.0]), 0.2 * x, 5 * x, x @ convex + 1):
        assert exact_gap(x, y) == pytest.approx(0, abs=1e-12)
    assert exact_gap(x, -x) > 1
    assert exact_gap(x, x + torch.tensor([3.0, -1.0, 2.0]), "euclidean") == pytest.approx(0, abs=1e-12)


def test_rotation_of_a_set_closed_under_it():
    angles = torch.arange(12, dtype=torch.float64) * (2 * math.pi / 12)
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    x = torch.cat([circle, 2.5 * circle])
    for k in (1, 3, 5, 6):
        theta = 2 * math.pi * k / 12
        turn = torch.tensor([[math.cos(theta), math.sin(theta)], [-math.sin(theta), math.cos(theta)]]).double()
        wanted = 2 * (1 - math.cos(theta)) * x.square().sum(1).mean().item()
        assert exact_gap(x, x @ turn) == pytest.approx(wanted, abs=1e-6)


def test_translations_do_not_matter_to_the_squared_cost_and_do_to_the_plain_one():
    x, y = cloud(20), cloud(20) @ SHEAR
    shift = torch.tensor([2.0, -3.0], dtype=torch.float64)
    assert exact_gap(x, y + shift) == pytest.approx(exact_gap(x, y), abs=1e-12)
    assert abs(exact_gap(x, y + shift, "euclidean") - exact_gap(x, y, "euclidean")) > 1e-3


# The entropic gap


@pytest.mark.parametrize("n", [8, 16, 32, 64])
def test_entropic_gaps_are_bounded_by_the_exact_one(n):
    x = cloud(n)
    y = x @ SHEAR + 0.3 * cloud(n, seed=3)
    M = exact_gap(x, y)
    scale = torch.cdist(x, y).square().mean().item()
    for share in (0.02, 0.1, 0.3, 1.0, 5.0):
        epsilon = share * scale
        shannon = MongeGap(epsilon=epsilon, tol=1e-5, relaxation=1.5)(x, y).item()
        kl = MongeGap(epsilon=epsilon, tol=1e-5, relaxation=1.5, entropy="kl")(x, y).item()
        assert M + epsilon * math.log(n) - 1e-9 <= shannon <= M + 2 * epsilon * math.log(n) + 1e-6
        assert M - epsilon * math.log(n) - 1e-9 <= kl <= M + 1e-6
        assert shannon - kl == pytest.approx(2 * epsilon * math.log(n))


def test_two_points_in_closed_form():
    x, y = cloud(2, seed=4), cloud(2, seed=5)
    (c00, c01), (c10, c11) = torch.cdist(x, y).square().tolist()
    epsilon = 0.7
    p = 0.5 / (1 + math.exp((c00 + c11 - c01 - c10) / (2 * epsilon)))
    P = [(p, c00), (p, c11), (0.5 - p, c01), (0.5 - p, c10)]
    W = sum(q * c + epsilon * q * math.log(q) for q, c in P)
    wanted = (c00 + c11) / 2 - W
    assert MongeGap(epsilon=epsilon, tol=1e-12)(x, y).item() == pytest.approx(wanted, abs=1e-10)
    kl = MongeGap(epsilon=epsilon, tol=1e-12, entropy="kl")(x, y).item()
    assert kl == pytest.approx(wanted - 2 * epsilon * math.log(2), abs=1e-10)


def plan_of(x, y, epsilon, a=None, b=None, rounds=4000):
    """Sinkhorn in NumPy, in the scaling form."""
    C = scipy.spatial.distance.cdist(x, y, "sqeuclidean")
    a = np.full(len(x), 1 / len(x)) if a is None else np.asarray(a)
    b = np.full(len(y), 1 / len(y)) if b is None else np.asarray(b)
    K, v = np.exp(-C / epsilon), np.ones(len(y))
    for _ in range(rounds):
        u = a / (K @ v)
        v = b / (K.T @ u)
    return C, u[:, None] * K * v


def test_gradient_is_the_envelopes_formula_term_by_term():
    x, y, epsilon = X, Y.clone().requires_grad_(), 0.6
    MongeGap(epsilon=epsilon, tol=1e-12)(x, y).backward()
    _, P = plan_of(x.numpy(), y.detach().numpy(), epsilon)
    wanted = torch.empty_like(y)
    for i in range(6):
        pulled = sum(P[k, i] * 2 * (y[i] - x[k]) for k in range(6))
        wanted[i] = (2 / 6 * (y[i] - x[i]) - pulled).detach()
    torch.testing.assert_close(y.grad, wanted)
    alone = 2 / 6 * (y - x).detach()  # what remains if the transport cost is detached as a whole
    assert (y.grad - alone).abs().max() > 0.1


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", ElasticCost(0.4)])
def test_all_three_gradients_are_finite_differences(cost):
    def value(y, gradient="envelope"):
        return MongeGap(cost, epsilon=0.5, tol=1e-10, gradient=gradient)(X, y)

    for gradient in ("envelope", "implicit", "unrolled"):
        y = Y.clone().requires_grad_()
        result = value(y, gradient)
        result.backward()
        assert result.item() == pytest.approx(value(Y).item(), abs=1e-9)
        h = 1e-5
        for i, k in ((0, 0), (3, 1), (5, 0)):
            step = torch.zeros_like(Y)
            step[i, k] = h
            difference = (value(Y + step) - value(Y - step)).item() / (2 * h)
            assert y.grad[i, k].item() == pytest.approx(difference, rel=1e-4)


def test_gradcheck_by_both_clouds_and_without_entropy():
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: MongeGap(epsilon=0.5, tol=1e-10)(x, y), (x, y))
    assert torch.autograd.gradcheck(lambda x, y: MongeGap(epsilon=0)(x, y), (x, y))


def test_unrolled_gradient_of_an_unconverged_iteration_is_another():
    def gradient(how, iterations):
        y = Y.clone().requires_grad_()
        with pytest.warns(RuntimeWarning):
            MongeGap(epsilon=0.1, tol=1e-14, max_iters=iterations, gradient=how)(X, y).backward()
        return y.grad

    assert (gradient("unrolled", 1) - gradient("envelope", 1)).abs().max() > 1e-4


def test_relative_epsilon_is_a_share_of_mean_or_deviation():
    C = torch.cdist(X, Y).square()
    for to, scale in (("mean", C.mean()), ("std", C.std(correction=0))):
        relative = MongeGap(relative_epsilon=0.3, relative_to=to)(X, Y)
        torch.testing.assert_close(relative, MongeGap(epsilon=0.3 * scale.item())(X, Y))
    torch.testing.assert_close(MongeGap()(X, Y), MongeGap(epsilon=0.01 * C.mean().item())(X, Y))
    torch.testing.assert_close(MongeGap()(3 * X, 3 * Y), 9 * MongeGap()(X, Y))  # C and ε scale alike


def test_joint_permutations_do_not_matter_and_others_do():
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    for epsilon in (0, 0.3):
        gap = MongeGap(epsilon=epsilon, tol=1e-10)
        torch.testing.assert_close(gap(X[order], Y[order]), gap(X, Y))
        assert abs(gap(X, Y[order]) - gap(X, Y)) > 0.1


def test_a_point_split_in_two_halves_changes_nothing():
    x, y = X[[0, 0, 1, 2, 3, 4, 5]], Y[[0, 0, 1, 2, 3, 4, 5]]
    gap = MongeGap(epsilon=0.4, entropy="kl", tol=1e-11)
    split = gap(x, y, weights(0.5, 0.5, 1, 1, 1, 1, 1))
    torch.testing.assert_close(split, gap(X, Y))
    assert abs(gap(x, y) - gap(X, Y)) > 1e-3


def test_scaling_and_relaxation_change_the_way_only():
    plain = MongeGap(epsilon=0.5, tol=1e-9)(X, Y)
    for options in ({"scaling": 0.7}, {"relaxation": 1.4}):
        torch.testing.assert_close(MongeGap(epsilon=0.5, tol=1e-9, **options)(X, Y), plain)


def test_no_convergence_is_a_warning_with_the_error_and_strictly_an_error():
    with pytest.warns(RuntimeWarning, match=r"marginals are off by \d"):
        MongeGap(max_iters=2, tol=1e-9)(X, Y)
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match=r"max_iters = 2 .* off by \d"):
        MongeGap(max_iters=2, tol=1e-9, strict=True)(X, Y)


# Costs


def test_costs_against_scipy():
    x, y = cloud(5, 3), cloud(4, 3, seed=1)
    unit = [z / z.norm(dim=1, keepdim=True) for z in (x, y)]
    angle = np.arccos(np.clip((unit[0] @ unit[1].T).numpy(), -1, 1))
    cdist = scipy.spatial.distance.cdist
    wanted = {
        "sqeuclidean": cdist(x, y, "sqeuclidean"),
        "half_sqeuclidean": cdist(x, y, "sqeuclidean") / 2,
        "euclidean": cdist(x, y),
        "cosine": cdist(x, y, "cosine"),
        "geodesic": angle,
        PNormCost(1.0): cdist(x, y, "cityblock"),
        PNormCost(3.0): cdist(x, y, "minkowski", p=3) ** 3,
        ElasticCost(0.7): 0.7 * cdist(x, y, "cityblock") + cdist(x, y, "sqeuclidean") / 2,
    }
    for cost, C in wanted.items():
        np.testing.assert_allclose(cost_matrix(cost, x, y).numpy(), C, atol=1e-12)


@pytest.mark.parametrize("cost", [*COSTS, PNormCost(1.0), PNormCost(1.5), ElasticCost(1.0)])
def test_costs_have_finite_gradients_where_points_coincide_or_are_opposite(cost):
    x = X.clone().requires_grad_()
    cost_matrix(cost, x, torch.cat([X, -X])).sum().backward()
    assert x.grad.isfinite().all()


def test_squared_distances_of_far_clouds_keep_their_digits():
    x, y = X.float() + 1000, Y.float() + 1000
    wanted = (x.double()[:, None] - y.double()).square().sum(2)
    np.testing.assert_allclose(cost_matrix("sqeuclidean", x, y).numpy(), wanted.numpy(), atol=1e-4)


# Fitting losses


def divergence_of(x, y, epsilon, a=None, b=None):
    def cost(u, v, p, q):
        C, P = plan_of(u, v, epsilon, p, q)
        return (P * C).sum() + epsilon * (P * np.log(P / np.outer(P.sum(1), P.sum(0)))).sum()

    return cost(x, y, a, b) - cost(x, x, a, a) / 2 - cost(y, y, b, b) / 2


def test_divergence_against_numpy():
    x, y, a, b = X, Y[:4] + 1, weights(1, 2, 3, 1, 2, 1), weights(2, 1, 1, 3)
    loss = SinkhornDivergence(epsilon=0.8, tol=1e-9)
    assert loss(x, y).item() == pytest.approx(divergence_of(x.numpy(), y.numpy(), 0.8), abs=1e-8)
    wanted = divergence_of(x.numpy(), y.numpy(), 0.8, a.numpy(), b.numpy())
    assert loss(x, y, a, b).item() == pytest.approx(wanted, abs=1e-8)


def test_divergence_is_zero_just_for_equal_measures_and_symmetric():
    loss = SinkhornDivergence(epsilon=0.5, tol=1e-8)
    assert loss(X, X[[2, 0, 1, 5, 4, 3]]).item() == pytest.approx(0, abs=1e-7)
    for seed in range(5):
        x, y = cloud(7, seed=seed), cloud(5, seed=seed + 20)
        assert loss(x, y) > 0
        torch.testing.assert_close(loss(x, y), loss(y, x))


def test_divergence_between_its_limits():
    x, y = cloud(9, 1, seed=2), cloud(9, 1, seed=3) + 0.5
    C = [torch.cdist(u, v).square().mean().item() for u, v in ((x, y), (x, x), (y, y))]
    far = SinkhornDivergence(epsilon=1e5, tol=1e-12)(x, y).item()
    assert far == pytest.approx(C[0] - C[1] / 2 - C[2] / 2, rel=1e-4)
    W = (x.sort(0).values - y.sort(0).values).square().mean().item()  # on the line, sorting is optimal
    near = SinkhornDivergence(epsilon=5e-3, tol=1e-4, max_iters=50_000)(x, y).item()
    assert near == pytest.approx(W, abs=5e-3)


def test_relative_epsilon_is_of_the_targets_own_costs():
    scale = torch.cdist(Y, Y).square().mean().item()
    wanted = SinkhornDivergence(epsilon=0.1 * scale)(X, Y)
    torch.testing.assert_close(SinkhornDivergence()(X, Y), wanted)
    torch.testing.assert_close(SinkhornDivergence(relative_epsilon=0.1)(X + 50, Y).detach(), _far(scale))


def _far(scale):
    return SinkhornDivergence(epsilon=0.1 * scale)(X + 50, Y)


def test_static_target_is_solved_once(monkeypatch):
    solved = []
    original = _monge_gap_fitting.symmetric_sinkhorn
    monkeypatch.setattr(
        _monge_gap_fitting, "symmetric_sinkhorn", lambda *args, **rest: solved.append(1) or original(*args, **rest)
    )
    loss, plain = SinkhornDivergence(static_target=True), SinkhornDivergence()
    first = [loss(x, Y) for x in (X, X + 1, X - 1)]
    assert len(solved) == 4  # three of the sources, one of the target
    torch.testing.assert_close(first, [plain(x, Y) for x in (X, X + 1, X - 1)])
    torch.testing.assert_close(loss(X, Y * 2), plain(X, Y * 2))  # another target is noticed
    a = weights(1, 2, 3, 1, 2, 1)
    torch.testing.assert_close(loss(X, Y * 2, None, a), plain(X, Y * 2, None, a))
    changing = Y.clone()
    loss(X, changing)
    changing.mul_(3)  # in place, behind its back
    torch.testing.assert_close(loss(X, changing), plain(X, changing))


def test_divergence_draws_points_onto_the_target():
    x = X.clone().requires_grad_()
    optimizer, loss = torch.optim.SGD([x], lr=2.0), SinkhornDivergence(epsilon=0.3, tol=1e-4, static_target=True)
    before = loss(x, Y + 2).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss(x, Y + 2).backward()
        optimizer.step()
    assert loss(x, Y + 2).item() < 1e-3 * before
    torch.testing.assert_close(x.mean(0).detach(), Y.mean(0) + 2, rtol=0, atol=1e-2)


def test_energy_distance_on_the_line_is_that_of_distribution_functions():
    x, y = cloud(8, 1), cloud(5, 1, seed=1) * 2
    wanted = scipy.stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2
    assert EnergyDistance()(x, y).item() == pytest.approx(wanted)
    assert EnergyDistance()(X, X).item() == pytest.approx(0, abs=1e-12)


def test_discrepancy_by_loops():
    x, y = X, Y[:4] + 1

    def k(u, v):
        return sum(math.exp(-((p - q) ** 2).sum() / (2 * 0.9**2)) for p in u for q in v) / (len(u) * len(v))

    wanted = k(x, x) + k(y, y) - 2 * k(x, y)
    assert MaximumMeanDiscrepancy(0.9)(x, y).item() == pytest.approx(wanted)
    width = math.sqrt(torch.cdist(y, y).square().mean().item() / 2)
    torch.testing.assert_close(MaximumMeanDiscrepancy()(x, y), MaximumMeanDiscrepancy(width)(x, y))
