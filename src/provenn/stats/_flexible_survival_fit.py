"""Maximum likelihood of the APGW regression: which parameters are free, starting points, Newton steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_number
from provenn.stats._flexible_survival_likelihood import NAMES, Likelihood, Rows

KAPPA_STARTS = (-0.5, 0.0, 1.0, 3.0)
_GRADIENT = 1e-7
"""Largest gradient of the mean log-likelihood at a maximum. Newton's last steps go far below it."""
_ITERATIONS = 200


class Model(NamedTuple):
    """Which parameters have covariates, which are free without, and which are fixed.

    Args:
        scale: The scales with covariates: ``"phi"``, ``"lam"``, or both.
        shape: The shapes with covariates: any of ``"gamma"`` and ``"kappa"``.
        kappa: The fixed value of κ, or None if it is free.
        free_scales: Whether a scale without covariates is free instead of fixed.
    """

    scale: tuple[str, ...]
    shape: tuple[str, ...] = ()
    kappa: float | None = None
    free_scales: bool = False

    @property
    def name(self) -> str:
        """The name in the paper's notation, such as M(φγ)."""
        signs = {"phi": "φ", "lam": "λ", "gamma": "γ", "kappa": "κ"}
        return f"M({''.join(signs[name] for name in NAMES if name in self.scale + self.shape)})"

    def widths(self, features: int) -> dict[str, int]:
        """Return how many coefficients each parameter's linear predictor has."""
        free = {
            "phi": self.free_scales or "phi" in self.scale,
            "lam": self.free_scales or "lam" in self.scale,
            "gamma": True,
            "kappa": self.kappa is None,
        }
        return {name: (1 + features if name in self.scale + self.shape else 1) if free[name] else 0 for name in NAMES}

    @property
    def fixed(self) -> dict[str, float]:
        """The linear predictors of fixed parameters, in the unit of time of :class:`Survival`."""
        return {} if self.kappa is None else {"kappa": math.log1p(self.kappa)}


def checked_model(scale: object, shape: object, kappa: object, free_scales: object) -> Model:
    """Return the model that an estimator's arguments ask for.

    Raises:
        ValueError: A name is unknown or given twice, no scale is given, κ ≤ −1, κ is fixed and has covariates, or the
            two scales cannot be told apart.
        TypeError: ``kappa`` is neither "free" nor a number, or ``free_scales`` is no bool.
    """
    scales, shapes = _names("scale", scale, NAMES[:2]), _names("shape", shape, NAMES[2:])
    if not scales:
        raise ValueError(f"scale must name at least one of 'phi' and 'lam', got {scale!r}")
    if not isinstance(free_scales, (bool, np.bool_)):
        raise TypeError(f"free_scales must be a bool, got {free_scales!r}")
    if isinstance(kappa, str):
        check_choice("kappa", kappa, ("free",))
        return Model(scales, shapes, None, bool(free_scales))
    check_number("kappa", kappa, above=-1)
    if "kappa" in shapes:
        raise ValueError(f"kappa cannot have covariates and be fixed at {kappa!r}")
    if kappa == 1 and (len(scales) == 2 or free_scales):
        raise ValueError("scale: phi and lam are not identified together where kappa is fixed at 1 (Weibull)")
    return Model(scales, shapes, float(kappa), bool(free_scales))  # type: ignore[arg-type]


def _names(argument: str, given: object, known: tuple[str, ...]) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given)  # type: ignore[call-overload]
    for name in names:
        check_choice(argument, name, known)
    if len(set(names)) != len(names):
        raise ValueError(f"{argument} names a parameter twice: {given!r}")
    return tuple(name for name in known if name in names)


class Survival(NamedTuple):
    """Survival data made ready: time in units of its median, covariates standardised.

    Args:
        rows: The likelihood's rows.
        samples: Number of subjects.
        unit: The median time, which is 1 in ``rows``.
        events: Number of events.
        mean: Means of the covariates.
        deviation: Their standard deviations.
    """

    rows: Rows
    samples: int
    unit: float
    events: int
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, X: np.ndarray, T: np.ndarray, event: np.ndarray, entry: np.ndarray) -> Survival:
        """Prepare checked data of shapes (n, features), (n,), (n,), (n,)."""
        unit = float(np.median(T))
        mean, deviation = X.mean(axis=0), X.std(axis=0)
        late = entry > 0
        design = np.column_stack([np.ones(len(X)), (X - mean) / deviation])
        rows = Rows(
            torch.from_numpy(np.concatenate([design, design[late]])),
            torch.from_numpy(np.log(np.concatenate([T, entry[late]])) - math.log(unit)),
            torch.from_numpy(np.concatenate([event, np.zeros(late.sum())])),
            torch.from_numpy(np.concatenate([np.ones(len(T)), -np.ones(late.sum())])),
        )
        return cls(rows, len(T), unit, int(event.sum()), torch.from_numpy(mean), torch.from_numpy(deviation))

    def to_original(self, widths: list[int]) -> tuple[Tensor, Tensor]:
        """Return (A, s) so that θ ↦ Aθ + s takes coefficients to the original covariates and unit of time."""
        size = sum(widths)
        matrix, shift, at = torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64), 0
        for name, width in zip(NAMES, widths, strict=True):
            if width > 1:
                matrix[at, at + 1 : at + width] = -self.mean / self.deviation
                matrix[range(at + 1, at + width), range(at + 1, at + width)] = 1 / self.deviation
            if name == "phi" and width:
                shift[at] = -math.log(self.unit)
            at += width
        return matrix, shift


