"""Trade-offs of two figures: which points no other beats, and how much the points cover. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence

Pair = tuple[float, float]


def front(points: Sequence[Pair]) -> list[Pair]:
    """Return the points ``(cost, gain)`` that no other beats (less cost, more gain), by ascending cost; once each."""
    kept: list[Pair] = []
    for cost, gain in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not kept or gain > kept[-1][1]:
            kept.append((cost, gain))
    return kept


def hypervolume(gains: Sequence[Pair]) -> float:
    """Return the area that points cover from the origin, both figures being gains.

    Points that do not gain in both cover nothing.

    Source: Zitzler and Thiele, "Multiobjective optimization using evolutionary algorithms", PPSN V (1998).
    """
    area, height = 0.0, 0.0
    # From the right: each point adds the strip by which it stands above those that reach further.
    for x, y in sorted(gains, reverse=True):
        if x > 0 and y > height:
            area += x * (y - height)
            height = y
    return area
