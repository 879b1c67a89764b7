"""Riemannian gradient descent: torch's SGD, geodesics to second order, constraints, and known minima."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from provenn.core.experiment.seeding import seeded
from provenn.nn import BiMap, GBWBatchNorm, RiemannianSGD, SPDBatchNorm, SPDNet, manifold_groups, spd


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrices(*shape, seed=0):
    A = normal(*shape, shape[-1], seed=seed)
    return A @ A.mT / shape[-1] + 0.3 * torch.eye(shape[-1], dtype=torch.float64)


def rows(m, n, seed=0):
    return torch.linalg.qr(normal(n, m, seed=seed))[0].T.contiguous()


def stepped(start, gradient, lr, manifold):
    param = nn.Parameter(start.clone())
    param.grad = gradient.clone()
    RiemannianSGD([param], lr=lr, manifold=manifold).step()
    return param.detach()


def test_euclidean_parameters_step_as_torchs_sgd():
    ours, theirs = (nn.Parameter(normal(4, 3)) for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    pairs = ((RiemannianSGD([ours], **options), ours), (torch.optim.SGD([theirs], **options), theirs))
    for step in range(6):
        for optimizer, param in pairs:
            param.grad = (param.detach() - normal(4, 3, seed=step)).cos()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=0)


def test_the_step_on_spd_matrices_is_the_affine_invariant_geodesic_to_second_order():
    P, G = matrices(4), normal(4, 4, seed=1)
    root, inverse = (np.real(scipy.linalg.fractional_matrix_power(P.numpy(), p)) for p in (0.5, -0.5))
    gradient = P @ (0.5 * (G + G.T)) @ P  # by the metric tr(P⁻¹ U P⁻¹ V)
    errors = []
    for lr in (1e-2, 5e-3):
        geodesic = root @ scipy.linalg.expm(-lr * inverse @ gradient.numpy() @ inverse) @ root
        errors.append(np.abs(stepped(P, G, lr, "spd").numpy() - geodesic).max())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(3, abs=0.1)


def test_spd_parameters_stay_so_at_any_learning_rate():
    P = torch.stack([matrices(4), 1e-3 * matrices(4, seed=1)])
    for lr in (1e-3, 1.0, 100.0):
        moved = stepped(P, normal(2, 4, 4, seed=2), lr, "spd")
        assert torch.equal(moved, moved.mT)
        assert (torch.linalg.eigvalsh(moved)[:, 0] >= 0.49 * torch.linalg.eigvalsh(P)[:, 0]).all()


def test_the_step_is_invariant_under_congruences():
    P, G, A = matrices(3), normal(3, 3, seed=1), normal(3, 3, seed=2)
    inverse = torch.linalg.inv(A)
    moved = stepped(A @ P @ A.T, inverse.T @ G @ inverse, 0.1, "spd")  # gradients move the other way
    torch.testing.assert_close(moved, A @ stepped(P, G, 0.1, "spd") @ A.T)


def test_it_finds_the_barycentre():
    X = matrices(6, 3)
    param = nn.Parameter(torch.eye(3, dtype=torch.float64))
    optimizer = RiemannianSGD([param], lr=0.5, manifold="spd")
    for _ in range(200):
        optimizer.zero_grad()
        spd.dist(param, X).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(param.detach(), spd.barycenter(X), atol=1e-7, rtol=0)


def test_rows_stay_orthonormal_and_small_steps_follow_the_tangent():
    W, G = torch.stack([rows(2, 5), rows(2, 5, seed=1)]), normal(2, 2, 5, seed=2)
    eye = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    for lr in (1e-3, 1.0, 100.0):
        moved = stepped(W, G, lr, "stiefel")
        torch.testing.assert_close(moved @ moved.mT, eye, atol=1e-12, rtol=0)
    tangent = G - W @ G.mT @ W
    assert (tangent @ W.mT + W @ tangent.mT).abs().max() < 1e-12
    h = 1e-6
    torch.testing.assert_close((stepped(W, G, h, "stiefel") - W) / -h, tangent, atol=1e-4, rtol=0)


def test_it_finds_the_leading_subspace():
    A = matrices(5)
    param = nn.Parameter(rows(2, 5))
    optimizer = RiemannianSGD([param], lr=0.1, manifold="stiefel")
    for _ in range(1000):
        optimizer.zero_grad()
        (-torch.trace(param @ A @ param.T)).backward()
        optimizer.step()
    best = torch.linalg.eigvalsh(A)[-2:].sum()
    torch.testing.assert_close(torch.trace(param @ A @ param.T).detach(), best, atol=1e-6, rtol=0)


def test_momentum_and_decay_leave_matrices_alone():
    P, G = matrices(3), normal(3, 3, seed=1)
    param = nn.Parameter(P.clone())
    optimizer = RiemannianSGD([param], lr=0.1, momentum=0.9, weight_decay=0.5, manifold="spd")
    param.grad = G
    optimizer.step()
    torch.testing.assert_close(param.detach(), stepped(P, G, 0.1, "spd"))
    assert not optimizer.state


def test_models_are_sorted_by_manifold():
    model = SPDNet((5, 3, 2), 4, lambda n: GBWBatchNorm(n))
    groups = {group["manifold"]: group["params"] for group in manifold_groups(model)}
    bimaps = [m for m in model.features if isinstance(m, BiMap)]
    norms = [m for m in model.features if isinstance(m, GBWBatchNorm)]
    assert {id(p) for p in groups["stiefel"]} == {id(m.weight) for m in bimaps}
    assert {id(p) for p in groups["spd"]} == {id(p) for m in norms for p in (m.bias, m.metric)}
    rest = {id(m.scale) for m in norms} | {id(p) for p in model.head.parameters()}
    assert {id(p) for p in groups["euclidean"]} == rest


def test_groups_leave_out_empty_manifolds_frozen_and_shared_parameters():
    head = nn.Linear(2, 2)
    head.bias.requires_grad_(False)
    model = nn.ModuleList([head, head])
    assert manifold_groups(model) == [{"params": [head.weight], "manifold": "euclidean"}]


@pytest.mark.parametrize("norm", [GBWBatchNorm, lambda n: GBWBatchNorm(n, theta=0.5), SPDBatchNorm])
def test_a_network_learns_and_keeps_its_constraints(norm):
    A = normal(4, 4, seed=3)
    X = matrices(32, 1, 4)
    X[16:] = A @ X[16:] @ A.T
    y = (torch.arange(32) >= 16).long()
    with seeded(0):
        model = SPDNet((4, 3), 2, norm)
    optimizer = RiemannianSGD(manifold_groups(model), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    W = model.features[0].weight.detach()
    torch.testing.assert_close(W @ W.mT, torch.eye(3, dtype=torch.float64)[None, None], atol=1e-12, rtol=0)
    for parameter in (p for group in manifold_groups(model) if group["manifold"] == "spd" for p in group["params"]):
        assert torch.linalg.eigvalsh(parameter.detach()).min() > 0
        assert (parameter.detach() - torch.eye(3)).abs().max() > 1e-4
