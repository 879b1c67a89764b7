"""The progress of a comparison on the terminal: a bar for each part, or a line for each run where output is piped."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from provenn.claims.ledger import CellKey, Record


class Bars(AbstractContextManager["Bars"]):
    """A bar for each part.

    Args:
        console: A terminal.
        parts: The parts.
        runs: Runs of each.
    """

    def __init__(self, console: Console, parts: tuple[str, ...], runs: int) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn())
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._bars = {part: self._progress.add_task(part, total=runs) for part in parts}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, part: str, share: float) -> None:
        """Take that a run has moved on by a share of itself."""
        self._progress.advance(self._bars[part], share)

    def ended(self, key: CellKey, record: Record | None, kept: bool) -> None:
        """Take that a run is over; its bar has moved already."""


class Lines(AbstractContextManager["Lines"]):
    """A line for each run that ends.

    Args:
        console: Where output goes.
        parts: The parts.
        runs: Runs of each.
    """

    def __init__(self, console: Console, parts: tuple[str, ...], runs: int) -> None:
        self._console = console
        self._total = len(parts) * runs
        self._done = self._fresh = 0
        self._clock = time.monotonic()

    def __exit__(self, *_: object) -> None:
        return None

    def advance(self, part: str, share: float) -> None:
        """Take that a run has moved on by a share of itself, which has no line."""

    def ended(self, key: CellKey, record: Record | None, kept: bool) -> None:
        """Print a run that is over."""
        self._done += 1
        self._fresh += not kept
        what = f"tuning with {key.settings}" if key.tuning else f"seed {key.seed}"
        left = "failed" if record is None else f"{record.metrics['score']:.4g}"
        how = "kept from before" if kept else f"{record.seconds:.0f} s" if record is not None else ""
        line = f"[{self._done}/{self._total}] {key.arm}, {what}: {', '.join(filter(None, (left, how, self._left())))}"
        self._console.print(Text(line), soft_wrap=True)

    def _left(self) -> str:
        if self._fresh == 0 or self._done >= self._total:
            return ""
        rate = (time.monotonic() - self._clock) / self._fresh
        return f"about {rate * (self._total - self._done):.0f} s left"


def display_on(console: Console, parts: tuple[str, ...], runs: int) -> Bars | Lines:
    """Return the display that suits the console."""
    return Bars(console, parts, runs) if console.is_terminal else Lines(console, parts, runs)
