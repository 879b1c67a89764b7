"""Geometric Brownian motion as a noising process, and the map of data to positive values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_number

Schedule = float | tuple[float, float] | Callable[[Tensor], Tensor]
Mode = Literal["sign_preserving", "sign_agnostic"]

_NODES, _WEIGHTS = (torch.from_numpy(one) for one in np.polynomial.legendre.leggauss(64))
"""Gauss–Legendre on [−1, 1]: exact to rounding for what is smooth, over several decades."""


class LogMoments(NamedTuple):
    """Mean and variance of log X_t given X_0 = 1: M(t) and V(t)."""

    mean: Tensor
    variance: Tensor


class GeometricBrownianSDE:
    r"""Noise that multiplies: geometric Brownian motion, element by element.

    .. math:: dX = \mu(t) X \, dt + \sigma(t) X \, dW, \qquad X_t = X_0 \circ e^{M(t) + \sqrt{V(t)} Z}, \quad
        V(t) = \int_0^t \sigma^2, \; M(t) = \int_0^t \mu - \sigma^2/2

    Args:
        mu: Drift: a number, a function of time, or ``"half_variance"`` for σ²/2, which keeps the mean of log X
            (M = 0).
        sigma: Volatility: a number, a pair (σ_min, σ_max) for σ_min (σ_max/σ_min)^(t/T), or a function of time.
        T: The end of time.

    Raises:
        ValueError: σ or T is not above 0, or a number is not finite.

    Cost: O(1) a time; schedules that are functions are integrated by 64 Gauss–Legendre nodes. In float64.

    Source: Shetty, Chanda, Seelamantula et al., arXiv 2510.02730, the forward process. Its paper's schedules could not
    be checked against code: σ geometric and μ = σ²/2 or 0 are what its description names.
    """

    def __init__(
        self,
        mu: float | Literal["half_variance"] | Callable[[Tensor], Tensor] = "half_variance",
        sigma: Schedule = (0.1, 4.0),
        T: float = 1.0,
    ) -> None:
        check_number("T", T, above=0)
        if isinstance(mu, str):
            check_choice("mu", mu, ("half_variance",))
        elif not callable(mu):
            check_number("mu", mu)
        for index, value in enumerate(sigma if isinstance(sigma, tuple) else ()):
            check_number(f"sigma[{index}]", value, above=0)
        if not isinstance(sigma, tuple) and not callable(sigma):
            check_number("sigma", sigma, above=0)
        self.mu, self._sigma, self.T = mu, sigma, T

    def sigma(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return σ at times ``t``."""
        if callable(self._sigma):
            return self._sigma(t)
        if isinstance(self._sigma, tuple):
            low, high = self._sigma
            return low * torch.exp(math.log(high / low) * t / self.T)
        return torch.full_like(t, self._sigma)

    def drift(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return μ at times ``t``."""
        if self.mu == "half_variance":
            return self.sigma(t).square() / 2
        return self.mu(t) if callable(self.mu) else torch.full_like(t, self.mu)

    def moments(self, t: Float[Tensor, "..."]) -> LogMoments:
        """Return M(t) and V(t), in the type of ``t``.

        Args:
            t: Times in [0, T].

        Raises:
            ValueError: V decreases or is not finite, as a schedule that is not a number makes it.
        """
        t64 = t.to(torch.float64)
        variance = self._integral_of_variance(t64)
        if not variance.isfinite().all():
            raise ValueError(f"sigma must be finite on [0, {self.T:g}], got an integral of its square that is not")
        if self.mu == "half_variance":
            mean = torch.zeros_like(variance)
        else:
            drift = _integral(self.mu, t64) if callable(self.mu) else self.mu * t64
            mean = drift - variance / 2
        return LogMoments(mean.to(t.dtype), variance.to(t.dtype))

    def _integral_of_variance(self, t: Tensor) -> Tensor:
        if isinstance(self._sigma, tuple):
            low, high = self._sigma
            rate = 2 * math.log(high / low) / self.T
            return low**2 * (t if rate == 0 else torch.expm1(rate * t) / rate)
        if callable(self._sigma):
            return _integral(lambda times: self.sigma(times).square(), t)
        return self._sigma**2 * t

    def marginal(
        self, x0: Float[Tensor, "batch *shape"], t: Float[Tensor, " batch"], noise: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch *shape"]:
        """Return X_t given X_0, for standard normal noise.

        Args:
            x0: Data, positive.
            t: A time for each sample.
            noise: Standard normal.
        """
        mean, variance = (expand(one, x0) for one in self.moments(t))
        return x0 * torch.exp(mean + variance.sqrt() * noise)

    def reverse_step(
        self,
        x: Float[Tensor, "batch *shape"],
        t: float,
        dt: float,
        score: Float[Tensor, "batch *shape"],
        noise: Float[Tensor, "batch *shape"],
        mode: Mode = "sign_preserving",
    ) -> Float[Tensor, "batch *shape"]:
        r"""Take one step of the reverse process from t to t − dt.

        With s the score, a = σ²δ and m = μδ as their integrals over the step (for constants the same),

        .. math:: \text{sign-preserving:} \; X \circ e^{3a/2 - m + a s + \sqrt{a} Z}, \qquad
            \text{sign-agnostic:} \; X \circ (1 + 2a - m + a s + \sqrt{a} Z)

        Args:
            x: The state, of any sign.
            t: The time.
            dt: The step's length, δ.
            score: x ∘ ∇log p_t(x).
            noise: Standard normal.
            mode: Euler's method in log x, which cannot flip a sign, or in x, which can.

        Raises:
            ValueError: ``mode`` is unknown.

        Source: arXiv 2510.02730, the reverse process and its two discretisations.
        """
        check_choice("mode", mode, ("sign_preserving", "sign_agnostic"))
        mean, variance = self.moments(torch.tensor([t, t - dt], dtype=torch.float64))
        a = (variance[0] - variance[1]).item()
        m = (mean[0] - mean[1]).item() + a / 2  # M holds μ − σ²/2
        if mode == "sign_preserving":
            return x * torch.exp(1.5 * a - m + a * score + math.sqrt(a) * noise)
        return x * (1 + 2 * a - m + a * score + math.sqrt(a) * noise)

    def prior(
        self,
        shape: tuple[int, ...],
        log_mean: Tensor | float = 0.0,
        log_variance: Tensor | float = 0.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw from the log-normal that the process ends in, from data whose logarithm has a mean and a variance.

        Args:
            shape: Of the draw.
            log_mean: Mean of the data's logarithm: a number, or a tensor of one sample's shape (the mean log-image).
            log_variance: Its variance, likewise.
            generator: Draws; ``None``: torch's global generator.
            dtype: Of the draw; ``None``: torch's default.
            device: Of the draw; ``None``: torch's default.
        """
        mean, variance = self.moments(torch.tensor(self.T, dtype=torch.float64))
        where = device if generator is None else generator.device
        noise = torch.randn(shape, generator=generator, dtype=dtype, device=where).to(device or where)
        spread = torch.as_tensor(log_variance, dtype=noise.dtype, device=noise.device) + variance.to(noise)
        return torch.exp(torch.as_tensor(log_mean).to(noise) + mean.to(noise) + spread.sqrt() * noise)


def _integral(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Integrate from 0 to each of some times."""
    nodes, weights = _NODES.to(t.device), _WEIGHTS.to(t.device)
    return t / 2 * (function(t.unsqueeze(-1) * (nodes + 1) / 2) * weights).sum(-1)


def expand(values: Float[Tensor, " batch"], like: Float[Tensor, "batch *shape"]) -> Tensor:
    """Give one value a sample the dimensions of the samples."""
    return values.view(-1, *[1] * (like.dim() - 1))


class PositiveTransform:
    """Shift values away from zero, where they have no logarithm: x = offset + scale · value; and back.

    Args:
        offset: What a value of 0 becomes.
        scale: Factor of the values.

    Raises:
        ValueError: ``scale`` ≤ 0, or ``offset`` is not finite; in a call, a result is not above 0.

    Source: arXiv 2510.02730, the experiments on images (offset 1 and scale 1 could not be checked against code).
    """

    def __init__(self, offset: float = 1.0, scale: float = 1.0) -> None:
        check_number("offset", offset)
        check_number("scale", scale, above=0)
        self.offset, self.scale = offset, scale

    def __call__(self, values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the positive data of values."""
        x = self.offset + self.scale * values
        if not (x > 0).all():
            raise ValueError(
                f"offset + scale · value must be above 0, got {x.min().item():.4g} for the value "
                f"{values.min().item():.4g}; raise offset"
            )
        return x

    def inverse(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the values of positive data."""
        return (x - self.offset) / self.scale
