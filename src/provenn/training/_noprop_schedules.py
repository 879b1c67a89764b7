"""Noise schedules of NoProp: fixed ones of T blocks, and the learned one of continuous time.

Times run from noise to class: ᾱ rises, so that block t denoises z_{t−1} to z_t, unlike DDPM's order.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_integer, check_number

LARGEST_ALPHA_BAR = 1 - 1e-6
"""Nearer to 1 the signal-to-noise ratio is no useful number any more."""


class DDPMCoefficients(NamedTuple):
    """What T blocks need of a schedule, in float64.

    Attributes:
        a: Weight of û in block t's mean, t = 1 … T.
        b: Weight of z_{t−1}.
        c: Variance of the noise that block t adds.
        snr: ᾱ_t / (1 − ᾱ_t), t = 0 … T.
        alpha_bars: ᾱ_t, t = 0 … T.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    snr: Tensor
    alpha_bars: Tensor


def cosine_schedule(num_blocks: int) -> Float[Tensor, " steps"]:
    """Return the α's of a cosine schedule: ᾱ_t = sin²(½π (t + 1) / (T + 2)), whose ends stay off 0 and 1.

    The paper says no more than "cosine"; that the ends are left out is this library's choice.

    Args:
        num_blocks: T.

    Shape: (T + 1), α_0 … α_T in float64.

    Returns:
        The α's: ᾱ_t = Π_{s ≥ t} α_s.

    Raises:
        ValueError: ``num_blocks`` < 1.
        TypeError: ``num_blocks`` is no integer.

    Cost: O(T).

    Source: NoProp, section 4; Nichol and Dhariwal, arXiv 2102.09672, for the cosine.
    """
    check_integer("num_blocks", num_blocks, at_least=1)
    places = torch.arange(1, num_blocks + 2, dtype=torch.float64) / (num_blocks + 2)
    alpha_bars = (0.5 * math.pi * places).sin().square()
    return torch.cat([alpha_bars[:-1] / alpha_bars[1:], alpha_bars[-1:]])


def ddpm_coefficients(alphas: Float[Tensor, " steps"]) -> DDPMCoefficients:
    """Return the Gaussian p(z_t | z_{t−1}, u) of each block, from q's α's.

    a_t = √ᾱ_t (1 − α_{t−1}) / (1 − ᾱ_{t−1}), b_t = √α_{t−1} (1 − ᾱ_t) / (1 − ᾱ_{t−1}),
    c_t = (1 − ᾱ_t)(1 − α_{t−1}) / (1 − ᾱ_{t−1}).

    Args:
        alphas: α_0 … α_T; ᾱ_t = Π_{s ≥ t} α_s.

    Shape: (T + 1); ``a``, ``b``, ``c`` have T entries, ``snr`` and ``alpha_bars`` T + 1.

    Returns:
        The coefficients, in float64.

    Raises:
        ValueError: Fewer than two α's, or ᾱ is not strictly rising within (0, 1).

    Warns:
        UserWarning: ᾱ_T is so near 1 that it is set to 1 − 1e-6.

    Cost: O(T).

    Source: NoProp, section 2.1 and appendix A.
    """
    alphas = alphas.detach().to("cpu", torch.float64)
    if len(alphas) < 2:
        raise ValueError(f"alphas must hold α_0 … α_T of T ≥ 1 blocks, got {alphas.tolist()}")
    alpha_bars = alphas.flip(0).cumprod(0).flip(0)
    if not (((alpha_bars > 0) & (alpha_bars < 1)).all() and (alpha_bars.diff() > 0).all()):
        raise ValueError(f"alphas must make ᾱ rise strictly within (0, 1), got ᾱ = {alpha_bars.tolist()}")
    if alpha_bars[-1] > LARGEST_ALPHA_BAR:
        warnings.warn(f"alphas: ᾱ_T is clamped to 1 − 1e-6, got {alpha_bars[-1].item()!r}", stacklevel=2)
        alpha_bars = alpha_bars.clone()
        alpha_bars[-1] = LARGEST_ALPHA_BAR
        if not (alpha_bars.diff() > 0).all():
            raise ValueError(f"alphas must make ᾱ rise strictly below 1 − 1e-6, got ᾱ = {alpha_bars.tolist()}")
    before, after = alpha_bars[:-1], alpha_bars[1:]
    alpha = before / after
    left = 1 - before
    return DDPMCoefficients(
        a=after.sqrt() * (1 - alpha) / left,
        b=alpha.sqrt() * (1 - after) / left,
        c=(1 - after) * (1 - alpha) / left,
        snr=alpha_bars / (1 - alpha_bars),
        alpha_bars=alpha_bars,
    )


