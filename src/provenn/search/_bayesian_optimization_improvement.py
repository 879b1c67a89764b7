"""Acquisitions about improvement: closed forms, the decision-theoretic form for noisy values, batches, constraints."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_number
from provenn.core.numerics.gaussian_processes import GaussianPosterior, cholesky
from provenn.search._bayesian_optimization_normal import below, density, expected_max_affine, expected_max_of_two

_SMALLEST = 1e-150
_ROUNDING = 1e-14
"""A variance this small of standardised values is a rounding error; to divide a covariance by its root would be one."""


def _positive(name: str, deviation: Tensor) -> Tensor:
    if bool((deviation < 0).any()):
        raise ValueError(f"{name} must be ≥ 0, got {deviation.min().item():g}")
    return deviation.clamp_min(_SMALLEST)


def expected_improvement(
    mean: Float[Tensor, "*shape"], sd: Float[Tensor, "*shape"], best: float | Tensor
) -> Float[Tensor, "*shape"]:
    r"""Return the expected improvement of a normal value over the best, [Δ]⁺ + σ φ(Δ/σ) − |Δ| Φ(−|Δ|/σ), Δ = μ − f*.

    Equal to Δ Φ(Δ/σ) + σ φ(Δ/σ), and [Δ]⁺ at σ = 0. Its derivatives are ∂/∂μ = Φ(Δ/σ) and ∂/∂σ = φ(Δ/σ). With noise
    it is ad hoc; f* is then the best observed value or, better, the best posterior mean.

    Args:
        mean: Posterior means.
        sd: Posterior standard deviations.
        best: f*, the best value so far.

    Returns:
        The expected improvement.

    Shape:
        Any, the same for all.

    Raises:
        ValueError: A standard deviation is negative.

    Cost: O(1) a point.

    Source: Frazier, arXiv 1807.02811, eq. 8; Jones, Schonlau, Welch, J. Glob. Optim. 13 (1998).
    """
    deviation = _positive("sd", sd)
    z = (mean - best) / deviation
    near = (mean - best) * below(z) + deviation * density(z)
    # Far below the best the two terms cancel; with their common factor taken out they do not.
    far = z.clamp_max(-1.0)
    ratio = 0.5 * (2 * torch.pi) ** 0.5 * torch.special.erfcx(-far * 0.5**0.5)
    return torch.where(z > -1, near, deviation * density(far) * (1 + far * ratio).clamp_min(0))


def probability_of_improvement(
    mean: Float[Tensor, "*shape"], sd: Float[Tensor, "*shape"], best: float | Tensor
) -> Float[Tensor, "*shape"]:
    """Return the probability that a normal value exceeds the best, Φ((μ − f*)/σ).

    Args:
        mean: Posterior means.
        sd: Posterior standard deviations.
        best: f*, the best value so far.

    Returns:
        The probability.

    Shape:
        Any, the same for all.

    Raises:
        ValueError: A standard deviation is negative.

    Cost: O(1) a point.

    Source: Kushner, J. Basic Eng. 86 (1964); named in Frazier, arXiv 1807.02811, section 4.
    """
    return below((mean - best) / _positive("sd", sd))


def ucb(mean: Float[Tensor, "*shape"], sd: Float[Tensor, "*shape"], beta: float = 4.0) -> Float[Tensor, "*shape"]:
    """Return the upper confidence bound μ + √β σ.

    Args:
        mean: Posterior means.
        sd: Posterior standard deviations.
        beta: β, the square of the number of standard deviations.

    Returns:
        The bound.

    Shape:
        Any, the same for all.

    Raises:
        ValueError: ``beta`` or a standard deviation is negative.

    Cost: O(1) a point.

    Source: Srinivas et al., ICML 2010.
    """
    check_number("beta", beta, at_least=0)
    return mean + beta**0.5 * _positive("sd", sd)


def noisy_expected_improvement(
    posterior: GaussianPosterior, X: Float[Tensor, "*batch d"], evaluated: Float[Tensor, "n d"] | None = None
) -> Float[Tensor, "*both"]:
    r"""Return how much the best posterior mean over evaluated points is expected to grow by one more observation.

    .. math:: EI_n(x) = E_n[\max_{i \le n+1} \mu_{n+1}(x_i) \mid x_{n+1} = x] - \max_{i \le n} \mu_n(x_i)

    One-step optimal for noisy values if the answer must be an evaluated point and risk is neutral. Every μ_{n+1}(x_i)
    is linear in one normal variable, so it is exact. Without noise it is the expected improvement. BoTorch's noisy
    expected improvement integrates over the values at observed points instead, and differs.

    Args:
        posterior: The Gaussian process.
        X: Points to score.
        evaluated: The points that may be the answer; default those the posterior has seen.

    Returns:
        The expected growth of the best posterior mean, at least 0 up to rounding.

    Shape:
        (..., d) to (..., ); draws of hyperparameters come first.

    Raises:
        ValueError: There is no evaluated point.

    Cost: O(n²) a point.

    Source: Frazier, arXiv 1807.02811, section 4.1, "noise" (the extension of expected improvement).
    """
    known = posterior.X if evaluated is None else evaluated
    return lines_gain(posterior, X, known, posterior.mean(known))


def lines_gain(posterior: GaussianPosterior, X: Tensor, known: Tensor, means: Tensor) -> Tensor:
    """Return E[max over ``known`` and x of the next posterior mean] − max over ``known`` of this one."""
    points = X.unsqueeze(-2)
    mean, variance = posterior.mean_variance(X)
    total = (variance + next_noise(posterior, variance)).clamp_min(_ROUNDING)
    cross = posterior.covariance(points, known).squeeze(-2)
    slopes = torch.cat([cross, variance.unsqueeze(-1)], -1) / total.sqrt().unsqueeze(-1)
    spread = means.reshape(*means.shape[:-1], *[1] * (mean.ndim - means.ndim + 1), means.shape[-1])
    heights = torch.cat([spread.expand(*mean.shape, -1), mean.unsqueeze(-1)], -1) - spread.amax(-1, keepdim=True)
    return expected_max_affine(heights, slopes)


def next_noise(posterior: GaussianPosterior, like: Tensor) -> Tensor:
    """Return λ, shaped to broadcast over draws."""
    noise = posterior.noise
    return noise.reshape(*noise.shape, *[1] * (like.ndim - noise.ndim))


def q_expected_improvement(
    mean: Float[Tensor, "*batch q"],
    cov: Float[Tensor, "*batch q q"],
    best: float | Tensor,
    base_samples: Float[Tensor, "samples q"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Return the expected improvement of the best of q values, E[(max_i f(x_i) − f*)⁺].

    Args:
        mean: Joint posterior mean.
        cov: Joint posterior covariance.
        best: f*, the best value so far.
        base_samples: Standard normal draws that are mapped to values by a Cholesky factor: common random numbers,
            with a gradient. Without, the exact value for one or two points.

    Returns:
        The expected improvement of each batch.

    Shape:
        (..., q) and (..., q, q) to (...).

    Raises:
        ValueError: q > 2 without ``base_samples``, or they are not (samples, q).

    Cost: exact O(1); by simulation O(q³ + samples · q²).

    Source: Frazier, arXiv 1807.02811, section 5, "parallel"; Wang et al., Oper. Res. 68 (2020).
    """
    q = mean.shape[-1]
    if base_samples is None:
        if q == 1:
            return expected_improvement(mean[..., 0], cov[..., 0, 0].clamp_min(0).sqrt(), best)
        if q == 2:
            return expected_max_of_two(mean - best, cov)
        raise ValueError(f"base_samples are needed for q > 2, got q = {q}")
    if base_samples.ndim != 2 or base_samples.shape[1] != q:
        raise ValueError(f"base_samples must be (samples, {q}), got {tuple(base_samples.shape)}")
    values = mean.unsqueeze(-2) + base_samples @ stable_factor(cov).mT
    return (values.amax(-1) - best).clamp_min(0).mean(-1)


