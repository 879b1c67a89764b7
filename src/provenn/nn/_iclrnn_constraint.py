"""The projection that follows every step of the optimizer: non-negative weights at a given spectral norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from provenn.core.experiment.checks import check_number

TOLERANCE = 1e-3
"""Change of the singular vector that ends the power iteration, and what is added to the norm that it finds."""
ITERATIONS = 10


def nonnegative_spectral_(
    W: Float[Tensor, "rows columns"], k: float = 1.0, generator: torch.Generator | None = None
) -> Float[Tensor, "rows columns"]:
    """Set negative entries of a matrix to zero, then scale it to the spectral norm k, in place.

    The norm σ of the clipped matrix is that of at most 10 steps of power iteration from a uniform start; the matrix is
    multiplied by k / (σ + 1e-3), also where σ is below 1, so that it ends *on* the set of norm k, up to 1e-3. Power
    iteration approaches the norm from below: where its two largest singular values nearly agree, the result may exceed
    k by a few thousandths. ``sequence_gain`` of a layer uses the true norms.

    Args:
        W: The matrix; a parameter stays the same object.
        k: The norm that is wanted.
        generator: Draws the start; ``None`` is torch's global one.

    Shape:
        ``W`` (rows, columns).

    Returns:
        ``W``.

    Raises:
        TypeError: ``W`` is no floating-point tensor, or ``k`` no number.
        ValueError: ``W`` is no matrix, or ``k`` ≤ 0.

    Cost: the product WᵀW and 10 of its products with a vector, O(rows · columns²); no value is waited for on a GPU.

    Source: Wang, Pravin & Wu, arXiv 2401.07494, section on the constraint; ε and the number of steps as in the authors'
    code, which ends the iteration where this one picks the vector.
    """
    if not W.is_floating_point():
        raise TypeError(f"W must be a floating-point tensor, got {W.dtype}")
    if W.ndim != 2:
        raise ValueError(f"W must be a matrix, got shape {tuple(W.shape)}")
    check_number("k", k, above=0)
    project_matrices_([W], k, generator)
    return W


@torch.no_grad()
def project_matrices_(weights: Sequence[Tensor], k: float, generator: torch.Generator | None) -> None:
    """Do what :func:`nonnegative_spectral_` does to matrices of one dtype and device, all at once.

    Cost: 10 batched products with a vector, for matrices padded to the largest number of columns.
    """
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    clipped = [weight.clamp_(min=0).to(wide) for weight in weights]
    columns = max(matrix.shape[1] for matrix in clipped)
    grams = torch.stack([_padded_gram(matrix, columns) for matrix in clipped])
    device = grams.device if generator is None else generator.device
    start = torch.rand(len(grams), columns, 1, generator=generator, device=device, dtype=wide).to(grams.device)
    norms = _norms(grams, start).unbind()
    for weight, matrix, norm in zip(weights, clipped, norms, strict=True):
        weight.copy_(matrix * (k / (norm + TOLERANCE)))


def _padded_gram(W: Float[Tensor, "rows columns"], size: int) -> Float[Tensor, "size size"]:
    """Return WᵀW with rows and columns of zeros, which take nothing from the largest eigenvalue."""
    short = size - W.shape[1]
    return F.pad(W.mT @ W, (0, short, 0, short)) if short else W.mT @ W


def _norms(grams: Float[Tensor, "n size size"], start: Float[Tensor, "n size 1"]) -> Float[Tensor, " n"]:
    """Return ‖Wu‖ for the vectors u that power iteration on WᵀW ends with: the first that move by less than 1e-3."""
    tiny = torch.finfo(start.dtype).tiny
    u = start / start.norm(dim=1, keepdim=True)
    vectors = [u]
    for _ in range(ITERATIONS):
        u = grams @ u
        u = u / (u.norm(dim=1, keepdim=True) + tiny)
        vectors.append(u)
    tried = torch.stack(vectors, 1).squeeze(-1)
    settled = tried.diff(dim=1).norm(dim=2) < TOLERANCE
    settled[:, -1] = True
    # All steps are taken, and the right one is read afterwards: no GPU is waited for, and a step costs little.
    end = settled.to(torch.uint8).argmax(1)
    chosen = tried[:, 1:].gather(1, end[:, None, None].expand(-1, 1, tried.shape[2])).squeeze(1)
    squares: Tensor = torch.einsum("ni,nij,nj->n", chosen, grams, chosen)
    return squares.clamp(min=0).sqrt()
