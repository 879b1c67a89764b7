"""Maps between point clouds: free networks, gradients of potentials, and maps in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.networks import mlp
from provenn.core.numerics.transport import sinkhorn
from provenn.losses._monge_gap_costs import Cost, check_clouds, cost_matrix
from provenn.losses._monge_gap_loss import relative


def _check_widths(dim: int, hidden: Sequence[int]) -> None:
    check_integer("dim", dim, at_least=1)
    if not hidden:
        raise ValueError("hidden must name at least one width, got none")
    for width in hidden:
        check_integer("hidden", width, at_least=1)


class TransportMLP(nn.Module):
    """A perceptron with GELU as a map of a space into itself: MLP(x), or x + MLP(x).

    Args:
        dim: Coordinates of a point.
        hidden: Widths of the hidden layers.
        residual: Whether the perceptron is added to its input.
        identity_init: Whether the last layer starts at a hundredth of its usual size, so that a residual map starts
            near the identity.
        spherical: Whether images are scaled to length 1.

    Shape:
        (n, dim) → (n, dim).

    Raises:
        ValueError: A width below 1, no hidden layer, or ``identity_init`` without ``residual``.

    Cost: O(Σ products of neighbouring widths) a point.

    Source: arXiv 2302.04953, section 6.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (32, 64, 32),
        *,
        residual: bool = False,
        identity_init: bool = False,
        spherical: bool = False,
    ) -> None:
        super().__init__()
        _check_widths(dim, hidden)
        if identity_init and not residual:
            raise ValueError("identity_init must be False without residual=True, got True")
        self.network = mlp([dim, *hidden, dim], nn.GELU)
        self.residual, self.spherical = residual, spherical
        if identity_init:
            with torch.no_grad():
                for parameter in self.network[-1].parameters():
                    parameter.mul_(0.01)

    def forward(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        """Return the points' images.

        Args:
            x: Points.

        Returns:
            T(x).
        """
        y: Tensor = self.network(x)
        y = x + y if self.residual else y
        return F.normalize(y, dim=1) if self.spherical else y


class InputConvexNetwork(nn.Module):
    """A potential that is convex in its input: weights from layer to layer are kept positive.

        z₁ = s(A₀ x + b₀),  z_{k+1} = s(W_k z_k + A_k x + b_k),  f(x) = ⟨w, z_K⟩ + α ‖x‖²/2,   W_k, w, α > 0, s softplus

    Args:
        dim: Coordinates of a point.
        hidden: Widths of the hidden layers.

    Shape:
        (n, dim) → (n,).

    Raises:
        ValueError: A width below 1, or no hidden layer.

    Cost: O(Σ products of neighbouring widths) a point.

    Source: Amos, Xu and Kolter, ICML 2017; as the map's potential, Makkuva et al., ICML 2020.
    """

    def __init__(self, dim: int, hidden: Sequence[int] = (32, 64, 32)) -> None:
        super().__init__()
        _check_widths(dim, hidden)
        self.inputs = nn.ModuleList(nn.Linear(dim, width) for width in hidden)
        # Through softplus these weights start near 1 / fan-in, so that a layer averages the one before.
        self.raw = nn.ParameterList(
            nn.Parameter(torch.randn(after, before) / 2 + _inverse_softplus(1 / before))
            for before, after in pairwise((*hidden, 1))
        )
        self.strength = nn.Parameter(torch.tensor(_inverse_softplus(1.0)))

    def forward(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
        """Return the potential at points.

        Args:
            x: Points.

        Returns:
            f(x).
        """
        first, *others = self.inputs
        z = F.softplus(first(x))
        for raw, linear in zip(self.raw, others, strict=False):  # the last of raw leads to the output
            z = F.softplus(F.linear(z, F.softplus(raw)) + linear(x))
        convex = F.linear(z, F.softplus(self.raw[-1])).squeeze(1)
        return convex + F.softplus(self.strength) * x.square().sum(dim=1) / 2


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))


