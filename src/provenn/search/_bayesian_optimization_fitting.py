"""Hyperparameters of a Gaussian process: maximum likelihood, maximum a posteriori, or slice sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.optimize
import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.numerics.covariance_functions import Hyperparameters, Kernel, PowerExponential, covariance
from provenn.core.numerics.gaussian_processes import GaussianPosterior

STARTS = 4
DRAWS = 8
_SWEEPS = 12
_NUDGE = 1e-8
"""Added to the diagonal, relative to the scale, while hyperparameters are sought: without noise, long lengths would
make every matrix singular. The posterior itself goes without it."""
_BOUNDS = {"scale": (-7.0, 7.0), "length": (-5.0, 5.0), "noise": (-14.0, 3.0)}

Basis = Callable[[Tensor], Tensor]


class Observations(NamedTuple):
    """What is fitted: points in the unit cube and standardised values.

    Args:
        X: Points (n, d).
        y: Values, or partial derivatives, (n,).
        orders: 0 where y is a value, i where it is ∂f/∂x_i; ``None`` if all are values.
        noises: Noise variances (n,); ``None`` to infer one.
        basis: The mean's functions at the points (n, k), with their partial derivatives at derivatives; k may be 0.
    """

    X: Tensor
    y: Tensor
    orders: Tensor | None
    noises: Tensor | None
    basis: Tensor


def unpack(kernel: Kernel, theta: Float[Tensor, "*draws p"], dims: int, known_noise: Tensor | None) -> Hyperparameters:
    """Return hyperparameters from logarithms: of the scale, of d lengths, and of the noise where it is inferred.

    A length is what it is for others: α = 1/ℓ² in Matérn's kernel, 1/(2 ℓ²) in the power exponential.
    """
    half = 0.5 if isinstance(kernel, PowerExponential) else 1.0
    weights = half * (-2 * theta[..., 1 : dims + 1]).exp()
    noise = theta[..., dims + 1].exp() if known_noise is None else known_noise.mean().expand(theta.shape[:-1])
    return Hyperparameters(theta[..., 0].exp(), weights, noise)


def log_prior(theta: Float[Tensor, "*draws p"], dims: int) -> Float[Tensor, "*draws"]:
    """Return the log prior: log-normal on scale, lengths and noise, the lengths' as in BoTorch.

    In the unit cube, log ℓ ~ N(√2 − 3 + ½ log d, 3), which has the mode of BoTorch's prior on ℓ; of standardised
    values, log α₀ ~ N(0, 1) and log λ ~ N(−4, 4).
    """
    centre = math.sqrt(2) - 3 + 0.5 * math.log(dims)
    total = -0.5 * theta[..., 0].square() - ((theta[..., 1 : dims + 1] - centre).square() / 6).sum(-1)
    if theta.shape[-1] > dims + 1:
        total = total - (theta[..., dims + 1] + 4).square() / 8
    return total


def log_density(
    kernel: Kernel, observed: Observations, theta: Float[Tensor, "*draws p"], with_prior: bool
) -> Float[Tensor, "*draws"]:
    """Return the log marginal likelihood at the best mean, with the log prior if asked; −1e10 where K is singular."""
    dims = observed.X.shape[1]
    hyperparameters = unpack(kernel, theta, dims, observed.noises)
    gram = covariance(kernel, hyperparameters, observed.X, observed.X, observed.orders, observed.orders)
    own = hyperparameters.noise[..., None].expand(*gram.shape[:-1]) if observed.noises is None else observed.noises
    diagonal = own + _NUDGE * hyperparameters.scale[..., None]
    factor, info = torch.linalg.cholesky_ex(gram + torch.diag_embed(diagonal.expand(gram.shape[:-1])))
    failed = info > 0
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = torch.where(failed[..., None, None], eye, factor)
    residual = _whitened_residual(factor, observed)
    value = -0.5 * residual.square().sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    if with_prior:
        value = value + log_prior(theta, dims)
    return torch.where(failed, -1e10, value)


def _whitened_residual(factor: Tensor, observed: Observations) -> Tensor:
    """Return L⁻¹ (y − H β) at the β that makes it shortest."""
    right = torch.cat([observed.y.unsqueeze(-1), observed.basis], -1).expand(*factor.shape[:-1], -1)
    white = torch.linalg.solve_triangular(factor, right, upper=False)
    y, H = white[..., :1], white[..., 1:]
    if H.shape[-1] == 0:
        return y.squeeze(-1)
    return (y - H @ torch.linalg.solve(H.mT @ H, H.mT @ y)).squeeze(-1)


def mean_coefficients(
    kernel: Kernel, observed: Observations, hyperparameters: Hyperparameters
) -> Float[Tensor, "*draws k"]:
    """Return the mean's coefficients β by generalised least squares, the exact maximum of the likelihood over β."""
    posterior = GaussianPosterior(
        kernel, hyperparameters, observed.X, observed.y, noises=observed.noises, orders=observed.orders
    )
    H = posterior.inverse_factor @ observed.basis
    return torch.linalg.solve(H.mT @ H, H.mT @ posterior.whitened.unsqueeze(-1)).squeeze(-1)


