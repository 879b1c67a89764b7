"""Which sources each query sees: windows of queries, and a random order of the sources cut in as many windows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class Subset(NamedTuple):
    """Block b of queries looks at block b of sources; indices from the length on stand for padding.

    Args:
        queries: Original index of every query, (blocks, window).
        sources: Original index of every source, likewise; every index occurs once.
    """

    queries: Int[Tensor, "blocks window"]
    sources: Int[Tensor, "blocks window"]


class Windows(NamedTuple):
    """A grid of tokens, cut in ``rows`` × ``columns`` windows of equal size; a sequence is a grid of height 1."""

    height: int
    width: int
    rows: int
    columns: int


def windows_of(tokens: int, sparsity: int, grid: tuple[int, int] | None, strict: bool) -> Windows:
    """Cut tokens in ``sparsity`` windows, those of a grid as nearly square as the divisors allow.

    Args:
        tokens: How many there are.
        sparsity: s.
        grid: Height and width of a grid of tokens; ``None`` for a sequence.
        strict: Whether a sequence must be divisible, and not be padded.

    Raises:
        ValueError: ``tokens`` is not divisible by ``sparsity`` and ``strict``; or the grid has another number of
            tokens, or cannot be cut in ``sparsity`` windows of one size.
    """
    if grid is None:
        window = -(-tokens // sparsity)
        if strict and window * sparsity != tokens:
            raise ValueError(f"sparsity must divide the tokens where strict, got {sparsity} and {tokens} tokens")
        return Windows(1, window * sparsity, 1, sparsity)
    height, width = grid
    if height * width != tokens:
        raise ValueError(f"grid must have the {tokens} tokens of the call, got {height} × {width}")
    cuts = [
        (rows, sparsity // rows)
        for rows in range(1, sparsity + 1)
        if sparsity % rows == 0 and height % rows == 0 and width % (sparsity // rows) == 0
    ]
    if not cuts:
        raise ValueError(f"grid must be divisible in {sparsity} equal windows, got {height} × {width}")
    rows, columns = min(cuts, key=lambda cut: abs(math.log(height / cut[0]) - math.log(width / cut[1])))
    return Windows(height, width, rows, columns)


def _blocked(windows: Windows, sigma: float, generator: torch.Generator | None) -> Int[Tensor, "blocks window"]:
    """Order the tokens by windows, each moved first by σ windows times normal noise, down and across."""
    height, width, rows, columns = windows
    place = torch.arange(height * width, device="cpu")
    row, column = (place // width).double(), (place % width).double()
    if sigma > 0 and rows > 1:
        row = row + sigma * height / rows * _normal(len(place), generator)
    if sigma > 0 and columns > 1:
        column = column + sigma * width / columns * _normal(len(place), generator)
    bands = row.argsort(stable=True).reshape(rows, -1)
    return bands.gather(1, column[bands].argsort(dim=1, stable=True)).reshape(rows * columns, -1)


def _normal(count: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn(count, generator=generator, dtype=torch.float64, device="cpu")


def _shifted(order: Tensor, windows: Windows, generator: torch.Generator | None) -> Tensor:
    """Draw how far the windows' borders move, and move them; what leaves at one end enters at the other."""
    height, width, rows, columns = windows
    down = torch.randint(height // rows, (), generator=generator, device="cpu")
    across = torch.randint(width // columns, (), generator=generator, device="cpu")
    return (order // width + down) % height * width + (order % width + across) % width


def draw_subset(
    windows: Windows,
    bias: str,
    sigma: float,
    moving: bool,
    generator: torch.Generator | None,
    device: torch.device | str | None = None,
) -> Subset:
    """Draw the sources of every window of queries.

    Args:
        windows: How tokens are cut.
        bias: ``"none"``: sources in uniformly random order; ``"local"``: ordered by place + σ · window · N(0, 1).
        sigma: σ.
        moving: Whether the windows' borders move by a random offset.
        generator: Draws, on the CPU; ``None``: torch's global one.
        device: Where the indices go.

    Cost: O(N log N), once a layer and call, whatever batch and heads.
    """
    queries = _blocked(windows, 0.0, None)
    if bias == "none":
        sources = torch.randperm(queries.numel(), generator=generator, device="cpu").reshape(queries.shape)
    else:
        sources = _blocked(windows, sigma, generator)
    if moving:
        both = _shifted(torch.stack([queries, sources]), windows, generator)
        queries, sources = both[0], both[1]
    return Subset(queries.to(device), sources.to(device))