class GradientMap(nn.Module):
    """The gradient of a potential as a map; optimal for the squared Euclidean cost if the potential is convex.

    Args:
        potential: Maps points (n, dim) to numbers (n,), each of its own point alone.

    Shape:
        (n, dim) → (n, dim).

    Cost: about three calls of the potential.

    Source: Brenier's theorem; arXiv 2302.04953, section 6, baselines.
    """

    def __init__(self, potential: nn.Module) -> None:
        super().__init__()
        self.potential = potential

    def forward(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        """Return the potential's gradient at points, with or without gradients enabled.

        Args:
            x: Points.

        Returns:
            ∇f(x).
        """
        gradient: Tensor = torch.func.grad(lambda points: self.potential(points).sum())(x)
        return gradient


class AffineMap(NamedTuple):
    """The map x ↦ target + A (x − source).

    Attributes:
        matrix: A.
        source: A point.
        target: Its image.
    """

    matrix: Float[Tensor, "d d"]
    source: Float[Tensor, " d"]
    target: Float[Tensor, " d"]

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return the points' images.

        Args:
            x: Points.
        """
        return self.target + (x - self.source) @ self.matrix.T


def gaussian_ot_map(
    m0: Float[Tensor, " d"], S0: Float[Tensor, "d d"], m1: Float[Tensor, " d"], S1: Float[Tensor, "d d"]
) -> AffineMap:
    """Return the optimal map between two Gaussians for the squared Euclidean cost.

        T(x) = m₁ + S₀^(−½) (S₀^½ S₁ S₀^½)^½ S₀^(−½) (x − m₀)

    Args:
        m0: Mean of the source.
        S0: Its covariance, positive definite.
        m1: Mean of the target.
        S1: Its covariance, positive semidefinite.

    Shape:
        m0 and m1 (d,), S0 and S1 (d, d); points (n, d) → (n, d).

    Returns:
        The map.

    Raises:
        ValueError: Shapes that do not fit, a covariance that is not symmetric, or one with eigenvalues that are
            negative, or 0 for the source.

    Cost: O(d³), and O(d²) a point.

    Source: Dowson and Landau, Journal of Multivariate Analysis 12 (1982).
    """
    for name, mean in (("m0", m0), ("m1", m1)):
        if mean.dim() != 1 or mean.shape != m0.shape:
            raise ValueError(f"{name} must be a vector of {len(m0)} coordinates, got shape {tuple(mean.shape)}")
    values0, vectors0 = _spectrum("S0", S0, len(m0))
    _spectrum("S1", S1, len(m0))
    if values0.min() <= 0:
        raise ValueError(f"S0 must be positive definite, got an eigenvalue {values0.min().item():.2g}")
    half = vectors0 * values0.sqrt() @ vectors0.T
    inverse = vectors0 / values0.sqrt() @ vectors0.T
    middle, vectors = torch.linalg.eigh(half @ S1 @ half)
    A = inverse @ (vectors * middle.clamp_min(0).sqrt() @ vectors.T) @ inverse
    return AffineMap(A, m0, m1)


def _spectrum(name: str, S: Tensor, d: int) -> tuple[Tensor, Tensor]:
    if S.shape != (d, d):
        raise ValueError(f"{name} must have shape {(d, d)}, got {tuple(S.shape)}")
    if not torch.allclose(S, S.T, rtol=1e-4, atol=1e-6 * float(S.abs().max())):
        raise ValueError(f"{name} must be symmetric, got {name} − {name}ᵀ up to {(S - S.T).abs().max().item():.2g}")
    values, vectors = torch.linalg.eigh(S)
    if values.min() < -1e-5 * values.abs().max():
        raise ValueError(f"{name} must have no negative eigenvalues, got {values.min().item():.2g}")
    return values, vectors


class EntropicMap(NamedTuple):
    """The map x ↦ Σ_j softmax_j((g_j − c(x, y_j))/ε) y_j.

    Attributes:
        target: The points y_j.
        potential: g.
        epsilon: ε.
        cost: c.
    """

    target: Float[Tensor, "m d"]
    potential: Float[Tensor, " m"]
    epsilon: float
    cost: Cost

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return the points' images.

        Args:
            x: Points.
        """
        C = cost_matrix(self.cost, x, self.target)
        return torch.softmax((self.potential - C) / self.epsilon, dim=1) @ self.target


def entropic_map(
    source: Float[Tensor, "n d"],
    target: Float[Tensor, "m d"],
    cost: Cost = "sqeuclidean",
    epsilon: float | None = None,
    relative_epsilon: float = 0.01,
    max_iters: int = 2000,
    tol: float = 1e-3,
) -> EntropicMap:
    """Solve entropic transport between samples, and return the map that its dual potential gives everywhere.

    Args:
        source: Samples.
        target: Samples.
        cost: As in :class:`MongeGap`.
        epsilon: ε, in the cost's unit; ``None``: ``relative_epsilon`` times the mean cost.
        relative_epsilon: See ``epsilon``.
        max_iters: Most Sinkhorn iterations.
        tol: As in :class:`MongeGap`.

    Shape:
        source (n, d), target (m, d); points (k, d) → (k, d).

    Returns:
        The map: the mean of the target under the plan's extension to a point, which estimates the optimal map for the
        squared Euclidean cost.

    Raises:
        ValueError: Points of different spaces, a bad cost, or a number out of range.

    Warns:
        RuntimeWarning: No convergence within ``max_iters``.

    Cost: O(n m) an iteration; O(m d) a point.

    Source: Pooladian and Niles-Weed, 2021 (arXiv 2109.12004), equation 1.5.
    """
    check_clouds(source, target, ("source", "target"))
    check_number("relative_epsilon", relative_epsilon, above=0)
    if epsilon is not None:
        check_number("epsilon", epsilon, above=0)
    check_integer("max_iters", max_iters, at_least=1)
    check_number("tol", tol, above=0)
    C = cost_matrix(cost, source, target).detach()
    strength = epsilon or relative(C, relative_epsilon)
    g = sinkhorn(C, epsilon=strength, tol=tol, max_iter=max_iters).g
    return EntropicMap(target.detach().clone(), g, strength, cost)


Map = Callable[[Tensor], Tensor]
"""Points (n, d) to points (n, d)."""
