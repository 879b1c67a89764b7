"""A Flexible Parametric Modelling Framework for Survival Analysis.

Burke, Jones, Noufaily, J. R. Stat. Soc. C 69 (2020). https://arxiv.org/abs/1901.03212

One distribution with two scales and two shapes holds Weibull, log-logistic, Burr XII, Gompertz and cure models;
covariates may act on several of the four parameters at once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.stats
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from provenn.core.experiment.checks import check_number
from provenn.stats._flexible_survival_concordance import concordance
from provenn.stats._flexible_survival_distribution import APGW
from provenn.stats._flexible_survival_fit import Survival, checked_model, inverse_information, maximum
from provenn.stats._flexible_survival_inference import (
    Coefficient,
    Estimates,
    RatioTest,
    coefficients,
    delta_method,
)
from provenn.stats._flexible_survival_inputs import check_columns, checked_grid, checked_times
from provenn.stats._flexible_survival_likelihood import NAMES
from provenn.stats._flexible_survival_selection import Selection, select_apgw

__all__ = ["APGW", "APGWRegression", "Coefficient", "Estimates", "RatioTest", "Selection", "select_apgw"]


class APGWRegression(RegressorMixin, BaseEstimator):
    r"""Multi-parameter regression with the adapted power generalised Weibull distribution.

    log φ = xᵀτ, log λ = xᵀβ, log γ = xᵀα and log(κ+1) = xᵀν, each with an intercept, fitted by maximum likelihood
    under right censoring and left truncation. A model is named by the parameters that have covariates: M(φ) is an
    accelerated failure time model, M(λ) a proportional hazards model; M(φγ), the default, and M(λγ) are the paper's
    recommendations. γ and κ are free without covariates too; a scale without is fixed: λ at 1, φ at one over the
    median of all times, so that the unit of time changes nothing.

    φ and λ are two scales, not two names of one, except at κ = 1. With covariates in γ the scale's coefficients are
    no hazard ratios and no accelerations: look at :meth:`hazard_ratio` over time.

    Args:
        scale: Scales with covariates: ``"phi"``, ``"lam"``, or both in a tuple.
        shape: Shapes with covariates: any of ``"gamma"`` and ``"kappa"``, in a tuple; may be empty.
        kappa: ``"free"``, or the number > −1 that κ is fixed at: 1 for Weibull, 0 for log-logistic or Burr XII.
        l2: Strength ≥ 0 of a penalty ½·l2·‖·‖² on the coefficients of standardised covariates, intercepts left out.
        free_scales: Whether the scale without covariates is free too, with an intercept alone. Around κ = 1 it is
            close to not identified, which a warning says.

    Attributes:
        coef_: For each parameter with an intercept its coefficients, the intercept first, of the covariates as given.
        covariance_: Covariance of all coefficients, in the order of :meth:`summary`.
        log_likelihood_: The largest log-likelihood, without penalty, of times in the unit given.
        aic_, bic_: −2ℓ + 2k and −2ℓ + k·log(samples), for k coefficients.
        time_unit_: The median time.
        converged_: Whether the search ended in a maximum.
        information_singular_: Whether the observed information has no inverse; then its pseudo-inverse is used, and
            standard errors are too small.

    Shape:
        ``X`` (samples, features), ``T``, ``event``, ``entry`` (samples,), NumPy arrays or what converts to them.
        Results are NumPy arrays in float64; times in the unit of ``T``.

    Raises:
        ValueError: An argument is unknown or out of range; a time is not above 0, an event not 0 or 1, an entry not
            in [0, T), a column constant; there is no event; or both scales are free with κ fixed at 1.
        TypeError: An argument is of the wrong type.

    Cost: 6 searches of 5 to 20 Newton steps; a step is O(n k²) time, O(n k) memory, for k coefficients.

    Source: arXiv 1901.03212, sections 2 and 3.
    """

    def __init__(
        self,
        scale: str | Sequence[str] = "phi",
        shape: str | Sequence[str] = ("gamma",),
        kappa: str | float = "free",
        l2: float = 0.0,
        free_scales: bool = False,
    ) -> None:
        self.scale = scale
        self.shape = shape
        self.kappa = kappa
        self.l2 = l2
        self.free_scales = free_scales

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = True
        return tags

    def fit(
        self, X: ArrayLike, T: ArrayLike, event: ArrayLike | None = None, entry: ArrayLike | None = None
    ) -> APGWRegression:
        """Fit the model.

        Args:
            X: Covariates, without a column of ones.
            T: Times of event or censoring, > 0.
            event: 1 where the event was seen, 0 where the time is censored; default all seen.
            entry: Times from which on a subject was watched (left truncation), in [0, T); default 0.

        Returns:
            The estimator.

        Raises:
            ValueError, TypeError: See the class.
        """
        model = checked_model(self.scale, self.shape, self.kappa, self.free_scales)
        check_number("l2", self.l2, at_least=0)
        X, T = validate_data(self, X, T, dtype=np.float64, y_numeric=True, ensure_min_samples=2)
        T, event, entry = checked_times(T, event, entry)
        check_columns(X, self._covariates())
        if model.free_scales and len(model.scale) == 1:
            warnings.warn("both scales are free: around kappa = 1 they are close to not identified", stacklevel=2)
        data = Survival.of(X, T, event, entry)
        found = maximum(data, model, self.l2)
        if not found.converged:
            warnings.warn("the likelihood's maximum was not reached", ConvergenceWarning, stacklevel=2)
        widths = model.widths(X.shape[1])
        self._widths = [widths[name] for name in NAMES]
        matrix, shift = data.to_original(self._widths)
        covariance, self.information_singular_ = inverse_information(found.hessian)
        self._theta = matrix @ found.theta + shift
        self._fixed = {"phi": -math.log(data.unit), "lam": 0.0, **model.fixed}
        self.covariance_ = (matrix @ covariance @ matrix.T).numpy()
        penalty = self._penalty_of(found.theta)
        self.log_likelihood_ = found.value + penalty - data.events * math.log(data.unit)
        size = len(found.theta)
        self.aic_ = 2 * size - 2 * self.log_likelihood_
        self.bic_ = math.log(data.samples) * size - 2 * self.log_likelihood_
        self.time_unit_, self.converged_ = data.unit, found.converged
        self.coef_ = {
            name: part.numpy() for name, part in zip(NAMES, self._theta.split(self._widths), strict=True) if len(part)
        }
        self._model = model
        self._fingerprint = (data.samples, data.events, float(T.sum()), float(entry.sum()))
        return self

    def _penalty_of(self, theta: Tensor) -> float:
        return sum(self.l2 * part[1:].square().sum().item() / 2 for part in theta.split(self._widths))

    def _covariates(self) -> list[str]:
        return list(getattr(self, "feature_names_in_", [f"x{place}" for place in range(self.n_features_in_)]))

    def _distribution(self, theta: Tensor, X: np.ndarray) -> APGW:
        """Return the distribution of each sample, with a last dimension of size one for times."""
        design = torch.from_numpy(np.column_stack([np.ones(len(X)), X]))
        logs = [
            design[:, :width] @ part if width else torch.full((len(X),), self._fixed[name], dtype=torch.float64)
            for name, width, part in zip(NAMES, self._widths, theta.split(self._widths), strict=True)
        ]
        phi, lam, gamma = (one[:, None].exp() for one in logs[:3])
        return APGW(phi, lam, gamma, torch.expm1(logs[3])[:, None])

    def distribution(self, X: ArrayLike) -> APGW:
        """Return the fitted distribution of each sample, its parameters of shape (samples, 1)."""
        return self._distribution(*self._ready(X))

    def _ready(self, X: ArrayLike) -> tuple[Tensor, np.ndarray]:
        check_is_fitted(self)
        return self._theta, validate_data(self, X, dtype=np.float64, reset=False)

    def _estimates(
        self, of: Callable[[Tensor], Tensor], back: Callable[[np.ndarray], np.ndarray], confidence: float | None
    ) -> Any:
        if confidence is None:
            return back(of(self._theta).numpy())
        return delta_method(of, back, self._theta, self.covariance_, confidence)

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Return the median time of each sample, (samples,); +∞ for those of whom half never have the event."""
        return self.predict_quantile(X, 0.5)

    def predict_quantile(self, X: ArrayLike, u: float, confidence: float | None = None) -> Any:
        """Return the time by which the event has come with probability u.

        Args:
            X: Covariates.
            u: The probability, in (0, 1).
            confidence: Confidence of a delta-method interval of log time; default none. Bounds are NaN where the time
                is infinite.

        Returns:
            Times (samples,), or :class:`Estimates`.
        """
        check_number("u", u, above=0, below=1)
        _, X = self._ready(X)
        return self._estimates(lambda theta: self._distribution(theta, X).icdf(u)[:, 0].log(), np.exp, confidence)

    def predict_survival(self, X: ArrayLike, t: ArrayLike, confidence: float | None = None) -> Any:
        """Return the probability of surviving each time.

        Args:
            X: Covariates.
            t: Times > 0, shared by all samples.
            confidence: Confidence of a delta-method interval of log(−log S); default none.

        Returns:
            Probabilities (samples, times), or :class:`Estimates`.
        """
        times, (_, X) = checked_grid(t), self._ready(X)

        def log_cumulative(theta: Tensor) -> Tensor:
            return self._distribution(theta, X).cumhaz(times).log()

        return self._estimates(log_cumulative, lambda value: np.exp(-np.exp(value)), confidence)

    def predict_hazard(self, X: ArrayLike, t: ArrayLike, confidence: float | None = None) -> Any:
        """Return the hazard at each time, in one over the unit of time.

        Args:
            X: Covariates.
            t: Times > 0, shared by all samples.
            confidence: Confidence of a delta-method interval of the log hazard; default none.

        Returns:
            Hazards (samples, times), or :class:`Estimates`.
        """
        times, (_, X) = checked_grid(t), self._ready(X)
        return self._estimates(lambda theta: self._distribution(theta, X).log_hazard(times), np.exp, confidence)

    def hazard_ratio(self, x0: ArrayLike, x1: ArrayLike, t: ArrayLike, confidence: float | None = None) -> Any:
        """Return the hazard at covariates x1 over that at x0, as a function of time.

        Args:
            x0: Covariates of the reference, (features,).
            x1: Covariates compared with it, (features,).
            t: Times > 0.
            confidence: Confidence of a delta-method interval of the log ratio; default none.

        Returns:
            Ratios (times,), or :class:`Estimates`.
        """
        times, (_, both) = checked_grid(t), self._ready(np.stack([np.asarray(x0, float), np.asarray(x1, float)]))

        def log_ratio(theta: Tensor) -> Tensor:
            logs = self._distribution(theta, both).log_hazard(times)
            return logs[1] - logs[0]

        return self._estimates(log_ratio, np.exp, confidence)

    def cure_fraction(self, X: ArrayLike, confidence: float | None = None) -> Any:
        """Return the share that never has the event: S(∞), which is 0 unless κ < 0.

        Args:
            X: Covariates.
            confidence: Confidence of a delta-method interval of log(−log S(∞)); default none. Bounds are NaN where
                κ ≥ 0.

        Returns:
            Shares (samples,), or :class:`Estimates`.
        """
        _, X = self._ready(X)

        def log_total(theta: Tensor) -> Tensor:
            made = self._distribution(theta, X)
            safe = torch.where(made.kappa < 0, made.kappa, torch.nan)
            total = (made.lam * (made.kappa + 1) / -safe).log()
            return total.nan_to_num(nan=math.inf)[:, 0] if confidence is None else total[:, 0]

        found = self._estimates(log_total, lambda value: np.exp(-np.exp(value)), confidence)
        return found if confidence is None else found._replace(estimate=np.nan_to_num(found.estimate, nan=0.0))

    def summary(self, confidence: float = 0.95) -> tuple[Coefficient, ...]:
        """Return a row for each coefficient; ``pandas.DataFrame(estimator.summary())`` makes a table of them.

        Args:
            confidence: Confidence of the intervals ±z standard errors.
        """
        check_is_fitted(self)
        places = [
            (name, covariate)
            for name, width in zip(NAMES, self._widths, strict=True)
            for covariate in ["intercept", *self._covariates()][:width]
        ]
        return tuple(coefficients(places, self._theta, self.covariance_, confidence))

    def likelihood_ratio(self, smaller: APGWRegression) -> RatioTest:
        """Test a nested model, fitted to the same times, against this one.

        Args:
            smaller: A fitted model whose free parameters, and covariates, are some of this one's.

        Returns:
            The test; its χ² law holds where the smaller model is not on the border of the larger one.

        Raises:
            ValueError: ``smaller`` is not nested, was fitted to other times, or either fit was penalised.
        """
        check_is_fitted(self)
        check_is_fitted(smaller)
        if self.l2 or smaller.l2:
            raise ValueError(f"smaller: tests need fits without penalty, got l2 {smaller.l2} and {self.l2}")
        if self._fingerprint != smaller._fingerprint:
            raise ValueError("smaller was fitted to other times")
        fits = all(few <= many for few, many in zip(smaller._widths, self._widths, strict=True))
        same_kappa = self._model.kappa in (None, smaller._model.kappa)
        if not fits or not same_kappa or smaller._widths == self._widths:
            raise ValueError(f"smaller, {smaller._model.name}, is not nested in {self._model.name}")
        statistic = max(0.0, 2 * (self.log_likelihood_ - smaller.log_likelihood_))
        degrees = sum(self._widths) - sum(smaller._widths)
        return RatioTest(statistic, degrees, float(scipy.stats.chi2.sf(statistic, degrees)))

    def score(self, X: ArrayLike, T: ArrayLike, event: ArrayLike | None = None) -> float:
        """Return the concordance of predicted medians with the times.

        Args:
            X: Covariates.
            T: Times of event or censoring.
            event: As in :meth:`fit`.
        """
        predicted = self.predict(X)
        T, event, _ = checked_times(np.asarray(T, float), event, None)
        return concordance(predicted, T, event)
