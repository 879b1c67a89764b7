"""Gaussian-process regression as a scikit-learn estimator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_number
from provenn.core.experiment.seeding import generator
from provenn.core.numerics.covariance_functions import Hyperparameters, Kernel, Matern
from provenn.core.numerics.gaussian_processes import GaussianPosterior, root, with_slopes
from provenn.search._bayesian_optimization_fitting import Observations, fit, mean_coefficients, unpack

METHODS = ("map", "mle", "slice")


class Prediction(NamedTuple):
    """Joint posterior of values at points, in the units of y."""

    mean: Float[Tensor, " m"]
    cov: Float[Tensor, "m m"]


class Mean(NamedTuple):
    """A prior mean β_1 Ψ_1(x) + … for one draw of hyperparameters, or one β a draw."""

    basis: Callable[[Tensor], Tensor]
    beta: Tensor

    def __call__(self, X: Tensor) -> Tensor:
        """Return the mean at points (…, m, d)."""
        beta = self.beta.reshape(*self.beta.shape[:-1], *[1] * (X.ndim - 2), self.beta.shape[-1], 1)
        return (self.basis(X) @ beta).squeeze(-1)


def constant(X: Tensor) -> Tensor:
    """Return the basis of a constant mean."""
    return torch.ones_like(X[..., :1])


def basis_of(functions: Callable[[Tensor], Tensor] | None, X: Tensor, orders: Tensor | None) -> Tensor:
    """Return the mean's functions at observations, with their slopes where slopes are observed."""
    if functions is None:
        return X.new_zeros(len(X), 0)
    count = functions(X[:1]).shape[-1]
    return torch.stack([with_slopes(lambda x, i=i: functions(x)[..., i], X, orders) for i in range(count)], -1).detach()


def fitted_posterior(
    kernel: Kernel, observed: Observations, theta: Tensor, functions: Callable[[Tensor], Tensor] | None
) -> GaussianPosterior:
    """Return the posterior at logarithms of hyperparameters, with the mean's coefficients by least squares."""
    hyperparameters = unpack(kernel, theta, observed.X.shape[1], observed.noises)
    return posterior_at(kernel, observed, hyperparameters, functions)


def posterior_at(
    kernel: Kernel,
    observed: Observations,
    hyperparameters: Hyperparameters,
    functions: Callable[[Tensor], Tensor] | None,
) -> GaussianPosterior:
    """Return the posterior at hyperparameters, with the mean's coefficients by least squares."""
    mean: float | Mean = 0.0
    if functions is not None:
        mean = Mean(functions, mean_coefficients(kernel, observed, hyperparameters))
    return GaussianPosterior(
        kernel, hyperparameters, observed.X, observed.y, mean, noises=observed.noises, orders=observed.orders
    )


def one_draw(posterior: GaussianPosterior, draw: int) -> GaussianPosterior:
    """Return the posterior at one draw of hyperparameters."""
    mean = posterior.prior_mean
    if isinstance(mean, Mean):
        mean = mean._replace(beta=mean.beta[draw])
    hyperparameters = Hyperparameters(*(value[draw] for value in posterior.hyperparameters))
    return GaussianPosterior(
        posterior.kernel, hyperparameters, posterior.X, posterior.y, mean, posterior.noises, posterior.orders
    )


