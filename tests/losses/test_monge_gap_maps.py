"""Maps, their metrics and their training against closed forms, finite differences and a loop written out."""

import copy
import math

import pytest
import torch
from torch import nn

from provenn.losses import (
    EnergyDistance,
    GradientMap,
    InputConvexNetwork,
    MongeGap,
    MongeMapEstimator,
    SinkhornDivergence,
    TransportMLP,
    entropic_map,
    gaussian_ot_map,
    l2_uvp,
    transport_cost_ratio,
)


def cloud(n, d=2, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(d, seed):
    root = cloud(d, d, seed)
    return root @ root.T + 0.3 * torch.eye(d, dtype=torch.float64)


def rotation(degrees):
    a = math.radians(degrees)
    return torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64)


X, Y = cloud(20), cloud(20, seed=1) + 2
ZERO, EYE = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)


class Quadratic(nn.Module):
    """x ↦ ½ xᵀ A x + ⟨b, x⟩."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 0.7]]))
        self.b = nn.Parameter(torch.tensor([1.0, -1.0, 0.5]))

    def forward(self, x):
        return (x @ self.A * x).sum(1) / 2 + x @ self.b


# Closed forms


@pytest.mark.parametrize("d", [1, 2, 5])
def test_gaussian_map_carries_mean_and_covariance_by_a_gradient_of_a_convex_function(d):
    m0, m1, S0, S1 = cloud(1, d)[0], cloud(1, d, 1)[0], spread(d, 2), spread(d, 3)
    T = gaussian_ot_map(m0, S0, m1, S1)
    torch.testing.assert_close(T.matrix @ S0 @ T.matrix.T, S1)
    torch.testing.assert_close(T.matrix, T.matrix.T)
    assert torch.linalg.eigvalsh(T.matrix).min() > 0
    torch.testing.assert_close(T(m0[None]), m1[None])
    x = m0 + cloud(4000, d, 4) @ torch.linalg.cholesky(S0).T
    y = T(x)
    torch.testing.assert_close(y.mean(0), m1 + (x.mean(0) - m0) @ T.matrix.T)
    torch.testing.assert_close(y.T.cov().reshape(d, d), T.matrix @ x.T.cov().reshape(d, d) @ T.matrix.T)


def test_gaussian_map_of_equal_measures_is_the_identity_and_of_axes_stretches_them():
    S = spread(3, 0)
    torch.testing.assert_close(gaussian_ot_map(cloud(1, 3)[0], S, cloud(1, 3)[0], S)(cloud(5, 3)), cloud(5, 3))
    one, other = torch.tensor([1.0, 4.0]).double(), torch.tensor([9.0, 1.0]).double()
    T = gaussian_ot_map(ZERO, one.diag(), ZERO, other.diag())
    torch.testing.assert_close(T.matrix, torch.tensor([3.0, 0.5]).double().diag())


def test_gaussian_map_costs_the_bures_distance():
    m0, m1, S0, S1 = ZERO, ZERO + 1, spread(2, 2), spread(2, 3)
    T = gaussian_ot_map(m0, S0, m1, S1)
    moved = T.matrix - EYE
    cost = (m1 - m0).square().sum() + (moved @ S0 @ moved.T).trace()
    cross = torch.linalg.eigvals(S0 @ S1).real.sqrt().sum()  # tr (S0^½ S1 S0^½)^½
    torch.testing.assert_close(cost, (m1 - m0).square().sum() + S0.trace() + S1.trace() - 2 * cross)
    assert MongeGap(epsilon=0)(X, T(X)).item() == pytest.approx(0, abs=1e-10)


def test_entropic_map_extends_the_plans_mean():
    T = entropic_map(X, Y, epsilon=0.5, tol=1e-11)
    K = torch.exp(-torch.cdist(X, Y).square() / 0.5)
    v = torch.ones(20, dtype=torch.float64)
    for _ in range(5000):
        u = 1 / (K @ v)
        v = 1 / (K.T @ u)
    P = u[:, None] * K * v
    torch.testing.assert_close(T(X), P @ Y / P.sum(1, keepdim=True))
    inside = T(cloud(7, seed=9))
    assert inside.min() >= Y.min()
    assert inside.max() <= Y.max()


def test_entropic_map_finds_a_translation():
    x = cloud(300, seed=3)
    T = entropic_map(x, cloud(300, seed=4) + 3, relative_epsilon=0.01, tol=1e-2)
    moved = T(0.7 * cloud(100, seed=5)) - 0.7 * cloud(100, seed=5)
    torch.testing.assert_close(moved.mean(0), torch.full((2,), 3.0).double(), rtol=0, atol=0.15)
    assert l2_uvp(T, lambda z: z + 3, cloud(200, seed=5)) < 10


def test_uvp_scale():
    assert l2_uvp(lambda x: x + 1, lambda x: x + 1, X) == 0
    assert l2_uvp(lambda x: (3 * x).mean(0).expand_as(x), lambda x: 3 * x, X) == pytest.approx(100)
    off = torch.tensor([0.1, 0.2], dtype=torch.float64)
    total = 9 * (X - X.mean(0)).square().sum().item() / 20  # over both coordinates
    assert l2_uvp(lambda x: 3 * x + off, lambda x: 3 * x, X) == pytest.approx(100 * 0.05 / total)


def test_cost_ratio_of_the_best_pairing_is_one():
    shift = torch.tensor([1.0, -2.0], dtype=torch.float64)
    target = (X + shift)[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    assert transport_cost_ratio(lambda x: x + shift, X, target) == pytest.approx(1)
    assert transport_cost_ratio(lambda x: x + 2 * shift, X, target) == pytest.approx(4)
    assert transport_cost_ratio(lambda x: x + 2 * shift, X, target, "euclidean") == pytest.approx(2)


# Networks


def test_networks_forms():
    torch.manual_seed(0)
    plain = TransportMLP(2, (8,)).double()
    residual = TransportMLP(2, (8,), residual=True).double()
    residual.load_state_dict(plain.state_dict())
    torch.testing.assert_close(residual(X), X + plain(X))
    near = TransportMLP(2, (8,), residual=True, identity_init=True).double()
    assert (near(X) - X).abs().max() < 0.02
    assert (near(X) - X).abs().max() > 0
    sphere = TransportMLP(2, (8,), spherical=True).double()
    torch.testing.assert_close(sphere(X).norm(dim=1), torch.ones(20, dtype=torch.float64))
    hidden = [layer for layer in TransportMLP(2).network if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in hidden] == [32, 64, 32, 2]


def test_convex_network_is_convex_whatever_its_weights():
    for seed in range(5):
        torch.manual_seed(seed)
        f = InputConvexNetwork(3, (8, 6)).double()
        for parameter in f.parameters():
            nn.init.normal_(parameter, std=2.0)
        x, y = 3 * cloud(50, 3, seed), 3 * cloud(50, 3, seed + 9)
        for t in (0.2, 0.5, 0.9):
            assert (f(t * x + (1 - t) * y) <= t * f(x) + (1 - t) * f(y) + 1e-9).all()
        hessian = torch.func.hessian(lambda z, f=f: f(z[None])[0])(x[0])
        assert torch.linalg.eigvalsh(hessian).min() > 0


def test_gradients_of_convex_networks_have_no_gap():
    torch.manual_seed(1)
    T = GradientMap(InputConvexNetwork(2, (8, 6)).double())
    with torch.no_grad():
        assert MongeGap(epsilon=0)(X, T(X)).item() == pytest.approx(0, abs=1e-12)


def test_gradient_map_is_the_gradient_with_and_without_gradients_enabled():
    f = Quadratic().double()
    T, x = GradientMap(f), cloud(4, 3)
    wanted = x @ f.A + f.b
    torch.testing.assert_close(T(x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(T(x), wanted.detach())
    assert torch.is_grad_enabled()
    T(x).square().sum().backward()  # through the gradient to the potential's parameters
    torch.testing.assert_close(f.b.grad, 2 * wanted.sum(0).detach())


# Training


def written_out(model, x, y, reference, weights, lr):
    """The whole sample in every step: the order within a minibatch changes neither loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    fit, gap = SinkhornDivergence(epsilon=0.5, tol=1e-9), MongeGap(epsilon=0.5, tol=1e-9)
    losses = []
    for weight in weights:
        z = x if reference is None else reference
        loss = fit(model(x), y) + weight * gap(z, model(z))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("reference", [None, cloud(9, seed=7)])
