"""Gaussian processes: scikit-learn's, finite differences, dense formulas written out, and refits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import kv
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from sklearn.gaussian_process.kernels import Matern as TheirMatern

from provenn.core.numerics.covariance_functions import Hyperparameters, Matern, PowerExponential, covariance
from provenn.core.numerics.gaussian_processes import CholeskyError, GaussianPosterior, cholesky, root

WEIGHTS = torch.tensor([2.0, 5.0], dtype=torch.float64)
KERNELS = [PowerExponential(), Matern(0.5), Matern(1.5), Matern(2.5), Matern(1.2), Matern(3.3)]
NAMES = ["power exponential", "1/2", "3/2", "5/2", "1.2", "3.3"]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hyperparameters(noise: float = 0.01) -> Hyperparameters:
    return Hyperparameters(torch.tensor(1.7, dtype=torch.float64), WEIGHTS, torch.tensor(noise, dtype=torch.float64))


def theirs(kernel):
    lengths = (1 / WEIGHTS.sqrt()).tolist()
    if isinstance(kernel, PowerExponential):
        return ConstantKernel(1.7) * RBF([length / math.sqrt(2) for length in lengths])
    return ConstantKernel(1.7) * TheirMatern(lengths, nu=kernel.smoothness)


@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
def test_kernel_is_scikit_learns(kernel) -> None:
    X, Y = drawn(8, 2), drawn(5, 2, seed=1)
    ours = covariance(kernel, hyperparameters(), X, Y)
    np.testing.assert_allclose(ours, theirs(kernel)(X.numpy(), Y.numpy()), rtol=0, atol=1e-12)


def test_general_matern_is_the_bessel_formula() -> None:
    q = torch.tensor([0.01, 0.5, 4.0], dtype=torch.float64)
    z = np.sqrt(2 * 0.8 * q.numpy())
    np.testing.assert_allclose(Matern(0.8).profile(q), 2**0.2 / math.gamma(0.8) * z**0.8 * kv(0.8, z), rtol=1e-12)
    assert Matern(0.8).profile(torch.zeros(1, dtype=torch.float64)).item() == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(Matern(2.5 + 1e-9).profile(q), Matern(2.5).profile(q), rtol=1e-7, atol=0)


@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
def test_profile_has_the_gradient_of_finite_differences(kernel) -> None:
    q = torch.tensor([0.3, 1.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kernel.profile, q)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.smoothness > 1], ids=[n for n in NAMES if n != "1/2"])
def test_derivative_blocks_are_finite_differences(kernel) -> None:
    X, Y = drawn(4, 2), drawn(3, 2, seed=1)
    step = 1e-4

    def value(rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
        return torch.tensor(theirs(kernel)(rows.numpy(), cols.numpy()))

    def shift(order: int) -> torch.Tensor:
        return step * torch.eye(3, 2, dtype=torch.float64).roll(1, 0)[order] if order else torch.zeros(2).double()

    for first in range(3):
        for second in range(3):
            found = covariance(kernel, hyperparameters(), X, Y, torch.full((4,), first), torch.full((3,), second))
            wanted = value(X, Y)
            signs = [(a, b) for a in ((1, -1) if first else (0,)) for b in ((1, -1) if second else (0,))]
            parts = [(a or 1) * (b or 1) * value(X + a * shift(first), Y + b * shift(second)) for a, b in signs]
            wanted = sum(parts) / (2 * step) ** ((first > 0) + (second > 0))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-4)


def test_derivatives_at_one_point_are_finite_and_positive_definite() -> None:
    orders = torch.tensor([0, 1, 2, 0, 1, 2])
    X = drawn(2, 2).repeat_interleave(3, 0)
    for kernel in KERNELS:
        if kernel.smoothness > 1:
            gram = covariance(kernel, hyperparameters(), X, X, orders, orders)
            assert gram.isfinite().all()
            assert torch.linalg.eigvalsh(gram).min() > 0


@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
def test_posterior_and_evidence_are_scikit_learns(kernel) -> None:
    X, Q = drawn(12, 2), drawn(7, 2, seed=1)
    y = (5 * X).sin().sum(1)
    peer = GaussianProcessRegressor(theirs(kernel), alpha=0.01, optimizer=None).fit(X.numpy(), y.numpy())
    mean, cov = peer.predict(Q.numpy(), return_cov=True)
    posterior = GaussianPosterior(kernel, hyperparameters(), X, y)
    np.testing.assert_allclose(posterior.mean(Q), mean, rtol=0, atol=1e-8)
    np.testing.assert_allclose(posterior.covariance(Q), cov, rtol=0, atol=1e-8)
    np.testing.assert_allclose(posterior.mean_variance(Q)[1], np.diag(cov), rtol=0, atol=1e-8)
    assert posterior.log_evidence().item() == pytest.approx(peer.log_marginal_likelihood_value_, abs=1e-8)


def test_interpolates_without_noise_and_forgets_far_away() -> None:
    X = drawn(10, 2)
    y = (5 * X).sin().sum(1)
    posterior = GaussianPosterior(Matern(2.5), hyperparameters(0.0), X, y, prior_mean=0.3)
    mean, variance = posterior.mean_variance(X)
    torch.testing.assert_close(mean, y, rtol=0, atol=1e-9)
    assert variance.max() < 1e-9
    far, spread = posterior.mean_variance(torch.full((1, 2), 1e3, dtype=torch.float64))
    torch.testing.assert_close(torch.stack([far, spread]).squeeze(), torch.tensor([0.3, 1.7]).double())


def test_every_point_can_have_its_own_noise() -> None:
    X, Q = drawn(5, 2), drawn(3, 2, seed=1)
    y, noises = X.sum(1), torch.tensor([0.1, 0.0, 0.5, 0.2, 1.0], dtype=torch.float64)
    posterior = GaussianPosterior(Matern(2.5), hyperparameters(), X, y, noises=noises)
    k = theirs(Matern(2.5))
    wanted = k(Q.numpy(), X.numpy()) @ np.linalg.solve(k(X.numpy()) + np.diag(noises), y.numpy())
    np.testing.assert_allclose(posterior.mean(Q), wanted, atol=1e-12)


@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("with_slopes", [False, True])
def test_condition_is_a_refit(draws: bool, with_slopes: bool) -> None:
    X, y, Q = drawn(8, 2), drawn(8, seed=2), drawn(4, 3, 2, seed=1)
    orders = torch.tensor([0, 0, 1, 2, 0, 1, 2, 0]) if with_slopes else None
    some = hyperparameters()
    if draws:
        some = Hyperparameters(
            torch.tensor([1.7, 0.4]), torch.tensor([[2.0, 5.0], [1.0, 9.0]]), torch.tensor([0.1, 0.2])
        )
        some = Hyperparameters(*(value.double() for value in some))
    whole = GaussianPosterior(Matern(2.5), some, X, y, 0.2, orders=orders)

    def cut(part: slice) -> torch.Tensor | None:
        return None if orders is None else orders[part]

    first, rest = slice(0, 5), slice(5, 8)
    grown = GaussianPosterior(Matern(2.5), some, X[first], y[first], 0.2, orders=cut(first))
    grown = grown.condition(X[rest], y[rest], orders=cut(rest))
    torch.testing.assert_close(grown.mean(Q), whole.mean(Q), rtol=0, atol=1e-10)
    torch.testing.assert_close(grown.covariance(Q), whole.covariance(Q), rtol=0, atol=1e-10)
    torch.testing.assert_close(grown.log_evidence(), whole.log_evidence(), rtol=0, atol=1e-9)
    assert whole.mean(Q).shape == ((2, 4, 3) if draws else (4, 3))


def test_a_draw_of_hyperparameters_is_its_own_process() -> None:
    X, y, Q = drawn(6, 2), drawn(6, seed=2), drawn(3, 2, seed=1)
    weights = torch.tensor([[2.0, 5.0], [1.0, 9.0]], dtype=torch.float64)
    scale, noise = torch.tensor([1.7, 0.4]).double(), torch.tensor([0.1, 0.2]).double()
    both = GaussianPosterior(PowerExponential(), Hyperparameters(scale, weights, noise), X, y)
    for draw in range(2):
        one = GaussianPosterior(PowerExponential(), Hyperparameters(scale[draw], weights[draw], noise[draw]), X, y)
        torch.testing.assert_close(both.mean(Q)[draw], one.mean(Q))
        torch.testing.assert_close(both.covariance(Q)[draw], one.covariance(Q))


def test_slopes_observed_are_reproduced_and_the_posterior_mean_follows() -> None:
    """A path sampled with its slopes: the posterior has them, and its mean's own finite differences agree."""
    X = drawn(4, 2)
    orders = torch.arange(3).repeat_interleave(4)
    rows = X.repeat(3, 1)
    prior = covariance(Matern(2.5), hyperparameters(0.0), rows, rows, orders, orders)
    path = torch.linalg.cholesky(prior) @ torch.randn(12, generator=torch.Generator().manual_seed(3)).double()
    posterior = GaussianPosterior(Matern(2.5), hyperparameters(0.0), rows, path, orders=orders)
    torch.testing.assert_close(posterior.mean(rows, orders), path, rtol=0, atol=1e-8)
    for axis in (0, 1):
        step = 1e-5 * torch.eye(2, dtype=torch.float64)[axis]
        slope = (posterior.mean(X + step) - posterior.mean(X - step)) / 2e-5
        torch.testing.assert_close(slope, path[4 * (axis + 1) : 4 * (axis + 2)], rtol=1e-4, atol=1e-4)


