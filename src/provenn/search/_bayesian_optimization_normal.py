"""Expectations under normal distributions: the envelope of lines, and orthants of two variables."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from provenn.core.numerics.gaussian_processes import GaussianPosterior

_LARGEST = 2**22


def density(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the standard normal density."""
    return (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)


def below(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the standard normal distribution function."""
    return torch.special.ndtr(z)


def expected_max_affine(a: Float[Tensor, "*batch m"], b: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch"]:
    r"""Return the exact expectation of the largest of m lines at a standard normal point, E[max_i (a_i + b_i Z)].

    The lines are sorted by slope; line j is on top between its last crossing with a flatter line and its first with a
    steeper one, and

    .. math:: E = \sum_j a_j (\Phi(h_j) - \Phi(l_j)) + b_j (\phi(l_j) - \phi(h_j)).

    Of lines with equal slopes the highest counts. The crossings need no gradient: what one line loses there the next
    one gains.

    Args:
        a: Intercepts.
        b: Slopes.

    Returns:
        The expectation of each row.

    Shape:
        (..., m) twice, to (...).

    Raises:
        ValueError: There is no line, or the shapes differ.

    Cost: O(m²) a row, all rows and pairs at once (the stack that would make it O(m log m) is serial, and slower for
    the hundreds of lines met here); memory is bounded by rows in turn.

    Source: Frazier, Powell, Dayanik, INFORMS J. Comput. 21 (2009), algorithm 1; arXiv 1807.02811, section 4.2.
    """
    if a.shape != b.shape or a.ndim == 0 or a.shape[-1] == 0:
        raise ValueError(f"a and b must be as many lines, at least one, got shapes {tuple(a.shape)}, {tuple(b.shape)}")
    order = a.detach().argsort(dim=-1)
    order = order.gather(-1, b.detach().gather(-1, order).argsort(dim=-1, stable=True))
    a, b = a.gather(-1, order), b.gather(-1, order)
    low, high = _top(a.detach(), b.detach())
    on_top = low < high
    low, high = torch.where(on_top, low, 0.0), torch.where(on_top, high, 0.0)
    # A share far out on the right is taken as one on the left, where it is not a difference of two ones.
    share = torch.where(low > 0, below(-low) - below(-high), below(high) - below(low))
    return (a * share + b * (density(low) - density(high))).sum(-1)


def _top(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return between which points each of the sorted lines is on top."""
    lines = a.shape[-1]
    rows = a.reshape(-1, lines), b.reshape(-1, lines)
    steeper = torch.ones(lines, lines, dtype=torch.bool, device=a.device).triu(1)
    lows, highs = [], []
    for some_a, some_b in zip(*(one.split(max(1, _LARGEST // lines**2)) for one in rows), strict=True):
        rise = some_b.unsqueeze(-2) - some_b.unsqueeze(-1)
        crossing = torch.where(rise > 0, (some_a.unsqueeze(-1) - some_a.unsqueeze(-2)) / rise, -math.inf)
        lows.append(torch.where(steeper, crossing, -math.inf).amax(-2))
        highs.append(torch.where(steeper, crossing, math.inf).amin(-1))
    return torch.cat(lows).reshape(a.shape), torch.cat(highs).reshape(a.shape)


_NODES, _WEIGHTS = (torch.from_numpy(one) for one in leggauss(96))


def both_below(h: Tensor, k: Tensor, correlation: Tensor) -> Tensor:
    """Return P(Z_1 ≤ h, Z_2 ≤ k) of standard normal variables, to about 1e-10; differentiable.

    Source: Drezner, Wesolowsky, J. Stat. Comput. Simul. 35 (1990): an integral over the correlation's angle.
    """
    end = correlation.clamp(-1 + 1e-14, 1 - 1e-14).asin().unsqueeze(-1)
    angle = 0.5 * end * (1 + _NODES.to(end))
    h, k = h.clamp(-40, 40).unsqueeze(-1), k.clamp(-40, 40).unsqueeze(-1)
    inside = (-(h.square() + k.square() - 2 * h * k * angle.sin()) / (2 * angle.cos().square())).exp()
    return (below(h) * below(k)).squeeze(-1) + (0.5 * end * inside * _WEIGHTS.to(end)).sum(-1) / (2 * math.pi)


def expected_max_of_two(mean: Float[Tensor, "*batch 2"], cov: Float[Tensor, "*batch 2 2"]) -> Float[Tensor, "*batch"]:
    """Return E[max(0, U, V)] of two normal variables, in closed form but for the bivariate distribution function.

    Each is integrated over where it wins, by Stein's identity.

    Source: Ginsbourger, Le Riche, Carraro, "Kriging is well-suited to parallelize optimization" (2010), section 4.
    """
    u, v = mean.unbind(-1)
    gap = (cov[..., 0, 0] + cov[..., 1, 1] - cov[..., 0, 1] - cov[..., 1, 0]).clamp_min(0)
    tied = gap < 1e-14 * (cov[..., 0, 0] + cov[..., 1, 1]) + _SMALLEST
    total = torch.zeros_like(u)
    for first, second, ahead, wins_ties in ((u, v, 0, True), (v, u, 1, False)):
        own, shared = cov[..., ahead, ahead].clamp_min(_SMALLEST), cov[..., 0, 1]
        sure = torch.where((first >= second) if wins_ties else (first > second), 1.0, 0.0)
        alone = sure * _positive_part(first, own.sqrt())
        total = total + torch.where(tied, alone, _won(first, own, first - second, gap + tied * own, own - shared))
    return total


_SMALLEST = 1e-60


def _positive_part(mean: Tensor, deviation: Tensor) -> Tensor:
    return mean * below(mean / deviation) + deviation * density(mean / deviation)


def _won(mean: Tensor, own: Tensor, lead: Tensor, gap: Tensor, shared: Tensor) -> Tensor:
    """Return E[U; U > 0, W > 0] for U ~ N(mean, own), W ~ N(lead, gap), Cov(U, W) = shared."""
    s, t = own.sqrt(), gap.sqrt()
    rho = (shared / (s * t)).clamp(-1, 1)
    rest = (1 - rho.square()).clamp_min(1e-14).sqrt()
    h, k = mean / s, lead / t
    return (
        mean * both_below(h, k, rho)
        + s * density(h) * below((k - rho * h) / rest)
        + s * rho * density(k) * below((h - rho * k) / rest)
    )


def joint(posterior: GaussianPosterior, X: Float[Tensor, "*batch q d"]) -> tuple[Tensor, Tensor]:
    """Return the joint mean and covariance of values at q points, by batch entry."""
    return posterior.mean(X), posterior.covariance(X)
