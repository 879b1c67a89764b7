"""pLSTM's scans against the formula cell by cell in plain torch; the recurrence under them against a loop; growth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import alternate
from provenn.core.experiment.accounting import TensorMemory
from provenn.core.sequences.scans import linear_recurrence
from provenn.nn import plstm_scan_1d, plstm_scan_2d

Scan = Callable[..., Tensor]
LENGTHS = (64, 256, 1024)


def measure() -> dict[str, Any]:
    """Compare numbers and gradients, time grids of 16 × 16 by turns, then the recurrence, then the blocks' growth."""
    difference = max(_largest_difference(shape) for shape in ((16, 16), (9, 13)))
    sequence = _largest_difference_1d(100)
    cells = _grid(16, 16, batch=2)
    ways: dict[str, Scan] = {
        "one block": _packed,
        "blocks of 4": partial(_packed, levels=2),
        "diagonals": partial(_packed, method="recurrent"),
        "peer": cell_by_cell,
    }
    times = alternate({name: partial(_train, way, cells) for name, way in ways.items()}, rounds=5)
    ours = min(times[name] for name in ways if name != "peer")
    loops = {
        length: alternate(
            {
                "scan": partial(_train, linear_recurrence, _recurrence(length)),
                "loop": partial(_train, step_by_step, _recurrence(length)),
            },
            rounds=9,
        )
        for length in LENGTHS
    }
    grown = alternate({str(n): partial(_train, _packed, _grid(n, n, batch=1)) for n in (4, 8, 16, 32)}, rounds=3)
    blocks = partial(_packed, levels=3)
    in_blocks = alternate({str(n): partial(_train, blocks, _grid(n, n, batch=1)) for n in (16, 32, 64)}, rounds=3)
    return {
        "peer": f"torch {torch.__version__}: the paper's recursion cell by cell, derived anew (the authors' package is "
        "not on the index); both passes at 16 × 16, 2 samples, 4 heads, d = 16",
        "agrees": max(difference, sequence) <= 1e-4,
        "largest_difference": max(difference, sequence),
        "speed_ratio": times["peer"] / ours,
        "speed_ratios_16x16": {name: times["peer"] / taken for name, taken in times.items() if name != "peer"},
        "recurrence_speed_ratio_over_a_loop": {str(n): one["loop"] / one["scan"] for n, one in loops.items()},
        "growth": {
            "one block, 4 → 8, time ×": grown["8"] / grown["4"],
            "one block, 8 → 16, time ×": grown["16"] / grown["8"],
            "one block, 16 → 32, time ×": grown["32"] / grown["16"],
            "blocks of 8, 16 → 32, time ×": in_blocks["32"] / in_blocks["16"],
            "blocks of 8, 32 → 64, time ×": in_blocks["64"] / in_blocks["32"],
            "one block, 16 → 32, memory ×": _memory(_packed, 32) / _memory(_packed, 16),
            "blocks of 8, 32 → 64, memory ×": _memory(blocks, 64) / _memory(blocks, 32),
        },
    }


def cell_by_cell(*flat: Tensor) -> Tensor:
    """The peer: states of the cell to the left and of the cell above, gates as numbers, one cell after the other."""
    q, k, v, *gates = flat
    sr, sd, rl, ru, dl, du, ml, mu, direct = (gate[..., None, None] for gate in gates)
    zero = torch.zeros_like(q[:, 0, 0, ..., None] * v[:, 0, 0, :, None])
    above = [zero] * q.shape[1]
    columns = []
    for y in range(q.shape[2]):
        left, row = zero, []
        for x in range(q.shape[1]):
            at, up = (slice(None), x, y), above[x]
            new = k[at][..., None] * v[at][..., None, :]
            row.append((q[at][..., None] * (ml[at] * left + mu[at] * up + direct[at] * new)).sum(-2))
            left, above[x] = (
                rl[at] * left + ru[at] * up + sr[at] * new,
                dl[at] * left + du[at] * up + sd[at] * new,
            )
        columns.append(torch.stack(row, 1))
    return torch.stack(columns, 2)


def step_by_step(gates: Tensor, inputs: Tensor) -> Tensor:
    """h_t = a_t h_{t−1} + x_t, in a loop along dimension 1."""
    state = torch.zeros_like(inputs[:, 0])
    states = []
    for a, x in zip(gates.unbind(1), inputs.unbind(1), strict=True):
        state = a * state + x
        states.append(state)
    return torch.stack(states, 1)


def _packed(*flat: Tensor, **options: Any) -> Tensor:
    return plstm_scan_2d(*flat[:3], flat[3:5], flat[5:9], flat[9:11], flat[11], **options)


def _draws(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator).sub(0.5).requires_grad_() for shape in shapes]


def _grid(x: int, y: int, batch: int) -> list[Tensor]:
    lead = (batch, x, y, 4)
    return _draws([(*lead, 16)] * 3 + [lead] * 9)


def _recurrence(length: int) -> list[Tensor]:
    return _draws([(4, length, 64)] * 2)


def _train(scan: Scan, operands: list[Tensor]) -> None:
    torch.autograd.grad(scan(*operands).sum(), operands)


def _results(scan: Scan, operands: list[Tensor]) -> list[Tensor]:
    output = scan(*operands)
    return [output, *torch.autograd.grad(output.square().sum(), operands, allow_unused=True)]


def _largest_difference(shape: tuple[int, int]) -> float:
    operands = _grid(*shape, batch=2)
    wanted = _results(cell_by_cell, operands)
    found = [_results(way, operands) for way in (_packed, partial(_packed, method="recurrent"))]
    return max((a - b).abs().max().item() for one in found for a, b in zip(one, wanted, strict=True))


def _largest_difference_1d(length: int) -> float:
    """A sequence is a grid of one row, whose edges down lead nowhere."""
    lead = (2, length, 4)
    q, k, v, source, transition, mark, direct = _draws([(*lead, 16)] * 3 + [lead] * 4)
    row = [one[:, :, None] for one in (q, k, v, source, source, *[transition] * 4, mark, mark, direct)]
    wanted = cell_by_cell(*row)[:, :, 0]
    found = [
        plstm_scan_1d(q, k, v, source, transition, mark, direct, method=method) for method in ("recurrent", "parallel")
    ]
    return max((one - wanted).abs().max().item() for one in found)


def _memory(scan: Scan, size: int) -> int:
    """Return the most bytes of tensors alive in both passes, beside the operands."""
    operands = _grid(size, size, batch=1)
    with TensorMemory() as memory:
        _train(scan, operands)
    return memory.peak
