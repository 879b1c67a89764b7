"""Run a fake claim, and take from it what must not depend on how it ran."""

from __future__ import annotations

from provenn.claims.display import PlainDisplay
from provenn.claims.harness import judged, run_cells
from provenn.claims.ledger import Ledger
from provenn.claims.plan import Plan
from provenn.claims.registry import find
from provenn.claims.summary import OF_THE_RUN, summarise
from provenn.claims.workers import Inline


class Silent(PlainDisplay):
    """Shows nothing, remembers everything."""

    def __init__(self):
        self.events = []

    def begin(self, done, total):
        self.events.append(("begin", done, total))

    def started(self, key):
        self.events.append(("started", key))

    def live(self, message):
        self.events.append(("live", message))

    def finished(self, key, record):
        self.events.append(("finished", key))

    def failed(self, failure):
        self.events.append(("failed", failure.key))


def go(name, executor=None, ledger=None, tier="small", display=None, **plan):
    found = find(name if ":" in name else f"claims.fake_claims:{name}")
    executor = executor or Inline()
    with ledger or Ledger() as opened:
        try:
            return run_cells(found, Plan(found.claim, tier, **plan), opened, executor, display or Silent())
        finally:
            executor.close()


def result(ran):
    """Everything of the summary that must be bit for bit the same."""
    verdict = judged(ran.plan.claim, ran.plan.evidence(ran.finished))
    return {key: value for key, value in summarise(ran, verdict).items() if key not in OF_THE_RUN}
