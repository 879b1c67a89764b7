"""Progress and results on the terminal: live where there is one, plain lines where output is piped."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from provenn.claims.cells import Failed, Live
from provenn.claims.claim import Scalar
from provenn.claims.ledger import CellKey, Record
from provenn.claims.summary import Summary


class LiveDisplay(AbstractContextManager["LiveDisplay"]):
    """A line for each running cell, and a bar with the time left; for a terminal."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figure]}", style="dim", markup=False),
        )
        self._progress = Progress(*columns, console=console)
        self._total: TaskID | None = None
        self._running: dict[CellKey, TaskID] = {}

    def __enter__(self) -> LiveDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, done: int, total: int) -> None:
        self._total = self._progress.add_task("all cells", total=total, figure=f"{done} kept" if done else "")
        self._progress.reset(self._total, total=total, completed=done)

    def started(self, key: CellKey) -> None:
        self._running[key] = self._progress.add_task(f"  {_short(key)}", total=None, figure="")

    def live(self, message: Live) -> None:
        figure = _latest(message.metrics)
        total = message.total or None
        self._progress.update(self._running[message.key], completed=message.done, total=total, figure=figure)

    def finished(self, key: CellKey, record: Record) -> None:
        self._end(key)

    def failed(self, failure: Failed) -> None:
        self._end(failure.key)
        self._progress.console.print(_failure(failure))

    def _end(self, key: CellKey) -> None:
        if key in self._running:
            self._progress.remove_task(self._running.pop(key))
        if self._total is not None:
            self._progress.advance(self._total)


class PlainDisplay(AbstractContextManager["PlainDisplay"]):
    """A line for each cell that ends; for pipes and logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._done = self._total = self._fresh = 0
        self._clock = time.monotonic()

    def __exit__(self, *_: object) -> None:
        return None

    def begin(self, done: int, total: int) -> None:
        self._done, self._total, self._clock = done, total, time.monotonic()
        if done:
            self._console.print(f"{done} of {total} cells were finished before")

    def started(self, key: CellKey) -> None:
        return None

    def live(self, message: Live) -> None:
        return None

    def finished(self, key: CellKey, record: Record) -> None:
        self._count()
        figures = f"{_latest(record.metrics)} ({record.seconds:.1f} s{self._left()})"
        self._console.print(Text(f"[{self._done}/{self._total}] {_short(key)}: {figures}"), soft_wrap=True)

    def failed(self, failure: Failed) -> None:
        self._count()
        self._console.print(_failure(failure), soft_wrap=True)

    def _count(self) -> None:
        self._done += 1
        self._fresh += 1

    def _left(self) -> str:
        rate = (time.monotonic() - self._clock) / self._fresh
        return f", about {rate * (self._total - self._done):.0f} s left" if self._total > self._done else ""


def display_on(console: Console) -> LiveDisplay | PlainDisplay:
    """Return the display that suits the console."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


def show_table(console: Console, summary: Summary) -> None:
    """Print the comparisons: metric, method, baseline, difference with its interval."""
    if not summary["comparisons"]:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    several = len(summary["arms"]) > 1
    for name in ("metric", "method", "baseline", "difference"):
        table.add_column(name, overflow="fold")
    for row in summary["comparisons"]:
        place = f"\n{row['study']}" if several else ""
        table.add_row(
            Text(f"{row['label']} {'↑' if row['maximize'] else '↓'}{place}"),
            Text(f"{figure(row['method_mean'])}\n{row['method']}"),
            Text(f"{figure(row['baseline_mean'])}\n{row['baseline']}"),
            Text(interval(row).replace(" [", "\n[")),
        )
    console.print(table)
    note = "differences with their 95 % bootstrap interval over seeds; ↑ more is better, ↓ less"
    console.print(Text(note, style="dim"), soft_wrap=True)


def show_verdict(console: Console, summary: Summary) -> None:
    """Print the verdict in words, and the margins that it rests on."""
    if summary["outcome"] is None:
        console.print("smoke: it runs; no verdict at this tier")
        return
    for name, value in summary["margins"].items():
        console.print(Text(f"{name}: {margin(value)}"), soft_wrap=True)
    console.print(Text.assemble((summary["outcome"], "bold"), f": {summary['reason']}"), soft_wrap=True)


def figure(value: float | None) -> str:
    """Word a figure with four significant digits."""
    return "not finite" if value is None else f"{value + 0.0:.4g}"  # + 0.0: no minus nought


def interval(row: dict[str, Any]) -> str:
    """Word a difference with its interval, left out where it has no width (one seed, or an exact figure)."""
    if row["low"] == row["high"]:
        return f"{row['difference']:+.4g}"
    return f"{row['difference']:+.4g} [{row['low']:+.4g}, {row['high']:+.4g}]"


def margin(value: Any) -> str:
    """Word a margin of a verdict: a figure, with its interval if it has one."""
    if isinstance(value, dict):
        return f"{figure(value['estimate'])} [{figure(value['low'])}, {figure(value['high'])}]"
    return figure(value)


def settings_in_words(settings: dict[str, Scalar]) -> str:
    """Word settings: ``lr 0.001, width 8``."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _short(key: CellKey) -> str:
    return f"{key.study} · {key.arm} · " + (f"tuning {key.settings}" if key.tuning else f"seed {key.seed}")


def _latest(metrics: Any) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[-2:])


def _failure(failure: Failed) -> Text:
    return Text(f"FAILED {failure.key}: {failure.cause}", style="red")
