"""What the suite of searchers runs: whole searches, and what ``best`` must be after them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from provenn.contracts.cases_training import SearcherCase
from provenn.contracts.suite import expect
from provenn.contracts.watch import same, seeded

Told = list[tuple[Any, Any]]


def take(points: Any, indices: Sequence[int]) -> Any:
    """Return some of the points, in the container that they came in."""
    return points[list(indices)] if isinstance(points, Tensor) else [points[index] for index in indices]


def like(points: Sequence[Any], wanted: Any) -> Any:
    """Return points in a container such as ``wanted``."""
    return torch.stack(list(points)).to(wanted) if isinstance(wanted, Tensor) else list(points)


def make(case: SearcherCase, seed: int = 0) -> Any:
    with seeded(0):
        return case.make(seed)


def ask(case: SearcherCase, searcher: Any, count: int) -> Any:
    """Ask for points, and expect as many valid ones."""
    points = case.ask(searcher, count)
    expect(len(points) == count, f"ask({count}) gave {len(points)} points")
    bad = [point for point in points if not case.valid(point)]
    expect(not bad, f"it proposed {bad[:1]}, which is not of the right type or not within bounds")
    return points


def search(
    case: SearcherCase,
    searcher: Any,
    evaluations: int,
    worth: Callable[[Any], Any] | None = None,
    *,
    outside: int = 0,
) -> Told:
    """Ask, evaluate and tell; return the points with what was told of them. ``outside`` seeds torch's generator."""
    told: Told = []
    with seeded(outside):
        while len(told) < evaluations:
            points = ask(case, searcher, min(case.batch, evaluations - len(told)))
            found = [(copy.deepcopy(point), (worth or case.objective)(point)) for point in points]
            case.tell(searcher, points, [value for _, value in found])
            told += found
    return told


def values_of(told: Told) -> list[Any]:
    return [value for _, value in told]


def is_finite(value: Any) -> bool:
    return bool(np.isfinite(np.asarray(value, dtype=np.float64)).all())


def quality(case: SearcherCase, values: Iterable[Any]) -> float:
    """Return the worth of a search, larger is better."""
    finite = [value for value in values if is_finite(value)]
    if case.quality is not None:
        return case.quality(finite)
    return float(max(finite) if case.direction == "maximize" else -min(finite))


def expect_best(case: SearcherCase, searcher: Any, told: Told) -> None:
    """Expect ``best`` to be the best that was told, or, where it is a belief, a valid point."""
    point, value = case.best(searcher)
    if not case.best_of_told:
        return
    finite = [v for v in values_of(told) if is_finite(v)]
    wanted = max(finite) if case.direction == "maximize" else min(finite)
    close = math.isclose(float(value), wanted, rel_tol=1e-6, abs_tol=1e-12)
    expect(close, f"best.value is {float(value):.6g}, the best value told is {wanted:.6g}")
    matching = [p for p, v in told if v == wanted]
    expect(any(same(p, point) for p in matching), f"best.point is {point}, the best point told is {matching[0]}")
