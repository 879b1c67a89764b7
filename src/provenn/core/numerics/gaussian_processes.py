"""Exact Gaussian processes for a few hundred observations of values and partial derivatives.

Plain Cholesky factors: at this size the time goes to overhead, not to arithmetic; observations of derivatives, added
rows and gradients in the query points are a few lines each; and every hyperparameter may carry leading dimensions, so
that the posteriors of many hyperparameter draws are one object.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provenn.core.numerics.covariance_functions import Hyperparameters, Kernel, covariance, lift

JITTERS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""What is added to the diagonal, relative to its mean, until a Cholesky factor exists."""


class CholeskyError(ValueError):
    """A covariance matrix has no Cholesky factor, even with jitter; the message names its condition number."""


def cholesky(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """Return the lower Cholesky factor; with jitter, and a warning, where there is none without.

    Args:
        matrix: Symmetric, positive semi-definite up to rounding.

    Raises:
        CholeskyError: A jitter of 1e-2 of the mean diagonal does not suffice.

    Cost: O(n³) time, O(n²) memory, a matrix.
    """
    scale = matrix.diagonal(dim1=-2, dim2=-1).detach().mean(-1)[..., None, None]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    rounding = 4 * torch.finfo(matrix.dtype).eps  # of duplicate points, rounding may leave a positive pivot
    for jitter in JITTERS:
        factor, info = torch.linalg.cholesky_ex(matrix + jitter * scale * eye)
        pivots = factor.diagonal(dim1=-2, dim2=-1).square()
        if not info.any() and bool((pivots > rounding * scale.squeeze(-1)).all()):
            if jitter:
                message = (
                    f"the covariance matrix is singular (duplicate points without noise?): jitter {jitter:g} added"
                )
                warnings.warn(message, stacklevel=3)
            lower: Tensor = factor
            return lower
    raise CholeskyError(f"no Cholesky factor with jitter {JITTERS[-1]:g}: condition number {_condition(matrix):.3g}")


def _condition(matrix: Tensor) -> float:
    if not matrix.isfinite().all():
        return math.inf
    return float(torch.linalg.cond(matrix.detach()).max())


class GaussianPosterior:
    """A Gaussian process with a constant prior mean, conditioned on observations.

    Args:
        kernel: The kernel.
        hyperparameters: Scale, weights and noise; leading dimensions are draws.
        X: Points observed.
        y: What was observed.
        prior_mean: The prior mean μ₀: a number, a tensor over draws, or a function (m, d) to (m,).
        noises: Noise variances of the observations; default the hyperparameters' λ for all.
        orders: 0 where y is a value, i where it is ∂f/∂x_i; default all values.

    Raises:
        CholeskyError: The covariance matrix is singular beyond repair.
        ValueError: Derivatives are observed, and the kernel's paths have none.

    Cost: O(n³) to build; O(m n²) time, O(m n) memory for m points queried; O(n²) to add an observation.

    Source: Rasmussen, Williams, "Gaussian Processes for Machine Learning" (2006), algorithm 2.1.
    """

    def __init__(
        self,
        kernel: Kernel,
        hyperparameters: Hyperparameters,
        X: Float[Tensor, "n d"],
        y: Float[Tensor, " n"],
        prior_mean: float | Tensor | Callable[[Tensor], Tensor] = 0.0,
        noises: Float[Tensor, " n"] | None = None,
        orders: Int[Tensor, " n"] | None = None,
    ) -> None:
        self.kernel, self.hyperparameters, self.prior_mean = kernel, hyperparameters, prior_mean
        self.X, self.y, self.orders = X, y, orders
        self.noises = noises
        own = (
            hyperparameters.noise[..., None].expand(*hyperparameters.noise.shape, len(X)) if noises is None else noises
        )
        gram = covariance(kernel, hyperparameters, X, X, orders, orders) + torch.diag_embed(own)
        factor = cholesky(gram)
        eye = torch.eye(len(X), dtype=X.dtype, device=X.device)
        self.inverse_factor = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
        self.factor = factor
        self._weigh()

    def _weigh(self) -> None:
        self.residuals = self.y - self._prior(self.X, self.orders)
        self.whitened = (self.inverse_factor @ self.residuals.unsqueeze(-1)).squeeze(-1)

    @property
    def noise(self) -> Float[Tensor, "*draws"]:
        """λ, the noise variance of a new observation."""
        return self.hyperparameters.noise

    def _prior(self, X: Tensor, orders: Tensor | None) -> Tensor:
        if callable(self.prior_mean):
            return with_slopes(self.prior_mean, X, orders)
        mean = torch.as_tensor(self.prior_mean, dtype=X.dtype, device=X.device)
        mean = lift(mean, X.ndim - 1, tail=0)
        return mean if orders is None else torch.where(orders > 0, 0.0, mean)

    def _whiten(self, X: Tensor, orders: Tensor | None = None) -> Tensor:
        """Return (…, m, n): rows L⁻¹ k(X_observed, x)."""
        cross = covariance(self.kernel, self.hyperparameters, X, self.X, orders, self.orders)
        return cross @ lift(self.inverse_factor, X.ndim - 2, tail=2).mT

    def mean(self, X: Float[Tensor, "*batch m d"], orders: Int[Tensor, " m"] | None = None) -> Float[Tensor, "*both m"]:
        """Return the posterior mean at points.

        Args:
            X: Points.
            orders: What is asked at each: 0 the value, i the partial derivative ∂f/∂x_i.
        """
        weights = lift(self.whitened, X.ndim - 2, tail=1).unsqueeze(-1)
        return self._prior(X, orders) + (self._whiten(X, orders) @ weights).squeeze(-1)

    def covariance(
        self,
        X: Float[Tensor, "*batch m d"],
        Y: Float[Tensor, "*other k d"] | None = None,
        orders: Int[Tensor, " m"] | None = None,
        second_orders: Int[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "*both m k"]:
        """Return posterior covariances between points of X and of Y (default X), by batch entry."""
        if Y is None:
            Y, second_orders = X, orders
        prior = covariance(self.kernel, self.hyperparameters, X, Y, orders, second_orders)
        return prior - self._whiten(X, orders) @ self._whiten(Y, second_orders).mT

    def mean_variance(self, X: Float[Tensor, "*batch m d"]) -> tuple[Tensor, Tensor]:
        """Return means and variances of values, without the covariances between points; variances are at least 0."""
        whitened = self._whiten(X)
        weights = lift(self.whitened, X.ndim - 2, tail=1).unsqueeze(-1)
        mean = self._prior(X, None) + (whitened @ weights).squeeze(-1)
        prior = lift(self.hyperparameters.scale, X.ndim - 1, tail=0)
        return mean, (prior - whitened.square().sum(-1)).clamp_min(0)

    def condition(
        self,
        X: Float[Tensor, "k d"],
        y: Float[Tensor, " k"],
        noises: Float[Tensor, " k"] | None = None,
        orders: Int[Tensor, " k"] | None = None,
    ) -> GaussianPosterior:
        """Return the posterior after more observations, by rows added to the Cholesky factor.

        Args:
            X: Points.
            y: What was observed there.
            noises: Noise variances; default λ.
            orders: As for the constructor.

        Cost: O(k n² + k³).
        """
        old, new = len(self.X), len(X)
        own = self.noise[..., None].expand(*self.noise.shape, new) if noises is None else noises
        low = self._whiten(X, orders)
        prior = covariance(self.kernel, self.hyperparameters, X, X, orders, orders)
        corner = cholesky(prior + torch.diag_embed(own) - low @ low.mT)
        eye = torch.eye(new, dtype=X.dtype, device=X.device)
        inverse = torch.linalg.solve_triangular(corner, eye.expand_as(corner), upper=False)
        grown = object.__new__(GaussianPosterior)
        grown.__dict__.update(self.__dict__)
        grown.X, grown.y = torch.cat([self.X, X]), torch.cat([self.y, y])
        if self.orders is not None or orders is not None:
            parts = [(self.orders, old), (orders, new)]
            none = [torch.zeros(n, dtype=torch.long, device=X.device) if o is None else o for o, n in parts]
            grown.orders = torch.cat(none)
        if self.noises is not None or noises is not None:
            kept = self.noises if self.noises is not None else self.noise.expand(old)
            grown.noises = torch.cat([kept, noises if noises is not None else self.noise.expand(new)])
        empty = low.new_zeros(*low.shape[:-2], old, new)
        grown.factor = torch.cat([torch.cat([self.factor, empty], -1), torch.cat([low, corner], -1)], -2)
        rows = torch.cat([-inverse @ low @ self.inverse_factor, inverse], -1)
        grown.inverse_factor = torch.cat([torch.cat([self.inverse_factor, empty], -1), rows], -2)
        grown._weigh()
        return grown

    def sample(
        self, X: Float[Tensor, "*batch m d"], count: int, generator: torch.Generator
    ) -> Float[Tensor, "count *both m"]:
        """Draw joint values at points.

        Args:
            X: Points.
            count: How many draws.
            generator: Draws them.

        Cost: O(m³ + count · m²).
        """
        mean, factor = self.mean(X), root(self.covariance(X))
        base = torch.randn(count, *mean.shape, dtype=mean.dtype, device=generator.device, generator=generator)
        draws: Tensor = mean + (factor @ base.to(mean.device).unsqueeze(-1)).squeeze(-1)
        return draws

    def log_evidence(self) -> Float[Tensor, "*draws"]:
        """Return the log marginal likelihood of what was observed."""
        logs = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        fit = -0.5 * self.whitened.square().sum(-1)
        evidence: Tensor = fit - logs - 0.5 * len(self.X) * math.log(2 * math.pi)
        return evidence


def root(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """Return a square root of a covariance matrix that may be singular: S with S Sᵀ = matrix, by eigenvalues.

    Cost: O(n³).
    """
    values, vectors = torch.linalg.eigh(matrix)
    square_root: Tensor = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    return square_root


def with_slopes(function: Callable[[Tensor], Tensor], X: Tensor, orders: Tensor | None) -> Tensor:
    """Return a function's values at points, and its partial derivatives where they are asked for."""
    values = function(X)
    if orders is None:
        return values
    leaf = X if X.requires_grad else X.detach().requires_grad_()
    with torch.enable_grad():
        total = function(leaf).sum() + 0 * leaf.sum()  # a constant has a gradient, too
        slopes = torch.autograd.grad(total, leaf, create_graph=X.requires_grad)[0]
    chosen = slopes.gather(-1, (orders - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where(orders > 0, chosen, values)
