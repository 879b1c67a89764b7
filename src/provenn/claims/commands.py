"""The commands ``provenn run`` and ``provenn report``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from provenn.claims.devices import check_device
from provenn.claims.display import display_on, show_table, show_verdict
from provenn.claims.errors import ExitCode, HarnessError, IncompleteError, UsageError
from provenn.claims.harness import Ran, judged, run_cells, run_key
from provenn.claims.ledger import Ledger
from provenn.claims.plan import Plan
from provenn.claims.recording import check_recordable, record_summary
from provenn.claims.registry import Found, find
from provenn.claims.reporting import shipped_summary, write_page
from provenn.claims.summary import Summary, summarise
from provenn.claims.workers import Executor, Workers

MISSING_SHOWN = 10
Slug = Annotated[str, typer.Argument(help="A paper's slug, or module:NAME of a claim of your own.")]
TierName = Annotated[str, typer.Option(help="smoke (seconds, no verdict), small (minutes), full (the paper's scale).")]


def run(
    slug: Slug,
    tier: TierName = "small",
    study: Annotated[list[str] | None, typer.Option(help="Only this study; may be given again.")] = None,
    seeds: Annotated[int | None, typer.Option(help="More seeds than the tier's, for exploration.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; default: one a core, one on a GPU.")] = None,
    ray: Annotated[str | None, typer.Option(help='Run on the Ray cluster at this address; "local" starts one.')] = None,
    device: Annotated[str, typer.Option(help="cpu, or a CUDA device.")] = "cpu",
    timeout: Annotated[float, typer.Option(help="Seconds without any event after which a cell counts as hung.")] = 600,
    record: Annotated[bool, typer.Option("--record", help="Write the summary that ships in the catalogue.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the finished cells and run them again.")] = False,
    report: Annotated[Path | None, typer.Option(help="Where the page goes; default: reports/SLUG-TIER.html.")] = None,
) -> None:
    """Check a paper's claim: run method and baselines, apply the rule, say the verdict."""
    console = Console(soft_wrap=False)
    with _exits():
        found = find(slug)
        plan = Plan(found.claim, tier, tuple(study or ()), seeds)
        check_device(device)
        if record:
            check_recordable(found, plan)
        executor = _executor(workers, ray, device, timeout)
        with Ledger() as ledger:
            if fresh:
                ledger.forget(run_key(found, tier, device), plan.studies)
            ran = _run(console, found, plan, ledger, executor, device)
        whole = replace(ran, plan=Plan(found.claim, tier, (), seeds))
        if study and whole.plan.missing(ran.finished):
            console.print(f"{', '.join(plan.studies)}: done; no verdict, since the other studies lack cells")
            return
        summary = _concluded(console, whole)
        if record:
            _say(console, f"recorded in {record_summary(found, whole, summary)}")
        if tier != "smoke" or report is not None:
            _say(console, f"report: {write_page(found, tier, summary, report)}")


def report(
    slug: Slug,
    tier: TierName = "small",
    device: Annotated[str, typer.Option(help="Where the cells ran: cpu, or a CUDA device.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="Where the page goes; default: reports/SLUG-TIER.html.")] = None,
) -> None:
    """Write a claim's page from the ledger, or from the results that ship."""
    console = Console()
    with _exits():
        found = find(slug)
        _say(console, f"report: {write_page(found, tier, _summary_of(found, tier, device), output)}")


def _run(console: Console, found: Found, plan: Plan, ledger: Ledger, executor: Executor, device: str) -> Ran:
    """Run the plan; say what is kept when interrupted, and what failed."""
    try:
        with display_on(console) as display:
            ran = run_cells(found, plan, ledger, executor, display, device)
    except KeyboardInterrupt:
        kept = plan.done(ledger.finished(run_key(found, plan.tier, device)))
        _say(
            console, f"interrupted: {kept} of {plan.size} cells are kept; the same command (without --fresh) continues"
        )
        raise
    finally:
        executor.close()
    missing = plan.missing(ran.finished)
    if missing:
        raise IncompleteError(_incomplete(ran, missing))
    return ran


def _summary_of(found: Found, tier: str, device: str) -> Summary:
    """Return the summary of the ledger's run if it is complete, else of the results that ship."""
    plan = Plan(found.claim, tier)
    with Ledger() as ledger:
        key = run_key(found, tier, device)
        ran = Ran(plan, key, ledger.finished(key), ())
    if plan.missing(ran.finished):
        return shipped_summary(found, tier)
    return summarise(ran, None if tier == "smoke" else judged(found.claim, plan.evidence(ran.finished)))


def _incomplete(ran: Ran, missing: list[str]) -> str:
    failed = [f"{failure.key}: {failure.cause.splitlines()[0]}" for failure in ran.failures]
    shown, hidden = missing[:MISSING_SHOWN], len(missing) - MISSING_SHOWN
    lines = ["failed:", *failed] if failed else []
    lines += ["missing:", *shown, *([f"... and {hidden} more"] if hidden > 0 else [])]
    kept = ran.plan.size - len(missing)
    head = (
        f"no verdict: {len(missing)} of {ran.plan.size} cells are missing; {kept} are kept, the same command continues"
    )
    return "\n  ".join([head, *lines])


def _concluded(console: Console, ran: Ran) -> Summary:
    """Apply the rule, and print the table and the verdict."""
    smoke = ran.plan.tier == "smoke"
    verdict = None if smoke else judged(ran.plan.claim, ran.plan.evidence(ran.finished))
    summary = summarise(ran, verdict)
    show_table(console, summary)
    show_verdict(console, summary)
    return summary


def _executor(workers: int | None, ray: str | None, device: str, timeout: float) -> Executor:
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be at least 1, got {workers}")
    if not timeout > 0:
        raise UsageError(f"--timeout must be above 0 seconds, got {timeout}")
    if ray is not None:
        from provenn.claims.ray_cluster import RayTasks

        try:
            return RayTasks(ray, workers, timeout)
        except ImportError as error:
            raise UsageError(str(error)) from error
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = workers or (1 if device.startswith("cuda") else cores)
    # One thread a cell, however many workers: figures do not depend on their number, and no threads fight for a core.
    return Workers(count, max(1, cores // count) if device.startswith("cuda") else 1, timeout)


@contextmanager
def _exits() -> Iterator[None]:
    """Turn the harness's errors into a message on stderr and an exit code."""
    try:
        yield
    except HarnessError as error:
        Console(stderr=True).print(Text(str(error), style="red"), soft_wrap=True)
        raise typer.Exit(error.code) from error
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None


def _say(console: Console, text: str) -> None:
    """Print a line as it is: no wrapping, no markup."""
    console.print(Text(text), soft_wrap=True)
