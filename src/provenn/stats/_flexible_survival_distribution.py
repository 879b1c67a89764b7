"""The adapted power generalised Weibull (APGW) distribution.

Source: Burke, Jones & Noufaily, arXiv 1901.03212, section 2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions.utils import broadcast_all

from provenn.core.experiment.checks import check_integer

_SMALL = 0.5
"""Below this magnitude the series of :func:`exponential_quotients` is used; its 14 terms then end at 1e-16."""
_SERIES = [(k + 1) * (k + 2) / math.factorial(k + 3) for k in range(14)]


class Quotients(NamedTuple):
    """f(x) = (eˣ − 1)/x with its first two derivatives, and eˣ."""

    value: Tensor
    first: Tensor
    second: Tensor
    exponential: Tensor


def exponential_quotients(x: Float[Tensor, "*shape"]) -> Quotients:
    """Return f(x) = (eˣ − 1)/x, f′(x), f″(x) and eˣ, each to full precision, also at and around 0.

    With f(x) = eˣ − x f′(x) and f′(x) = (eˣ − x f″(x))/2, whichever direction of the recursion is stable is taken.
    """
    exponential = x.exp()
    inside = (x.abs() < _SMALL).to(x.dtype)  # weights rather than torch.where, which takes ten times as long
    outside = 1 - inside
    small_x, large_x = x.clamp(-1, 1) * inside, x + inside
    coefficients = x.new_tensor(_SERIES).unbind()
    second = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        second = torch.addcmul(coefficient, second, small_x)  # one pass over memory a term, where * and + take two
    near = exponential.clamp(max=2.0)  # eˣ where the series holds; elsewhere finite, to meet a weight of 0
    first = (near - small_x * second) / 2
    value = near - small_x * first
    large_value = (exponential - 1) / large_x
    large_first = (exponential - large_value) / large_x
    large_second = (exponential - 2 * large_first) / large_x
    return Quotients(
        torch.addcmul(outside * large_value, inside, value),
        torch.addcmul(outside * large_first, inside, first),
        torch.addcmul(outside * large_second, inside, second),
        exponential,
    )


def _log_quotient(x: Tensor) -> Tensor:
    """Return log(1 + x)/x, with its limit 1 at 0."""
    small = x.abs() < 1e-4
    safe = torch.where(small, 1.0, x)
    return torch.where(small, 1 - x / 2 + x**2 / 3 - x**3 / 4, torch.log1p(safe) / safe)


class APGW:
    r"""Adapted power generalised Weibull distribution of a time t > 0.

    Its cumulative hazard is H(t) = λ H₀((φt)^γ; κ), H₀(z; κ) = ((κ+1)/κ){(1 + z/(κ+1))^κ − 1}. It is a Weibull
    distribution for κ = 1, Burr XII for κ = 0 (log-logistic where λ = 1 too), and goes to Gompertz for κ → ∞ with
    γ = 1. For κ < 0 it is defective: :attr:`cure_fraction` never have the event.

    Args:
        phi: Horizontal scale φ > 0, in one over the unit of time.
        lam: Vertical scale λ > 0.
        gamma: Power shape γ > 0.
        kappa: Shape κ > −1.

    Shape:
        The parameters broadcast to one shape ``batch``; every method broadcasts its argument against that.

    Raises:
        ValueError: A parameter is out of range or not finite, a time is negative, a probability is outside [0, 1],
            or ``n`` < 0.
        TypeError: ``n`` is not an integer.

    Cost: O(1) time and memory an element. All is computed from log t, so that large powers do not overflow early.

    Source: arXiv 1901.03212, section 2.
    """

    def __init__(self, phi: float | Tensor, lam: float | Tensor, gamma: float | Tensor, kappa: float | Tensor) -> None:
        self.phi, self.lam, self.gamma, self.kappa = broadcast_all(phi, lam, gamma, kappa)
        for name, lowest in (("phi", 0), ("lam", 0), ("gamma", 0), ("kappa", -1)):
            value = getattr(self, name)
            if not bool(((value > lowest) & value.isfinite()).all()):
                raise ValueError(f"{name} must be finite and > {lowest}, got {value}")

    def __repr__(self) -> str:
        return f"APGW(phi={self.phi}, lam={self.lam}, gamma={self.gamma}, kappa={self.kappa})"

    def _log1p_scaled(self, t: Tensor) -> Tensor:
        """Return log(1 + (φt)^γ/(κ+1)), by way of logarithms."""
        exponent = self.gamma * (self.phi.log() + t.log()) - torch.log1p(self.kappa)
        return torch.logaddexp(exponent, torch.zeros_like(exponent))

    def cumhaz(self, t: float | Tensor) -> Tensor:
        """Return the cumulative hazard H(t).

        Args:
            t: Times ≥ 0.
        """
        t = self._times(t)
        s = self._log1p_scaled(t)
        return self.lam * (self.kappa + 1) * s * exponential_quotients(self.kappa * s).value

    def log_hazard(self, t: float | Tensor) -> Tensor:
        """Return the logarithm of the hazard.

        Args:
            t: Times ≥ 0; at 0 the limit, which is ±∞ unless γ = 1.
        """
        t = self._times(t)
        power = torch.xlogy(self.gamma - 1, t) + self.gamma * self.phi.log()
        return self.lam.log() + self.gamma.log() + power + (self.kappa - 1) * self._log1p_scaled(t)

    def hazard(self, t: float | Tensor) -> Tensor:
        """Return the hazard h(t) = dH/dt, in one over the unit of time.

        Args:
            t: Times ≥ 0.
        """
        return self.log_hazard(t).exp()

    def sf(self, t: float | Tensor) -> Tensor:
        """Return the probability S(t) of surviving t.

        Args:
            t: Times ≥ 0.
        """
        return (-self.cumhaz(t)).exp()

    def cdf(self, t: float | Tensor) -> Tensor:
        """Return the probability 1 − S(t) of an event until t.

        Args:
            t: Times ≥ 0.
        """
        return -torch.expm1(-self.cumhaz(t))

    def pdf(self, t: float | Tensor) -> Tensor:
        """Return the density h(t)S(t), which integrates to one minus the cure fraction.

        Args:
            t: Times ≥ 0.
        """
        return (self.log_hazard(t) - self.cumhaz(t)).exp()

    def icdf(self, u: float | Tensor) -> Tensor:
        """Return the time by which the event has come with probability u; +∞ where it never is that probable.

        Args:
            u: Probabilities in [0, 1].
        """
        u = torch.as_tensor(u, dtype=self.phi.dtype, device=self.phi.device)
        if not bool(((u >= 0) & (u <= 1)).all()):
            raise ValueError(f"u must be in [0, 1], got {u}")
        return self.inverse_cumhaz(-torch.log1p(-u))

    def inverse_cumhaz(self, total: float | Tensor) -> Tensor:
        """Return the time at which the cumulative hazard reaches a value; +∞ where it never does.

        Args:
            total: Values ≥ 0 of the cumulative hazard.
        """
        total = torch.as_tensor(total, dtype=self.phi.dtype, device=self.phi.device)
        scaled = total / (self.lam * (self.kappa + 1))
        x = self.kappa * scaled
        reached = (x > -1) & total.isfinite()
        x, scaled = torch.where(reached, x, 0.0), torch.where(reached, scaled, 1.0)
        # log z, so that a power of a large z does not overflow.
        grown = scaled * _log_quotient(x)
        log_z = torch.log1p(self.kappa) + grown + torch.log(-torch.expm1(-grown))
        return torch.where(reached, (log_z / self.gamma).exp() / self.phi, torch.inf)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n times for each distribution of the batch; +∞ stands for those who never have the event.

        Args:
            n: Number of draws.
            generator: Where the randomness comes from; default torch's global generator.

        Returns:
            Times, of shape (n, *batch).
        """
        check_integer("n", n, at_least=0)
        u = torch.rand(n, *self.phi.shape, generator=generator, dtype=self.phi.dtype, device=self.phi.device)
        return self.icdf(u.clamp(min=torch.finfo(u.dtype).tiny))

    @property
    def cure_fraction(self) -> Tensor:
        """S(∞) = exp(−λ(κ+1)/|κ|) for κ < 0; else 0."""
        defective = self.kappa < 0
        kappa = torch.where(defective, self.kappa, -0.5)
        return torch.where(defective, (self.lam * (kappa + 1) / kappa).exp(), 0.0)

    def _times(self, t: float | Tensor) -> Tensor:
        t = torch.as_tensor(t, dtype=self.phi.dtype, device=self.phi.device)
        if not bool((t >= 0).all()):
            raise ValueError(f"t must be ≥ 0, got {t}")
        return t
