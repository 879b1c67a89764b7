"""What the harness costs a cell beyond the cell's own work, on a claim of 200 empty cells.

``python -m benchmarks.harness_overhead`` prints the milliseconds a cell: over all, with the start of the workers; and
the median gap between two cells that one worker ran in turn.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from provenn.claims.claim import Claim, Comparison, Event, Evidence, Metric, Study, Tier, Trial, Verdict
from provenn.claims.harness import Display, Ran, run_cells
from provenn.claims.ledger import CellKey, Ledger, Record
from provenn.claims.plan import Plan
from provenn.claims.registry import find
from provenn.claims.workers import Workers

CELLS = 200


def empty(trial: Trial) -> Iterator[Event]:
    """Leave a metric and do nothing else."""
    yield Metric("score", float(trial.seed))


def judge(evidence: Evidence) -> Verdict:
    """Give the one verdict that nothing deserves."""
    return Verdict("not reproduced", f"{len(evidence.cells)} arms did nothing")


CLAIM = Claim(
    slug="harness-overhead",
    statement="Doing nothing takes no time.",
    figures=(),
    rule="None.",
    studies={"empty": Study(("method", "baseline"), {"small": Tier(CELLS // 2)})},
    comparisons=(Comparison("empty", "score", "method", "baseline"),),
    run=empty,
    judge=judge,
)


class Silent(Display):
    """Shows nothing."""


def ran(workers: int) -> tuple[Ran, float]:
    """Run the empty claim on a fresh ledger, and return what it left with the seconds it took."""
    found = find("benchmarks.harness_overhead:CLAIM")
    with tempfile.TemporaryDirectory() as folder, Ledger(str(Path(folder) / "ledger.sqlite")) as ledger:
        executor = Workers(workers, threads=1, timeout=60)
        began = time.perf_counter()
        try:
            left = run_cells(found, Plan(found.claim, "small"), ledger, executor, Silent())
        finally:
            executor.close()
        return left, time.perf_counter() - began


def gaps(finished: dict[CellKey, Record]) -> Sequence[float]:
    """Return the seconds between the end of each cell and the start of the next, in the order they ran."""
    spans = sorted((datetime.fromisoformat(one.started).timestamp(), one.seconds) for one in finished.values())
    return [after - before - seconds for (before, seconds), (after, _) in itertools.pairwise(spans)]


def measure() -> dict[str, float]:
    """Return milliseconds a cell on one worker: over all, and the median gap."""
    left, seconds = ran(workers=1)
    return {
        "milliseconds_a_cell": 1000 * seconds / CELLS,
        "median_gap_milliseconds": 1000 * statistics.median(gaps(dict(left.finished))),
    }


if __name__ == "__main__":
    for name, value in measure().items():
        print(f"{name} {value:.3g}")
