"""Streams of losses between independent draws and an adversary, with dials for the noise and for the drift."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.experiment.seeding import generator as seeded_generator
from provenn.optim._optimistic_omd_domains import Ball

KINDS = ("iid", "switch", "corrupted", "drifting", "adversarial", "self-play")
LOSSES = ("linear", "quadratic")


class Trajectory(NamedTuple):
    """What was played against a stream.

    Args:
        points: The played points x_t.
        draws: What the losses were: a sample of the stream.
        opponents: The other player's points y_t, in self-play.

    Shape:
        ``points`` (T, d), ``draws`` (T, d), or (T, d, d) in self-play, ``opponents`` (T, d).

    Source: arXiv 2302.04552, the protocol.
    """

    points: Float[Tensor, "T d"]
    draws: Float[Tensor, "T ..."]
    opponents: Float[Tensor, "T d"] | None = None


class SEAStream:
    """Losses whose means an adversary of a given kind moves, and whose noise nature draws around them.

    A draw z_t = E z_t + ξ_t has noise of length σ in a uniform direction, so that E‖ξ_t‖² = σ² and gradients are
    bounded. The losses on the ball of ``radius`` are f_t(x) = ⟨z_t, x⟩, or (c/2)‖x − z_t‖², or in self-play
    xᵀZ_t y_t with Z_t = A + N_t, A normal with spectral norm 1 and N_t of Frobenius norm σ√d.

    ================  ===============================================================================================
    ``kind``          means E z_t
    ================  ===============================================================================================
    ``iid``           a vector b of length ``location`` throughout
    ``switch``        b ± (drift/2)u in turns of ``period`` rounds, with u a random direction
    ``corrupted``     b, and b + drift·u in each round with probability ``rate``
    ``drifting``      on a circle of radius ``location``, by ``drift`` a round
    ``adversarial``   b, and b + drift·u in ``count`` rounds
    ``self-play``     A
    ================  ===============================================================================================

    The adversary's choices are fixed at construction by ``seed``; :meth:`sample` draws the noise.

    Args:
        kind: How the means move.
        dim: d.
        rounds: T.
        loss: ``"linear"`` or ``"quadratic"``; ignored in self-play, which is bilinear.
        sigma: σ.
        drift: How far the mean moves when it moves.
        location: Length of b.
        period: Rounds between switches.
        rate: Probability of a corrupted round.
        count: Number of adversarial rounds.
        curvature: c.
        radius: Radius of the domain, a ball around the origin.
        seed: Seeds the means.
        dtype: Type of the draws.

    Shape:
        A sample of n streams is (n, T, d); (n, T, d, d) in self-play.

    Raises:
        ValueError: An unknown choice, an option out of bounds, ``count`` > ``rounds``, or ``drift`` above the
            diameter of the circle.
        TypeError: A number of the wrong type.

    Cost: O(n T d) a sample; in self-play O(n T d²).

    Source: arXiv 2302.04552, the intermediate cases that the paper works out; the SEA model is that of Sachs et al.,
    arXiv 2202.07554.
    """

    def __init__(
        self,
        kind: str = "iid",
        dim: int = 5,
        rounds: int = 100,
        loss: str = "linear",
        sigma: float = 0.1,
        drift: float = 0.5,
        location: float = 0.5,
        period: int = 1,
        rate: float = 0.1,
        count: int = 1,
        curvature: float = 1.0,
        radius: float = 1.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        check_choice("kind", kind, KINDS)
        check_choice("loss", loss, LOSSES)
        for name, whole in (("dim", dim), ("rounds", rounds), ("period", period)):
            check_integer(name, whole, at_least=1)
        check_integer("count", count, at_least=0, at_most=rounds)
        for name, number in (("sigma", sigma), ("drift", drift), ("location", location)):
            check_number(name, number, at_least=0)
        check_number("rate", rate, at_least=0, at_most=1)
        check_number("curvature", curvature, above=0)
        check_number("radius", radius, above=0)
        if kind == "drifting":
            check_integer("dim", dim, at_least=2)
            check_number("drift", drift, at_most=2 * location)
        self.kind, self.dim, self.rounds, self.dtype = kind, dim, rounds, dtype
        self.loss = "bilinear" if kind == "self-play" else loss
        self.sigma, self.drift, self.location, self.period = sigma, drift, location, period
        self.rate, self.count, self.curvature, self.radius = rate, count, curvature, radius
        self.means = self._means(seeded_generator(seed, "stream", kind)).to(dtype)
        """E z_t: (T, d), or (T, d, d)."""

    def _means(self, draws: torch.Generator) -> Tensor:
        if self.loss == "bilinear":
            A = torch.randn(self.dim, self.dim, generator=draws, device=draws.device, dtype=torch.float64)
            return (A / torch.linalg.matrix_norm(A, ord=2)).expand(self.rounds, -1, -1)
        base, direction = torch.randn(2, self.dim, generator=draws, device=draws.device, dtype=torch.float64)
        base, direction = self.location * base / base.norm(), direction / direction.norm()
        turns = torch.arange(self.rounds, dtype=torch.float64, device=draws.device)
        if self.kind == "drifting":
            side = direction - base * (direction @ base) / base.square().sum().clamp(min=1e-300)
            side = self.location * side / side.norm()
            angles = turns * 2 * math.asin(min(1.0, self.drift / (2 * max(self.location, 1e-300))))
            return torch.outer(angles.cos(), base) + torch.outer(angles.sin(), side)
        moved = torch.zeros_like(turns)
        if self.kind == "switch":
            moved = 0.5 - (turns // self.period) % 2
        elif self.kind == "corrupted":
            moved = (
                torch.rand(self.rounds, generator=draws, device=draws.device, dtype=torch.float64) < self.rate
            ).double()
        elif self.kind == "adversarial":
            moved[torch.randperm(self.rounds, generator=draws, device=draws.device)[: self.count]] = 1
        return base + self.drift * torch.outer(moved, direction)

    @property
    def domain(self) -> Ball:
        """Where points are played."""
        return Ball(self.radius)

    @property
    def diameter(self) -> float:
        """D."""
        return 2 * self.radius

    @property
    def lipschitz(self) -> float:
        """G, the largest gradient that can come."""
        if self.loss == "bilinear":
            return float(torch.linalg.matrix_norm(self.means[0], ord=2) + self.sigma * self.dim**0.5) * self.radius
        reach = float(self.means.norm(dim=-1).max()) + self.sigma
        return reach if self.loss == "linear" else self.curvature * (self.radius + reach)

    @property
    def smoothness(self) -> float:
        """L, which is also the strong convexity: the losses are quadratic, or linear in x."""
        return self.curvature if self.loss == "quadratic" else 0.0

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n T ..."]:
        """Draw the losses of streams with these means.

        Args:
            n: Number of streams.
            generator: Draws the noise, on its device; ``None``: torch's global one.

        Shape:
            (n, T, d); (n, T, d, d) in self-play.

        Returns:
            The draws z_t.

        Raises:
            ValueError: ``n`` < 0.
            TypeError: ``n`` is no integer.
        """
        check_integer("n", n, at_least=0)
        device = "cpu" if generator is None else generator.device
        shape = (n, self.rounds, self.means[0].numel())
        noise = torch.randn(shape, generator=generator, dtype=self.dtype, device=device)
        length = self.sigma * (math.sqrt(self.dim) if self.loss == "bilinear" else 1.0)
        noise = noise * (length / noise.norm(dim=-1, keepdim=True))
        return self.means.to(device) + noise.view(n, *self.means.shape)

    def gradient(self, x: Tensor, draw: Tensor, opponent: Tensor | None = None) -> Tensor:
        """Return ∇f_t(x) for one round, or for many in leading dimensions.

        Args:
            x: Points (..., d).
            draw: z_t (..., d), or Z_t (..., d, d).
            opponent: y_t (..., d), in self-play.

        Raises:
            ValueError: No ``opponent`` in self-play.
        """
        if self.loss == "bilinear":
            if opponent is None:
                raise ValueError("opponent must be given in self-play, got None")
            return (draw @ opponent.unsqueeze(-1)).squeeze(-1)
        return draw if self.loss == "linear" else self.curvature * (x - draw)
