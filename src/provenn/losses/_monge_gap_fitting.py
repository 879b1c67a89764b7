"""Losses that say how far a map's image is from the target: Sinkhorn divergence, energy distance, MMD."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.numerics.transport import as_weights, sinkhorn, symmetric_sinkhorn
from provenn.losses._monge_gap_costs import Cost, check_clouds, check_cost, cost_matrix
from provenn.losses._monge_gap_loss import relative


class _Target(NamedTuple):
    """A target whose own term is known: its points, their weights, ε and the term."""

    points: Tensor
    weights: Tensor
    epsilon: float
    term: Tensor


class SinkhornDivergence(nn.Module):
    """The entropic transport cost between two measures, less what each costs to itself.

        S_ε(μ, ν) = W_ε(μ, ν) − ½ W_ε(μ, μ) − ½ W_ε(ν, ν),   W_ε = min_P ⟨P, C⟩ + ε KL(P ‖ a bᵀ)

    It is at least 0 and 0 for equal measures, for costs such as the squared or plain Euclidean one.

    Args:
        cost: As in :class:`MongeGap`; symmetric.
        epsilon: ε, in the cost's unit; ``None``: ``relative_epsilon`` times the mean cost within the target, which
            then counts as a constant in gradients.
        static_target: Whether to keep W_ε(ν, ν), and take it again as long as the target stays the same; a target then
            gets no gradient through it.
        relative_epsilon: See ``epsilon``.
        max_iters: Most Sinkhorn iterations of each of the three problems.
        tol: As in :class:`MongeGap`.

    Shape:
        x (n, d), y (m, d), weights (n,) and (m,) → ().

    Raises:
        ValueError: A number out of range, or an unknown cost.
        TypeError: ``cost`` is neither a name nor a function.

    Cost: O((n m + n² + m²) d) for the costs, and O(n m) an iteration; the measures to themselves take few.

    Source: Feydy et al., AISTATS 2019; arXiv 2302.04953, section 4.
    """

    def __init__(
        self,
        cost: Cost = "sqeuclidean",
        epsilon: float | None = None,
        static_target: bool = False,
        *,
        relative_epsilon: float = 0.1,
        max_iters: int = 2000,
        tol: float = 1e-3,
    ) -> None:
        super().__init__()
        check_cost(cost)
        if epsilon is not None:
            check_number("epsilon", epsilon, above=0)
        check_number("relative_epsilon", relative_epsilon, above=0)
        check_integer("max_iters", max_iters, at_least=1)
        check_number("tol", tol, above=0)
        self.cost, self.epsilon, self.static_target = cost, epsilon, static_target
        self.relative_epsilon, self.max_iters, self.tol = relative_epsilon, max_iters, tol
        self._target: _Target | None = None

    def forward(
        self,
        x: Float[Tensor, "n d"],
        y: Float[Tensor, "m d"],
        x_weights: Float[Tensor, " n"] | None = None,
        y_weights: Float[Tensor, " m"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the divergence.

        Args:
            x: Points of μ, such as a map's image.
            y: Points of the target ν.
            x_weights: Weights of x, above 0 and adding up to 1; ``None``: equal.
            y_weights: Those of y.

        Returns:
            The divergence, in the cost's unit.

        Raises:
            ValueError: Points of different spaces, costs of a wrong shape or not finite, bad weights.
            TypeError: x or y are no floating-point numbers.

        Warns:
            RuntimeWarning: A Sinkhorn iteration did not converge within ``max_iters``.
        """
        check_clouds(x, y)
        a, b = as_weights("x_weights", x_weights, x, len(x)), as_weights("y_weights", y_weights, x, len(y))
        epsilon, to_itself = self._of_target(y, b)
        options = {"epsilon": epsilon, "tol": self.tol, "max_iter": self.max_iters}
        between = sinkhorn(cost_matrix(self.cost, x, y), a, b, **options).value  # type: ignore[arg-type]
        within = symmetric_sinkhorn(cost_matrix(self.cost, x, x), a, **options).value  # type: ignore[arg-type]
        # In the divergence the constants of the KL convention cancel: H(a) + H(b) − ½ 2H(a) − ½ 2H(b) = 0.
        return between - within / 2 - to_itself / 2

    def _of_target(self, y: Tensor, weights: Tensor) -> tuple[float, Tensor]:
        """Return ε and W_ε(ν, ν)."""
        held = self._target
        if self.static_target and held is not None and _same(held.points, y) and _same(held.weights, weights):
            return held.epsilon, held.term
        C = cost_matrix(self.cost, y, y)
        epsilon = self.epsilon or relative(C, self.relative_epsilon)
        term = symmetric_sinkhorn(C, weights, epsilon=epsilon, tol=self.tol, max_iter=self.max_iters).value
        if self.static_target:
            term = term.detach()
            self._target = _Target(y.detach().clone(), weights.detach().clone(), epsilon, term)
        return epsilon, term


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


class EnergyDistance(nn.Module):
    """The energy distance 2 E‖X − Y‖ − E‖X − X′‖ − E‖Y − Y′‖ between samples, over all pairs.

    Shape:
        x (n, d), y (m, d) → ().

    Cost: O((n + m)² d).

    Source: Székely and Rizzo, Journal of Statistical Planning and Inference 143 (2013).
    """

    def forward(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
        """Return the distance.

        Args:
            x: Points, such as a map's image.
            y: Points of the target.

        Returns:
            The distance, in the points' unit.

        Raises:
            ValueError: Points of different spaces, or none.
            TypeError: They are no floating-point numbers.
        """
        check_clouds(x, y)
        between, one, other = (cost_matrix("euclidean", u, v).mean() for u, v in ((x, y), (x, x), (y, y)))
        return 2 * between - one - other


class MaximumMeanDiscrepancy(nn.Module):
    """The squared maximum mean discrepancy between samples under a Gaussian kernel, over all pairs.

    Args:
        bandwidth: σ of exp(−‖x − y‖² / 2σ²), in the points' unit; ``None``: the root of half the mean squared distance
            within the target, a constant in gradients.

    Shape:
        x (n, d), y (m, d) → ().

    Raises:
        ValueError: ``bandwidth`` ≤ 0.

    Cost: O((n + m)² d).

    Source: Gretton et al., JMLR 13 (2012), equation 5.
    """

    def __init__(self, bandwidth: float | None = None) -> None:
        super().__init__()
        if bandwidth is not None:
            check_number("bandwidth", bandwidth, above=0)
        self.bandwidth = bandwidth

    def forward(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
        """Return the squared discrepancy.

        Args:
            x: Points, such as a map's image.
            y: Points of the target.

        Returns:
            The squared discrepancy, in [0, 2].

        Raises:
            ValueError: Points of different spaces, or none.
            TypeError: They are no floating-point numbers.
        """
        check_clouds(x, y)
        between, one, other = (cost_matrix("sqeuclidean", u, v) for u, v in ((x, y), (x, x), (y, y)))
        width = self.bandwidth or math.sqrt(relative(other, 0.5))
        kernel = [torch.exp(-C / (2 * width**2)).mean() for C in (between, one, other)]
        return kernel[1] + kernel[2] - 2 * kernel[0]
