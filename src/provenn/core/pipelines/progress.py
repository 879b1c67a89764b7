"""What every stage of a pipeline is at, seen from outside, and the error that names a stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from provenn.core.pipelines.timeline import Kind

KINDS: tuple[Kind, ...] = ("forward", "recompute", "backward")


class StageError(RuntimeError):
    """A stage of a pipeline raised, hung or died; the message names it.

    Attributes:
        stage: The stage.
    """

    def __init__(self, stage: int, words: str) -> None:
        super().__init__(f"stage {stage} {words}")
        self.stage = stage
        self.words = words

    def __reduce__(self) -> tuple[type[StageError], tuple[int, str]]:
        return StageError, (self.stage, self.words)


class LostStageError(Exception):
    """What a stage raises that waits for another one in vain; the other one's fault is the cause."""


class Progress:
    """A board on which stages write what they are at, in memory that processes can share.

    Args:
        stages: Number of stages.
        shared: Whether other processes write to it.
    """

    def __init__(self, stages: int, shared: bool = False) -> None:
        # A row a stage: changes so far, the kind of its task or −1, its micro-batch, when that began.
        self._board = torch.zeros(stages, 4, dtype=torch.float64)
        self._board[:, 1] = -1
        if shared:
            self._board.share_memory_()

    @property
    def board(self) -> Tensor:
        """The numbers, a row a stage."""
        return self._board

    @contextmanager
    def task(self, stage: int, kind: Kind, micro_batch: int) -> Iterator[None]:
        """Write that a stage is at a task inside the block.

        Args:
            stage: The stage.
            kind: What it does.
            micro_batch: With which micro-batch.
        """
        row = self._board[stage]
        row[2], row[3], row[1] = micro_batch, time.perf_counter(), KINDS.index(kind)
        row[0] += 1
        try:
            yield
        finally:
            row[1] = -1
            row[0] += 1

    def changes(self) -> float:
        """Return a number that grows whenever a stage starts or ends a task."""
        return float(self._board[:, 0].sum())

    def doing(self, stage: int) -> str:
        """Return in words what a stage is at; nothing if it waits."""
        _, kind, micro_batch, _ = self._board[stage].tolist()
        return f"{KINDS[int(kind)]} of micro-batch {int(micro_batch)}" if kind >= 0 else ""

    def stalled(self, timeout: float) -> StageError:
        """Return the error of a pipeline in which nothing has happened for too long.

        It blames who is at a task; if nobody is, the stage that is behind its neighbour, whose results wait for it.

        Args:
            timeout: Seconds in which nothing happened.
        """
        busy = [stage for stage in range(len(self._board)) if self.doing(stage)]
        if not busy:
            words = f"takes up no task: nothing happened in any stage for {timeout:g} s (time-out)"
            return StageError(self._behind(), words)
        first = min(busy, key=lambda stage: float(self._board[stage, 3]))
        others = "".join(f"; stage {stage} too, in {self.doing(stage)}" for stage in busy if stage != first)
        return StageError(first, f"hangs in {self.doing(first)}: no end within {timeout:g} s (time-out){others}")

    def _behind(self) -> int:
        counts = self._board[:, 0].tolist()
        least = min(counts)
        for stage, found in enumerate(counts):
            if found == least and max(counts[max(stage - 1, 0) : stage + 2]) > least:
                return stage
        return 0


class Watch:
    """Tells how much longer to wait for a pipeline that makes progress now and then.

    Args:
        progress: The board.
        timeout: Seconds without a change after which the pipeline is given up.
    """

    def __init__(self, progress: Progress, timeout: float) -> None:
        self._progress, self._timeout = progress, timeout
        self._seen, self._since = progress.changes(), time.monotonic()

    def left(self) -> float:
        """Return the seconds left.

        Raises:
            StageError: None are; it names the stage that hangs.
        """
        changes, now = self._progress.changes(), time.monotonic()
        if changes != self._seen:
            self._seen, self._since = changes, now
        left = self._since + self._timeout - now
        if left <= 0:
            raise self._progress.stalled(self._timeout)
        return left
