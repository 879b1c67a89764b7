"""The estimator and the search: scikit-learn's regression, refits, exotic settings, failures and warnings."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel
from sklearn.gaussian_process.kernels import Matern as TheirMatern

from provenn.core.numerics.covariance_functions import Hyperparameters, Matern
from provenn.core.numerics.objectives import branin
from provenn.search import BayesianOptimizer, GaussianProcess
from provenn.search._bayesian_optimization_fitting import maximise, slice_sample
from provenn.search.bayesian_optimization import Environment

BRANIN = branin()


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Q = 3 * drawn(15, 2) - 1, 3 * drawn(6, 2, seed=1) - 1
Y = X.sin().sum(1) + 5


def kept(noise: float = 0.01) -> Hyperparameters:
    values = torch.tensor([1.3, noise], dtype=torch.float64)
    return Hyperparameters(values[0], torch.tensor([2.0, 0.5]).double(), values[1])


def test_kept_hyperparameters_are_scikit_learns_regression() -> None:
    kernel = ConstantKernel(1.3) * TheirMatern([2**-0.5, 2**0.5], nu=1.5)
    peer = GaussianProcessRegressor(kernel, alpha=0.01, optimizer=None).fit(X.numpy(), Y.numpy())
    ours = GaussianProcess(Matern(1.5), mean=0.0, hyperparameters=kept()).fit(X, Y)
    mean, deviation = peer.predict(Q.numpy(), return_std=True)
    np.testing.assert_allclose(ours.predict(Q.numpy(), return_std=True), (mean, deviation), rtol=0, atol=1e-8)
    np.testing.assert_allclose(ours.posterior(Q).cov, peer.predict(Q.numpy(), return_cov=True)[1], rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", ["map", "mle", "slice"])
def test_learns_and_keeps_units(method: str) -> None:
    model = GaussianProcess(hyperparameters=method).fit(100 * X, 1000 * Y)
    np.testing.assert_allclose(model.predict((100 * Q).numpy()), 1000 * (Q.sin().sum(1) + 5), rtol=0, atol=150)
    mean, cov = model.posterior(100 * Q)
    assert torch.linalg.eigvalsh(cov).min() > -1e-6 * cov.diagonal().max()
    draws = model.sample(100 * Q, 20_000)
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=5 * cov.diagonal().max().sqrt().item() / 141)


def test_condition_keeps_the_hyperparameters_and_equals_a_refit() -> None:
    first = GaussianProcess(mean=4.0, hyperparameters=kept()).fit(X[:10], Y[:10])
    grown, whole = first.condition(X[10:], Y[10:]), GaussianProcess(mean=4.0, hyperparameters=kept()).fit(X, Y)
    for one, other in zip(grown.posterior(Q), whole.posterior(Q), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert len(first.posterior_.X) == 10


def test_derivatives_are_learnt_from() -> None:
    rows = torch.cat([Y.unsqueeze(1), X.cos()], 1)
    for options in ({}, {"mean": 5.0, "noise": 0.0}):
        slopes = GaussianProcess(derivatives=True, **options).fit(X, rows)
        plain = GaussianProcess(**options).fit(X, Y)
        errors = [np.abs(one.predict(Q.numpy()) - (Q.sin().sum(1) + 5).numpy()).max() for one in (slopes, plain)]
        assert errors[0] < 0.5 * errors[1]
        step = torch.tensor([1e-4, 0.0]).double()
        found = (slopes.predict((X + step).numpy()) - slopes.predict((X - step).numpy())) / 2e-4
        np.testing.assert_allclose(found, X[:, 0].cos(), atol=0.02)
    more = slopes.condition(Q, torch.cat([(Q.sin().sum(1) + 5).unsqueeze(1), Q.cos()], 1))
    np.testing.assert_allclose(more.predict(Q.numpy()), Q.sin().sum(1) + 5, atol=1e-4)


def test_a_parametric_mean_extrapolates() -> None:
    line = GaussianProcess(mean=lambda x: torch.cat([torch.ones_like(x[..., :1]), x], -1), noise=1e-6)
    line.fit(X, 3 + 2 * X[:, 0] - X[:, 1])
    assert line.predict(np.array([[50.0, 20.0]]))[0] == pytest.approx(83, abs=0.5)


def test_noise_by_observation() -> None:
    noises = torch.full((15,), 1e-6, dtype=torch.float64)
    noises[3] = 100.0
    spoiled = Y.clone()
    spoiled[3] += 10
    model = GaussianProcess(noise=noises).fit(X, spoiled)
    assert abs(model.predict(X[3:4].numpy())[0] - Y[3].item()) < 1


def test_duplicates_without_noise_warn() -> None:
    with pytest.warns(UserWarning, match="duplicate points"):
        GaussianProcess(mean=0.0, noise=0.0).fit(X[[0, 0, 1, 2]], Y[[0, 0, 1, 2]])


def test_maximise_finds_every_restarts_optimum() -> None:
    low_high = torch.tensor([[-2.0], [2.0]], dtype=torch.float64)
    ends, values = maximise(
        lambda x: -(x.squeeze(-1).square() - 1).square(), torch.tensor([[-1.5], [0.3]]).double(), low_high
    )
    torch.testing.assert_close(ends.abs().squeeze(), torch.ones(2).double(), rtol=0, atol=1e-3)
    assert values.max() <= 0


def test_slice_sampling_has_the_targets_moments() -> None:
    def density(theta: torch.Tensor) -> torch.Tensor:
        return -0.125 * (theta[:, 0] - 1).square() - 0.5 * (theta[:, 1] - theta[:, 0]).square()

    states = slice_sample(density, torch.zeros(4000, 2).double(), 12, torch.Generator().manual_seed(0))
    torch.testing.assert_close(states.mean(0), torch.ones(2).double(), rtol=0, atol=0.2)
    torch.testing.assert_close(states.T.cov(), torch.tensor([[4.0, 4.0], [4.0, 5.0]]).double(), rtol=0, atol=0.5)


def search(evaluations: int = 9, **options) -> BayesianOptimizer:
    searcher = BayesianOptimizer(BRANIN.bounds, refit_every=3, **options)
    for _ in range(evaluations):
        points = searcher.ask()
        searcher.tell(points, BRANIN(points))
    return searcher


@pytest.mark.parametrize("rule", ["noisy_ei", "ei_observed", "pi", "ucb", "kg", "es", "pes"])
def test_every_rule_searches_and_pickles(rule: str) -> None:
    searcher = search(7, acquisition=rule)
    other = pickle.loads(pickle.dumps(searcher))
    assert torch.equal(searcher.ask(1), other.ask(1))


@pytest.mark.parametrize("rule", ["kg_simulation", "kg_sgd"])
def test_simulated_rules_search(rule: str) -> None:
    assert search(7, acquisition=rule).best.value > -3


@pytest.mark.parametrize("rule", ["ei", "kg"])
def test_batches_are_spread(rule: str) -> None:
    searcher = search(3, acquisition=rule, q=2)
    points = searcher.ask()
    assert points.shape == (2, 2)
    assert (points[0] - points[1]).norm() > 1e-3


def test_pending_points_are_avoided() -> None:
    searcher = search(9, noise=0.0)
    points = searcher.ask(3)
    assert torch.pdist(points).min() > 1e-2


def test_constraints_are_learnt() -> None:
    searcher = BayesianOptimizer(BRANIN.bounds, constraints=1, noise=0.0, refit_every=3)
    for _ in range(14):
        points = searcher.ask()
        searcher.tell(points, BRANIN(points), points[:, :1] - 2)  # feasible: the first coordinate is at most 2
    assert searcher.best.point[0] <= 2
    assert searcher.recommend().point[0] <= 2
    assert (torch.stack(searcher._models.points[6:])[:, 0] <= 2.5).float().mean() > 0.7


def test_nothing_feasible_is_said() -> None:
    searcher = BayesianOptimizer(BRANIN.bounds, constraints=1)
    points = searcher.ask(3)
    searcher.tell(points, [1.0, 2.0, 3.0], [[1.0], [1.0], [1.0]])
    with pytest.raises(RuntimeError, match="nothing feasible"):
        _ = searcher.best


def test_fidelities_prefer_what_is_cheap() -> None:
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    searcher = BayesianOptimizer(bounds, "kg", fidelity=lambda x: 1.05 - x[:, 1], noise=0.0)
    asked = []
    for _ in range(11):
        point = searcher.ask()
        asked.append(point[0])
        searcher.tell(point, -(point[:, 0] - 0.6).square() - 0.05 * point[:, 1] * point[:, 0])
    assert searcher.recommend("domain").point.item() == pytest.approx(0.6, abs=0.1)
    assert torch.stack(asked[6:])[:, 1].mean() > 0.5


def test_environments_are_met_at_their_nodes_and_averaged() -> None:
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    environment = Environment(torch.tensor([[0.0], [1.0]]).double(), torch.tensor([0.25, 0.75]).double())
    searcher = BayesianOptimizer(bounds, "kg", environment=environment, noise=0.0)
    for _ in range(12):
        point = searcher.ask()
        assert point[0, 1].item() in (0.0, 1.0)
        searcher.tell(point, -(point[:, 0] - point[:, 1]).square())
    assert searcher.recommend("domain").point.item() == pytest.approx(0.75, abs=0.05)  # ∂: 0.25 x = 0.75 (1 − x)


def test_gradients_told_are_used() -> None:
    searcher = BayesianOptimizer(BRANIN.bounds, noise=0.0)
    points = searcher.ask(6)
    leaf = points.clone().requires_grad_()
    values = BRANIN(leaf)
    (slopes,) = torch.autograd.grad(values.sum(), leaf)
    searcher.tell(points, values.detach(), gradients=slopes)
    assert searcher.ask().shape == (1, 2)
    assert searcher._models._posterior(searcher._models.shares(searcher._models.points), 0).orders is not None


def test_failures_are_listed_and_left_out() -> None:
    searcher = BayesianOptimizer(BRANIN.bounds)
    points = searcher.ask(3)
    searcher.tell(points, [1.0, math.nan, math.inf])
    assert torch.equal(torch.stack(searcher.failures), points[1:])
    assert searcher.best.value == 1.0


def test_many_dimensions_warn() -> None:
    with pytest.warns(UserWarning, match="21 dimensions"):
        BayesianOptimizer(torch.tensor([[0.0], [1.0]]).expand(2, 21))
