"""What a search is after: the function's value, or a weighted sum of values over an environment or tasks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.numerics.gaussian_processes import GaussianPosterior


class Environment(NamedTuple):
    """What is not ours to decide: the last coordinates w of a point, of which F(x) = Σ_k p_k f(x, w_k) counts.

    A random environment's integral by quadrature or sample points, tasks, or, with one node, a fidelity's exact end.

    Args:
        nodes: The w_k.
        weights: The p_k, which may be any numbers.
    """

    nodes: Float[Tensor, "nodes w"]
    weights: Float[Tensor, " nodes"]


class Target:
    """The posterior of F at decisions: of f itself, or of an environment's weighted sum, a linear functional of f.

    Args:
        posterior: The Gaussian process over decisions and environment.
        environment: The sum; ``None`` if f is the target.

    Cost: with k nodes, k times (means, covariances with points) or k² times (covariances) the posterior's own.

    Source: Frazier, arXiv 1807.02811, section 5, "random environmental conditions and multi-task".
    """

    def __init__(self, posterior: GaussianPosterior, environment: Environment | None = None) -> None:
        self.posterior = posterior
        self.environment = environment

    def decision(self, X: Float[Tensor, "*batch full"]) -> Float[Tensor, "*batch d"]:
        """Return the part of points that is ours to decide."""
        return X if self.environment is None else X[..., : X.shape[-1] - self.environment.nodes.shape[1]]

    def mean(self, A: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*both m"]:
        """Return posterior means of F."""
        if self.environment is None:
            return self.posterior.mean(A)
        return self._summed(self.posterior.mean(self._spread(A)))

    def cross(
        self, A: Float[Tensor, "*batch m d"], X: Float[Tensor, "*batch k full"], orders: Tensor | None = None
    ) -> Float[Tensor, "*both m k"]:
        """Return posterior covariances of F at decisions with f, or its derivatives, at points."""
        if self.environment is None:
            return self.posterior.covariance(A, X, second_orders=orders)
        wide = self.posterior.covariance(self._spread(A), X, second_orders=orders)
        return self._summed(wide.mT).mT

    def covariance(self, A: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*both m m"]:
        """Return posterior covariances of F between decisions."""
        if self.environment is None:
            return self.posterior.covariance(A)
        return self._summed(self._summed(self.posterior.covariance(self._spread(A))).mT)

    def _spread(self, A: Tensor) -> Tensor:
        """Return every decision with every node, (…, m · k, full)."""
        assert self.environment is not None
        nodes = self.environment.nodes.to(A)
        shape = (*A.shape[:-1], len(nodes))
        pairs = [A.unsqueeze(-2).expand(*shape, -1), nodes.expand(*shape, -1)]
        return torch.cat(pairs, -1).flatten(-3, -2)

    def _summed(self, values: Tensor) -> Tensor:
        assert self.environment is not None
        return values.unflatten(-1, (-1, len(self.environment.nodes))) @ self.environment.weights.to(values)
