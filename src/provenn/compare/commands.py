"""The command ``provenn compare``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from provenn.compare.lookup import kind_names, task_names

if TYPE_CHECKING:
    from rich.console import Console

    from provenn.claims.ledger import Ledger
    from provenn.compare.running import Comparison, PartResult

TASK_HELP = f"{', '.join(task_names())}, or module.NAME of your own; without it, the kind's tasks are listed."
PARTS_HELP = (
    "With commas: DiffGrad,torch.optim.Adam,my.module.Part; or all, for all that fit; without it, the task's parts are"
    " listed."
)


def compare(
    kind: Annotated[str, typer.Argument(help=f"What to compare: {', '.join(kind_names())}.")],
    task: Annotated[str | None, typer.Option(help=TASK_HELP)] = None,
    parts: Annotated[str | None, typer.Option(help=PARTS_HELP)] = None,
    trials: Annotated[int, typer.Option(help="Tuning runs of each part; 0: its own defaults.")] = 8,
    seeds: Annotated[int, typer.Option(help="Runs of each part that count.")] = 5,
    output: Annotated[Path, typer.Option(help="Folder of the CSV, JSON, PNG and HTML files.")] = Path("reports"),
    workers: Annotated[int | None, typer.Option(help="Worker processes; default: one a core, one on a GPU.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or a CUDA device.")] = "cpu",
    timeout: Annotated[float, typer.Option(help="Seconds without any event after which a run counts as hung.")] = 600,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget these parts' finished runs and run them again.")
    ] = False,
) -> None:
    """Line up parts on a task: equal tuning, same data and initial weights; a ranking with intervals.

    Finished runs are kept: after an interruption, or with more seeds, the same command goes on from them.
    """
    from rich.console import Console
    from rich.text import Text

    from provenn.claims.devices import check_device
    from provenn.claims.errors import ExitCode, HarnessError
    from provenn.claims.ledger import Ledger
    from provenn.compare.listing import parts_in_words, tasks_in_words
    from provenn.compare.lookup import find_kind, find_task
    from provenn.compare.ranking import rank
    from provenn.compare.reporting import check_folder, figures_table, table, write
    from provenn.compare.running import Comparison, check

    console = Console()
    try:
        if task is None or parts is None:
            lines = tasks_in_words(kind) if task is None else parts_in_words(kind, task)
            for line in lines:
                console.print(Text(line), soft_wrap=True)
            return
        counts = (_at_least("trials", trials, 0), _at_least("seeds", seeds, 1))
        hands = _hands(device) if workers is None else _at_least("workers", workers, 1)
        names = None if parts.strip() == "all" else _part_names(parts)
        check_device(device)
        comparison = Comparison(kind, task, names or (), *counts, device)
        check(comparison)
        comparison = _fitting(comparison, console)
        check_folder(output)
        with Ledger() as ledger:
            results = _run(comparison, hands, timeout, ledger, fresh)
        rows = rank(results, find_kind(kind).maximize(find_task(task)))
        console.print(table(comparison, rows))
        if (costs := figures_table(comparison, rows)) is not None:
            console.print(costs)
        for path in write(comparison, rows, output):
            console.print(Text(str(path)), soft_wrap=True)
    except HarnessError as error:
        Console(stderr=True).print(Text(str(error), style="red"), soft_wrap=True)
        raise typer.Exit(error.code) from error
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    if all(row.rank is None for row in rows):
        raise typer.Exit(ExitCode.INCOMPLETE)


def _fitting(comparison: Comparison, console: Console) -> Comparison:
    """Return the comparison with all parts that fit, if none is named; otherwise check that those named do."""
    from dataclasses import replace

    from rich.text import Text

    from provenn.compare.listing import by_reason
    from provenn.compare.lookup import find_kind, find_task, fitting_parts
    from provenn.compare.running import check_fit

    if comparison.parts:
        check_fit(comparison)
        return comparison
    names, reasons = fitting_parts(find_kind(comparison.kind), find_task(comparison.task))
    for line in by_reason(reasons):
        console.print(Text(f"left out: {line}"), soft_wrap=True)
    return replace(comparison, parts=names)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hands(device: str) -> int:
    """Return the worker processes of a device: one a core, one on a GPU."""
    return 1 if device.startswith("cuda") else _cores()


def _run(comparison: Comparison, workers: int, timeout: float, ledger: Ledger, fresh: bool) -> list[PartResult]:
    """Run a comparison in worker processes; show each part as a bar, or each run as a line where output is piped."""
    from rich.console import Console

    from provenn.claims.workers import Workers
    from provenn.compare.cells import study_name
    from provenn.compare.display import display_on
    from provenn.compare.keeping import Keeper
    from provenn.compare.running import run_comparison, tuning_runs

    runs = tuning_runs(comparison) + comparison.seeds
    keeper = Keeper(ledger, comparison.kind, comparison.task, comparison.parts, comparison.device)
    if fresh:
        keeper.forget(study_name(comparison.kind, comparison.task))
    console = Console(stderr=True)
    threads = max(1, _cores() // workers) if comparison.device.startswith("cuda") else 1
    executor = Workers(workers, threads, timeout)
    try:
        with display_on(console, comparison.parts, runs) as display:
            return run_comparison(comparison, executor, display.advance, keeper, display.ended)
    except KeyboardInterrupt:
        kept = f"{keeper.kept} of {runs * len(comparison.parts)} runs are kept"
        console.print(f"interrupted: {kept}; the same command (without --fresh) continues", soft_wrap=True)
        raise
    finally:
        executor.close()


def _part_names(parts: str) -> tuple[str, ...]:
    from provenn.claims.errors import UsageError

    names = tuple(name.strip() for name in parts.split(",") if name.strip())
    if len(names) < 2 or len(set(names)) < len(names):
        raise UsageError(f"--parts must name two or more different parts, got {parts!r}")
    return names


def _at_least(option: str, value: int, bound: int) -> int:
    from provenn.claims.errors import UsageError

    if value < bound:
        raise UsageError(f"--{option} must be at least {bound}, got {value}")
    return value