class GammaSchedule(nn.Module):
    """A learned schedule of continuous time: ᾱ_t = σ(−γ(t)), γ(t) = γ₀ + (γ₁ − γ₀)(1 − γ̄(t)).

    γ̄ is a line plus a layer of sigmoids, all weights positive, scaled to run from 0 to 1; so γ falls and ᾱ rises,
    whatever the parameters. γ₁ − γ₀ is kept positive likewise.

    Args:
        gamma_0: γ at t = 1, where least noise is left. The paper gives no start; ±4 leave 2 % of noise, or of signal.
        gamma_1: γ at t = 0.
        hidden: Sigmoids of γ̄.

    Shape: t of any shape, in [0, 1] → γ of the same shape.

    Raises:
        ValueError: ``gamma_0`` ≥ ``gamma_1``, or ``hidden`` < 1.

    Cost: O(hidden) a time.

    Source: NoProp, appendix on NoProp-CT; Kingma et al., arXiv 2107.00630, for the form.
    """

    def __init__(self, gamma_0: float = -4.0, gamma_1: float = 4.0, hidden: int = 16) -> None:
        super().__init__()
        check_number("gamma_1", gamma_1)
        check_number("gamma_0", gamma_0, below=gamma_1)
        check_integer("hidden", hidden, at_least=1)
        self.gamma_0 = nn.Parameter(torch.tensor(float(gamma_0)))
        gap = float(gamma_1) - float(gamma_0)
        self.gap = nn.Parameter(torch.tensor(gap + math.log(-math.expm1(-gap))))  # softplus⁻¹
        self.slope = nn.Parameter(torch.tensor(0.5))
        centres = torch.linspace(0, 1, hidden)
        self.rates = nn.Parameter(torch.full((hidden,), 4.0))
        self.shifts = nn.Parameter(-4.0 * centres)
        self.weights = nn.Parameter(torch.full((hidden,), -3.0))

    def _raw(self, t: Tensor) -> Tensor:
        hidden = (F.softplus(self.rates) * t[..., None] + self.shifts).sigmoid()
        return F.softplus(self.slope) * t + (F.softplus(self.weights) * hidden).sum(-1)

    def _raw_slope(self, t: Tensor) -> Tensor:
        rates = F.softplus(self.rates)
        hidden = (rates * t[..., None] + self.shifts).sigmoid()
        return F.softplus(self.slope) + (F.softplus(self.weights) * rates * hidden * (1 - hidden)).sum(-1)

    def _span(self) -> tuple[Tensor, Tensor]:
        ends = self._raw(self.slope.new_tensor([0.0, 1.0]))
        return ends[0], ends[1] - ends[0]

    def forward(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return γ(t).

        Args:
            t: Times in [0, 1].

        Returns:
            γ, falling with t.
        """
        start, span = self._span()
        return self.gamma_0 + F.softplus(self.gap) * (1 - (self._raw(t) - start) / span)

    def rate(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return γ̇ = −γ′(t) > 0."""
        return F.softplus(self.gap) * self._raw_slope(t) / self._span()[1]

    def alpha_bar(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return ᾱ_t = σ(−γ(t))."""
        return (-self(t)).sigmoid()

    def snr(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return ᾱ_t / (1 − ᾱ_t) = exp(−γ(t))."""
        return (-self(t)).exp()

    def snr_rate(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return SNR′(t) = γ̇ exp(−γ)."""
        return self.rate(t) * self.snr(t)
