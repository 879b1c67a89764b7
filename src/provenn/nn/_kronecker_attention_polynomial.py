"""Polynomials in place of the exponential: their coefficients, certified errors, and the monomials they need."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial import chebyshev
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer, check_number

BASES = ("taylor", "chebyshev")
MAX_RANK = 20_000
_LARGEST_RANGE = 1e4  # beyond it no rank is in reach, and the search for the degree takes long
_LARGEST_CHEBYSHEV = 100  # degrees that are tried, and interval half-width


@dataclass(frozen=True)
class PolynomialReport:
    """What an approximation is made of, and how far off it can be.

    Args:
        degree: g of the polynomial.
        rank: r, the number of monomials of degree up to g in d variables.
        bound: B, the largest magnitude of an entry of q and ks.
        basis: ``"taylor"`` or ``"chebyshev"``.
        entry_error: ε, the largest relative error of an entry exp(score), for scores in [−Bᵏ, Bᵏ].
        output_error: 2ε/(1 − ε), the largest error of an output where no entry of V₁ ⊘ ⋯ is larger than 1 in
            magnitude; infinite for ε ≥ 1. Rounding comes on top: see :func:`rounding_error`.
    """

    degree: int
    rank: int
    bound: float
    basis: str
    entry_error: float
    output_error: float


class Plan(NamedTuple):
    """An approximation, and the weight w_α of every monomial, by ascending degree."""

    weights: tuple[float, ...]
    report: PolynomialReport


def taylor_error(degree: int, reach: float) -> float:
    """Return the largest relative error of exp's Taylor polynomial on [−reach, reach].

    h(x) = 1 − e⁻ˣ P(x) has the derivative e⁻ˣ xᵍ/g! and is 0 at 0, so that it is largest at −reach, where its
    magnitude is ∫ eᵗ tᵍ/g! dt over [0, reach] = Σ_m reach^(g+1+m) / (m! g! (g + 1 + m)); all terms are positive.
    """
    if reach == 0:
        return 0.0
    if reach > _LARGEST_RANGE:
        return math.inf
    m = np.arange(int(3 * reach) + 60)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, len(m))))])
    terms = (degree + 1 + m) * math.log(reach) - log_factorial - math.lgamma(degree + 1) - np.log(degree + 1 + m)
    largest = terms.max()
    exponent = largest + math.log(np.exp(terms - largest).sum())
    return math.exp(exponent) if exponent < 700 else math.inf


def _chebyshev_series(degree: int, reach: float) -> np.ndarray:
    return chebyshev.chebinterpolate(lambda x: np.exp(reach * x), degree)


def chebyshev_error(degree: int, reach: float) -> float:
    """Return the largest relative error on [−reach, reach] of exp's interpolant at Chebyshev points.

    1 − e⁻ˣ P(x) is stationary where P′ = P: its extremes are at the ends and at the real roots of P − P′.
    """
    series = _chebyshev_series(degree, reach)
    slope = chebyshev.chebder(series) / reach if degree else np.zeros(1)
    roots = chebyshev.chebroots(chebyshev.chebsub(series, slope)) if degree else np.zeros(0)
    # A root that rounding moved off the real line still marks a place worth looking at.
    places = np.concatenate([[-1.0, 1.0], np.clip(np.real(roots), -1, 1)])
    return float(np.abs(1 - np.exp(-reach * places) * chebyshev.chebval(places, series)).max())


def polynomial_coefficients(degree: int, reach: float, basis: str) -> list[float]:
    """Return c_0, …, c_g of the polynomial in powers of the score."""
    if basis == "taylor":
        return [1 / math.factorial(power) for power in range(degree + 1)]
    series = chebyshev.cheb2poly(_chebyshev_series(degree, reach))
    padded = np.concatenate([series, np.zeros(degree + 1 - len(series))])
    return [float(c) for c in padded / reach ** np.arange(degree + 1)]


def rounding_error(reach: float, dtype: torch.dtype) -> float:
    """Return the order of the relative rounding error of exp(−reach), summed from terms as large as exp(reach)."""
    return torch.finfo(dtype).eps * math.exp(2 * reach) if reach < 300 else math.inf


def _smallest_degree(error: Callable[[int], float], tol: float) -> int:
    """Find the smallest degree that keeps the tolerance. Errors rise to one peak and fall, so bisection is safe."""
    if error(0) <= tol:
        return 0
    high = 1
    while error(high) > tol:
        high *= 2
    low = high // 2  # known not to keep it
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error(middle) <= tol else (middle, high)
    return high


def _chosen_degree(reach: float, tol: float, basis: str) -> int:
    if basis == "taylor":
        return _smallest_degree(lambda degree: taylor_error(degree, reach), tol)
    for degree in range(_LARGEST_CHEBYSHEV + 1):
        if chebyshev_error(degree, reach) <= tol:
            return degree
    raise ValueError(f"tol = {tol} is out of reach of Chebyshev interpolation in double precision on ±{reach:g}")


def polynomial_plan(
    dim: int, order: int, bound: float, degree: int | None, tol: float, basis: str, max_rank: int
) -> Plan:
    """Choose the degree, and compute its weights w_α = c_|α| |α|! / (α! d^|α|).

    Args:
        dim: d, the features of a head.
        order: k; scores are within Bᵏ.
        bound: B.
        degree: g, or ``None`` for the smallest that keeps ``tol``.
        tol: ε.
        basis: ``"taylor"`` or ``"chebyshev"``.
        max_rank: Largest number of monomials.

    Raises:
        ValueError: A number is out of bounds, the rank needed is above ``max_rank``, or rounding alone is above
            ``tol``.
    """
    check_choice("basis", basis, BASES)
    check_number("bound", bound, at_least=0)
    check_number("tol", tol, above=0, below=1)
    check_integer("max_rank", max_rank, at_least=1)
    if degree is not None:
        check_integer("degree", degree, at_least=0)
    reach = float(bound) ** order
    if reach > _LARGEST_RANGE and degree is None:
        least = math.comb(dim + int(reach), dim)
        raise ValueError(f"max_rank must be at least {least} for bound = {bound:g}, got {max_rank}")
    if basis == "chebyshev":
        reach = max(reach, 1e-3)  # the points must not coincide; a wider interval covers the narrow one
        if reach > _LARGEST_CHEBYSHEV:
            raise ValueError(
                f'bound must be at most {_LARGEST_CHEBYSHEV ** (1 / order):g} with basis="chebyshev", got {bound}'
            )
    chosen = _chosen_degree(reach, tol, basis) if degree is None else degree
    rank = math.comb(dim + chosen, dim)
    if rank > max_rank:
        raise ValueError(f"max_rank must be at least {rank} (degree {chosen}, bound {bound:g}), got {max_rank}")
    rounding = rounding_error(reach, torch.float64)
    if degree is None and rounding > tol:
        raise ValueError(f"tol = {tol:g} is out of reach for bound = {bound:g}: float64 rounds by {rounding:.1g}")
    error = taylor_error(chosen, reach) if basis == "taylor" else chebyshev_error(chosen, reach)
    output_error = 2 * error / (1 - error) if error < 1 else math.inf
    report = PolynomialReport(chosen, rank, float(bound), basis, error, output_error)
    return Plan(_weights(dim, polynomial_coefficients(chosen, reach, basis)), report)


def _weights(dim: int, coefficients: list[float]) -> tuple[float, ...]:
    """Return w_α in the order of :func:`monomials`."""
    exponents = np.zeros((1, dim), dtype=np.int64)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, len(coefficients) + 1)))])
    weights = []
    for power, coefficient in enumerate(coefficients):
        if power:
            exponents = np.concatenate(
                [exponents[: _prefix(power, last)] + np.eye(dim, dtype=np.int64)[last] for last in range(dim)]
            )
        share = log_factorial[power] - log_factorial[exponents].sum(axis=1) - power * math.log(dim)
        weights.append(coefficient * np.exp(share))
    return tuple(np.concatenate(weights).tolist())


def _prefix(power: int, last: int) -> int:
    """Count the monomials of degree power − 1 in the first last + 1 variables; they come first in their level."""
    return math.comb(power - 1 + last, last)


def monomials(x: Float[Tensor, "*batch tokens dim"], degree: int) -> Float[Tensor, "*batch tokens rank"]:
    """Return every monomial x^α with |α| ≤ degree, by ascending degree, each made of one of the degree below.

    Within a degree they are grouped by their last variable: x_l times each monomial of the degree below in the
    variables up to l, which are a prefix of it.

    Args:
        x: Tokens.
        degree: g.

    Shape:
        (..., n, d) → (..., n, C(d + g, g)).

    Cost: one multiplication a monomial.
    """
    level = torch.ones_like(x[..., :1])
    levels = [level]
    for power in range(1, degree + 1):
        level = torch.cat(
            [x[..., last : last + 1] * level[..., : _prefix(power, last)] for last in range(x.shape[-1])], dim=-1
        )
        levels.append(level)
    return torch.cat(levels, dim=-1)