def test_prior_mean_function_and_its_slopes() -> None:
    X = drawn(4, 2)
    orders = torch.tensor([0, 1, 2, 0])
    posterior = GaussianPosterior(
        Matern(2.5),
        hyperparameters(),
        X,
        torch.zeros(4).double(),
        lambda x: 3 * x[..., 0] + x[..., 1] ** 2,
        orders=orders,
    )
    wanted = torch.stack(
        [3 * X[0, 0] + X[0, 1] ** 2, torch.tensor(3.0).double(), 2 * X[2, 1], 3 * X[3, 0] + X[3, 1] ** 2]
    )
    torch.testing.assert_close(posterior.residuals, -wanted)


def test_samples_have_the_posteriors_moments() -> None:
    posterior = GaussianPosterior(Matern(2.5), hyperparameters(), drawn(5, 2), drawn(5, seed=1))
    Q = drawn(3, 2, seed=2)
    draws = posterior.sample(Q, 200_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.mean(0), posterior.mean(Q), rtol=0, atol=0.015)  # 5 / √200000 deviations
    torch.testing.assert_close(draws.T.cov(), posterior.covariance(Q), rtol=0, atol=0.02)


def test_cholesky_adds_jitter_with_a_warning_and_gives_up_in_words() -> None:
    singular = torch.ones(3, 3, dtype=torch.float64)
    singular[0, 0] -= 1e-9
    with pytest.warns(UserWarning, match=r"jitter 1e-06"):
        factor = cholesky(singular)
    torch.testing.assert_close(factor @ factor.T, singular, rtol=0, atol=2e-6)
    with pytest.raises(CholeskyError, match="condition number"):
        cholesky(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)))


def test_root_of_a_singular_matrix() -> None:
    matrix = torch.ones(3, 3, dtype=torch.float64)
    torch.testing.assert_close(root(matrix) @ root(matrix).T, matrix)


@pytest.mark.parametrize("nu", [0, -1, math.nan, 51])
def test_bad_smoothness(nu: float) -> None:
    with pytest.raises(ValueError, match="nu"):
        Matern(nu)


def test_rough_kernels_have_no_derivatives() -> None:
    with pytest.raises(ValueError, match="nu > 1"):
        covariance(Matern(0.5), hyperparameters(), drawn(2, 2), drawn(2, 2), torch.ones(2, dtype=torch.long))
