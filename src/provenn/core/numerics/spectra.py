"""Spectra of symmetric operators that are known by their products alone: stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.numerics.krylov import Operator, lanczos


class Spectrum(NamedTuple):
    """A discrete picture of a spectral density: nodes (Ritz values) and weights that add up to 1.

    Args:
        nodes: Ritz values, ascending.
        weights: The share of the spectrum that each stands for.
    """

    nodes: Float[Tensor, " count"]
    weights: Float[Tensor, " count"]

    def moment(self, power: int) -> Float[Tensor, ""]:
        """Return the mean of λ^power over the spectrum: tr(Aᵖ)/n, estimated."""
        return (self.weights * self.nodes**power).sum()

    def density(self, grid: Float[Tensor, " points"], width: float) -> Float[Tensor, " points"]:
        """Return the density on a grid, each node blurred to a Gaussian.

        Args:
            grid: Where.
            width: Standard deviation of the Gaussians.

        Raises:
            ValueError: ``width`` ≤ 0.
        """
        check_number("width", width, above=0)
        z = (grid.unsqueeze(1) - self.nodes) / width
        peak = width * math.sqrt(2 * math.pi)
        return (torch.exp(-0.5 * z.square()) * self.weights).sum(dim=1) / peak


def stochastic_lanczos(
    apply: Operator,
    like: Float[Tensor, " dim"],
    steps: int = 100,
    num_vectors: int = 1,
    generator: torch.Generator | None = None,
) -> Spectrum:
    """Estimate the spectral density of a symmetric operator.

    Each random unit vector v gives a Gauss quadrature of its spectral measure by Lanczos' method with full
    reorthogonalisation: nodes are Ritz values, weights the squared first components of their eigenvectors. Moments up
    to 2·steps − 1 of vᵀAᵖv are exact; the mean over vectors estimates tr(Aᵖ)/dim.

    Args:
        apply: v ↦ A v.
        like: A vector of the operator's size, type and device.
        steps: Lanczos steps a vector; no more than ``dim`` are taken.
        num_vectors: Random vectors.
        generator: Draws them; ``None``: torch's global generator.

    Returns:
        The spectrum; its extreme nodes never leave the range of the eigenvalues.

    Raises:
        ValueError: ``steps`` < 1 or ``num_vectors`` < 1.

    Cost: num_vectors · steps products, O(num_vectors · dim · steps²) time, dim · steps numbers of memory.

    Source: Golub and Meurant, "Matrices, Moments and Quadrature" (2010); Ubaru, Chen and Saad, SIAM J. Matrix Anal.
    Appl. 38 (2017).
    """
    check_integer("steps", steps, at_least=1)
    check_integer("num_vectors", num_vectors, at_least=1)
    nodes, weights = [], []
    for _ in range(num_vectors):
        device = like.device if generator is None else generator.device
        v = torch.randn(like.shape, dtype=like.dtype, device=device, generator=generator).to(like.device)
        values, vectors = lanczos(apply, v, min(steps, len(like))).ritz()
        nodes.append(values)
        weights.append(vectors[0].square() / num_vectors)
    order = torch.cat(nodes).argsort()
    return Spectrum(torch.cat(nodes)[order], torch.cat(weights)[order])
