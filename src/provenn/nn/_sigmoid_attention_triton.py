"""The fused CUDA kernel: sigmoid attention in tiles, forward and backward (FlashSigmoid, Algorithm 1 of the paper).

A program owns one tile of rows (or of columns) of one head, and walks over the other side. There is no running
maximum or sum to carry, and no row correction in the backward pass: with P the tile's weights, dS = dP ⊙ P ⊙ (1 − P).

σ is computed as 1/(1 + e^(−s)). The authors' ½(1 + tanh(s/2)) is one instruction on a GPU, but its absolute rounding
error of 6e-8 is large beside weights that start at 1/n.

``no_type_check`` keeps run-time checkers of signatures from wrapping what triton is to compile.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from provenn.core.sequences.streaming import register_kernel


@triton.jit
@no_type_check
def _weights(
    q, k, rows, columns, queries, keys, scale, constant, slope, bias, mask, mask_row, mask_column,
    HAS_BIAS: tl.constexpr, BIAS_ROWS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Weights of one tile, rows × columns; ``bias`` and ``mask`` point at this head's."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + constant
    place = rows[:, None] + (keys - queries)
    s -= slope * tl.abs(place - columns[None, :]).to(tl.float32)
    inside_rows, inside_columns = rows < queries, columns < keys
    if HAS_BIAS:
        if BIAS_ROWS:
            s += tl.load(bias + rows, mask=inside_rows, other=0.0).to(tl.float32)[:, None]
        else:
            s += tl.load(bias).to(tl.float32)
    visible = inside_rows[:, None] & inside_columns[None, :]
    if MASK != 0:
        where = mask + rows[:, None].to(tl.int64) * mask_row + columns[None, :].to(tl.int64) * mask_column
        entry = tl.load(where, mask=visible, other=0)
        if MASK == 1:
            visible = visible & (entry != 0)
        else:
            s += entry.to(tl.float32)
    if CAUSAL:
        visible = visible & (columns[None, :] <= place)
    return tl.where(visible, 1 / (1 + tl.exp(-s)), 0.0)


@triton.jit
@no_type_check
def _forward_kernel(
    Q, K, V, OUT, SLOPES, BIAS, BIAS_INDEX, MASK_AT, MASK_INDEX,
    queries, keys, scale, constant, bias_stride, mask_stride, mask_row, mask_column,
    D: tl.constexpr, E: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_ROWS: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, ROWS)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    rows = tile * ROWS + tl.arange(0, ROWS)
    d, e = tl.arange(0, HEAD), tl.arange(0, VALUE)
    slope, bias, mask = 0.0, BIAS, MASK_AT
    if HAS_SLOPES:
        slope = tl.load(SLOPES + head)
    if HAS_BIAS:
        bias += tl.load(BIAS_INDEX + head) * bias_stride
    if MASK != 0:
        mask += tl.load(MASK_INDEX + head) * mask_stride
    Q += head * queries * D
    K += head * keys * D
    V += head * keys * E
    OUT += head * queries * E
    q = tl.load(Q + rows[:, None] * D + d[None, :], mask=(rows < queries)[:, None] & (d < D)[None, :], other=0.0)
    total = tl.zeros((ROWS, VALUE), tl.float32)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (tile + 1) * ROWS + keys - queries)
    for start in range(0, end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (columns < keys)[:, None]
        k = tl.load(K + columns[:, None] * D + d[None, :], mask=inside & (d < D)[None, :], other=0.0)
        v = tl.load(V + columns[:, None] * E + e[None, :], mask=inside & (e < E)[None, :], other=0.0)
        p = _weights(
            q, k, rows, columns, queries, keys, scale, constant, slope, bias, mask, mask_row, mask_column,
            HAS_BIAS, BIAS_ROWS, MASK, CAUSAL,
        )  # fmt: skip
        total += tl.dot(p.to(v.dtype), v, input_precision="ieee")
    where = (rows < queries)[:, None] & (e < E)[None, :]
    tl.store(OUT + rows[:, None] * E + e[None, :], total.to(OUT.dtype.element_ty), mask=where)


@triton.jit
@no_type_check
def _query_gradient_kernel(
    Q, K, V, DO, DQ, DROW, SLOPES, BIAS, BIAS_INDEX, MASK_AT, MASK_INDEX,
    queries, keys, scale, constant, bias_stride, mask_stride, mask_row, mask_column,
    D: tl.constexpr, E: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_ROWS: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, ROWS)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    rows = tile * ROWS + tl.arange(0, ROWS)
    d, e = tl.arange(0, HEAD), tl.arange(0, VALUE)
    slope, bias, mask = 0.0, BIAS, MASK_AT
    if HAS_SLOPES:
        slope = tl.load(SLOPES + head)
    if HAS_BIAS:
        bias += tl.load(BIAS_INDEX + head) * bias_stride
    if MASK != 0:
        mask += tl.load(MASK_INDEX + head) * mask_stride
    Q += head * queries * D
    K += head * keys * D
    V += head * keys * E
    DO += head * queries * E
    DQ += head * queries * D
    inside = (rows < queries)[:, None]
    q = tl.load(Q + rows[:, None] * D + d[None, :], mask=inside & (d < D)[None, :], other=0.0)
    do = tl.load(DO + rows[:, None] * E + e[None, :], mask=inside & (e < E)[None, :], other=0.0)
    dq = tl.zeros((ROWS, HEAD), tl.float32)
    drow = tl.zeros((ROWS,), tl.float32)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (tile + 1) * ROWS + keys - queries)
    for start in range(0, end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        within = (columns < keys)[:, None]
        k = tl.load(K + columns[:, None] * D + d[None, :], mask=within & (d < D)[None, :], other=0.0)
        v = tl.load(V + columns[:, None] * E + e[None, :], mask=within & (e < E)[None, :], other=0.0)
        p = _weights(
            q, k, rows, columns, queries, keys, scale, constant, slope, bias, mask, mask_row, mask_column,
            HAS_BIAS, BIAS_ROWS, MASK, CAUSAL,
        )  # fmt: skip
        ds = tl.dot(do, tl.trans(v), input_precision="ieee") * p * (1 - p)
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
        drow += tl.sum(ds, axis=1)
    tl.store(DQ + rows[:, None] * D + d[None, :], (dq * scale).to(DQ.dtype.element_ty), mask=inside & (d < D)[None, :])
    tl.store(DROW + head * queries + rows, drow, mask=rows < queries)


@triton.jit
@no_type_check
def _key_gradient_kernel(
    Q, K, V, DO, DK, DV, SLOPES, BIAS, BIAS_INDEX, MASK_AT, MASK_INDEX,
    queries, keys, scale, constant, bias_stride, mask_stride, mask_row, mask_column,
    D: tl.constexpr, E: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_ROWS: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(keys, COLUMNS)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    d, e = tl.arange(0, HEAD), tl.arange(0, VALUE)
    slope, bias, mask = 0.0, BIAS, MASK_AT
    if HAS_SLOPES:
        slope = tl.load(SLOPES + head)
    if HAS_BIAS:
        bias += tl.load(BIAS_INDEX + head) * bias_stride
    if MASK != 0:
        mask += tl.load(MASK_INDEX + head) * mask_stride
    Q += head * queries * D
    K += head * keys * D
    V += head * keys * E
    DO += head * queries * E
    DK += head * keys * D
    DV += head * keys * E
    inside = (columns < keys)[:, None]
    k = tl.load(K + columns[:, None] * D + d[None, :], mask=inside & (d < D)[None, :], other=0.0)
    v = tl.load(V + columns[:, None] * E + e[None, :], mask=inside & (e < E)[None, :], other=0.0)
    dk = tl.zeros((COLUMNS, HEAD), tl.float32)
    dv = tl.zeros((COLUMNS, VALUE), tl.float32)
    begin = 0
    if CAUSAL:  # the first row that sees this tile's first column, rounded down to a tile of rows
        begin = tl.maximum(0, tile * COLUMNS - (keys - queries)) // ROWS * ROWS
    for start in range(begin, queries, ROWS):
        rows = start + tl.arange(0, ROWS)
        within = (rows < queries)[:, None]
        q = tl.load(Q + rows[:, None] * D + d[None, :], mask=within & (d < D)[None, :], other=0.0)
        do = tl.load(DO + rows[:, None] * E + e[None, :], mask=within & (e < E)[None, :], other=0.0)
        p = _weights(
            q, k, rows, columns, queries, keys, scale, constant, slope, bias, mask, mask_row, mask_column,
            HAS_BIAS, BIAS_ROWS, MASK, CAUSAL,
        )  # fmt: skip
        dv += tl.dot(tl.trans(p).to(do.dtype), do, input_precision="ieee")
        ds = tl.dot(do, tl.trans(v), input_precision="ieee") * p * (1 - p)
        dk += tl.dot(tl.trans(ds).to(q.dtype), q, input_precision="ieee")
    tl.store(
        DK + columns[:, None] * D + d[None, :], (dk * scale).to(DK.dtype.element_ty), mask=inside & (d < D)[None, :]
    )
    tl.store(DV + columns[:, None] * E + e[None, :], dv.to(DV.dtype.element_ty), mask=inside & (e < E)[None, :])


class _Launch:
    """What the three kernels share: operands made contiguous, strides, tile sizes, switches."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, bias_index: Tensor | None, mask: Tensor | None,
        mask_index: Tensor | None, slopes: Tensor | None, scale: float, constant: float, causal: bool,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        (self.count, self.queries, d), self.keys, e = q.shape, k.shape[1], v.shape[2]
        bias = None if bias is None else bias.contiguous()
        mask = None if mask is None else mask.contiguous()
        kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
        if kind == 1:
            mask = mask.view(torch.uint8)
        absent = self.q  # a pointer that no switched-off branch follows
        # Contiguous, as the kernels read them: an index or slope shared by all heads comes as a view of stride 0.
        self.operands = [
            absent if one is None else one.contiguous() for one in (slopes, bias, bias_index, mask, mask_index)
        ]
        self.numbers = [
            self.queries, self.keys, scale, constant,
            0 if bias is None else bias.stride(0),
            *((0, 0, 0) if mask is None else (mask.stride(0), _step(mask, 1), _step(mask, 2))),
        ]  # fmt: skip
        head, value = (max(16, triton.next_power_of_2(size)) for size in (d, e))
        # Sizes whose tiles fit the 99 KB of shared memory that any recent GPU gives a program.
        side, stages = (32 if max(head, value) > 32 else 64, 2) if q.dtype == torch.float32 else (64, 3)
        self.rows = self.columns = side
        self.switches = {
            "D": d, "E": e, "HEAD": head, "VALUE": value, "ROWS": side, "COLUMNS": side,
            "HAS_SLOPES": slopes is not None, "HAS_BIAS": bias is not None,
            "BIAS_ROWS": bias is not None and bias.shape[1] > 1, "MASK": kind, "CAUSAL": causal,
            "num_stages": stages,
        }  # fmt: skip

    def run(self, kernel: object, tiles: int, *tensors: Tensor) -> None:
        """Launch a kernel over its tiles of every head, on the operands' device."""
        if tiles * self.count == 0:
            return
        with torch.cuda.device_of(self.q):
            kernel[(tiles * self.count,)](*tensors, *self.operands, *self.numbers, **self.switches)  # type: ignore[index]