def test_training_is_the_loop_written_out(reference):
    torch.manual_seed(0)
    model = TransportMLP(2, (8,)).double()
    other = copy.deepcopy(model)
    weights = [0.0, 0.5, 1.0, 1.5, 2.0]
    trainer = MongeMapEstimator(
        model,
        SinkhornDivergence(epsilon=0.5, tol=1e-9),
        MongeGap(epsilon=0.5, tol=1e-9),
        gap_weight=lambda step: step / 2,
        lr=1e-2,
        steps=5,
        batch=50,
        reference=reference,
        log_every=2,
    )
    history = trainer.fit(X, Y).history
    losses = written_out(other, X, Y, reference, weights, 1e-2)
    assert [(record.index, record.step) for record in history] == [(0, 2), (1, 4), (2, 5)]
    means = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2, losses[4]]
    assert [record.loss for record in history] == pytest.approx(means, abs=1e-6)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_minibatches_are_drawn_without_replacement_from_both_and_differ():
    seen = []

    def fit(images, target):
        seen.append((images.detach(), target))
        return images.square().mean()

    MongeMapEstimator(_Same(), fit, None, steps=6, batch=8, lr=1e-9).fit(X, Y)
    for images, target in seen:
        assert images.shape == target.shape == (8, 2)
        for part, whole in ((images, X), (target, Y)):
            rows = [int((whole - row).abs().sum(1).argmin()) for row in part]
            assert len(set(rows)) == 8
            torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-6)
    assert not torch.equal(seen[0][0], seen[1][0])
    firsts = [int((X - images[0]).abs().sum(1).argmin()) for images, _ in seen]
    seconds = [int((Y - target[0]).abs().sum(1).argmin()) for _, target in seen]
    assert firsts != seconds  # the two samples are drawn apart


