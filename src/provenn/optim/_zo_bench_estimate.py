"""Random gradient estimates as pieces that are drawn again from their seeds, and the masks of sparse ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from provenn.core.experiment.seeding import generator
from provenn.core.numerics.gradient_free import Closure, checked
from provenn.core.numerics.zeroth_order import Difference, Mask, SeededDirection, finite_difference

Differentiate = Callable[[Closure, SeededDirection, float, bool, float | None], Difference]

_SAMPLE = 10_000_000
"""Weights of which a quantile over all tensors is taken, at most: the authors' number."""


@dataclass(frozen=True)
class Estimate:
    """A gradient estimate Σ wᵢ zᵢ, kept as its seeds and weights.

    Args:
        tensors: What it is a gradient of.
        directions: zᵢ, one a query.
        weights: wᵢ.
    """

    tensors: Sequence[Tensor]
    directions: Sequence[SeededDirection]
    weights: Sequence[float]

    def pieces(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield index of the tensor, piece of its flattened entries, and the estimate there, which may be changed."""
        first, *others = (direction.pieces() for direction in self.directions)
        for index, piece, total in first:
            total.mul_(self.weights[0])
            for other, weight in zip(others, self.weights[1:], strict=True):
                _, _, noise = next(other)
                total.add_(noise, alpha=weight)
                del noise
            yield index, piece, total
            del total  # or it would outlive the draw of the next piece

    def signs(self) -> Estimate:
        """Return the estimate with each derivative replaced by its sign."""
        count = len(self.weights)
        return Estimate(self.tensors, self.directions, [((one > 0) - (one < 0)) / count for one in self.weights])


def estimate(
    loss: Closure,
    tensors: Sequence[Tensor],
    seeds: Sequence[int],
    eps: float,
    two_sided: bool,
    mask: Mask | None = None,
    base: float | None = None,
    differentiate: Differentiate = finite_difference,
) -> Estimate:
    """Average the difference quotients along one direction a seed.

    Args:
        loss: Evaluates the loss.
        tensors: What is perturbed; all else stays.
        seeds: One a query.
        eps: μ.
        two_sided: Which quotient.
        mask: Factors of the noise.
        base: f(θ), where it is known.
        differentiate: How the tensors are moved and put back.

    Returns:
        The estimate.

    Raises:
        NonFiniteLossError: A quotient is NaN or infinite.
    """
    directions = [SeededDirection(tensors, seed, mask) for seed in seeds]
    slopes = []
    for direction in directions:
        difference = checked(differentiate(loss, direction, eps, two_sided, base))
        if not two_sided:
            base = difference.behind
        slopes.append(difference.derivative / len(seeds))
    return Estimate(tensors, directions, slopes)


def random_mask(tensors: Sequence[Tensor], positions: Sequence[int], shares: Sequence[float], seed: int) -> Mask:
    """Return a mask that zeroes each entry with its tensor's probability, the same at every draw of a seed.

    Args:
        tensors: Of the direction.
        positions: Of these tensors among all parameters.
        shares: Of all parameters, the probability of a zero.
        seed: The seed.
    """

    def mask(index: int, piece: slice) -> Tensor:
        like, position = tensors[index], positions[index]
        draws = generator(seed, position, piece.start, device=like.device)
        kept = torch.empty(piece.stop - piece.start, dtype=like.dtype, device=like.device)
        return kept.bernoulli_(1 - shares[position], generator=draws)

    return mask


def masked_shares(tensors: Sequence[Tensor], sparsity: float, by: str) -> list[float]:
    """Return each tensor's share of masked entries.

    Args:
        tensors: The parameters.
        sparsity: The share overall.
        by: ``"layer"``: the same in every tensor; ``"global"``: the share of a tensor's entries that are among the
            smallest overall.
    """
    if by == "layer" or not sparsity:
        return [sparsity] * len(tensors)
    sizes = torch.cat([tensor.detach().flatten().abs().float() for tensor in tensors])
    sizes = sizes[:: -(-len(sizes) // _SAMPLE)]
    # torch.quantile refuses so many numbers
    threshold = sizes.kthvalue(max(1, round(sparsity * len(sizes)))).values
    return [
        float((tensor.detach().abs() <= threshold).double().mean()) if tensor.numel() else 0.0 for tensor in tensors
    ]