def _step(mask: Tensor, dim: int) -> int:
    return 0 if mask.shape[dim] == 1 else mask.stride(dim)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, bias_index: Tensor | None, mask: Tensor | None,
    mask_index: Tensor | None, slopes: Tensor | None, activation: str, scale: float, constant: float, causal: bool,
    size: int,
) -> Tensor:  # fmt: skip
    launch = _Launch(q, k, v, bias, bias_index, mask, mask_index, slopes, scale, constant, causal)
    output = torch.zeros(launch.count, launch.queries, v.shape[2], dtype=v.dtype, device=v.device)
    launch.run(_forward_kernel, triton.cdiv(launch.queries, launch.rows), launch.q, launch.k, launch.v, output)
    return output


def _backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, bias_index: Tensor | None,
    mask: Tensor | None, mask_index: Tensor | None, slopes: Tensor | None, activation: str, scale: float,
    constant: float, causal: bool, size: int, needs_bias: bool, needs_mask: bool,
) -> list[Tensor]:  # fmt: skip
    launch = _Launch(q, k, v, bias, bias_index, mask, mask_index, slopes, scale, constant, causal)
    gradient = gradient.contiguous()
    dq, dk, dv = (torch.zeros_like(one) for one in (launch.q, launch.k, launch.v))
    drow = torch.zeros(launch.count, launch.queries, dtype=torch.float32, device=q.device)
    inputs = (launch.q, launch.k, launch.v, gradient)
    launch.run(_query_gradient_kernel, triton.cdiv(launch.queries, launch.rows), *inputs, dq, drow)
    launch.run(_key_gradient_kernel, triton.cdiv(launch.keys, launch.columns), *inputs, dk, dv)
    nothing = q.new_empty(0)
    if not needs_bias or bias is None or bias_index is None:
        return [dq, dk, dv, nothing, nothing.clone()]
    by_row = drow.unsqueeze(2) if bias.shape[1] > 1 else drow.sum(dim=1).reshape(-1, 1, 1)
    dbias = torch.zeros_like(bias, dtype=torch.float32).index_add_(0, bias_index, by_row).to(bias.dtype)
    return [dq, dk, dv, dbias, nothing]


register_kernel("triton", _forward, _backward)
