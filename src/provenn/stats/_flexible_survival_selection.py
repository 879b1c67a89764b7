"""Choice among APGW regressions by AIC, and the profile likelihood of κ.

Source: Burke, Jones & Noufaily, arXiv 1901.03212, sections 4 and 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_X_y
from torch import Tensor

from provenn.core.experiment.reports import Report
from provenn.stats._flexible_survival_fit import Maximum, Model, Survival, maximum
from provenn.stats._flexible_survival_inputs import check_columns, checked_times

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LATTICE = (
    Model(("phi",)),
    Model(("lam",)),
    Model(("phi",), ("gamma",)),
    Model(("lam",), ("gamma",)),
    Model(("phi", "lam")),
    Model(("phi", "lam"), ("gamma",)),
)
KAPPAS = (-0.9, -0.7, -0.5, -0.3, -0.15, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, math.inf)
_INFINITE = 1e7
"""Stands for κ = ∞, from which it differs by less than 1e-6."""
_DROP = 1.9207
"""Half the 95 % quantile of χ² with one degree of freedom."""


@dataclass(frozen=True)
class Selection(Report):
    """What :func:`select_apgw` found; entries of tuples belong to ``models``, or to ``kappas``.

    Args:
        models: The models, such as M(φγ): those parameters have covariates, κ is free.
        log_likelihoods: Their largest log-likelihoods.
        parameters: Their numbers of coefficients.
        aic: −2ℓ + 2k.
        bic: −2ℓ + k·log(samples).
        delta_aic: AIC less the smallest one.
        best: The model of the smallest AIC.
        kappa: The best model's κ; 0, 1 and ∞ stand for log-logistic or Burr XII, Weibull, and Gompertz shapes.
        kappas: Values of κ, the last one ∞.
        profile: For each the largest log-likelihood of the best model with κ fixed there.
        supported: Whether each is within the 95 % interval of the likelihood ratio.
    """

    models: tuple[str, ...]
    log_likelihoods: tuple[float, ...]
    parameters: tuple[int, ...]
    aic: tuple[float, ...]
    bic: tuple[float, ...]
    delta_aic: tuple[float, ...]
    best: str
    kappa: float
    kappas: tuple[float, ...]
    profile: tuple[float, ...]
    supported: tuple[bool, ...]

    def plot(self) -> Figure:
        """Draw ΔAIC of the models, and the profile likelihood of κ with its interval and the named values."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.5), layout="constrained")
        bars, curve = figure.subplots(1, 2)
        bars.barh(self.models[::-1], self.delta_aic[::-1])
        bars.set_xlabel("AIC above the smallest")
        top = max(self.profile)
        places = [_bounded(kappa) for kappa in self.kappas]
        curve.plot(places, [value - top for value in self.profile], marker=".")
        curve.axhline(-_DROP, linestyle=":", color="grey")
        named = {0.0: "0: log-logistic, Burr XII", 1.0: "1: Weibull", math.inf: "∞: Gompertz"}
        for kappa in named:
            curve.axvline(_bounded(kappa), linestyle="--", color="grey", linewidth=0.8)
        curve.axvline(_bounded(self.kappa), color="tab:red", linewidth=0.8, label=f"estimate {self.kappa:.3g}")
        curve.set_xticks([_bounded(kappa) for kappa in (-1.0, *named)], ["−1", *named.values()], fontsize=7)
        curve.set_ylim(bottom=max(-10.0, min(self.profile) - top - 0.5))
        curve.set_ylabel("profile log-likelihood less its largest")
        curve.set_title(f"κ in {self.best}")
        curve.legend()
        return figure


def _bounded(kappa: float) -> float:
    """Map κ from (−1, ∞] to (0, 1], with 0 at ⅓."""
    return 1.0 if math.isinf(kappa) else (kappa + 1) / (kappa + 3)


def select_apgw(
    X: ArrayLike, T: ArrayLike, event: ArrayLike | None = None, entry: ArrayLike | None = None
) -> Selection:
    """Fit M(φ), M(λ), M(φγ), M(λγ), M(φλ) and M(φλγ) with free κ, and profile κ in the one of smallest AIC.

    Args:
        X: Covariates, without a column of ones.
        T: Times of event or censoring, > 0.
        event: 1 where the event was seen, 0 where the time is censored; default all seen.
        entry: Times from which on a subject was watched, in [0, T); default 0.

    Shape:
        ``X`` (samples, features), the others (samples,).

    Returns:
        The frozen report.

    Raises:
        ValueError: A time is not above 0, an event not 0 or 1, an entry not in [0, T), a column of X constant, or
            there is no event.

    Cost: 36 searches for the models, 54 for the profile.

    Source: arXiv 1901.03212, sections 4 and 5.
    """
    names = [str(name) for name in getattr(X, "columns", [])]
    X, T = check_X_y(X, T, dtype=np.float64, y_numeric=True, ensure_min_samples=2)
    T, event, entry = checked_times(T, event, entry)
    check_columns(X, names or [f"x{place}" for place in range(X.shape[1])])
    data = Survival.of(X, T, event, entry)
    found = [maximum(data, model) for model in LATTICE]
    in_unit = data.events * math.log(data.unit)
    likelihoods = [one.value - in_unit for one in found]
    sizes = [len(one.theta) for one in found]
    aic = [2 * size - 2 * value for size, value in zip(sizes, likelihoods, strict=True)]
    best = int(np.argmin(aic))
    profile = [value - in_unit for value in profile_of_kappa(data, LATTICE[best], found[best])]
    top = max([*profile, likelihoods[best]])
    return Selection(
        models=tuple(model.name for model in LATTICE),
        log_likelihoods=tuple(likelihoods),
        parameters=tuple(sizes),
        aic=tuple(aic),
        bic=tuple(math.log(data.samples) * size - 2 * value for size, value in zip(sizes, likelihoods, strict=True)),
        delta_aic=tuple(value - min(aic) for value in aic),
        best=LATTICE[best].name,
        kappa=math.expm1(found[best].theta[-1].item()),
        kappas=KAPPAS,
        profile=tuple(profile),
        supported=tuple(top - value <= _DROP for value in profile),
    )


def profile_of_kappa(data: Survival, model: Model, best: Maximum) -> list[float]:
    """Return the largest log-likelihood of a model for each of ``KAPPAS``.

    Each search starts where the neighbour nearer to the best κ ended, and from the usual starts.
    """
    at = math.expm1(best.theta[-1].item())
    values: dict[float, float] = {}
    for side in ([k for k in KAPPAS if k >= at], [k for k in reversed(KAPPAS) if k < at]):
        start: Tensor = best.theta[:-1]
        for kappa in side:
            fixed = model._replace(kappa=min(kappa, _INFINITE))
            searches = maximum(data, fixed, start=start), maximum(data, fixed)
            found = max(searches, key=lambda one: (one.converged, one.value))
            start, values[kappa] = found.theta, found.value
    return [values[kappa] for kappa in KAPPAS]
