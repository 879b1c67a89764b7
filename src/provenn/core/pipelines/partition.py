"""Cuts of a sequence into consecutive blocks of even cost: the exact optimum, and a heuristic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from provenn.core.experiment.checks import check_integer, check_number


def optimal_blocks(costs: Sequence[float], k: int) -> list[int]:
    """Cut a sequence into k consecutive blocks so that the largest sum of a block is as small as can be.

    Of the cuts that reach it, the one with the least sum of squared block sums is taken, so that the other blocks are
    even as well.

    Args:
        costs: The cost of each entry, ≥ 0.
        k: Number of blocks; none is empty.

    Returns:
        The lengths of the blocks.

    Raises:
        ValueError: ``k`` < 1, fewer entries than blocks, or a cost that is negative or not finite.

    Cost: O(k n²) time, O(k n) memory, by dynamic programming over the last cut.
    """
    sums = _prefix_sums(costs, k)
    length = len(costs)
    largest = _smallest_maximum(sums, k)
    allowed = largest * (1 + 1e-12)
    # squares[e]: the least sum of squares of the first entries e in so many blocks, none above the maximum
    squares = np.full(length + 1, np.inf)
    squares[0] = 0.0
    before = np.zeros((k, length + 1), dtype=int)
    for block in range(k):
        following = np.full(length + 1, np.inf)
        for end in range(block + 1, length + 1):
            size = sums[end] - sums[:end]
            candidates = np.where(size <= allowed, squares[:end] + size**2, np.inf)
            before[block, end] = candidates.argmin()
            following[end] = candidates.min()
        squares = following
    cuts = [length]
    for block in reversed(range(k)):
        cuts.append(int(before[block, cuts[-1]]))
    return [stop - start for start, stop in pairwise(reversed(cuts))]


def _prefix_sums(costs: Sequence[float], k: int) -> np.ndarray:
    check_integer("k", k, at_least=1)
    for place, cost in enumerate(costs):
        check_number(f"costs[{place}]", cost, at_least=0)
    if len(costs) < k:
        raise ValueError(f"k must be at most the number of costs, {len(costs)}, got {k}")
    return np.concatenate([[0.0], np.cumsum(np.asarray(costs, dtype=np.float64))])


def _smallest_maximum(sums: np.ndarray, k: int) -> float:
    length = len(sums) - 1
    best = sums.copy()  # of one block
    for block in range(1, k):
        following = np.full(length + 1, np.inf)
        for end in range(block + 1, length + 1):
            following[end] = np.maximum(best[block:end], sums[end] - sums[block:end]).min()
        best = following
    return float(best[length])


def even_blocks(costs: Sequence[float], k: int) -> list[int]:
    """Cut a sequence into k consecutive blocks whose sums differ by at most the largest cost, by moving single entries.

    From blocks of equal length on, entries at the border move from the largest block towards the nearest smallest one,
    until the largest and the smallest sum differ by no more than the spread of the costs.

    Args:
        costs: The cost of each entry, ≥ 0.
        k: Number of blocks; none is empty.

    Returns:
        The lengths of the blocks.

    Raises:
        ValueError: As for :func:`optimal_blocks`.

    Cost: O(k n³) time at most, O(n) memory; the sums are near even, not optimal.

    Source: Bárány and Grinberg, "Block partitions of sequences", Israel J. Math. 206 (2015); torchgpipe's balance.
    """
    _prefix_sums(costs, k)
    least, spread = min(costs), max(costs) - min(costs)
    scaled = [(cost - least) / spread if spread > 0 else 0.0 for cost in costs]
    cuts = [len(costs) // k * block for block in range(k)] + [len(costs)]

    def sizes() -> list[float]:
        return [math.fsum(scaled[start:stop]) for start, stop in pairwise(cuts)]

    largest = int(np.argmax(sizes()))
    while True:
        now = sizes()
        smallest = min(range(k), key=lambda block: (now[block], abs(block - largest)))
        if now[largest] <= now[smallest] + 1 + 1e-12:
            break
        if largest < smallest:  # the entry before the smallest block joins it
            giver = smallest - 1
            cuts[smallest] -= 1
        else:
            giver = smallest + 1
            cuts[smallest + 1] += 1
        if giver == largest:
            largest = int(np.argmax(sizes()))
    lengths = [stop - start for start, stop in pairwise(cuts)]
    return lengths if min(lengths) > 0 else optimal_blocks(costs, k)
