"""Each check of the suite of searchers catches a searcher that is broken in that way."""

import math
import random
import string
from dataclasses import dataclass, replace

import pytest
import torch
from contracts.broken import DOCUMENTED_ELSEWHERE, assert_caught, broken_runs, good_runs, own_checks
from torch import Tensor

from provenn.contracts import BadInput, ContractError, SearcherCase, check_searcher

KINDS = string.ascii_lowercase


@dataclass(frozen=True)
class Best:
    point: Tensor
    value: float


class HillClimber:
    """A correct little searcher over the unit square, to be broken below: Gaussian steps around the best point."""

    def __init__(self, seed=0, step=1.0):
        if step <= 0:
            raise ValueError(f"step must be > 0, got {step}")
        self.source, self.step = torch.Generator().manual_seed(seed), step
        self.points, self.values = [], []

    def __getstate__(self):
        return vars(self) | {"source": self.source.get_state()}

    def __setstate__(self, state):
        vars(self).update(state, source=torch.Generator().set_state(state["source"]))

    def ask(self, n):
        draws = torch.rand(n, 2, generator=self.source, dtype=torch.float64)
        if not self.values:
            return draws
        width = self.step / (1 + len(self.values) / 10)
        return (self.best.point + width * (draws - 0.5)).clamp(0, 1)

    def tell(self, points, values):
        if len(points) != len(values):
            raise ValueError(f"values must be one a point ({len(points)}), got {len(values)}")
        for point, value in zip(points, values, strict=True):
            if self.counts(value):
                self.points.append(self.kept(point))
                self.values.append(value)

    def kept(self, point):
        return point.clone()

    def counts(self, value):
        return math.isfinite(value)

    @property
    def best(self):
        if not self.values:
            raise RuntimeError("no finite value was told yet")
        index = max(range(len(self.values)), key=self.values.__getitem__)
        return Best(self.points[index], self.values[index])


def valid(point):
    return isinstance(point, Tensor) and point.shape == (2,) and bool(((point >= 0) & (point <= 1)).all())


def objective(point):
    """A cone with its top at (0.7, 0.2)."""
    return -float((point - torch.tensor([0.7, 0.2])).norm())


class AsksTooFew(HillClimber):
    def ask(self, n):
        return super().ask(n)[:2]


class AsksOnlyInTurn(HillClimber):
    waiting = False

    def ask(self, n):
        if self.waiting:
            raise RuntimeError("tell first")
        self.waiting = True
        return super().ask(n)

    def tell(self, points, values):
        self.waiting = False
        super().tell(points, values)


class LeavesTheSquare(HillClimber):
    def ask(self, n):
        return super().ask(n) * 1.5 - 0.25


class AsksLists(HillClimber):
    def ask(self, n):
        return super().ask(n).tolist()

    def kept(self, point):
        return torch.tensor(point)


class AsksTheCentre(HillClimber):
    def ask(self, n):
        return torch.full((n, 2), 0.5, dtype=torch.float64)


class KeepsTheLast(HillClimber):
    @property
    def best(self):
        return Best(self.points[-1], super().best.value)


class KeepsTheSmallest(HillClimber):
    @property
    def best(self):
        index = min(range(len(self.values)), key=self.values.__getitem__)
        return Best(self.points[index], self.values[index])


class StandardizesValues(HillClimber):
    @property
    def best(self):
        best = super().best
        return Best(best.point, best.value - sum(self.values) / len(self.values))


class RoundsPoints(HillClimber):
    def kept(self, point):
        return point.float().double()


class BestIsNone(HillClimber):
    @property
    def best(self):
        return super().best if self.values else Best(None, None)


class BestIsTheEmptyMax(HillClimber):
    @property
    def best(self):
        return Best(self.points[0], 0.0) if not self.values else super().best  # IndexError


class BestIsTerse(HillClimber):
    @property
    def best(self):
        if not self.values:
            raise ValueError("max")
        return super().best


class DrawsGlobally(HillClimber):
    def ask(self, n):
        return (super().ask(n) + 1e-3 * torch.rand(n, 2)).clamp(0, 1)


class DrawsFromPython(HillClimber):
    def ask(self, n):
        return (super().ask(n) + 1e-3 * random.random()).clamp(0, 1)


class IgnoresItsSeed(HillClimber):
    def __init__(self, seed=0):
        super().__init__(0)


