"""Acquisitions: quadrature, brute force, Monte Carlo, finite differences, and each other where they must agree."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from provenn.core.numerics.covariance_functions import Hyperparameters, Matern
from provenn.core.numerics.gaussian_processes import GaussianPosterior
from provenn.search.acquisition import (
    constrained_ei,
    entropy_search,
    expected_improvement,
    expected_max_affine,
    knowledge_gradient,
    noisy_expected_improvement,
    predictive_entropy_search,
    probability_of_improvement,
    q_expected_improvement,
    q_knowledge_gradient,
    ucb,
)
from provenn.search.bayesian_optimization import Environment

BOX = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=source(seed))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=source(seed))


def fitted(X: torch.Tensor, y: torch.Tensor, noise: float, weight: float = 8.0) -> GaussianPosterior:
    weights = torch.full((X.shape[1],), weight, dtype=torch.float64)
    some = Hyperparameters(torch.tensor(1.0).double(), weights, torch.tensor(noise).double())
    return GaussianPosterior(Matern(2.5), some, X, y)


def posterior(noise: float = 0.05) -> GaussianPosterior:
    X = drawn(10, 2)
    return fitted(X, (5 * X).sin().sum(1), noise)


def integrated(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Integrate the largest line by Simpson's rule on a fine grid."""
    z = np.linspace(-12, 12, 400_001)
    weights = np.ones_like(z)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    weights *= (z[1] - z[0]) / 3 * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return np.array(
        [
            (row_a[:, None] + row_b[:, None] * z).max(0) @ weights
            for row_a, row_b in zip(a.numpy(), b.numpy(), strict=True)
        ]
    )


def test_expected_max_affine_is_the_integral() -> None:
    a, b = normal(6, 9), normal(6, 9, seed=1)
    b[0, 3] = b[0, 2]  # two parallel lines
    a[1] = 0.0  # all meet in one point
    b[2] = 0.0  # all flat
    a[3], b[3] = a[3, 0].item(), b[3, 0].item()  # one line, nine times
    b[4] *= 1e-9
    np.testing.assert_allclose(expected_max_affine(a, b), integrated(a, b), rtol=0, atol=1e-8)


