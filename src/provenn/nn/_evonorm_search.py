"""The evolution of layers: tournaments won on the Pareto front over a sliding window of candidates."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.experiment.seeding import generator
from provenn.nn._evonorm_anchors import NormActAnchor
from provenn.nn._evonorm_graph import NormActGraph, NormActSpace
from provenn.nn._evonorm_rejection import NormActRejection

SELECTIONS = ("pareto", "average", "single")


class Candidate(NamedTuple):
    """A graph, the mean of its scores, and the scores."""

    point: NormActGraph
    value: float
    values: tuple[float, ...]


class EvoNormSearch:
    """Search a space of layers by regularised evolution with several objectives.

    Until ``population`` candidates were accepted, graphs are random. Then each is the child of a tournament: some of
    the window's candidates are drawn, the winner is drawn from those of them that no other beats on all anchors, and
    one node of it is mutated; or, at random, the graph is a fresh one. The window holds the latest ``population``
    accepted candidates; the older die, however good they were.

    Use :meth:`run`, or ``ask`` and ``tell`` around an evaluation of your own: scores are one number an anchor, larger
    is better, and any number of them works. A candidate whose scores are not all finite counts as rejected.

    Args:
        space: What may be proposed.
        anchors: Networks that :meth:`evaluate` trains; none if you evaluate by yourself.
        population: Size of the start population and of the window.
        rejection: Tests before a full training; ``None`` trains everything.
        tournament: Share of the window in a tournament; two candidates at least.
        selection: Who wins: ``"pareto"``, drawn uniformly from the candidates that no other dominates;
            ``"average"``, the best mean; or ``"single"``, the best on the first anchor.
        restart: Probability of a random graph in place of a child.
        seed: All draws derive from it.

    Attributes:
        history: All accepted candidates in the order told.
        rejected: How many were rejected, by reason: ``"quality"`` and ``"stability"`` by :meth:`evaluate`, and
            ``"told"`` for all that were told scores that are not finite.

    Shape: no tensors; scores are tuples of one number an anchor.

    Raises:
        ValueError: A number out of range, an unknown selection, scores of another number than the points or than
            those told before, or a point that is not in the space; ``best`` before any was accepted.
        TypeError: Something of the wrong type.

    Cost: of ``ask``, O(population · anchors) for every graph; of :meth:`evaluate`, that of rejection and trainings.

    Source: arXiv 2004.02967, on evolution and selection; Real et al., arXiv 1802.01548, for the window.
    """

    def __init__(
        self,
        space: NormActSpace,
        anchors: Sequence[NormActAnchor] = (),
        population: int = 100,
        rejection: NormActRejection | None = NormActRejection(),  # noqa: B008 - frozen
        tournament: float = 0.05,
        selection: str = "pareto",
        restart: float = 0.05,
        seed: int = 0,
    ) -> None:
        if not isinstance(space, NormActSpace):
            raise TypeError(f"space must be a NormActSpace, got {space!r}")
        if not all(isinstance(anchor, NormActAnchor) for anchor in anchors):
            raise TypeError(f"anchors must be NormActAnchor objects, got {anchors!r}")
        check_integer("population", population, at_least=2)
        check_number("tournament", tournament, above=0, at_most=1)
        check_choice("selection", selection, SELECTIONS)
        check_number("restart", restart, at_least=0, at_most=1)
        check_integer("seed", seed)
        self.space, self.anchors, self.population, self.rejection = space, tuple(anchors), population, rejection
        self.tournament, self.selection, self.restart, self.seed = tournament, selection, restart, seed
        self.history: list[Candidate] = []
        self.rejected: Counter[str] = Counter()
        self._window: deque[Candidate] = deque(maxlen=population)
        self._asked = 0

    def ask(self, n: int = 1) -> list[NormActGraph]:
        """Propose graphs.

        Args:
            n: How many.
        """
        check_integer("n", n, at_least=1)
        return [self._proposal() for _ in range(n)]

    def _proposal(self) -> NormActGraph:
        draws = generator(self.seed, "proposal", self._asked)  # by number: a copy goes on as the original
        self._asked += 1
        if len(self._window) < self.population or torch.rand((), generator=draws, device="cpu").item() < self.restart:
            return NormActGraph.random(self.space, draws)
        return self._winner(draws).point.mutate(self.space, draws)

    def _winner(self, draws: torch.Generator) -> Candidate:
        size = max(2, round(self.tournament * len(self._window)))
        order = torch.randperm(len(self._window), generator=draws, device="cpu")[:size].tolist()
        rivals = [self._window[index] for index in order]
        if self.selection != "pareto":
            return max(rivals, key=lambda rival: rival.value if self.selection == "average" else rival.values[0])
        best = undominated(_values(rivals)).nonzero().flatten()
        return rivals[int(best[torch.randint(len(best), (), generator=draws, device="cpu")])]

    def tell(self, points: Sequence[NormActGraph], values: Sequence[float | Sequence[float]]) -> None:
        """Take what graphs are worth, asked for or not.

        Args:
            points: The graphs.
            values: For each a score, or a sequence of one score an anchor; not finite if it was rejected or failed.
        """
        if len(points) != len(values):
            raise ValueError(f"values must be one a point ({len(points)}), got {len(values)}")
        made = [_candidate(point, value) for point, value in zip(points, values, strict=True)]
        counts = {len(one.values) for one in (*made, *self.history[:1])}
        if len(counts) > 1:
            raise ValueError(f"values must have one number of scores for all points, got {sorted(counts)}")
        for one in made:
            if one.point not in self.space:
                raise ValueError(f"points must be of the space {self.space}, got {one.point}")
        for one in made:
            if math.isfinite(one.value):
                self.history.append(one)
                self._window.append(one)
            else:
                self.rejected["told"] += 1

    @property
    def best(self) -> Candidate:
        """The candidate with the best mean score of all told; the first of several."""
        if not self.history:
            raise ValueError("best is unknown: no accepted candidate was told yet")
        return max(self.history, key=lambda one: one.value)

    @property
    def front(self) -> list[Candidate]:
        """The candidates of all told that no other dominates, in the order told."""
        if not self.history:
            return []
        kept = undominated(_values(self.history)).tolist()
        return [one for one, stays in zip(self.history, kept, strict=True) if stays]

    def finalists(self, count: int = 10) -> list[Candidate]:
        """Return the best by mean score, each function once.

        Args:
            count: How many, at most.
        """
        check_integer("count", count, at_least=1)
        ranked = sorted(self.history, key=lambda one: -one.value)
        return list({one.point.hash(): one for one in reversed(ranked)}.values())[::-1][:count]

    def rerank(self, anchors: Sequence[NormActAnchor], count: int = 10) -> list[Candidate]:
        """Train the finalists in other, larger anchors, and return them by their mean score there.

        Args:
            anchors: The anchors.
            count: How many finalists.
        """
        trained = [
            _candidate(one.point, [anchor.accuracy(one.point) for anchor in anchors]) for one in self.finalists(count)
        ]
        return sorted(trained, key=lambda one: -one.value)

    def evaluate(self, graph: NormActGraph) -> tuple[float, ...]:
        """Return a graph's validation accuracy on every anchor, or NaN for all if it is rejected.

        Args:
            graph: The candidate.
        """
        if not self.anchors:
            raise ValueError("anchors must hold one network or more to evaluate candidates, got none")
        reason = None if self.rejection is None else self.rejection.reason(graph, self.anchors)
        if reason is not None:
            self.rejected[reason] += 1
            return (math.nan,) * len(self.anchors)
        return tuple(anchor.accuracy(graph) for anchor in self.anchors)

    def run(self, evaluations: int) -> Candidate:
        """Propose, evaluate and tell, one by one, and return the best.

        Args:
            evaluations: How many proposals, rejected ones included.
        """
        check_integer("evaluations", evaluations, at_least=1)
        for _ in range(evaluations):
            points = self.ask(1)
            self.tell(points, [self.evaluate(point) for point in points])
        return self.best


def undominated(values: Float[Tensor, "candidates objectives"]) -> Bool[Tensor, " candidates"]:
    """Return which rows no other row dominates: none is at least as large everywhere and larger somewhere.

    Args:
        values: Scores, larger is better.

    Cost: O(candidates² · objectives) time and memory.
    """
    one, other = values.unsqueeze(1), values.unsqueeze(0)
    dominated = (other >= one).all(-1) & (other > one).any(-1)
    return ~dominated.any(1)


def _values(candidates: Sequence[Candidate]) -> Tensor:
    return torch.tensor([one.values for one in candidates], dtype=torch.float64, device="cpu")


def _candidate(point: Any, values: Any) -> Candidate:
    if not isinstance(point, NormActGraph):
        raise TypeError(f"points must be NormActGraph objects, got {point!r}")
    scores = tuple(float(value) for value in values) if isinstance(values, Sequence) else (float(values),)
    if not scores:
        raise ValueError("values must hold a score or more for every point, got none")
    finite = all(map(math.isfinite, scores))
    return Candidate(point, sum(scores) / len(scores) if finite else math.nan, scores)