class DoesNotPickle(HillClimber):
    def __init__(self, seed=0):
        super().__init__(seed)
        self.size = lambda: len(self.values)


class PicklesAFreshGenerator(HillClimber):
    def __setstate__(self, state):
        vars(self).update(state, source=torch.Generator().manual_seed(0))


class PicklesPointsAlone(HillClimber):
    def __getstate__(self):
        return super().__getstate__() | {"values": self.values[:1], "points": self.points[:1]}


class ForgetsWhatIsPending(HillClimber):
    def __init__(self, seed=0):
        super().__init__(seed)
        self.pending = []

    def ask(self, n):
        points = super().ask(n)
        self.pending += points.tolist()
        return points

    def tell(self, points, values):
        if len(points) != len(values):
            raise ValueError(f"values must be one a point ({len(points)}), got {len(values)}")
        known = [index for index, point in enumerate(points.tolist()) if point in self.pending]
        super().tell(points[known], [values[index] for index in known])

    def __getstate__(self):
        return super().__getstate__() | {"pending": []}


class RandomSearch(HillClimber):
    def ask(self, n):
        return torch.rand(n, 2, generator=self.source, dtype=torch.float64)


class Descends(HillClimber):
    """Its steps go from the worst point."""

    def ask(self, n):
        self.values = [-value for value in self.values]
        points = super().ask(n)
        self.values = [-value for value in self.values]
        return points


class TakesNaN(HillClimber):
    def counts(self, value):
        return True


class TakesInfinity(HillClimber):
    def counts(self, value):
        return not math.isnan(value)


class StumblesOverNaN(HillClimber):
    def counts(self, value):
        if math.isnan(value):
            raise ValueError("values must be finite")
        return super().counts(value)


class NeedsSuccessAtFirst(HillClimber):
    told = False

    def tell(self, points, values):
        self.told = True
        super().tell(points, values)

    def ask(self, n):
        return super().ask(n) if not self.told else (self.best.point + torch.zeros(n, 2)).clamp(0, 1)


class MatchesByPosition(HillClimber):
    def ask(self, n):
        self.asked = super().ask(n)
        return self.asked.clone()

    def tell(self, points, values):
        if hasattr(self, "asked") and len(points) <= len(self.asked):
            points = self.asked[: len(points)]
        super().tell(points, values)


class WantsAllTold(HillClimber):
    asked = 0

    def ask(self, n):
        self.asked = n
        return super().ask(n)

    def tell(self, points, values):
        if len(points) != self.asked:
            raise ValueError(f"points must be the {self.asked} asked for")
        super().tell(points, values)


class IgnoresUnknownPoints(ForgetsWhatIsPending):
    def __getstate__(self):
        return HillClimber.__getstate__(self)


class RefusesUnknownPoints(IgnoresUnknownPoints):
    def tell(self, points, values):
        unknown = [point for point in points.tolist() if point not in self.pending]
        if unknown:
            raise ValueError(f"points must have been asked for, got {unknown[0]}")
        super().tell(points, values)


class TruncatesSilently(HillClimber):
    def tell(self, points, values):
        pairs = list(zip(points, values, strict=False))
        super().tell([point for point, _ in pairs], [value for _, value in pairs])


class ChecksTooLate(HillClimber):
    def tell(self, points, values):
        count = min(len(points), len(values))
        super().tell(points[:count], [value + 1 for value in values[:count]])
        if len(points) != len(values):
            raise ValueError("values must be one a point")


class HoldsOnToPoints(HillClimber):
    def kept(self, point):
        return point


class HoldsOnToValues(HillClimber):
    @property
    def best(self):
        self.values = self.list_told if hasattr(self, "list_told") else self.values
        return super().best

    def tell(self, points, values):
        super().tell(points, values)
        if not hasattr(self, "list_told") and len(values) == 3:
            self.list_told = values


class CentersPoints(HillClimber):
    def tell(self, points, values):
        super().tell(points, values)
        points -= 0.5


GOOD = SearcherCase(
    "contracts.broken.own_checks",
    HillClimber,
    valid,
    lambda generator: torch.rand(2, generator=generator, dtype=torch.float64),
    objective,
    budget=40,
    bad_input=(BadInput("step", lambda: HillClimber(step=0)),),
    excluded={**DOCUMENTED_ELSEWHERE, "public_name": "the part is a test's own"},
    label="good",
)