class _Same(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        return x + self.shift


def test_no_gap_is_computed_where_its_weight_is_zero():
    called = []

    def gap(x, y):
        called.append(len(x))
        return MongeGap(epsilon=1.0)(x, y)

    make = {"fitting_loss": EnergyDistance(), "gap": gap, "steps": 4, "batch": 8}
    MongeMapEstimator(_Same(), gap_weight=0.0, **make).fit(X, Y)
    assert called == []
    MongeMapEstimator(_Same(), gap_weight=lambda step: float(step % 2), **make).fit(X, Y)
    assert called == [8, 8]


def test_transform_is_the_map_in_evaluation_mode():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(2, 2)).double()
    trainer = MongeMapEstimator(model, EnergyDistance(), None)
    model.train()
    torch.testing.assert_close(trainer.transform(X, batch_size=7), model[1](X).detach())
    assert model.training
    assert not trainer.transform(X).requires_grad


def test_the_gap_turns_a_rotated_fit_into_the_optimal_one():
    # Δ is blind to a rotation of a round sample; the gap sees nothing else.
    circle = torch.randn(256, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = circle + 3

    def fitted(weight):
        linear = nn.Linear(2, 2).double()
        with torch.no_grad():
            linear.weight.copy_(rotation(100))
            linear.bias.fill_(3.0)
        gap = MongeGap(epsilon=0)
        trainer = MongeMapEstimator(linear, EnergyDistance(), gap, gap_weight=weight, lr=2e-2, steps=150, batch=64)
        trainer.fit(circle, target)
        return l2_uvp(trainer.transform, lambda x: x + 3, circle)

    assert fitted(0.0) > 150
    assert fitted(1.0) < 3