def stable_factor(cov: Float[Tensor, "*batch q q"]) -> Float[Tensor, "*batch q q"]:
    """Return a Cholesky factor of a posterior covariance, which duplicates may make singular; differentiable."""
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    scale = cov.diagonal(dim1=-2, dim2=-1).detach().mean(-1).clamp_min(1e-12)[..., None, None]
    return cholesky(cov + (1e-9 * scale + _ROUNDING) * eye)


def constrained_ei(
    mean: Float[Tensor, "*shape"],
    sd: Float[Tensor, "*shape"],
    best: float | Tensor,
    constraint_mean: Float[Tensor, "constraints *shape"],
    constraint_sd: Float[Tensor, "constraints *shape"],
) -> Float[Tensor, "*shape"]:
    """Return the expected improvement times the probability that all constraints g_j(x) ≤ 0 hold.

    Exactly the one-step improvement of the best feasible value where objective and constraints are independent and
    observed without noise.

    Args:
        mean: Posterior means of the objective.
        sd: Its posterior standard deviations.
        best: The best feasible value so far.
        constraint_mean: Posterior means of the g_j.
        constraint_sd: Their posterior standard deviations.

    Returns:
        The expected feasible improvement.

    Shape:
        Any for the objective; constraints come first.

    Raises:
        ValueError: A standard deviation is negative.

    Cost: O(constraints) a point.

    Source: Frazier, arXiv 1807.02811, section 5, "constraints"; Gardner et al., ICML 2014.
    """
    feasible = below(-constraint_mean / _positive("constraint_sd", constraint_sd)).prod(0)
    return expected_improvement(mean, sd, best) * feasible
