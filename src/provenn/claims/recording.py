"""Write a run's summary to the results that ship, and refuse what must not ship."""

from __future__ import annotations

from pathlib import Path

from provenn.catalog.card import Card
from provenn.catalog.results import read_results, write_section
from provenn.claims.display import settings_in_words
from provenn.claims.errors import NotRecordedError
from provenn.claims.harness import Ran
from provenn.claims.plan import Plan
from provenn.claims.registry import Found
from provenn.claims.summary import Summary, environments


def check_recordable(found: Found, plan: Plan) -> Card:
    """Check, before anything runs, that a run may be recorded, and return the paper's card.

    Raises:
        NotRecordedError: The tier gives no verdict, the claim is no paper's, or seeds or studies were chosen by hand.
    """
    if plan.tier == "smoke":
        raise NotRecordedError("--record: the smoke tier gives no verdict, so there is nothing to record")
    if found.card is None:
        raise NotRecordedError(f"--record: {found.reference} is not the claim of a paper in the catalogue")
    if plan.seeds is not None:
        raise NotRecordedError("--record: the rule fixes the number of seeds; --seeds is for exploration")
    if plan.studies != tuple(name for name, one in plan.claim.studies.items() if plan.tier in one.tiers):
        raise NotRecordedError("--record: a verdict needs every study; leave --study out")
    return found.card


def record_summary(found: Found, ran: Ran, summary: Summary) -> Path:
    """Write a summary to the paper's results, beside those of other tiers, and return the file.

    Raises:
        NotRecordedError: Besides what :func:`check_recordable` refuses: cells are missing; the source changed while the
            cells ran; or cells ran with different versions or thread counts.
    """
    card = check_recordable(found, ran.plan)
    missing = ran.plan.missing(ran.finished)
    if missing:
        raise NotRecordedError(f"--record: {len(missing)} cells are missing, the first is {missing[0]}")
    if found.fingerprint(summary["device"]) != ran.key.fingerprint:
        raise NotRecordedError("--record: the claim's or the paper's source changed while the cells ran; run it again")
    conditions = environments(ran)
    if len(conditions) > 1:
        words = " and ".join(settings_in_words({"threads": one["threads"], **one["versions"]}) for one in conditions)
        raise NotRecordedError(f"--record: the cells ran under different conditions ({words}); run with --fresh")
    tiers = read_results(card).get("claim", {})
    return write_section(card, "claim", {**tiers, ran.plan.tier: summary})
