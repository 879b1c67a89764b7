"""The scan over a grid: cell by cell along the anti-diagonals, or by levels of blocks that double along both axes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn import functional as F

from provenn.core.sequences.graph_scans import GridTransitions, grid_recurrence
from provenn.nn._plstm_operands import Operands, arrange, check_method, gated_attention, read, restore, written

Pair = tuple[Tensor, Tensor]


def plstm_scan_2d(
    q: Shaped[Tensor, "batch x y heads *query"],
    k: Shaped[Tensor, "batch x y heads *key"],
    v: Shaped[Tensor, "batch x y heads *value"],
    source: Pair,
    transition: tuple[Tensor, Tensor, Tensor, Tensor],
    mark: Pair,
    direct: Shaped[Tensor, "batch x y heads *direct"],
    *,
    method: Literal["recurrent", "parallel"] = "parallel",
    levels: int = 6,
) -> Shaped[Tensor, "batch x y heads *output"]:
    r"""Run pLSTM over a grid, whose cells have an edge to the right (along x) and one down (along y).

    .. math::
        C^r_{x,y} &= t^{rl} C^r_{x-1,y} + t^{ru} C^d_{x,y-1} + s^r k v^\top \\
        C^d_{x,y} &= t^{dl} C^r_{x-1,y} + t^{du} C^d_{x,y-1} + s^d k v^\top \\
        h_{x,y} &= \mu^l q^\top C^r_{x-1,y} + \mu^u q^\top C^d_{x,y-1} + \delta (q^\top k) v

    All gates, q, k, v and h are those of cell (x, y); nothing enters the grid from outside.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        source: s^r and s^d.
        transition: t^rl (left to right), t^ru (up to right), t^dl (left to down) and t^du (up to down).
        mark: μ^l and μ^u.
        direct: δ.
        method: ``"recurrent"``: all states, one anti-diagonal after the other. ``"parallel"``: blocks of 2^levels cells
            a side, in each of which a gating matrix G is put together by doubling and the output is (G ∘ QKᵀ)V;
            borders' states pass between blocks along the blocks' anti-diagonals.
        levels: Doublings of either axis, for ``"parallel"``; does not change the result. Axes are padded to a multiple
            of 2^levels, or to the next power of 2 if that is less.

    Shape:
        Without state tracking q, k (batch, X, Y, heads, d_k), v (batch, X, Y, heads, d_v), gates (batch, X, Y, heads),
        output as v; with it, dimensions as in :func:`plstm_scan_1d` come behind.

    Returns:
        h.

    Raises:
        TypeError: ``levels`` is no integer.
        ValueError: Shapes that do not fit, an unknown ``method``, or ``levels`` below 0.

    Cost: for N = X·Y cells recurrent O(N d_k d_v) time and memory in X + Y − 1 rounds; parallel, in blocks of b × b
    cells, O(N b³ + N b² d) time and O(N b² + N d_k d_v / b) memory in 2 log₂ b rounds and (X + Y)/b − 1 steps.

    Source: Pöppel et al., "pLSTM", 2025, section 4; the four transitions as in the authors' ``plstm_2d``.
    """
    check_method(method, levels)
    for name, group, count in (("source", source, 2), ("transition", transition, 4), ("mark", mark, 2)):
        if len(group) != count:
            raise ValueError(f"{name} must hold {count} tensors, got {len(group)}")
    gates = {"source": list(source), "transition": list(transition), "mark": list(mark), "direct": [direct]}
    operands, layout = arrange(q, k, v, gates, 2)
    outputs = layout.sizes["O"]
    if 0 in q.shape[:3]:
        return restore(operands.v.new_zeros(*operands.v.shape[:-1], outputs), layout)
    if method == "parallel":
        return restore(_parallel(operands, outputs, levels), layout)
    # Transitions that are matrices cross the grid in blocks of one cell.
    numbers = layout.sizes["T"] == 1
    return restore(_recurrent(operands, outputs) if numbers else _parallel(operands, outputs, 0), layout)


def _recurrent(operands: Operands, outputs: int) -> Tensor:
    q, k, v = (one[:, :, :, None] for one in operands[:3])
    right, down = (written(one, k, v).permute(1, 2, 0, 3, 4) for one in operands.sources)
    gates = (one.permute(1, 2, 0, 3, 4) for one in operands.transitions)
    right, down = (one.permute(2, 0, 1, 3, 4) for one in grid_recurrence(right, down, GridTransitions(*gates)))
    left, up = F.pad(right, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], F.pad(down, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    from_left, from_up = (read(one, q, state, outputs) for one, state in zip(operands.marks, (left, up), strict=True))
    return (from_left + from_up + gated_attention(operands.direct, q, k, v, outputs))[:, :, :, 0]


class Block(NamedTuple):
    """The linear map of a block of cells: from what enters left and up, and cells' sources, to what leaves and marks.

    The first letter says where a matrix leads (r: the right border, d: the lower border, y: the cells' marks), the
    second whence it comes (l: the left border, u: the upper border, x: the cells' sources).
    """

    rl: Tensor
    ru: Tensor
    rx: Tensor
    dl: Tensor
    du: Tensor
    dx: Tensor
    yl: Tensor
    yu: Tensor
    yx: Tensor


SMALL = 2
"""Levels at which matrices are so small and so many that they are best multiplied with the batch behind."""


def join(first: Block, second: Block, down: bool, behind: bool) -> Block:
    """Join two blocks of which the second lies to the right, or below: what leaves the first there enters the second.

    Borders and cells of the first come before those of the second.

    Args:
        first: Blocks.
        second: Their neighbours.
        down: Whether the second lies below.
        behind: Whether matrices are (rows, columns, …), with the batch behind, else (…, rows, columns).
    """
    if down:
        return _mirrored(join(_mirrored(first), _mirrored(second), False, behind))
    rows, columns = (0, 1) if behind else (-2, -1)
    return Block(
        _product(second.rl, first.rl, behind),
        torch.cat((_product(second.rl, first.ru, behind), second.ru), columns),
        torch.cat((_product(second.rl, first.rx, behind), second.rx), columns),
        torch.cat((first.dl, _product(second.dl, first.rl, behind)), rows),
        _lower(first.du, _product(second.dl, first.ru, behind), second.du, rows, columns),
        _lower(first.dx, _product(second.dl, first.rx, behind), second.dx, rows, columns),
        torch.cat((first.yl, _product(second.yl, first.rl, behind)), rows),
        _lower(first.yu, _product(second.yl, first.ru, behind), second.yu, rows, columns),
        _lower(first.yx, _product(second.yl, first.rx, behind), second.yx, rows, columns),
    )


def _product(one: Tensor, other: Tensor, behind: bool) -> Tensor:
    if not behind:
        return one @ other
    total = one[:, :1] * other[:1]
    for term in range(1, one.shape[1]):
        total = torch.addcmul(total, one[:, term : term + 1], other[term : term + 1])
    return total


def _lower(first: Tensor, corner: Tensor, second: Tensor, rows: int, columns: int) -> Tensor:
    """Return [[first, 0], [corner, second]]."""
    shape = list(first.shape)
    shape[columns] = second.shape[columns]
    above = torch.cat((first, first.new_zeros(shape)), columns)
    return torch.cat((above, torch.cat((corner, second), columns)), rows)


def _mirrored(block: Block) -> Block:
    """Exchange the two axes."""
    rl, ru, rx, dl, du, dx, yl, yu, yx = block
    return Block(du, dl, dx, ru, rl, rx, yu, yl, yx)


def merge(block: Block, levels_x: int, levels_y: int) -> Block:
    """Double the blocks, (n, X, Y, rows, columns), along either axis by turns, as often as each is asked to."""
    small = min(SMALL, max(levels_x, levels_y))
    block = Block(*(one.permute(3, 4, 1, 2, 0).contiguous() for one in block))
    for level in range(small):
        block = _doubled(block, level < levels_x, level < levels_y, behind=True)
    block = Block(*(one.permute(4, 2, 3, 0, 1).contiguous() for one in block))
    for level in range(small, max(levels_x, levels_y)):
        block = _doubled(block, level < levels_x, level < levels_y, behind=False)
    return block


def _doubled(block: Block, along_x: bool, along_y: bool, behind: bool) -> Block:
    axis = 2 if behind else 1
    if along_x:
        block = join(*_halves(block, axis), down=False, behind=behind)
    if along_y:
        block = join(*_halves(block, axis + 1), down=True, behind=behind)
    return block


def _halves(block: Block, axis: int) -> tuple[Block, Block]:
    """Return the blocks at even places along an axis, and those at odd ones."""
    pairs = [one.unflatten(axis, (-1, 2)).unbind(axis + 1) for one in block]
    return Block(*(even for even, _ in pairs)), Block(*(odd for _, odd in pairs))


def _parallel(operands: Operands, outputs: int, levels: int) -> Tensor:
    shape = operands.q.shape[1:3]
    lx, ly = (min(levels, (size - 1).bit_length()) for size in shape)
    missing = (-shape[0] % (1 << lx), -shape[1] % (1 << ly))
    q, k, v, rl, ru, dl, du, sr, sd, ml, mu, direct = (
        _padded(one, missing)
        for one in (*operands[:3], *operands.transitions, *operands.sources, *operands.marks, operands.direct)
    )
    q, k, v = (_blocks_of(one, lx, ly) for one in (q, k, v))
    cells = Block(rl, ru, sr, dl, du, sd, ml, mu, direct)
    if q.shape[1] * q.shape[2] == 1 and lx + ly > 0:
        output = _one_block(cells, q, k, v, lx, ly, outputs)
    else:
        block = merge(cells, lx, ly)
        output = gated_attention(block.yx, q, k, v, outputs)
        if q.shape[1] * q.shape[2] > 1:
            output = output + _between_blocks(block, q, k, v, outputs)
    return _grid_of(output, lx, ly)[:, : shape[0], : shape[1]]


def _one_block(cells: Block, q: Tensor, k: Tensor, v: Tensor, levels_x: int, levels_y: int, outputs: int) -> Tensor:
    """Return the output of a grid that is one block without its last join: of its halves, and of the way across."""
    down = levels_y >= levels_x
    block = merge(cells, levels_x - (not down), levels_y - down)
    q, k, v = (one[:, 0].unflatten(2, (2, -1)).transpose(1, 2) for one in (q, k, v))  # (n, half, 1, cells, …)
    first, second = _halves(block, 2 if down else 1)
    across = second.yu @ first.dx if down else second.yl @ first.rx
    own = gated_attention(block.yx.movedim(2, 1) if down else block.yx, q, k, v, outputs)
    crossed = gated_attention(across[:, 0], q[:, 1], k[:, 0], v[:, 0], outputs)
    return torch.cat((own[:, 0], own[:, 1] + crossed), 2)[:, None]


def _padded(one: Tensor, missing: tuple[int, int]) -> Tensor:
    return F.pad(one, (0, 0) * (one.ndim - 3) + (0, missing[1], 0, missing[0])) if any(missing) else one


def _bits(levels_x: int, levels_y: int) -> list[int]:
    """Return which bits of (block's x, x's bits, block's y, y's bits) number the cells of a block, the highest first.

    The last join is the highest bit; of one level, that along y comes after that along x.
    """
    order = []
    for level in reversed(range(max(levels_x, levels_y))):
        order += [1 + levels_x + levels_y - level] * (level < levels_y) + [levels_x - level] * (level < levels_x)
    return order


def _blocks_of(one: Tensor, levels_x: int, levels_y: int) -> Tensor:
    """Cut (n, X, Y, …) into (n, blocks, blocks, cells, …), cells in the order in which :func:`merge` leaves them."""
    split = one.unflatten(2, (-1, *(2,) * levels_y)).unflatten(1, (-1, *(2,) * levels_x))
    behind = 3 + levels_x + levels_y
    order = [0, 1, 2 + levels_x, *(1 + bit for bit in _bits(levels_x, levels_y)), *range(behind, split.ndim)]
    return split.permute(order).flatten(3, behind - 1) if behind > 3 else split.unsqueeze(3)


def _grid_of(one: Tensor, levels_x: int, levels_y: int) -> Tensor:
    """Undo :func:`_blocks_of`."""
    behind = 3 + levels_x + levels_y
    split = one.unflatten(3, (2,) * (levels_x + levels_y)) if behind > 3 else one[:, :, :, 0]
    order = [0, 1, 2 + levels_x, *(1 + bit for bit in _bits(levels_x, levels_y))]
    back = [order.index(axis) for axis in range(behind)]
    whole = split.permute(*back, *range(behind, split.ndim))
    return whole.flatten(2 + levels_x, behind - 1).flatten(1, 1 + levels_x)


def _between_blocks(block: Block, q: Tensor, k: Tensor, v: Tensor, outputs: int) -> Tensor:
    """Return what cells read of other blocks' sources: borders' states pass along the blocks' anti-diagonals."""
    wide, high = q.shape[1:3]
    to_right, to_down = written(block.rx, k, v), written(block.dx, k, v)
    left = torch.zeros_like(to_right[:, 0])  # what enters the next block of each row, then of each column
    up = torch.zeros_like(to_down[:, :, 0])
    entered = []
    for diagonal in range(wide + high - 1):
        x = torch.arange(max(0, diagonal - high + 1), min(wide, diagonal + 1), device=q.device)
        y = diagonal - x
        from_left, from_up = left[:, y], up[:, x]
        entered.append((from_left, from_up))
        right = block.rl[:, x, y] @ from_left + block.ru[:, x, y] @ from_up + to_right[:, x, y]
        down = block.dl[:, x, y] @ from_left + block.du[:, x, y] @ from_up + to_down[:, x, y]
        left, up = left.index_copy(1, y, right), up.index_copy(1, x, down)
    # Blocks came in the order of their diagonals.
    ranges = [(max(0, d - high + 1), min(wide, d + 1)) for d in range(wide + high - 1)]
    xs = torch.cat([torch.arange(first, last, device="cpu") for first, last in ranges])
    ds = torch.cat([torch.full((last - first,), d, device="cpu") for d, (first, last) in enumerate(ranges)])
    place = torch.argsort(xs * high + (ds - xs)).to(q.device)
    lefts, ups = (torch.cat(one, 1)[:, place].unflatten(1, (wide, high)) for one in zip(*entered, strict=True))
    return read(block.yl, q, lefts, outputs) + read(block.yu, q, ups, outputs)