def test_expected_max_affine_of_two_lines_is_gauss_hermite() -> None:
    """A smooth case for the rule: far apart lines, of which the larger is taken everywhere the rule looks."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    a, b = torch.tensor([[0.0, 60.0]]).double(), torch.tensor([[0.5, 0.4]]).double()
    wanted = (np.maximum(0.5 * nodes, 60 + 0.4 * nodes) * weights).sum() / weights.sum()
    assert expected_max_affine(a, b).item() == pytest.approx(wanted, abs=1e-8)


def test_expected_max_affine_gradient_and_order() -> None:
    a, b = normal(2, 5).requires_grad_(), normal(2, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(expected_max_affine, (a, b))
    shuffled = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(expected_max_affine(a[:, shuffled], b[:, shuffled]), expected_max_affine(a, b))


def test_expected_improvement_is_the_monte_carlo_mean() -> None:
    mean, sd = torch.tensor([-1.0, 0.3, 2.0]).double(), torch.tensor([0.5, 1.0, 2.0]).double()
    draws = (mean + sd * normal(1_000_000, 3) - 0.4).clamp_min(0)
    error = draws.std(0) / 1000
    assert ((expected_improvement(mean, sd, 0.4) - draws.mean(0)).abs() < 3 * error).all()
    assert ((probability_of_improvement(mean, sd, 0.4) - (draws > 0).double().mean(0)).abs() < 0.002).all()
    torch.testing.assert_close(ucb(mean, sd, 4.0), mean + 2 * sd)


def test_expected_improvement_grows_with_mean_and_deviation_and_is_accurate_in_the_tail() -> None:
    grid = torch.linspace(-3, 3, 61, dtype=torch.float64)
    assert (expected_improvement(grid, torch.ones_like(grid), 0.0).diff() > 0).all()
    sds = torch.linspace(0.01, 3, 61, dtype=torch.float64)
    for mean in (-1.0, 0.0, 1.0):
        assert (expected_improvement(torch.full_like(sds, mean), sds, 0.0).diff() >= 0).all()
    tail = expected_improvement(torch.tensor([-20.0]).double(), torch.ones(1).double(), 0.0).item()
    series = math.exp(-200) / math.sqrt(2 * math.pi) / 400 * (1 - 3 / 400 + 15 / 400**2)
    assert tail == pytest.approx(series, rel=1e-5)
    sure = expected_improvement(torch.tensor([-1.0, 2.0]).double(), torch.zeros(2).double(), 0.0)
    assert sure.tolist() == [0.0, 2.0]


def test_expected_improvement_has_its_closed_gradient() -> None:
    mean = torch.tensor([-2.0, -1.0, 0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    sd = torch.tensor([0.7, 1.0, 1.3, 0.2, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, s: expected_improvement(m, s, 0.0), (mean, sd))
    slopes = torch.autograd.grad(expected_improvement(mean, sd, 0.0).sum(), (mean, sd))
    normal_law = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(slopes[0], normal_law.cdf(mean / sd))
    torch.testing.assert_close(slopes[1], normal_law.log_prob(mean / sd).exp())


def test_without_noise_noisy_improvement_is_improvement() -> None:
    model, Q = posterior(0.0), drawn(200, 2, seed=1)
    mean, variance = model.mean_variance(Q)
    plain = expected_improvement(mean, variance.sqrt(), model.y.max())
    torch.testing.assert_close(noisy_expected_improvement(model, Q), plain, rtol=0, atol=1e-8)
    assert noisy_expected_improvement(model, model.X).max() < 1e-8
    assert plain.max() > 0.01


def test_noisy_improvement_picks_the_one_step_optimal_point() -> None:
    """On 15 points in a line: by quadrature over y, refitting for every outcome, answering with an evaluated point."""
    grid = torch.linspace(0, 1, 15, dtype=torch.float64).unsqueeze(1)
    X = grid[[1, 6, 6, 12]]
    y = torch.tensor([0.2, 1.0, 0.1, 0.4], dtype=torch.float64)
    model = fitted(X, y, 0.3)
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)
    rewards = []
    for x in grid.unsqueeze(1):
        mean, variance = model.mean_variance(x)
        total = 0.0
        for node, weight in zip(nodes, weights / weights.sum(), strict=True):
            outcome = mean + (variance + 0.3).sqrt() * node
            after = fitted(torch.cat([X, x]), torch.cat([y, outcome]), 0.3)
            total += weight * after.mean(after.X).max().item()
        rewards.append(total - model.mean(X).max().item())
    ours = noisy_expected_improvement(model, grid)
    np.testing.assert_allclose(ours, rewards, rtol=0, atol=2e-3)  # the rule's error at the kinks
    assert int(ours.argmax()) == int(np.argmax(rewards))


def test_noisy_improvement_is_not_plug_in() -> None:
    model, Q = posterior(0.3), drawn(50, 2, seed=1)
    mean, variance = model.mean_variance(Q)
    plug_in = expected_improvement(mean, variance.sqrt(), model.mean(model.X).max())
    assert (noisy_expected_improvement(model, Q) < plug_in + 1e-12).float().mean() > 0.9


def test_knowledge_gradient_at_the_evaluated_points_is_noisy_improvement() -> None:
    model, Q = posterior(), drawn(20, 2, seed=1)
    torch.testing.assert_close(
        knowledge_gradient(model, Q, model.X), noisy_expected_improvement(model, Q), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("count", [1, 3, 30])
def test_knowledge_gradient_is_never_negative(count: int) -> None:
    model, Q = posterior(), drawn(40, 2, seed=1)
    assert knowledge_gradient(model, Q, drawn(count, 2, seed=2)).min() > -1e-12


def test_knowledge_gradient_is_brute_force() -> None:
    """Draw outcomes, refit for each, and take the best mean over the alternatives and the point."""
    model, A, x = posterior(), drawn(5, 2, seed=2), drawn(1, 2, seed=3)
    mean, variance = model.mean_variance(x)
    outcomes = mean + (variance + 0.05).sqrt() * normal(4000)
    best = [
        fitted(torch.cat([model.X, x]), torch.cat([model.y, y[None]]), 0.05).mean(torch.cat([A, x])).max()
        for y in outcomes
    ]
    gains = torch.stack(best) - model.mean(A).max()
    error = gains.std().item() / math.sqrt(len(gains))
    assert knowledge_gradient(model, x, A).item() == pytest.approx(gains.mean().item(), abs=4 * error)


def test_simulated_knowledge_gradient_agrees_with_a_dense_discrete_one_and_its_gradient() -> None:
    model, Q = posterior(), drawn(4, 2, seed=1)
    side = torch.linspace(0, 1, 41, dtype=torch.float64)
    dense = torch.cartesian_prod(side, side)
    samples = torch.special.ndtri((torch.arange(256).double() + 0.5) / 256).unsqueeze(1)
    options = {"method": "simulation", "bounds": BOX, "base_samples": samples}
    found = knowledge_gradient(model, Q, dense[::7], **options)
    torch.testing.assert_close(found, knowledge_gradient(model, Q, dense), rtol=0.03, atol=2e-3)
    leaf = Q.clone().requires_grad_()
    (slope,) = torch.autograd.grad(knowledge_gradient(model, leaf, dense[::7], **options).sum(), leaf)
    step = torch.tensor([1e-3, 0.0], dtype=torch.float64)
    ahead, behind = (knowledge_gradient(model, Q + sign * step, dense[::7], **options) for sign in (1, -1))
    torch.testing.assert_close(slope[:, 0], (ahead - behind) / 2e-3, rtol=0.05, atol=5e-3)


def test_stochastic_knowledge_gradients_average_to_the_simulated_one() -> None:
    model, x, A = posterior(), drawn(1, 2, seed=1), drawn(40, 2, seed=2)
    draws = source()
    some = torch.stack(
        [knowledge_gradient(model, x, A, "sgd", bounds=BOX, generator=draws).squeeze() for _ in range(60)]
    )
    samples = torch.special.ndtri((torch.arange(256).double() + 0.5) / 256).unsqueeze(1)
    wanted = knowledge_gradient(model, x, A, "simulation", bounds=BOX, base_samples=samples).item()
    assert some.mean().item() == pytest.approx(wanted, abs=4 * some.std().item() / math.sqrt(60))


def test_slopes_observed_are_worth_something() -> None:
    model, Q, A = posterior(), drawn(5, 2, seed=1), drawn(30, 2, seed=2)
    value = knowledge_gradient(model, Q, A)
    one = knowledge_gradient(model, Q, A, gradients=1, base_samples=normal(20_000, 2))
    both = knowledge_gradient(model, Q, A, gradients="all", base_samples=normal(20_000, 3))
    assert (one > value - 2e-3).all()
    assert (both > one - 2e-3).all()
    assert (both > 1.2 * value).any()


def test_environment_of_one_certain_node_is_the_slice() -> None:
    """The target f(·, 0.3) seen by points of full dimension; two equal halves of it are the same."""
    model, Q, A = posterior(), drawn(6, 2, seed=1), drawn(12, 1, seed=2)
    node = torch.tensor([[0.3]]).double()
    at = torch.cat([A, node.expand(12, 1)], 1)
    once = knowledge_gradient(model, Q, A, environment=Environment(node, torch.ones(1).double()))
    halves = Environment(node.repeat(2, 1), torch.full((2,), 0.5).double())
    torch.testing.assert_close(once, knowledge_gradient(model, Q, A, environment=halves))
    on_slice = torch.cat([Q[:, :1], node.expand(6, 1)], 1)
    torch.testing.assert_close(
        knowledge_gradient(model, on_slice, A, environment=Environment(node, torch.ones(1).double())),
        knowledge_gradient(model, on_slice, at),
    )


def test_batches() -> None:
    cov = torch.tensor([[1.0, 0.3], [0.3, 0.5]]).double()
    mean = torch.tensor([0.2, -0.1]).double()
    one = q_expected_improvement(mean[:1], cov[:1, :1], 0.4)
    torch.testing.assert_close(one, expected_improvement(mean[0], cov[0, 0].sqrt(), 0.4))
    exact = q_expected_improvement(mean, cov, 0.4)
    torch.testing.assert_close(q_expected_improvement(mean.flip(0), cov.flip(0, 1), 0.4), exact)
    draws = normal(1_000_000, 2)
    values = (mean + draws @ torch.linalg.cholesky(cov).T).amax(1) - 0.4
    assert exact.item() == pytest.approx(values.clamp_min(0).mean().item(), abs=0.002)
    assert q_expected_improvement(mean, cov, 0.4, draws).item() == pytest.approx(exact.item(), abs=0.002)
    twice = q_expected_improvement(mean[[0, 0]], torch.ones(2, 2).double(), 0.4)
    torch.testing.assert_close(twice, one)
    leaf = mean.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: q_expected_improvement(m, cov, 0.4), leaf)


def test_batch_knowledge_gradient_of_one_is_the_knowledge_gradient_and_grows() -> None:
    model, A, X = posterior(), drawn(20, 2, seed=2), drawn(3, 2, 2, seed=1)
    one = q_knowledge_gradient(model, X[:, :1], A, normal(10, 1))
    torch.testing.assert_close(one, knowledge_gradient(model, X[:, 0], A))
    two = q_knowledge_gradient(model, X, A, normal(50_000, 2))
    assert (two > one - 2e-3).all()
    swapped = q_knowledge_gradient(model, X.flip(1), A, normal(50_000, 2))
    torch.testing.assert_close(two, swapped, rtol=0, atol=5e-3)


def test_constraints() -> None:
    mean, sd = normal(5), drawn(5) + 0.1
    plain = expected_improvement(mean, sd, 0.2)
    sure = torch.full((1, 5), -50.0).double()
    torch.testing.assert_close(constrained_ei(mean, sd, 0.2, sure, torch.ones(1, 5).double()), plain)
    even = torch.zeros(2, 5).double()
    torch.testing.assert_close(constrained_ei(mean, sd, 0.2, even, torch.ones(2, 5).double()), plain / 4)


def test_entropies_are_information() -> None:
    model, Q, C = posterior(), drawn(12, 2, seed=1), drawn(60, 2, seed=2)
    es = entropy_search(model, Q, C, source(), samples=2000)
    for found in (
        es,
        predictive_entropy_search(model, Q, C, source(), samples=500),
        predictive_entropy_search(model, Q, C, source(), "rejection", samples=5000),
    ):
        assert found.min() > -0.01  # sampling error
        assert np.corrcoef(found, es)[0, 1] > 0.8  # three estimates of one thing


def test_a_point_that_changes_nothing_has_no_entropy_to_give() -> None:
    model, C = posterior(0.0), drawn(30, 2, seed=2)
    seen = model.X[:2]
    assert entropy_search(model, seen, C, source()).abs().max() < 1e-6
    assert predictive_entropy_search(model, seen, C, source()).abs().max() < 1e-2  # of a variance of 1e-16
    noisy = posterior(0.05)
    far = torch.full((1, 2), 1e3, dtype=torch.float64)
    assert entropy_search(noisy, far, C, source()).item() == pytest.approx(0, abs=1e-12)


def test_predictive_entropy_has_a_gradient() -> None:
    model, C = posterior(), drawn(30, 2, seed=2)
    leaf = drawn(3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda X: predictive_entropy_search(model, X, C, source()), leaf, eps=1e-5, atol=1e-3
    )
