"""Matrix-free curvature against dense matrices from nested autograd, finite differences and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from provenn.core.numerics.curvature import CurvatureOperator, per_sample_gradients


def cross_entropy(z, y):
    return F.cross_entropy(z, y, reduction="none")


def squared(z, y):
    return (z - y).square().sum(-1)


def problem(loss=cross_entropy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    y = torch.randint(3, (7,)) if loss is cross_entropy else torch.randn(7, 3, dtype=torch.float64)
    return model, x, y


def flat_loss(model, loss, x, y):
    """The mean loss as a function of one vector, by autograd's own reshaping."""
    shapes = [(name, one.shape) for name, one in model.named_parameters()]

    def of(theta):
        parameters, start = {}, 0
        for name, shape in shapes:
            parameters[name] = theta[start : start + shape.numel()].view(shape)
            start += shape.numel()
        return torch.func.functional_call(model, parameters, (x,))

    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    return of, (lambda t: loss(of(t), y).mean()), theta


def columns(operator) -> torch.Tensor:
    return torch.stack([operator(e) for e in torch.eye(operator.dim, dtype=torch.float64)], dim=1)


@pytest.mark.parametrize("loss", [cross_entropy, squared])
def test_the_hessian_is_nested_autograds(loss) -> None:
    model, x, y = problem(loss)
    _, mean, theta = flat_loss(model, loss, x, y)
    wanted = torch.autograd.functional.hessian(mean, theta)
    operator = CurvatureOperator(model, loss, [(x[:3], y[:3]), (x[3:], y[3:])])
    torch.testing.assert_close(columns(operator), wanted, rtol=1e-9, atol=1e-12)


def test_a_hessian_product_is_a_difference_of_gradients() -> None:
    model, x, y = problem()
    _, mean, theta = flat_loss(model, cross_entropy, x, y)
    v = torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gradient(t):
        t = t.clone().requires_grad_()
        return torch.autograd.grad(mean(t), t)[0]

    h = 1e-5
    wanted = (gradient(theta + h * v) - gradient(theta - h * v)) / (2 * h)
    got = CurvatureOperator(model, cross_entropy, [(x, y)])(v)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)  # the difference errs by h²


def test_gauss_newton_for_cross_entropy_is_the_softmax_formula() -> None:
    model, x, y = problem()
    outputs, _, theta = flat_loss(model, cross_entropy, x, y)
    J = torch.autograd.functional.jacobian(outputs, theta)
    p = outputs(theta).softmax(-1)
    wanted = sum(j.T @ (torch.diag(q) - torch.outer(q, q)) @ j for j, q in zip(J, p, strict=True)) / len(x)
    operator = CurvatureOperator(model, cross_entropy, [(x[:5], y[:5]), (x[5:], y[5:])], "gauss-newton")
    torch.testing.assert_close(columns(operator), wanted, rtol=1e-9, atol=1e-12)


def test_gauss_newton_for_squared_error_is_twice_the_jacobians_gram_matrix() -> None:
    model, x, y = problem(squared)
    outputs, _, theta = flat_loss(model, squared, x, y)
    J = torch.autograd.functional.jacobian(outputs, theta).flatten(0, 1)
    operator = CurvatureOperator(model, squared, [(x, y)], "gauss-newton")
    torch.testing.assert_close(columns(operator), 2 * J.T @ J / len(x), rtol=1e-9, atol=1e-12)


def loop_of_gradients(model, loss, x, y) -> torch.Tensor:
    rows = []
    for sample, target in zip(x, y, strict=True):
        model.zero_grad()
        loss(model(sample[None]), target[None]).sum().backward()
        rows.append(torch.cat([one.grad.flatten() for one in model.parameters()]))
    model.zero_grad()
    return torch.stack(rows)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
def test_per_sample_gradients_are_a_loops(chunk_size) -> None:
    model, x, y = problem()
    got = per_sample_gradients(model, cross_entropy, x, y, chunk_size)
    torch.testing.assert_close(got, loop_of_gradients(model, cross_entropy, x, y), rtol=1e-10, atol=1e-12)
    assert per_sample_gradients(model, cross_entropy, x[:0], y[:0]).shape == (0, got.shape[1])


def test_the_empirical_fisher_is_the_gradients_second_moment() -> None:
    model, x, y = problem()
    G = loop_of_gradients(model, cross_entropy, x, y)
    operator = CurvatureOperator(model, cross_entropy, [(x[:2], y[:2]), (x[2:], y[2:])], "empirical-fisher")
    torch.testing.assert_close(columns(operator), G.T @ G / len(x), rtol=1e-9, atol=1e-12)


def test_frozen_parameters_are_left_out_and_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    for matrix in ("hessian", "gauss-newton", "empirical-fisher"):
        operator = CurvatureOperator(model, cross_entropy, [(x, y)], matrix)
        assert operator.dim == 4 + 8 + 10
        operator(torch.ones(operator.dim))
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert model.training
    assert all(one.grad is None for one in model.parameters())


def test_the_operator_follows_the_parameters() -> None:
    model, x, y = problem()
    operator = CurvatureOperator(model, cross_entropy, [(x, y)])
    v = torch.ones(operator.dim, dtype=torch.float64)
    before = operator(v)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert not torch.allclose(operator(v), before)
    torch.testing.assert_close(operator(v), CurvatureOperator(model, cross_entropy, [(x, y)])(v))


def test_bad_input_is_named() -> None:
    model, x, y = problem()
    with pytest.raises(ValueError, match="matrix must be one of 'hessian'"):
        CurvatureOperator(model, cross_entropy, [(x, y)], "fisher")
    with pytest.raises(ValueError, match="batches must hold at least one sample"):
        CurvatureOperator(model, cross_entropy, [])
    with pytest.raises(ValueError, match="trainable parameters"):
        CurvatureOperator(nn.Tanh(), cross_entropy, [(x, y)])
    with pytest.raises(ValueError, match=r"v must have shape \(31,\), got \(3,\)"):
        CurvatureOperator(model, cross_entropy, [(x, y)])(torch.ones(3))
    with pytest.raises(ValueError, match="chunk_size must be"):
        per_sample_gradients(model, cross_entropy, x, y, chunk_size=0)
