"""Run a claim: plan its cells, skip the finished, run the rest, store each as it ends, and apply its rule.

The process that runs this is the ledger's only writer; cells are independent, so a run may be killed at any moment and
the next continues from the finished cells, with the same figures in the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from provenn.claims.cells import Failed, Job, Live
from provenn.claims.claim import Claim, Evidence, Verdict
from provenn.claims.errors import ClaimBrokenError
from provenn.claims.ledger import CellKey, Ledger, Record, RunKey
from provenn.claims.plan import Plan
from provenn.claims.registry import Found
from provenn.claims.workers import Executor


class Display(Protocol):
    """What shows the progress of a run."""

    def begin(self, done: int, total: int) -> None:
        """The run begins; ``done`` of ``total`` cells were finished before."""

    def started(self, key: CellKey) -> None:
        """A cell begins."""

    def live(self, message: Live) -> None:
        """A cell gives a sign of life."""

    def finished(self, key: CellKey, record: Record) -> None:
        """A cell is stored."""

    def failed(self, failure: Failed) -> None:
        """A cell failed."""


@dataclass(frozen=True)
class Ran:
    """What a run left: every finished cell of it, now or earlier, and the failures of this time."""

    plan: Plan
    key: RunKey
    finished: Mapping[CellKey, Record]
    failures: tuple[Failed, ...]


def run_key(found: Found, tier: str, device: str) -> RunKey:
    """Return the ledger's key of a claim's run."""
    return RunKey(found.claim.slug, tier, found.fingerprint(device))


def run_cells(
    found: Found, plan: Plan, ledger: Ledger, executor: Executor, display: Display, device: str = "cpu"
) -> Ran:
    """Run the plan's unfinished cells, and store each as it ends.

    A cell of a later phase starts as soon as the tuning of its own arm is done. A cell that another process stored
    meanwhile is not run again. A failed cell does not stop the others.

    Args:
        found: The claim.
        plan: Its cells.
        ledger: Where finished cells are and go.
        executor: What runs them; the caller closes it.
        display: What shows progress.
        device: Where cells run.

    Raises:
        LedgerError: The ledger refuses; the cells stored so far are kept.
        WorkerStartError: No worker could start.
    """
    run = run_key(found, plan.tier, device)
    finished = dict(ledger.finished(run))
    display.begin(plan.done(finished), plan.size)
    queue = _Queue(plan, finished)
    flying: set[CellKey] = set()
    failures: list[Failed] = []
    while queue.waiting or flying:
        while queue.waiting and executor.idle() > 0:
            key = queue.waiting.popleft()
            if ledger.has(run, key):
                record = ledger.finished(run)[key]
                queue.done(key, record)
                display.finished(key, record)
                continue
            display.started(key)
            executor.submit(Job(key, found.reference, plan.trial(key, device), plan.needed(key)))
            flying.add(key)
        for message in executor.wait() if flying else ():
            if isinstance(message, Live):
                display.live(message)
                continue
            flying.discard(message.key)
            if isinstance(message, Failed):
                failures.append(message)
                display.failed(message)
                continue
            ledger.store(run, message.key, message.record)
            queue.done(message.key, message.record)
            display.finished(message.key, message.record)
    return Ran(plan, run, ledger.finished(run), tuple(failures))


class _Queue:
    """The cells to run, growing as the tuning of an arm ends."""

    def __init__(self, plan: Plan, finished: Mapping[CellKey, Record]) -> None:
        self._plan = plan
        self._finished = dict(finished)
        self.waiting = deque(plan.runnable(self._finished))
        self._known = set(self.waiting)

    def done(self, key: CellKey, record: Record) -> None:
        self._finished[key] = record
        if key.tuning:
            fresh = [one for one in self._plan.runnable(self._finished) if one not in self._known]
            self.waiting.extend(fresh)
            self._known.update(fresh)


def judged(claim: Claim, evidence: Evidence) -> Verdict:
    """Apply the claim's rule.

    Raises:
        ClaimBrokenError: ``judge`` raises, or returns no verdict.
    """
    try:
        verdict = claim.judge(evidence)
    except Exception as error:
        raise ClaimBrokenError(f"judge of {claim.slug} raises {type(error).__name__}: {error}") from error
    if not isinstance(verdict, Verdict):
        raise ClaimBrokenError(f"judge of {claim.slug} returned {verdict!r}, which is no Verdict")
    return verdict
