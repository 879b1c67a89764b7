"""The blocks of attention: which part of the scores is alive at a time, and the two passes over them.

Both passes work on flattened operands: q, k, v have one leading dimension N (batch and heads); ``bias`` (·, L or 1, 1)
and ``mask`` (·, L or 1, S or 1) keep their own, and ``bias_index``, ``mask_index`` (N,) say which row each of N uses,
so that nothing is expanded beyond one block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from provenn.core.sequences.attention import ACTIVATIONS, wide


class Block(NamedTuple):
    """One block of scores: a range of leading indices, of queries and of keys."""

    heads: slice
    rows: slice
    columns: slice


def blocks(count: int, queries: int, keys: int, causal: bool, size: int) -> Iterator[Block]:
    """Cut N × L × S scores into blocks of at most ``size`` scores, skipping those where causality hides all.

    Args:
        count: N.
        queries: L.
        keys: S.
        causal: Whether query i sees keys up to S − L + i alone.
        size: Scores in a block; at least one row of one key is always taken.
    """
    if not (count and queries and keys):
        return
    side = max(1, math.isqrt(size))
    height = min(queries, side)
    if causal:  # lower blocks follow the diagonal more closely: less is computed and thrown away
        height = min(height, max(64, -(-queries // 8)))
    width = min(keys, max(1, size // height))
    depth = max(1, size // (height * width))
    first = keys - queries
    for head in range(0, count, depth):
        heads = slice(head, min(head + depth, count))
        for row in range(0, queries, height):
            rows = slice(row, min(row + height, queries))
            end = min(keys, rows.stop + first) if causal else keys
            for column in range(0, end, width):
                yield Block(heads, rows, slice(column, min(column + width, end)))


class Problem(NamedTuple):
    """The flattened operands beside values, and the options."""

    q: Tensor
    k: Tensor
    bias: Tensor | None
    bias_index: Tensor | None
    mask: Tensor | None
    mask_index: Tensor | None
    slopes: Tensor | None
    activation: str
    scale: float
    constant: float
    causal: bool

    def weights(self, block: Block) -> Tensor:
        """Compute the weights of one block."""
        heads, rows, columns = block
        start = self.q.new_full((1, 1, 1), self.constant)
        scores = torch.baddbmm(start, self.q[heads, rows], self.k[heads, columns].mT, alpha=self.scale)
        first = self.k.shape[1] - self.q.shape[1]
        row = torch.arange(rows.start + first, rows.stop + first, device=scores.device)[:, None]
        column = torch.arange(columns.start, columns.stop, device=scores.device)
        if self.slopes is not None:
            scores.addcmul_(self.slopes[heads, None, None], (row - column).abs().to(scores.dtype), value=-1)
        if self.bias is not None and self.bias_index is not None:
            scores.add_(_part(self.bias, self.bias_index, block))
        if self.mask is not None and self.mask_index is not None:
            mask = _part(self.mask, self.mask_index, block)
            if mask.dtype == torch.bool:
                scores.masked_fill_(~mask, float("-inf"))
            else:
                scores.add_(mask)
        if self.causal and columns.stop - 1 > rows.start + first:
            scores.masked_fill_(row < column, float("-inf"))
        return ACTIVATIONS[self.activation].weigh_(scores)


def _within(operand: Tensor, block: Block) -> tuple[slice, slice]:
    """The block's rows and columns of an operand whose size may be 1 along either."""
    whole = slice(None)
    return (whole if operand.shape[1] == 1 else block.rows, whole if operand.shape[2] == 1 else block.columns)


def _part(operand: Tensor, index: Tensor, block: Block) -> Tensor:
    return operand[(slice(None), *_within(operand, block))].index_select(0, index[block.heads])


def _accumulate(total: Tensor, index: Tensor, block: Block, gradient: Tensor) -> None:
    """Add a block's gradient to that of an operand which was broadcast to it."""
    for dim in (1, 2):
        if total.shape[dim] == 1:
            gradient = gradient.sum(dim=dim, keepdim=True)
    total[(slice(None), *_within(total, block))].index_add_(0, index[block.heads], gradient)


def _wide(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == torch.bool else tensor.to(dtype)


def _widened(problem: Problem) -> Problem:
    dtype = wide(problem.q.dtype)
    q, k, bias, mask = problem.q.to(dtype), problem.k.to(dtype), _wide(problem.bias, dtype), _wide(problem.mask, dtype)
    return problem._replace(q=q, k=k, bias=bias, mask=mask)


def forward_pass(problem: Problem, v: Tensor, size: int) -> Tensor:
    """Sum φ(S_block) V_block over the blocks of every row."""
    output = torch.zeros(*problem.q.shape[:2], v.shape[2], dtype=wide(v.dtype), device=v.device)
    dtype, problem, v = v.dtype, _widened(problem), v.to(output.dtype)
    for block in blocks(len(problem.q), problem.q.shape[1], problem.k.shape[1], problem.causal, size):
        heads, rows, columns = block
        output[heads, rows].baddbmm_(problem.weights(block), v[heads, columns])
    return output.to(dtype)


def backward_pass(problem: Problem, v: Tensor, gradient: Tensor, size: int, needs: list[bool]) -> list[Tensor]:
    """Compute each block's weights again, and add up its part of every gradient.

    With P the block's weights: dV += Pᵀ dO, dS = φ′ ⊙ (dO Vᵀ), dQ += scale dS K, dK += scale dSᵀ Q. Where softmax
    subtracts a row's sum, nothing is to be done.

    Args:
        problem: As in the forward pass.
        v: Values.
        gradient: Gradient by the output.
        size: Scores in a block.
        needs: Whether the gradient by bias and that by mask are wanted.

    Returns:
        Gradients by q, k, v, bias, mask; empty ones where not wanted.
    """
    inputs = (problem.q, problem.k, v, problem.bias, problem.mask)
    problem, v, gradient = _widened(problem), v.to(wide(v.dtype)), gradient.to(wide(v.dtype))
    dq, dk, dv = (torch.zeros_like(one, memory_format=torch.contiguous_format) for one in (problem.q, problem.k, v))
    operands = ((problem.bias, problem.bias_index), (problem.mask, problem.mask_index))
    extra = [
        torch.zeros_like(one) if need and one is not None else dq.new_empty(0)
        for (one, _), need in zip(operands, needs, strict=True)
    ]
    chain = ACTIVATIONS[problem.activation].chain
    for block in blocks(len(problem.q), problem.q.shape[1], problem.k.shape[1], problem.causal, size):
        heads, rows, columns = block
        weights = problem.weights(block)
        dv[heads, columns].baddbmm_(weights.mT, gradient[heads, rows])
        ds = chain(torch.bmm(gradient[heads, rows], v[heads, columns].mT), weights)
        dq[heads, rows].baddbmm_(ds, problem.k[heads, columns], alpha=problem.scale)
        dk[heads, columns].baddbmm_(ds.mT, problem.q[heads, rows], alpha=problem.scale)
        for total, (_, index), need in zip(extra, operands, needs, strict=True):
            if need and index is not None:
                _accumulate(total, index, block, ds)
    return [
        one.to(like.dtype) if like is not None and one.ndim == 3 else one
        for one, like in zip((dq, dk, dv, *extra), inputs, strict=True)
    ]