def fit(
    kernel: Kernel,
    observed: Observations,
    method: str,
    generator: torch.Generator,
    start: Float[Tensor, " p"] | None = None,
) -> Float[Tensor, "*draws p"]:
    """Find logarithms of hyperparameters.

    Args:
        kernel: The kernel.
        observed: Points and values.
        method: ``"map"``, ``"mle"``, or ``"slice"``: draws of the posterior, by chains that start from the mode.
        generator: Draws starting points and slices.
        start: A start to try beside the prior's centre and random ones.

    Returns:
        (p,), for ``"slice"`` (8, p).

    Cost: some 50 evaluations of O(4 n³) for a mode; slice sampling some 100 p of O(8 n³).
    """
    dims = observed.X.shape[1]
    size = dims + 1 + (observed.noises is None)
    dtype, device = observed.X.dtype, generator.device
    centre = torch.zeros(size, dtype=dtype, device=device)
    centre[1 : dims + 1] = math.log(0.5) + 0.5 * math.log(dims)
    centre[dims + 1 :] = -4.0
    noise = torch.randn(STARTS, size, generator=generator, dtype=dtype, device=device)
    spread = torch.linspace(0, 1, STARTS, dtype=dtype, device=device).unsqueeze(-1)
    starts = (centre + noise * spread).to(observed.X.device)
    if start is not None:
        starts = torch.cat([starts[:-1], start.unsqueeze(0)])

    def density(theta: Tensor) -> Tensor:
        return log_density(kernel, observed, theta, with_prior=method != "mle")

    bounds = [_BOUNDS["scale"], *[_BOUNDS["length"]] * dims, *[_BOUNDS["noise"]] * (size - dims - 1)]
    modes, values = maximise(density, starts, torch.tensor(bounds, dtype=starts.dtype, device=starts.device).T)
    mode = modes[values.argmax()]
    if method != "slice":
        return mode
    chains = mode + 0.1 * torch.randn(DRAWS, size, dtype=mode.dtype, generator=generator, device=generator.device).to(
        mode
    )
    return slice_sample(density, chains, _SWEEPS, generator)


def maximise(
    objective: Callable[[Tensor], Tensor],
    starts: Float[Tensor, "restarts d"],
    bounds: Float[Tensor, "2 d"],
    iterations: int = 60,
) -> tuple[Float[Tensor, "restarts d"], Float[Tensor, " restarts"]]:
    """Maximise from many starts at once: L-BFGS-B on the sum, so that one backward pass serves all restarts.

    Args:
        objective: (restarts, d) to (restarts,); differentiable.
        starts: Where to begin; moved into the bounds.
        bounds: Lower and upper bounds.
        iterations: Most iterations of L-BFGS-B.

    Returns:
        For each restart the better of its start and its end, and the value there.
    """
    low, high = bounds
    starts = starts.detach().clamp(low, high)
    with torch.no_grad():
        first = objective(starts)
    size = (first.max() - first.min()).abs().item()
    unit = max(first.abs().max().item() if size == 0 else size, 1e-12)

    def negative(flat: np.ndarray) -> tuple[float, np.ndarray]:
        points = torch.as_tensor(flat.reshape(starts.shape)).to(starts).requires_grad_()
        with torch.enable_grad():
            total = objective(points).sum() / unit
        (slope,) = torch.autograd.grad(total, points)
        return -total.item(), -slope.nan_to_num().double().cpu().numpy().ravel()

    pairs = bounds.T.cpu().numpy().astype(float).tolist() * len(starts)
    found = scipy.optimize.minimize(
        negative,
        starts.double().cpu().numpy().ravel(),
        jac=True,
        method="L-BFGS-B",
        bounds=pairs,
        options={"maxiter": iterations},
    )
    ends = torch.as_tensor(found.x.reshape(starts.shape)).to(starts).clamp(low, high)
    with torch.no_grad():
        last = objective(ends)
    better = last > first
    return torch.where(better.unsqueeze(-1), ends, starts), torch.where(better, last, first)


def slice_sample(
    density: Callable[[Tensor], Tensor], start: Float[Tensor, "chains p"], sweeps: int, generator: torch.Generator
) -> Float[Tensor, "chains p"]:
    """Return the last states of chains that sample each coordinate in turn from a slice, all chains in one batch.

    Args:
        density: Log density, (chains, p) to (chains,).
        start: First states.
        sweeps: How often every coordinate is drawn.
        generator: Draws.

    Cost: some 8 evaluations of the density a coordinate and sweep.

    Source: Neal, "Slice sampling", Ann. Statist. 31 (2003), stepping out and shrinkage.
    """

    def uniform() -> Tensor:
        return torch.rand(len(start), dtype=start.dtype, generator=generator, device=generator.device).to(start.device)

    with torch.no_grad():
        state, value = start.clone(), density(start)
        for coordinate in torch.arange(start.shape[1]).repeat(sweeps).tolist():
            level = value + (1 - uniform()).log()
            left = state[:, coordinate] - uniform()
            right = left + 1
            for edge, step in ((left, -1.0), (right, 1.0)):
                for _ in range(8):
                    outside = _moved(density, state, coordinate, edge)[1] > level
                    if not outside.any():
                        break
                    edge += step * outside
            waiting = torch.ones_like(value, dtype=torch.bool)
            here = state[:, coordinate].clone()
            while waiting.any():
                drawn = left + (right - left) * uniform()
                moved, at = _moved(density, state, coordinate, torch.where(waiting, drawn, state[:, coordinate]))
                accepted = waiting & ((at >= level) | ((right - left) < 1e-12))
                state = torch.where(accepted.unsqueeze(-1), moved, state)
                value = torch.where(accepted, at, value)
                waiting &= ~accepted
                left = torch.where(waiting & (drawn < here), drawn, left)
                right = torch.where(waiting & (drawn >= here), drawn, right)
        return state


def _moved(density: Callable[[Tensor], Tensor], state: Tensor, coordinate: int, to: Tensor) -> tuple[Tensor, Tensor]:
    moved = state.clone()
    moved[:, coordinate] = to
    return moved, density(moved)
