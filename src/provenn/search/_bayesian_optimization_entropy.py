"""Acquisitions about the entropy of where the maximum is."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer
from provenn.core.numerics.gaussian_processes import GaussianPosterior, root
from provenn.search._bayesian_optimization_normal import below, density
from provenn.search._bayesian_optimization_targets import Environment, Target

_CHUNK = 2**23
_VANISHING = 1e-9


def entropy_search(
    posterior: GaussianPosterior,
    X: Float[Tensor, "b full"],
    candidates: Float[Tensor, "m d"],
    generator: torch.Generator,
    *,
    environment: Environment | None = None,
    samples: int = 256,
    nodes: int = 8,
) -> Float[Tensor, " b"]:
    """Return H[p_n(x*)] − E[H[p_n(x* | y at x)]] in nats, x* the best of the candidates.

    p(x*) is how often each candidate wins among joint samples of the posterior. For every node y of a Gauss–Hermite
    rule the same samples are moved to the posterior that y gives, so that the sampling error largely cancels: a point
    that cannot move them scores 0 exactly.

    Args:
        posterior: The Gaussian process.
        X: Points to score.
        candidates: Where the maximum may be.
        generator: Draws the samples.
        environment: What the maximum is of; default the value itself.
        samples: Joint samples.
        nodes: Nodes for y.

    Returns:
        The expected drop of the entropy of x* at each point.

    Shape:
        (b, d) to (b,). Not differentiable.

    Raises:
        ValueError: ``samples`` or ``nodes`` < 1.

    Cost: O((m + b)³) once and O(samples · nodes · m) a point.

    Source: Frazier, arXiv 1807.02811, section 4.3; Hennig, Schuler, JMLR 13 (2012).
    """
    check_integer("samples", samples, at_least=1)
    check_integer("nodes", nodes, at_least=1)
    with torch.no_grad():
        target = Target(posterior, environment)
        wins, values = _joint_samples(target, X, candidates, samples, generator)
        cross = target.cross(candidates, X)
        mean, variance = posterior.mean_variance(X)
        total = (variance + posterior.noise).clamp_min(_VANISHING)
        gains = cross / total
        noise = torch.randn(samples, 1, generator=generator, device=generator.device, dtype=X.dtype).to(X)
        observed = values + posterior.noise.sqrt() * noise
        base = _entropy(wins.argmax(-1).unsqueeze(0), len(candidates))
        places, weights = (torch.as_tensor(one).to(X) for one in hermegauss(nodes))
        weights = weights / weights.sum()
        after = torch.zeros_like(mean)
        size = max(1, _CHUNK // (samples * len(candidates)))
        for part in torch.arange(len(X), device=X.device).split(size):
            for place, weight in zip(places, weights, strict=True):
                y = mean[part] + place * total[part].sqrt()
                moved = wins + gains[:, part].T.unsqueeze(1) * (y - observed[:, part]).T.unsqueeze(-1)
                after[part] += weight * _entropy(moved.argmax(-1), len(candidates))
        return base - after


def _joint_samples(
    target: Target, X: Tensor, candidates: Tensor, samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return joint samples of F at the candidates (samples, m) and of f at X (samples, b)."""
    cross = target.cross(candidates, X)
    blocks = [
        torch.cat([target.covariance(candidates), cross], 1),
        torch.cat([cross.T, target.posterior.covariance(X)], 1),
    ]
    mean = torch.cat([target.mean(candidates), target.posterior.mean(X)])
    base = torch.randn(samples, len(mean), generator=generator, device=generator.device, dtype=X.dtype).to(X)
    drawn = mean + base @ root(torch.cat(blocks)).T
    return drawn[:, : len(candidates)], drawn[:, len(candidates) :]


def _entropy(winners: Tensor, candidates: int) -> Tensor:
    """Return the entropy of the winners' shares, for each row of winners."""
    counts = torch.zeros(len(winners), candidates, dtype=torch.float64, device=winners.device)
    counts.scatter_add_(1, winners, torch.ones_like(winners, dtype=torch.float64))
    shares = counts / winners.shape[1]
    return torch.special.entr(shares).sum(-1)