class Maximum(NamedTuple):
    """A maximum of a likelihood: where, how high (penalty included), the Hessian there, whether the search ended."""

    theta: Tensor
    value: float
    hessian: Tensor
    converged: bool


def climb(likelihood: Likelihood, start: Tensor) -> Maximum:
    """Follow the trust-region Newton method from a start to a maximum.

    Cost: one Hessian, O(rows · k²), and O(k³) an iteration; 5 to 20 iterations are usual.
    """
    count = len(likelihood.rows.event)
    seen: dict[bytes, tuple[float, np.ndarray, np.ndarray]] = {}

    def at(theta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        if theta.tobytes() not in seen:
            seen.clear()
            parts = likelihood.derivatives(torch.from_numpy(theta))
            value, gradient, hessian = (-part.numpy() / count for part in parts)
            if not all(np.isfinite(part).all() for part in (value, gradient, hessian)):
                # Far away it overflows: the trust region refuses an infinite value, whatever the slope.
                value, gradient, hessian = np.array(np.inf), np.zeros(len(theta)), np.eye(len(theta))
            seen[theta.tobytes()] = float(value), gradient, hessian
        return seen[theta.tobytes()]

    with np.errstate(all="ignore"):
        found = scipy.optimize.minimize(
            lambda theta: at(theta)[0],
            start.numpy(),
            jac=lambda theta: at(theta)[1],
            hess=lambda theta: at(theta)[2],
            method="trust-exact",
            options={"gtol": _GRADIENT, "maxiter": _ITERATIONS},
        )
    theta = torch.from_numpy(found.x)
    value, gradient, hessian = likelihood.derivatives(theta)
    if not math.isfinite(found.fun):
        return Maximum(theta, -math.inf, hessian, False)
    polished = theta + inverse_information(hessian)[0] @ gradient
    again, finer, curved = likelihood.derivatives(polished)
    if bool(finer.norm() < gradient.norm()) and bool(again >= value - 1e-9 * (1 + abs(value))):
        theta, value, gradient, hessian = polished, again, finer, curved
    return Maximum(theta, value.item(), hessian, gradient.norm().item() / count < 10 * _GRADIENT)


def maximum(data: Survival, model: Model, l2: float = 0.0, start: Tensor | None = None) -> Maximum:
    """Return the best maximum over all starts, or the one above a given start; searches that did not end come last."""
    likelihood = Likelihood(data.rows, model.widths(len(data.mean)), model.fixed, l2)
    starts = _starts(data, model, likelihood.widths) if start is None else iter([start])
    return max((climb(likelihood, one) for one in starts), key=lambda found: (found.converged, found.value))


def _starts(data: Survival, model: Model, widths: list[int]) -> Iterator[Tensor]:
    """Yield the exponential model, then for each κ (or the fixed one) the best model without covariates.

    κ = 1 is the Weibull distribution, κ = 0 the log-logistic, or Burr XII.
    """
    rate = math.log(data.events / (data.rows.sign @ data.rows.log_time.exp()).item())
    leading = "phi" if widths[0] else "lam"
    origin = {"phi": 0.0, "lam": 0.0, "gamma": 0.0, "kappa": math.log(2)} | model.fixed | {leading: rate}
    yield _embedded(origin, widths)
    for kappa in KAPPA_STARTS if model.kappa is None else (model.kappa,):
        alone = {name: int(name in (leading, "gamma")) for name in NAMES}
        null = Likelihood(data.rows, alone, {"kappa": math.log1p(kappa)})
        here = climb(null, torch.tensor([rate, 0.0], dtype=torch.float64)).theta.tolist()
        yield _embedded({**origin, leading: here[0], "gamma": here[1], "kappa": math.log1p(kappa)}, widths)


def _embedded(intercepts: dict[str, float], widths: list[int]) -> Tensor:
    parts = [
        torch.tensor([intercepts[name]] + [0.0] * (width - 1), dtype=torch.float64)
        for name, width in zip(NAMES, widths, strict=True)
        if width
    ]
    return torch.cat(parts)


def inverse_information(hessian: Tensor) -> tuple[Tensor, bool]:
    """Return the inverse of the observed information, or its pseudo-inverse and True if it is singular."""
    if not bool(hessian.isfinite().all()):
        return torch.full_like(hessian, math.nan), True
    scales, directions = torch.linalg.eigh(-hessian)
    kept = scales > 1e-10 * scales.abs().max()
    directions = directions[:, kept]
    return (directions / scales[kept]) @ directions.T, not bool(kept.all())
