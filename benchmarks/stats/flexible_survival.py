"""APGW regression against lifelines: special cases, and likelihood with gradient in its generic parametric fitter."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import autograd
import autograd.numpy as anp
import lifelines
import numpy as np
import pandas as pd
import torch
from lifelines import LogLogisticAFTFitter, WeibullAFTFitter
from lifelines.datasets import load_gbsg2, load_rossi
from lifelines.fitters import ParametricRegressionFitter
from lifelines.utils import DataframeSlicer

from benchmarks.timing import alternate
from provenn.stats import APGWRegression
from provenn.stats._flexible_survival_likelihood import Likelihood, Rows


class GenericAPGW(ParametricRegressionFitter):
    """M(φγ) as a user of lifelines would write it: the cumulative hazard; lifelines derives the rest by autograd."""

    _fitted_parameter_names = ["phi_", "gamma_", "kappa_"]  # noqa: RUF012

    def _cumulative_hazard(self, params: Any, T: Any, Xs: Any) -> Any:
        phi, gamma = anp.exp(anp.dot(Xs["phi_"], params["phi_"])), anp.exp(anp.dot(Xs["gamma_"], params["gamma_"]))
        grown = anp.exp(anp.dot(Xs["kappa_"], params["kappa_"]))
        kappa = grown - 1
        return grown / kappa * anp.expm1(kappa * anp.log1p((phi * T) ** gamma / grown))

    def _create_initial_point(self, *_: Any) -> Any:
        return {"phi_": np.zeros(6), "gamma_": np.zeros(6), "kappa_": np.full(1, 0.5)}

    def _fit_model(self, likelihood: Any, Ts: Any, Xs: Any, E: Any, weights: Any, entries: Any, **_: Any) -> Any:
        """Keep what lifelines would hand to scipy's optimiser, and fit nothing."""
        self._prepare_initial_points(None, Ts, E, entries, weights, Xs)
        objective = partial(
            self._create_neg_likelihood_with_penalty_function, likelihood=likelihood, penalty=self._add_penalty
        )
        self.objective = autograd.value_and_grad(objective)
        self.arguments = Ts, E, weights, entries, DataframeSlicer(Xs)
        self.covariates = Xs
        raise _CapturedError


class _CapturedError(Exception):
    """The objective is at hand."""


def measure() -> dict[str, Any]:
    """Compare maxima with lifelines on its data sets, and time one evaluation of the likelihood and its gradient."""
    likelihoods, coefficients = _special_cases()
    ratios, gaps = {}, []
    growth: dict[int, float] = {}
    for samples in (400, 4000, 40_000):
        ours, theirs, gap = _evaluations(samples)
        gaps.append(gap)
        times = alternate({"ours": ours, "theirs": theirs}, rounds=40)
        ratios[samples], growth[samples] = times["theirs"] / times["ours"], times["ours"]
    return {
        "peer": f"lifelines {lifelines.__version__}",
        "agrees": max(likelihoods, coefficients) <= 1e-4 and max(gaps) <= 1e-8,
        "largest_difference": max(likelihoods, coefficients),
        "largest_difference_of_log_likelihoods": likelihoods,
        "largest_relative_difference_of_gradients": max(gaps),
        "speed_ratio": ratios[400],
        "speed_ratio_of_likelihood_and_gradient": {f"{samples} samples": ratio for samples, ratio in ratios.items()},
        "growth": {
            "samples ×10 (400 to 4000), time ×": growth[4000] / growth[400],
            "samples ×10 (4000 to 40000), time ×": growth[40_000] / growth[4000],
        },
    }


def _special_cases() -> tuple[float, float]:
    rossi, gbsg2 = load_rossi(), load_gbsg2()[["age", "tsize", "pnodes", "time", "cens"]].astype(float)
    likelihoods, coefficients = [], []
    for table, time, event in ((rossi, "week", "arrest"), (gbsg2, "time", "cens")):
        X = table.drop(columns=[time, event])
        for kappa, fitter, scale in ((1.0, WeibullAFTFitter, "lambda_"), (0.0, LogLogisticAFTFitter, "alpha_")):
            ours = APGWRegression("phi", (), kappa=kappa).fit(X, table[time], table[event])
            theirs = fitter().fit(table, time, event, fit_options={"ftol": 1e-14})
            wanted = -theirs.params_[scale][["Intercept", *X.columns]].to_numpy()
            likelihoods.append(abs(ours.log_likelihood_ - theirs.log_likelihood_))
            coefficients.append(float(np.abs(ours.coef_["phi"] - wanted).max()))
    return max(likelihoods), max(coefficients)


def _evaluations(samples: int) -> tuple[Callable[[], Any], Callable[[], Any], float]:
    """Return one evaluation of −ℓ/n and its gradient, ours and lifelines', and how far these differ."""
    draws = np.random.default_rng(0)
    names = [f"x{place}" for place in range(5)]
    table = pd.DataFrame(draws.normal(size=(samples, 5)), columns=names)
    table["T"] = draws.weibull(1.5, samples) * np.exp(0.3 * table["x0"])
    table["event"] = draws.random(samples) < 0.7
    formula = " + ".join(names)
    captured = GenericAPGW()
    with suppress(_CapturedError):
        captured.fit(table, "T", "event", regressors={"phi_": formula, "gamma_": formula, "kappa_": "1"})
    design = captured.covariates["phi_"].to_numpy()
    rows = Rows(*(torch.from_numpy(one) for one in (design, np.log(table["T"].to_numpy()), *_columns(table))))
    likelihood = Likelihood(rows, {"phi": 6, "lam": 0, "gamma": 6, "kappa": 1})
    theta = 0.1 * draws.normal(size=13)
    theta[-1] = math.log(1.7)
    order = np.r_[6:12, 12, 0:6]  # lifelines' parameters lie in the order of their names: gamma, kappa, phi

    def ours() -> tuple[float, np.ndarray]:
        value, gradient, _ = likelihood.derivatives(torch.from_numpy(theta), hessian=False)
        return -value.item() / samples, -gradient.numpy() / samples

    def theirs() -> tuple[float, np.ndarray]:
        value, gradient = captured.objective(theta[order], *captured.arguments)
        return float(value), gradient

    (value, gradient), (wanted, slope) = ours(), theirs()
    apart = float(np.abs(gradient[order] - slope).max() / np.abs(slope).max())
    return ours, theirs, max(abs(value - wanted) / abs(wanted), apart)


def _columns(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return table["event"].to_numpy().astype(float), np.ones(len(table))