def predictive_entropy_search(
    posterior: GaussianPosterior,
    X: Float[Tensor, "b full"],
    candidates: Float[Tensor, "m d"],
    generator: torch.Generator,
    method: Literal["ep", "rejection"] = "ep",
    *,
    environment: Environment | None = None,
    samples: int = 256,
) -> Float[Tensor, " b"]:
    r"""Return the same mutual information the other way round, H[p(y | x)] − E_{x*}[H[p(y | x, x*)]], in nats.

    x* is drawn as the best candidate of joint samples, and p(y | x, x*) taken as normal, its variance either

    - ``"ep"``: after expectation propagation has imposed f(x*) ≥ max_i μ_n(x_i) and f(x*) ≥ f(x), or
    - ``"rejection"``: that of the samples of which x* is the best candidate.

    The conditions on gradient and curvature at x* that the predictive-entropy paper adds are left out.

    Args:
        posterior: The Gaussian process.
        X: Points to score.
        candidates: Where the maximum may be.
        generator: Draws the samples.
        method: How the posterior given x* is found.
        environment: What the maximum is of; ``"rejection"`` only.
        samples: Joint samples.

    Returns:
        The mutual information of y and x* at each point.

    Shape:
        (b, d) to (b,). ``"ep"`` is differentiable in X.

    Raises:
        ValueError: ``samples`` < 2, an unknown method, or an environment with ``"ep"``.

    Cost: O(m³) once; O(distinct x* · (n + iterations)) a point for ``"ep"``; O((m + b)³) for ``"rejection"``.

    Source: Frazier, arXiv 1807.02811, section 4.3; Hernández-Lobato, Hoffman, Ghahramani, NeurIPS 2014.
    """
    check_choice("method", method, ("ep", "rejection"))
    check_integer("samples", samples, at_least=2)
    target = Target(posterior, environment)
    _, variance = posterior.mean_variance(X)
    if method == "rejection":
        with torch.no_grad():
            wins, values = _joint_samples(target, X, candidates, samples, generator)
            return _from_samples(wins.argmax(-1), values, posterior.noise)
    if environment is not None:
        raise ValueError("environment needs method 'rejection', got 'ep'")
    with torch.no_grad():
        drawn = posterior.sample(candidates, samples, generator)
        winners, counts = drawn.argmax(-1).unique(return_counts=True)
    shrunk = _propagated(posterior, X, candidates[winners])
    floor = posterior.noise + _VANISHING
    gains = 0.5 * ((variance + floor) / (shrunk + floor)).log()
    return (counts / counts.sum()).to(X) @ gains


def _from_samples(winners: Tensor, values: Tensor, noise: Tensor) -> Tensor:
    """Return half the log ratio of variances, overall and within the samples of each x*; by concavity at least 0."""
    count = int(winners.max()) + 1
    shares = torch.zeros(count, dtype=values.dtype, device=values.device).index_add_(
        0, winners, torch.ones_like(winners, dtype=values.dtype)
    )
    empty = torch.zeros(count, values.shape[1], dtype=values.dtype, device=values.device)
    centred = values - values.mean(0)
    means = empty.index_add(0, winners, centred) / shares.clamp_min(1).unsqueeze(-1)
    within = empty.index_add(0, winners, (centred - means[winners]).square()) / shares.clamp_min(1).unsqueeze(-1)
    floor = noise + _VANISHING
    logs = ((centred.square().mean(0) + floor) / (within + floor)).log()
    return 0.5 * (shares / shares.sum()) @ logs


def _propagated(posterior: GaussianPosterior, X: Tensor, stars: Tensor, iterations: int = 8) -> Tensor:
    """Return the variance of f(x) given each x*, (stars, b), by expectation propagation of the two conditions."""
    best = posterior.mean(posterior.X).amax(-1).detach()
    mean, variance = posterior.mean_variance(X)
    star_mean, star_variance = (one.unsqueeze(-1) for one in posterior.mean_variance(stars))
    cross = posterior.covariance(stars, X)
    m = torch.stack([(star_mean - best).expand_as(cross), star_mean - mean], -1)
    lead = star_variance - cross
    spread = (star_variance + variance - 2 * cross).clamp_min(0)
    V = torch.stack([torch.stack([star_variance.expand_as(cross), lead], -1), torch.stack([lead, spread], -1)], -2)
    V = V + _VANISHING * torch.eye(2, dtype=V.dtype, device=V.device)
    precision, shift = torch.zeros_like(m), torch.zeros_like(m)
    for _ in range(iterations):
        for site in (0, 1):
            centre, cov = _tilted(m, V, precision, shift)
            own = cov[..., site, site].clamp_min(_VANISHING)
            cavity_precision = (1 / own - precision[..., site]).clamp_min(1e-10)
            cavity_mean = (centre[..., site] / own - shift[..., site]) / cavity_precision
            z = (cavity_mean * cavity_precision.sqrt()).clamp(-30, 30)
            ratio = density(z) / below(z)
            matched = (1 - ratio * (z + ratio)).clamp_min(1e-6) / cavity_precision
            new_precision = (1 / matched - cavity_precision).clamp_min(0)
            new_shift = (cavity_mean + ratio / cavity_precision.sqrt()) / matched - cavity_mean * cavity_precision
            precision = _replaced(precision, site, new_precision)
            shift = _replaced(shift, site, new_shift)
    ties = torch.stack([cross, cross - variance], -1)
    half = precision.sqrt().unsqueeze(-1)
    inner = torch.eye(2, dtype=V.dtype, device=V.device) + half * V * half.mT
    right = half * ties.unsqueeze(-1)
    return (variance - (right * torch.linalg.solve(inner, right)).sum((-2, -1))).clamp_min(0)


def _tilted(m: Tensor, V: Tensor, precision: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of the normal approximation with its sites."""
    half = precision.sqrt().unsqueeze(-1)
    inner = torch.eye(2, dtype=V.dtype, device=V.device) + half * V * half.mT
    reduced = V @ (half * torch.linalg.solve(inner, half * V))
    cov = V - reduced
    pulled = V @ (half * torch.linalg.solve(inner, half * m.unsqueeze(-1)))
    return m - pulled.squeeze(-1) + (cov @ shift.unsqueeze(-1)).squeeze(-1), cov


def _replaced(values: Tensor, site: int, new: Tensor) -> Tensor:
    parts = list(values.unbind(-1))
    parts[site] = new
    return torch.stack(parts, -1)
