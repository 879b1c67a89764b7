"""The suite of searchers: ``ask``, ``tell`` and ``best``, whatever comes in whatever order."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from provenn.contracts._searches import Told, ask, expect_best, like, make, quality, search, take, values_of
from provenn.contracts.cases_training import SearcherCase
from provenn.contracts.suite import ContractError, check_part, expect
from provenn.contracts.watch import generator, same

SEEDS = 5
"""Searches whose mean rank among random ones is taken."""
RANK = 0.8
"""The mean rank to reach. Random search reaches it with probability 1/120: five uniform numbers add up to 4 or more."""
_RANDOM_SEARCHES = 200
_POOL = 50
"""Budgets of random points that the random searches draw from."""


def exercise(case: SearcherCase) -> Callable[[], object]:
    """Return a call that builds the searcher and makes the first steps of a search."""

    def act() -> None:
        searcher = case.make(0)
        for _ in range(3):
            points = case.ask(searcher, case.batch)
            case.tell(searcher, points, [case.objective(point) for point in points])

    return act


def check_ask(case: SearcherCase) -> None:
    """ask(n) gives n valid points, as often as it is called, whether or not their values were told."""
    searcher = make(case)
    points = [ask(case, searcher, count) for count in (1, 3)]
    told = search(case, searcher, 2 * case.batch)
    points += [ask(case, searcher, count) for count in (3, 1)]
    case.tell(searcher, points[1], [case.objective(point) for point in points[1]])
    expect_best(case, searcher, told + [(point, case.objective(point)) for point in points[1]])


def check_bounds(case: SearcherCase) -> None:
    """Every point proposed in a whole search is of the right type and within bounds."""
    told = search(case, make(case), case.budget)
    expect(any(not same(told[0][0], point) for point, _ in told), f"it proposes nothing but {told[0][0]}")


def check_best_of_told(case: SearcherCase) -> None:
    """After every tell, best is the best point told so far, with the value told."""
    searcher, told = make(case), Told()
    while len(told) < case.budget:
        told += search(case, searcher, case.batch)
        expect_best(case, searcher, told)


def check_best_before_tell(case: SearcherCase) -> None:
    """Before anything was told, asking for best raises a ValueError or a RuntimeError in words."""
    for asked in (0, case.batch):
        searcher = make(case)
        if asked:
            ask(case, searcher, asked)
        try:
            found = case.best(searcher)
        except (ValueError, RuntimeError) as error:
            expect(len(str(error).split()) > 2, f"best raised {error!r}, which explains nothing")
        else:
            raise ContractError(f"best is {found} though nothing was told")


def check_seed(case: SearcherCase) -> None:
    """The same seed and the same values give the same points bit by bit, whatever torch's global seed."""
    first = search(case, make(case), case.budget, outside=1)
    for outside in (1, 2):
        again = search(case, make(case), case.budget, outside=outside)
        where = next((i for i, (a, b) in enumerate(zip(first, again, strict=True)) if not same(a[0], b[0])), None)
        expect(where is None, f"point {where} of two searches differs (torch's global seeds 1 and {outside})")


def check_random(case: SearcherCase) -> None:
    """Another seed gives other points."""
    one, other = ([point for point, _ in search(case, make(case, seed), case.budget)] for seed in (0, 1))
    expect(not same(one, other), "two seeds gave the same points")