class GaussianProcess(RegressorMixin, BaseEstimator):
    r"""Regression by a Gaussian process, of values or of values and gradients.

    Hyperparameters are sought on inputs scaled to the unit cube and standardised values; all that goes in and comes
    out is in the user's units.

    Args:
        kernel: :class:`~provenn.core.numerics.covariance_functions.Matern` (default, ν = 5/2) or ``PowerExponential``.
        mean: The prior mean: ``"constant"``, fitted; a number, fixed; or a function of tensors, (m, d) to (m, k), whose
            columns Ψ_i are weighted by fitted β_i. Fitted coefficients are those of generalised least squares.
        noise: λ: ``"infer"``, a known variance, or one variance an observation.
        derivatives: Whether y has the gradient beside the value: (n, 1 + d).
        hyperparameters: ``"map"``, ``"mle"``, ``"slice"`` (eight draws of the posterior, over which predictions are
            mixed), or ``Hyperparameters`` to keep, in the units of the data; then ``noise`` has no effect unless it
            varies by observation.
        seed: Draws starting points and slices.

    Attributes:
        posterior_: The ``GaussianPosterior`` over scaled inputs and standardised values.
        hyperparameters_: Scale, weights and noise in the user's units.

    Raises:
        ValueError: An unknown choice, noise below 0, data that are empty, not finite or of other shapes.
        CholeskyError: The covariance is singular even with jitter; the message names its condition number.

    Cost: O(n³) time a step of the search for hyperparameters, O(n²) memory; n (1 + d) for n with derivatives.

    Source: Frazier, arXiv 1807.02811, section 3 and, for derivatives, section 5.
    """

    def __init__(
        self,
        kernel: Kernel | None = None,
        mean: Any = "constant",
        noise: Any = "infer",
        derivatives: bool = False,
        hyperparameters: Any = "map",
        seed: int = 0,
    ) -> None:
        self.kernel = kernel
        self.mean = mean
        self.noise = noise
        self.derivatives = derivatives
        self.hyperparameters = hyperparameters
        self.seed = seed

    def fit(self, X: Any, y: Any) -> GaussianProcess:
        """Find hyperparameters, unless they are given, and condition on the data.

        Args:
            X: Points (n, d), a tensor or array.
            y: Values (n,); with ``derivatives`` values and gradients (n, 1 + d).

        Returns:
            The estimator itself.
        """
        X, y = self._data(X, y)
        fixed = isinstance(self.hyperparameters, Hyperparameters)
        if not fixed:
            check_choice("hyperparameters", self.hyperparameters, METHODS)
        self._scale(X, y, fixed)
        kernel = Matern(2.5) if self.kernel is None else self.kernel
        functions, self.level_ = self._mean_functions()
        X, y, orders = self._rows((X - self.low_) / self.span_, (y - self._offset(y)) / self.unit_)
        noises = self._noises(len(X), X)
        observed = Observations(X, y, orders, noises, basis_of(functions, X, orders))
        if fixed:
            found = self.hyperparameters
            if noises is not None and torch.as_tensor(self.noise).ndim == 0:
                observed = observed._replace(noises=None)
        else:
            theta = fit(kernel, observed, self.hyperparameters, generator(self.seed, "hyperparameters"))
            found = unpack(kernel, theta, X.shape[1], noises)
        self.posterior_ = posterior_at(kernel, observed, found, functions)
        self.hyperparameters_ = Hyperparameters(
            found.scale * self.unit_**2, found.weights / self.span_.square(), found.noise * self.unit_**2
        )
        return self

    def posterior(self, X: Any) -> Prediction:
        """Return the joint posterior of values at points; over draws of hyperparameters, the mixture's two moments.

        Args:
            X: Points (m, d).

        Cost: O(m n² + m² n).
        """
        points = self._points(X)
        mean, cov = self.posterior_.mean(points), self.posterior_.covariance(points)
        if mean.ndim == 2:
            away = mean - mean.mean(0)
            cov, mean = cov.mean(0) + away.T @ away / len(away), mean.mean(0)
        return Prediction(self.level_ + self.unit_ * mean, self.unit_**2 * cov)

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Return the posterior mean at points as an array; with ``return_std`` also the standard deviation of f."""
        points = self._points(X)
        mean, variance = self.posterior_.mean_variance(points)
        if mean.ndim == 2:
            variance, mean = variance.mean(0) + mean.var(0, correction=0), mean.mean(0)
        values = (self.level_ + self.unit_ * mean).detach().cpu().numpy()
        return (values, (self.unit_ * variance.sqrt()).detach().cpu().numpy()) if return_std else values

    def sample(self, X: Any, n: int, seed: int = 0) -> Float[Tensor, "n m"]:
        """Draw n joint values at points.

        Args:
            X: Points (m, d).
            n: How many draws.
            seed: Draws.
        """
        mean, cov = self.posterior(X)
        draws = generator(seed, "sample")
        base = torch.randn(n, len(mean), dtype=mean.dtype, generator=draws, device=draws.device).to(mean.device)
        return mean + base @ root(cov).T

    def condition(self, x: Any, y: Any) -> GaussianProcess:
        """Return an estimator that has seen more, with the same hyperparameters, by rows added to the factor.

        Args:
            x: Points (k, d).
            y: As in :meth:`fit`. New observations have noise λ, the mean one where it varies by observation.

        Cost: O(k n²).
        """
        points = self._points(x)
        y = torch.as_tensor(y).to(points)
        expected = (len(points), 1 + points.shape[1]) if self.derivatives else (len(points),)
        if tuple(y.shape) != expected or not y.isfinite().all():
            raise ValueError(f"y must be finite numbers of shape {expected}, got shape {tuple(y.shape)}")
        X, y, orders = self._rows(points, (y - self._offset(y)) / self.unit_)
        grown = copy.copy(self)
        grown.posterior_ = self.posterior_.condition(X, y, orders=orders)
        return grown

    def _offset(self, y: Tensor) -> Any:
        """Return what is taken from y: the level from values, nothing from gradients."""
        if y.ndim == 1:
            return self.level_
        return torch.cat([y.new_full((1,), float(self.level_)), y.new_zeros(y.shape[1] - 1)])

    def _data(self, X: Any, y: Any) -> tuple[Tensor, Tensor]:
        if isinstance(X, Tensor):
            place = X
            X, y = X.detach().cpu().numpy(), torch.as_tensor(y).detach().cpu().numpy()
        else:
            place = torch.zeros(())
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=bool(self.derivatives), y_numeric=True)
        expected = (len(X), 1 + X.shape[1]) if self.derivatives else (len(X),)
        if y.shape != expected:
            raise ValueError(f"y must have shape {expected}, got {y.shape}")
        return torch.tensor(X, device=place.device), torch.tensor(y, dtype=torch.float64, device=place.device)

    def _points(self, X: Any) -> Tensor:
        check_is_fitted(self)
        if isinstance(X, Tensor):
            if X.ndim != 2 or X.shape[1] != self.n_features_in_:
                raise ValueError(f"X must be (m, {self.n_features_in_}), got shape {tuple(X.shape)}")
            return (X.to(self.low_) - self.low_) / self.span_
        points = torch.tensor(validate_data(self, X, reset=False, dtype=np.float64)).to(self.low_)
        return (points - self.low_) / self.span_

    def _scale(self, X: Tensor, y: Tensor, fixed: bool) -> None:
        """Find the units in which hyperparameters are sought."""
        values = y if y.ndim == 1 else y[:, 0]
        span, unit = X.amax(0) - X.amin(0), values.std(correction=0)
        self.low_ = torch.zeros_like(span) if fixed else X.amin(0)
        self.span_ = torch.ones_like(span) if fixed else torch.where(span > 0, span, 1.0)
        self.unit_ = torch.ones_like(unit) if fixed or unit == 0 else unit

    def _mean_functions(self) -> tuple[Callable[[Tensor], Tensor] | None, float]:
        """Return the functions whose coefficients are fitted, and the fixed level."""
        if callable(self.mean):
            low, span, mean = self.low_, self.span_, self.mean
            return _Rescaled(mean, low, span), 0.0
        if isinstance(self.mean, str):
            check_choice("mean", self.mean, ("constant",))
            return constant, 0.0
        check_number("mean", self.mean)
        return None, float(self.mean)

    def _noises(self, rows: int, like: Tensor) -> Tensor | None:
        if isinstance(self.noise, str):
            check_choice("noise", self.noise, ("infer",))
            return None
        noise = torch.as_tensor(self.noise, dtype=torch.float64, device=like.device)
        if not (noise.isfinite().all() and (noise >= 0).all()):
            raise ValueError(f"noise must be variances ≥ 0, got {self.noise!r}")
        if noise.ndim == 0:
            return (noise / self.unit_**2).expand(rows)
        copies = 1 + like.shape[1] if self.derivatives else 1
        if len(noise) * copies != rows:
            raise ValueError(f"noise must be one variance an observation, {rows // copies}, got {len(noise)}")
        return (noise / self.unit_**2).repeat(copies)

    def _rows(self, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return one row an observed number: first all values, then all slopes along the first axis, …."""
        if not self.derivatives:
            return X, y, None
        dims = X.shape[1]
        scaled = torch.cat([y[:, :1], y[:, 1:] * self.span_], 1)
        return X.repeat(dims + 1, 1), scaled.T.flatten(), torch.arange(dims + 1).repeat_interleave(len(X)).to(X.device)


class _Rescaled(NamedTuple):
    """A function of the user's units, called in the unit cube."""

    function: Callable[[Tensor], Tensor]
    low: Tensor
    span: Tensor

    def __call__(self, X: Tensor) -> Tensor:
        return self.function(self.low + self.span * X)
