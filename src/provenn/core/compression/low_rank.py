"""Low-rank forms of tensors: sums of outer products (canonical polyadic), and Tucker's form in two of the modes.

Everything is batched over the first dimension, so that the kernels of all output channels are fitted at once.

Sources: Carroll and Chang, "Analysis of individual differences in multidimensional scaling", Psychometrika 1970, and
Harshman 1970 (alternating least squares); De Lathauwer, De Moor and Vandewalle, "On the best rank-1 and
rank-(R1, ..., RN) approximation of higher-order tensors", SIAM J. Matrix Anal. Appl. 2000 (orthogonal iteration).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer

SWEEPS_OF_A_NEW_TERM = 5
"""Sweeps that fit a new term to what is left, before all terms are fitted together."""


def canonical_tensor(factors: Sequence[Float[Tensor, "batch _ rank"]]) -> Float[Tensor, "batch *modes"]:
    """Return Σ_r f₁[:, r] ⊗ f₂[:, r] ⊗ … for each entry of the batch.

    Args:
        factors: One for each mode.

    Shape:
        factors (batch, n_k, R) → (batch, n₁, n₂, …).
    """
    sizes = [factor.shape[1] for factor in factors]
    tensors: Tensor = _khatri_rao(factors).sum(dim=-1).unflatten(1, sizes)
    return tensors


def canonical_factors(
    tensors: Float[Tensor, "batch *modes"], rank: int, iterations: int = 50
) -> list[Float[Tensor, "batch _ {rank}"]]:
    """Approximate each tensor by a sum of outer products, by alternating least squares.

    Terms join one at a time: each is fitted to what the earlier ones leave over, then all are fitted together. So the
    error never grows with ``rank``, nor from sweep to sweep. Two modes give the truncated SVD, which is the best
    there is; a rank of the product of all modes but the longest, or more, gives the tensors themselves. In between,
    alternating least squares may end in a local minimum, and a best approximation need not exist.

    Args:
        tensors: What is approximated; its first dimension is a batch.
        rank: Terms R.
        iterations: Sweeps over all modes after each new term.

    Shape:
        tensors (batch, n₁, n₂, …) → factors (batch, n_k, R), one for each mode, in the type of ``tensors``. The terms'
        factors have equal norms.

    Returns:
        The factors, for :func:`canonical_tensor`.

    Raises:
        ValueError: ``rank`` < 1, ``iterations`` < 1, fewer than two modes, or an entry that is not finite.
        TypeError: ``tensors`` are not real floating-point.

    Cost: for each term and sweep, and each mode, a least-squares problem of Π n_k × R.
    """
    check_integer("rank", rank, at_least=1)
    check_integer("iterations", iterations, at_least=1)
    if tensors.ndim < 3:
        raise ValueError(f"tensors must have a batch and two modes or more, got shape {tuple(tensors.shape)}")
    wide = _double("tensors", tensors)
    # squares of entries would leave the range of float64 where the entries are very small or large
    scale = wide.flatten(1).abs().amax(dim=1)
    scale = torch.where(scale > 0, scale, 1.0)
    wide = wide / scale.reshape(-1, *[1] * (wide.ndim - 1))
    if rank >= math.prod(tensors.shape[1:]) // max(tensors.shape[1:]):
        factors = _exact(wide, rank)
    elif wide.ndim == 3:
        factors = _singular(wide, rank)
    else:
        factors = _alternating(wide, rank, iterations)
    root = (scale ** (1 / len(factors)))[:, None, None]
    return [(factor * root).to(tensors.dtype) for factor in _balanced(factors)]


def alternating_sweep(
    tensors: Float[Tensor, "batch *modes"], factors: Sequence[Float[Tensor, "batch _ rank"]]
) -> list[Float[Tensor, "batch _ rank"]]:
    """Solve for the factor of each mode in turn, the others fixed; the squared error cannot grow.

    Args:
        tensors: What is approximated.
        factors: The factors before.

    Shape:
        As in :func:`canonical_factors`.

    Returns:
        The factors after.
    """
    factors = list(factors)
    for mode in range(len(factors)):
        others = _khatri_rao(factors[:mode] + factors[mode + 1 :])
        unfolded = tensors.movedim(mode + 1, 1).flatten(2)
        factors[mode] = unfolded @ torch.linalg.pinv(others).mT
    return factors


def tucker_factors(
    matrices: Float[Tensor, "rows columns *rest"], ranks: tuple[int, int], iterations: int = 50
) -> tuple[Float[Tensor, "rows {ranks[0]}"], Float[Tensor, "{ranks[0]} {ranks[1]} *rest"], Float[Tensor, "columns _"]]:
    """Approximate a tensor by a smaller one and orthonormal bases of its first two modes, by orthogonal iteration.

    Args:
        matrices: The tensor.
        ranks: How many basis vectors of the first and of the second mode.
        iterations: Alternations after the start from the singular vectors of the unfoldings.

    Shape:
        (m, n, …) → U (m, R₁), G (R₁, R₂, …), V (n, R₂), so that the tensor is about Σ_pq U[:, p] ⊗ V[:, q] ⊗ G[p, q].

    Returns:
        U, G and V in the tensor's type.

    Raises:
        ValueError: A rank < 1 or above its mode's size, ``iterations`` < 0, or an entry that is not finite.
        TypeError: ``matrices`` are not real floating-point.

    Cost: two singular value decompositions an iteration.
    """
    for mode, rank in enumerate(ranks):
        check_integer("ranks", rank, at_least=1, at_most=matrices.shape[mode])
    check_integer("iterations", iterations, at_least=0)
    wide = _double("matrices", matrices).reshape(*matrices.shape[:2], math.prod(matrices.shape[2:]))
    right = _leading(wide.movedim(1, 0).flatten(1), ranks[1])
    left = _leading(torch.einsum("mnz,nq->mqz", wide, right).flatten(1), ranks[0])
    for _ in range(iterations):
        right = _leading(torch.einsum("mnz,mp->npz", wide, left).flatten(1), ranks[1])
        left = _leading(torch.einsum("mnz,nq->mqz", wide, right).flatten(1), ranks[0])
    core = torch.einsum("mnz,mp,nq->pqz", wide, left, right).reshape(*ranks, *matrices.shape[2:])
    return left.to(matrices), core.to(matrices), right.to(matrices)


def _double(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be real floating-point, got {tensor.dtype}")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    return tensor.detach().double()


def _leading(matrix: Tensor, count: int) -> Tensor:
    """The first left singular vectors; where the matrix is too narrow to have as many, any that complete them."""
    vectors: Tensor = torch.linalg.svd(matrix, full_matrices=matrix.shape[1] < count).U
    return vectors[:, :count]


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, :, None] * factor[:, None]).flatten(1, 2)
    return product


def _exact(tensors: Tensor, rank: int) -> list[Tensor]:
    """One term for each fibre along the longest mode: unit vectors in the other modes."""
    batch, *sizes = tensors.shape
    longest = sizes.index(max(sizes))
    others = sizes[:longest] + sizes[longest + 1 :]
    count = math.prod(others)
    places = torch.unravel_index(torch.arange(count, device=tensors.device), others)
    factors = []
    for size, place in zip(others, places, strict=True):
        unit = torch.nn.functional.one_hot(place, size).T.to(tensors)
        factors.append(torch.nn.functional.pad(unit, (0, rank - count)).repeat(batch, 1, 1))
    fibres = tensors.movedim(longest + 1, 1).flatten(2)
    factors.insert(longest, torch.nn.functional.pad(fibres, (0, rank - count)))
    return factors


def _singular(matrices: Tensor, rank: int) -> list[Tensor]:
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    return [left[..., :rank] * values[:, None, :rank], right[:, :rank].mT]


def _alternating(tensors: Tensor, rank: int, iterations: int) -> list[Tensor]:
    factors = [tensors.new_zeros(len(tensors), size, 0) for size in tensors.shape[1:]]
    for _ in range(rank):
        left_over = tensors - canonical_tensor(factors)
        term = [_leading_vector(left_over, mode) for mode in range(len(factors))]
        for _ in range(SWEEPS_OF_A_NEW_TERM):
            term = alternating_sweep(left_over, term)
        factors = [torch.cat(pair, dim=-1) for pair in zip(factors, term, strict=True)]
        for _ in range(iterations):
            factors = alternating_sweep(tensors, _balanced(factors))
    return factors


def _leading_vector(tensors: Tensor, mode: int) -> Tensor:
    unfolded = tensors.movedim(mode + 1, 1).flatten(2)
    vectors: Tensor = torch.linalg.eigh(unfolded @ unfolded.mT).eigenvectors
    return vectors[..., -1:]


def _balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """Give the factors of each term equal norms; a term that is zero stays zero."""
    norms = [factor.norm(dim=1, keepdim=True) for factor in factors]
    product = torch.stack(norms).prod(dim=0)
    mean = product ** (1 / len(factors))
    return [
        torch.where(product > 0, factor * (mean / norm.clamp_min(torch.finfo(norm.dtype).tiny)), 0.0)
        for factor, norm in zip(factors, norms, strict=True)
    ]