def check_pickle(case: SearcherCase) -> None:
    """A pickle made midway goes on exactly as the original, also when points are asked for and not yet told."""
    for pending in (False, True):
        searcher = make(case)
        told = search(case, searcher, case.budget // 2)
        asked = ask(case, searcher, 1) if pending else []
        other = pickle.loads(pickle.dumps(searcher))
        late = [(copy.deepcopy(point), _better(case, told, point)) for point in asked]
        found = []
        for each, outside in ((searcher, 1), (other, 2)):
            if pending:
                case.tell(each, asked, values_of(late))
            expect_best(case, each, told + late)
            found.append([point for point, _ in search(case, each, case.budget // 2, outside=outside)])
        when = "between ask and tell" if pending else "after a tell"
        expect(same(*found), f"pickled {when}, it goes on with other points than the original")


def _better(case: SearcherCase, told: Told, point: Any) -> Any:
    """Return a value that beats all that was told, so that losing it would show; of several objectives the real one."""
    if not isinstance(case.failed, float):
        return case.objective(point)
    return max(values_of(told)) + 1 if case.direction == "maximize" else min(values_of(told)) - 1


def check_beats_random(case: SearcherCase) -> None:
    """On the known function it ranks at 0.8 or above among random searches of the same budget, over five seeds."""
    source = generator(0)
    pool = [case.objective(case.random_point(source)) for _ in range(_POOL * case.budget)]
    picks = torch.rand(_RANDOM_SEARCHES, len(pool), generator=source).argsort(dim=1)[:, : case.budget].tolist()
    rivals = [quality(case, [pool[index] for index in row]) for row in picks]
    ranks = []
    for seed in range(SEEDS):
        mine = quality(case, values_of(search(case, make(case, seed), case.budget)))
        ranks.append(sum((mine > rival) + 0.5 * (mine == rival) for rival in rivals) / len(rivals))
    mean = sum(ranks) / SEEDS
    expect(mean >= RANK, f"its mean rank is {mean:.2f} ({', '.join(f'{rank:.2f}' for rank in ranks)})")


def check_failed_evaluations(case: SearcherCase) -> None:
    """NaN and infinite values, at first and then every third, are survived and never best; the search goes on."""
    infinities = {"infinities": (math.inf, -math.inf)} if isinstance(case.failed, float) else {}
    for name, failures in {f"{case.failed}": (case.failed,), **infinities}.items():
        searcher = make(case)
        try:
            told = search(case, searcher, max(case.budget, 3 * case.batch + 3), _failing(case, failures))
            expect_best(case, searcher, told)
        except Exception as error:
            raise ContractError(f"told {name}: {type(error).__name__}: {error}") from error


def _failing(case: SearcherCase, failures: Sequence[Any]) -> Callable[[Any], Any]:
    """Return the objective, of which the first evaluations and then every third fail."""
    calls = itertools.count()

    def worth(point: Any) -> Any:
        call = next(calls)
        failed = call < 2 * case.batch or call % 3 == 0
        return failures[call % len(failures)] if failed else case.objective(point)

    return worth


def check_out_of_order(case: SearcherCase) -> None:
    """Values may be told in another order, in pieces, late, or never."""
    searcher = make(case)
    told = search(case, searcher, case.batch)
    points = ask(case, searcher, 6)
    later = ask(case, searcher, 2)
    for piece in (take(points, (4, 2)), later, take(points, (0,)), take(points, (3,))):
        case.tell(searcher, piece, [case.objective(point) for point in piece])
        told += [(copy.deepcopy(point), case.objective(point)) for point in piece]
        expect_best(case, searcher, told)
    expect_best(case, searcher, told + search(case, searcher, 2 * case.batch))


def check_unknown_points(case: SearcherCase) -> None:
    """Points that it never proposed are taken into account, or refused by a ValueError, as the case declares."""
    source = generator(3)
    searcher = make(case)
    asked = ask(case, searcher, case.batch)
    own = like([case.random_point(source) for _ in range(8)], asked)
    told = [(copy.deepcopy(point), case.objective(point)) for point in own]
    try:
        case.tell(searcher, own, values_of(told))
    except ValueError as error:
        expect(case.unknown_points == "refused", f"points of the user's own were refused: {error}")
        return
    expect(case.unknown_points == "accepted", "points of the user's own were accepted, the case says refused")
    expect_best(case, searcher, told)
    expect_best(case, searcher, told + search(case, searcher, 2 * case.batch))


def check_mismatched_tell(case: SearcherCase) -> None:
    """More or fewer values than points are refused by a ValueError, and leave the search as it was."""
    searcher = make(case)
    told = search(case, searcher, case.batch)
    points = ask(case, searcher, 3)
    values = [case.objective(point) for point in points]
    for wrong in (values[:2], values + values[:1], []):
        try:
            case.tell(searcher, points, wrong)
        except ValueError:
            continue
        raise ContractError(f"3 points with {len(wrong)} values were accepted")
    expect_best(case, searcher, told)


def check_told_untouched(case: SearcherCase) -> None:
    """What was told is neither changed nor held on to: the caller may reuse it."""
    searcher = make(case)
    points = ask(case, searcher, 3)
    values = [case.objective(point) for point in points]
    before = copy.deepcopy((points, values))
    case.tell(searcher, points, values)
    expect(same((points, values), before), "tell changed the points or the values that it was given")
    _overwrite(points)
    values[:] = [math.nan] * len(values)
    expect_best(case, searcher, list(zip(*before, strict=True)))


def _overwrite(points: Any) -> None:
    for point in [points, *points]:
        if isinstance(point, (Tensor, np.ndarray)):
            point[...] = 0
        elif isinstance(point, (list, dict)):
            point.clear()


CHECKS: dict[str, Callable[[SearcherCase], None]] = {
    "ask": check_ask,
    "bounds": check_bounds,
    "best_of_told": check_best_of_told,
    "best_before_tell": check_best_before_tell,
    "seed": check_seed,
    "random": check_random,
    "pickle": check_pickle,
    "beats_random": check_beats_random,
    "failed_evaluations": check_failed_evaluations,
    "out_of_order": check_out_of_order,
    "unknown_points": check_unknown_points,
    "mismatched_tell": check_mismatched_tell,
    "told_untouched": check_told_untouched,
}


def check_searcher(case_or_make: SearcherCase | Callable[[int], Any], **options: Any) -> None:
    """Hold a searcher to the contract of its kind.

    Args:
        case_or_make: A case, or what builds the searcher from a seed; then ``valid``, ``random_point`` and
            ``objective`` come with the options.
        **options: Fields of :class:`~provenn.contracts.SearcherCase`; ``part`` defaults to the factory's own name.

    Raises:
        ContractError: At least one check fails; the message lists all that do.
    """
    check_part(SearcherCase, case_or_make, options)
