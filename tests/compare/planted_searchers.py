"""A black-box function with a known maximum, and searchers that note what they are given."""

from __future__ import annotations

import torch

from provenn.compare.search_task import SearchTask

EVALUATIONS = 6
SEEN: list[tuple[str, int | None, float]] = []
"""Searcher, seed and each value told."""


class Hill:
    """3 − |x − (0.25, −0.5)|², at most 3."""

    bounds = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    maximum = 3.0

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        return 3 - (points - torch.tensor([0.25, -0.5], dtype=points.dtype)).square().sum(-1)


QUIET = SearchTask("hill", "a hill", Hill, EVALUATIONS)
NOISY = SearchTask("noisy-hill", "a noisy hill", Hill, EVALUATIONS, noise=0.5)


class Walker:
    """Walks along the first axis from 0 by quarters; recommends the last point."""

    name = "walker"
    second = -0.5

    def __init__(self, bounds: torch.Tensor, seed: int) -> None:
        assert bounds.tolist() == Hill.bounds.tolist()
        self.seed, self.place, self.best = seed, -1, None

    def ask(self, n: int) -> torch.Tensor:
        assert n == 1
        self.place += 1
        return torch.tensor([[0.25 * (self.place % 4), self.second]], dtype=torch.float64)

    def tell(self, points: torch.Tensor, values: list[float]) -> None:
        assert isinstance(values, list)
        SEEN.extend((self.name, self.seed, value) for value in values)
        self.best = type("Best", (), {"point": points[-1]})


class Seedless(Walker):
    """Takes no seed, stays a tenth off on the second axis, and returns lists."""

    name = "seedless"
    second = -0.4

    def __init__(self, bounds: torch.Tensor) -> None:
        super().__init__(bounds, -1)

    def ask(self, n: int) -> list[torch.Tensor]:
        return list(super().ask(n))


class Stuck(Walker):
    def ask(self, n: int) -> torch.Tensor:
        raise RuntimeError("planted fault")
