"""Trade-offs against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from provenn.compare.pareto import front, hypervolume


def brute_area(points, cells: int = 12) -> float:
    """Count the unit cells of a grid that some point covers; points have whole coordinates."""
    grid = itertools.product(range(cells), range(cells))
    return sum(any(x >= i + 1 and y >= j + 1 for x, y in points) for i, j in grid)


@pytest.mark.parametrize("seed", range(20))
def test_hypervolume_and_front_against_brute_force(seed) -> None:
    generator = np.random.default_rng(seed)
    points = [tuple(map(int, point)) for point in generator.integers(-3, 12, size=(generator.integers(0, 9), 2))]
    assert hypervolume(points) == brute_area(points)
    expected = {(x, y) for x, y in points if not any((a <= x and b >= y and (a, b) != (x, y)) for a, b in points)}
    found = front(points)
    assert set(found) == expected
    assert found == sorted(expected)


def test_a_point_without_gain_in_both_covers_nothing() -> None:
    assert hypervolume([]) == 0
    assert hypervolume([(-1, 5), (5, -1), (0, 3), (3, 0)]) == 0
    assert hypervolume([(2, 3), (2, 3)]) == 6