def broken(make, **options):
    return replace(GOOD, **{"make": make, "label": make.__name__, **options})


BROKEN = {
    "ask": [broken(AsksTooFew), broken(AsksOnlyInTurn)],
    "bounds": [broken(LeavesTheSquare), broken(AsksLists), broken(AsksTheCentre)],
    "best_of_told": [
        broken(KeepsTheLast),
        broken(KeepsTheSmallest),
        broken(StandardizesValues),
        broken(RoundsPoints),
        broken(HillClimber, direction="minimize", label="the other direction"),
    ],
    "best_before_tell": [broken(BestIsNone), broken(BestIsTheEmptyMax), broken(BestIsTerse)],
    "seed": [broken(DrawsGlobally), broken(DrawsFromPython)],
    "random": [broken(IgnoresItsSeed)],
    "pickle": [
        broken(DoesNotPickle),
        broken(PicklesAFreshGenerator),
        broken(PicklesPointsAlone),
        broken(ForgetsWhatIsPending),
    ],
    "beats_random": [broken(RandomSearch), broken(Descends)],
    "failed_evaluations": [
        broken(TakesNaN),
        broken(TakesInfinity),
        broken(StumblesOverNaN),
        broken(NeedsSuccessAtFirst),
    ],
    "out_of_order": [broken(MatchesByPosition), broken(WantsAllTold)],
    "unknown_points": [
        broken(IgnoresUnknownPoints),
        broken(RefusesUnknownPoints),
        broken(HillClimber, unknown_points="refused", label="not refused"),
    ],
    "mismatched_tell": [broken(TruncatesSilently), broken(ChecksTooLate)],
    "told_untouched": [broken(HoldsOnToPoints), broken(HoldsOnToValues), broken(CentersPoints)],
}


class ParetoClimber:
    """Two objectives over a list of dictionaries, batches of four, no single best."""

    def __init__(self, seed=0):
        self.source, self.told = random.Random(seed), []

    def ask(self, n):
        return [self.propose() for _ in range(n)]

    def propose(self):
        if not self.best:
            return {"width": self.source.randrange(1000), "kind": self.source.choice(KINDS)}
        parent, _ = self.source.choice(self.best)
        width = parent["width"] + round(self.source.gauss(0, self.source.choice([10, 100])))
        kind = KINDS.index(parent["kind"]) + self.source.randint(-2, 2)
        return {"width": min(max(width, 0), 999), "kind": KINDS[min(max(kind, 0), 25)]}

    def tell(self, points, values):
        if len(points) != len(values):
            raise ValueError(f"values must be one a point ({len(points)}), got {len(values)}")
        self.told += [(dict(p), v) for p, v in zip(points, values, strict=True) if all(map(math.isfinite, v))]

    @property
    def best(self):
        return sorted(self.told, key=lambda entry: -sum(entry[1]))[:2]


PARETO = SearcherCase(
    "contracts.broken.own_checks",
    ParetoClimber,
    lambda point: point["width"] in range(1000) and point["kind"] in KINDS,
    lambda generator: {
        "width": int(torch.randint(1000, (), generator=generator)),
        "kind": KINDS[int(torch.randint(26, (), generator=generator))],
    },
    lambda point: (-abs(point["width"] - 600) / 100.0, -abs(ord(point["kind"]) - ord("m")) / 2.0),
    budget=100,
    batch=4,
    quality=lambda values: max(map(sum, values)),
    failed=(math.nan, math.nan),
    best=lambda searcher: (searcher.best, None),
    best_of_told=False,
    best_of_told_reason="best is a front",
    bad_input_reason="it has no options",
    excluded={**GOOD.excluded, "best_before_tell": "an empty front"},
    label="pareto",
)
REFUSING = broken(RefusesUnknownPoints, unknown_points="refused")


@pytest.mark.parametrize("check", good_runs(GOOD, PARETO, REFUSING))
def test_good_searcher_passes(check):
    check()


@pytest.mark.parametrize(("name", "case"), broken_runs(BROKEN))
def test_broken_searchers_are_caught(name, case):
    assert_caught(name, case)


def test_every_check_has_a_broken_searcher():
    assert set(BROKEN) == own_checks("searcher")


def test_check_searcher_lists_failures():
    with pytest.raises(ContractError, match="'beats_random'"):
        check_searcher(broken(RandomSearch))
