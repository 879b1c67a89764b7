"""The command ``provenn compare``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from provenn.compare.lookup import kind_names, task_names

if TYPE_CHECKING:
    from provenn.compare.running import Comparison, PartResult


def compare(
    kind: Annotated[str, typer.Argument(help=f"What to compare: {', '.join(kind_names())}.")],
    task: Annotated[str, typer.Option(help=f"{', '.join(task_names())}, or module.NAME of your own.")],
    parts: Annotated[
        str, typer.Option(help="With commas: DiffGrad,torch.optim.Adam,my.module.Part; or all, for all that fit.")
    ],
    trials: Annotated[int, typer.Option(help="Tuning runs of each part; 0: its own defaults.")] = 8,
    seeds: Annotated[int, typer.Option(help="Runs of each part that count.")] = 5,
    output: Annotated[Path, typer.Option(help="Folder of the CSV, JSON, PNG and HTML files.")] = Path("reports"),
    workers: Annotated[int | None, typer.Option(help="Worker processes; default: one a core, one on a GPU.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or a CUDA device.")] = "cpu",
    timeout: Annotated[float, typer.Option(help="Seconds without any event after which a run counts as hung.")] = 600,
) -> None:
    """Line up parts on a task: equal tuning, same data and initial weights; a ranking with intervals."""
    from rich.console import Console
    from rich.text import Text

    from provenn.claims.errors import ExitCode, HarnessError
    from provenn.compare.lookup import find_kind, find_task, fitting_parts
    from provenn.compare.ranking import rank
    from provenn.compare.reporting import table, write
    from provenn.compare.running import Comparison, check

    console = Console()
    try:
        if parts.strip() == "all":
            names, reasons = fitting_parts(find_kind(kind), find_task(task))
            for name, reason in reasons.items():
                console.print(Text(f"left out: {name} {reason}"))
        else:
            names = _part_names(parts)
        comparison = Comparison(kind, task, names, _at_least("trials", trials, 0), _at_least("seeds", seeds, 1), device)
        check(comparison)
        results, maximize = _run(comparison, workers, timeout)
        rows = rank(results, maximize)
        console.print(table(comparison, rows))
        for path in write(comparison, rows, output):
            console.print(Text(str(path)), soft_wrap=True)
    except HarnessError as error:
        Console(stderr=True).print(Text(str(error), style="red"), soft_wrap=True)
        raise typer.Exit(error.code) from error
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted: nothing is kept")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    if all(row.rank is None for row in rows):
        raise typer.Exit(ExitCode.INCOMPLETE)


def _run(comparison: Comparison, workers: int | None, timeout: float) -> tuple[list[PartResult], bool]:
    """Run a comparison in worker processes with a bar for each part; return also whether more is better."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from provenn.claims.workers import Workers
    from provenn.compare.lookup import find_kind, find_task
    from provenn.compare.running import run_comparison, tuning_runs

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    default = 1 if comparison.device.startswith("cuda") else cores
    count = default if workers is None else _at_least("workers", workers, 1)
    executor = Workers(count, max(1, cores // count) if comparison.device.startswith("cuda") else 1, timeout)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            runs = tuning_runs(comparison) + comparison.seeds
            bars = {part: progress.add_task(part, total=runs) for part in comparison.parts}
            results = run_comparison(comparison, executor, lambda part, share: progress.advance(bars[part], share))
    finally:
        executor.close()
    kind, task = find_kind(comparison.kind), find_task(comparison.task)
    return results, kind.maximize(task)


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
