"""The two passes of exact tensor attention: a running softmax over blocks, and a backward pass that computes them anew.

All key factors but the last make one long axis of composite keys, M = S₁ ⋯ S_{k−2} of them, whose index is never
expanded: a block holds some queries, some composite keys and all S of the last factor, so that its scores are one
matrix product (q ∘ k₁ ∘ ⋯) Kᵀ. Operands are flattened to one leading dimension N (batch and heads).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from provenn.core.sequences._blocks import Block, blocks


class Problem(NamedTuple):
    """The operands and what hides or shifts scores.

    Args:
        q: (N, L, d).
        ks: k − 1 tensors (N, S_m, d).
        vs: k − 1 tensors (N, S_m, e).
        mask: (·, L or 1, M or 1, S or 1), boolean or added; ``None`` for none.
        mask_index: (N,), which row of the mask each of N uses.
        scale: Factor of the scores.
        causal: Whether query i sees factors up to position S − L + i alone.
        size: Scores in a block.
    """

    q: Tensor
    ks: Sequence[Tensor]
    vs: Sequence[Tensor]
    mask: Tensor | None
    mask_index: Tensor | None
    scale: float
    causal: bool
    size: int

    @property
    def composite(self) -> int:
        """M."""
        return math.prod(k.shape[1] for k in self.ks[:-1])

    def cuts(self) -> Iterator[Block]:
        """Cut queries and composite keys into blocks; for one left factor, blocks that causality hides are left out."""
        last = max(1, self.ks[-1].shape[1])
        triangular = self.causal and len(self.ks) == 2
        return blocks(self.q.shape[0], self.q.shape[1], self.composite, triangular, max(1, self.size // last))

    def index(self, columns: slice) -> list[Tensor]:
        """Unravel composite keys into one index a factor."""
        flat = torch.arange(columns.start, columns.stop, device=self.q.device)
        found = []
        for k in reversed(self.ks[:-1]):
            found.append(flat % k.shape[1])
            flat = flat // k.shape[1]
        return found[::-1]

    def reach(self, rows: slice) -> tuple[Tensor, int]:
        """Return the last position that each query may see, and how many keys of the last factor the block needs."""
        keys = self.ks[-1].shape[1]
        first = keys - self.q.shape[1]
        positions = torch.arange(rows.start + first, rows.stop + first, device=self.q.device)
        return positions, min(keys, rows.stop + first) if self.causal else keys

    def scores(self, block: Block, mixed: Tensor, index: Sequence[Tensor], end: int) -> Tensor:
        """Return the scores of a block, (H, I, J, S'), from q ∘ k₁ ∘ ⋯, (H, I, J, d)."""
        heads, rows, columns = block
        products = torch.matmul(mixed.flatten(1, 2), self.ks[-1][heads, :end].mT).mul_(self.scale)
        scores = products.unflatten(1, mixed.shape[1:3])
        if self.mask is not None and self.mask_index is not None:
            mask = self.mask[self.mask_index[heads]]
            for dim, place in ((1, rows), (2, columns), (3, slice(0, end))):
                if mask.shape[dim] > 1:
                    mask = mask.narrow(dim, place.start, place.stop - place.start)
            if mask.dtype == torch.bool:
                scores.masked_fill_(~mask, -math.inf)
            else:
                scores.add_(mask)
        if self.causal:
            positions, _ = self.reach(rows)
            seen = torch.arange(end, device=positions.device) <= positions[:, None, None]
            for one in index:
                seen = seen & (one[:, None] <= positions[:, None, None])
            scores.masked_fill_(~seen, -math.inf)
        return scores


def product(factors: Sequence[Tensor], heads: slice, index: Sequence[Tensor], like: Tensor) -> Tensor:
    """Multiply the rows of the factors that the index names, (H, J, features); ones where there is no factor."""
    if not factors:
        return like.new_ones(1, 1, like.shape[-1])
    found = factors[0][heads].index_select(1, index[0])
    for factor, place in zip(factors[1:], index[1:], strict=True):
        found = found * factor[heads].index_select(1, place)
    return found


def forward_pass(problem: Problem) -> Tensor:
    """Return output and log-sum-exp of the scores side by side, (N, L, e + 1).

    The softmax runs: a block's larger maximum shrinks what was summed before. A query that sees nothing gets output 0
    and the log-sum-exp +∞, with which the backward pass finds all its weights to be 0.
    """
    q, last = problem.q, problem.vs[-1]
    top = q.new_full((*q.shape[:2], 1), -math.inf)
    total = torch.zeros_like(top)
    output = q.new_zeros(*q.shape[:2], last.shape[-1])
    for block in problem.cuts():
        heads, rows, columns = block
        index, end = problem.index(columns), problem.reach(rows)[1]
        mixed = q[heads, rows, None] * product(problem.ks[:-1], heads, index, q)[:, None]
        scores = problem.scores(block, mixed, index, end).flatten(2)
        high = torch.maximum(top[heads, rows], scores.amax(dim=-1, keepdim=True))
        shift = high.masked_fill(high == -math.inf, 0)
        kept = torch.exp(top[heads, rows] - shift)
        weights = scores.sub_(shift).exp_()
        total[heads, rows] = total[heads, rows] * kept + weights.sum(dim=-1, keepdim=True)
        summed = torch.matmul(weights.unflatten(2, (-1, end)).flatten(1, 2), last[heads, :end])
        summed = summed.unflatten(1, mixed.shape[1:3]) * product(problem.vs[:-1], heads, index, last)[:, None]
        output[heads, rows] = output[heads, rows] * kept + summed.sum(dim=2)
        top[heads, rows] = high
    empty = total == 0
    normalizer = (top + total.log()).masked_fill(empty, math.inf)
    return torch.cat([output / total.masked_fill(empty, 1), normalizer], dim=-1)


def backward_pass(problem: Problem, packed: Tensor, gradient: Tensor) -> list[Tensor]:
    """Return the gradients by q, every k and every v, from that by the packed output."""
    q, ks, vs = problem.q, problem.ks, problem.vs
    normalizer, by_output = packed[..., -1:], gradient[..., :-1]
    offset = gradient[..., -1:] - (by_output * packed[..., :-1]).sum(dim=-1, keepdim=True)
    dq, dks, dvs = torch.zeros_like(q), [torch.zeros_like(k) for k in ks], [torch.zeros_like(v) for v in vs]
    for block in problem.cuts():
        heads, rows, columns = block
        index, end = problem.index(columns), problem.reach(rows)[1]
        left_k, left_v = product(ks[:-1], heads, index, q), product(vs[:-1], heads, index, vs[-1])
        mixed, pulled = q[heads, rows, None] * left_k[:, None], by_output[heads, rows, None] * left_v[:, None]
        shape = mixed.shape[1:3]
        flat_mixed, flat_pulled = mixed.flatten(1, 2), pulled.flatten(1, 2)
        scores = problem.scores(block, mixed, index, end)
        weights = scores.sub_(normalizer[heads, rows, None]).exp_().flatten(1, 2)
        dvs[-1][heads, :end] += weights.mT @ flat_pulled
        by_left_v = (weights @ vs[-1][heads, :end]).unflatten(1, shape) * by_output[heads, rows, None]
        slopes = (flat_pulled @ vs[-1][heads, :end].mT).unflatten(1, shape).add_(offset[heads, rows, None])
        slopes = slopes.flatten(1, 2).mul_(weights).mul_(problem.scale)
        dks[-1][heads, :end] += slopes.mT @ flat_mixed
        by_mixed = (slopes @ ks[-1][heads, :end]).unflatten(1, shape)
        dq[heads, rows] += (by_mixed * left_k[:, None]).sum(dim=2)
        _scatter(dks, ks, heads, index, (by_mixed * q[heads, rows, None]).sum(dim=1))
        _scatter(dvs, vs, heads, index, by_left_v.sum(dim=1))
    return [dq, *dks, *dvs]


def _scatter(
    gradients: Sequence[Tensor], factors: Sequence[Tensor], heads: slice, index: Sequence[Tensor], by_product: Tensor
) -> None:
    """Hand the gradient by a product of left factors to each of them."""
    for place in range(len(factors) - 1):
        others = [other for other in range(len(factors) - 1) if other != place]
        share = by_product
        if others:
            chosen, chosen_index = [factors[other] for other in others], [index[other] for other in others]
            share = by_product * product(chosen, heads, chosen_index, by_product)
        gradients[place][heads].index_add_(1, index[place], share)
