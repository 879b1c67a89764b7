"""Searchers: each maximises the same black-box function within the same budget of evaluations, one at a time.

A part is ``part(bounds, seed=…)``: it takes ``bounds``, lower above upper bounds, and is told values to maximise by
``ask`` and ``tell``; ``best.point`` is the point that it recommends, judged without noise. Where a part's signature has
no ``seed`` it goes without.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from provenn.claims.claim import Event, Metric, Point, Progress, Settings
from provenn.compare.kind import Kind, accepted
from provenn.compare.kinds._searchers import BoTorchSearch, RandomSearch, SobolSearch
from provenn.compare.search_task import SearchSetup


def run(setup: SearchSetup, part: Any, settings: Settings) -> Iterator[Event]:
    """Search with a part, and measure the regret of what it recommends after every evaluation."""
    searcher = part(**accepted(part, {"bounds": setup.bounds, "seed": setup.seed, **settings}))
    budget = setup.task.evaluations
    score = float("nan")
    for index in range(budget):
        points = torch.stack([torch.as_tensor(point) for point in searcher.ask(1)])
        searcher.tell(points, [setup.evaluate(point, index) for point in points])
        score = setup.log_regret(torch.as_tensor(searcher.best.point))
        yield Progress(index + 1, budget)
        yield Point("course", index + 1, score)
    yield Metric("steps", budget)
    yield Metric("score", score)


KIND = Kind(
    name="search",
    part_kind="searcher",
    run=run,
    references={"random": RandomSearch, "sobol": SobolSearch, "botorch": BoTorchSearch},
    over="evaluations",
)
