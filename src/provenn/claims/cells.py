"""Run one cell: seed, consume the events of ``run``, check what it left, measure time and memory.

This is what every executor does with a cell, whether in this process, in a worker or on a Ray cluster.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import math
import os
import platform
import random
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from provenn.claims.claim import Bar, Claim, Metric, Point, Progress, Trial
from provenn.claims.ledger import CellKey, Record
from provenn.claims.memory import peak_memory, reset_peak

LIVE_SECONDS = 0.1
"""The shortest time between two live messages of a cell."""


@dataclass(frozen=True)
class Job:
    """A cell for an executor.

    Args:
        key: The cell.
        reference: ``module:attribute`` of the claim.
        trial: What ``run`` receives.
        needed: The metrics that the cell must leave.
    """

    key: CellKey
    reference: str
    trial: Trial
    needed: tuple[str, ...]


@dataclass(frozen=True)
class Live:
    """A sign of life of a running cell."""

    key: CellKey
    done: int = 0
    total: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """A cell that ended well."""

    key: CellKey
    record: Record


@dataclass(frozen=True)
class Failed:
    """A cell that did not, with its cause in words."""

    key: CellKey
    cause: str


Message = Live | Done | Failed


def prepare(threads: int) -> None:
    """Set up a process that runs nothing but cells: its torch threads, and denormal numbers flushed to zero."""
    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def run_cell(job: Job) -> Iterator[Message]:
    """Run a cell to its end; nothing that the claim raises escapes.

    Yields:
        A sign of life now and then, and :class:`Done` or :class:`Failed` at the end.
    """
    try:
        yield from _run(load(job.reference), job)
    except Exception as error:
        yield Failed(job.key, f"raised {type(error).__name__}: {error}\n{tail(traceback.format_exc())}")


@cache
def load(reference: str) -> Claim:
    """Import the claim that ``module:attribute`` names."""
    module, _, attribute = reference.partition(":")
    claim = getattr(importlib.import_module(module), attribute)
    assert isinstance(claim, Claim)
    return claim


def _run(claim: Claim, job: Job) -> Iterator[Message]:
    _seed(job.trial)
    _reset_peaks(job.trial.device)
    started, clock = datetime.now(UTC), time.perf_counter()
    metrics: dict[str, float] = {}
    curves: dict[str, list[tuple[float, float]]] = {}
    done, total, told = 0, 0, clock
    events: Iterator[object] = iter(claim.run(job.trial))
    for event in events:
        if isinstance(event, Metric):
            metrics[event.name] = float(event.value)
        elif isinstance(event, Point):
            curves.setdefault(event.curve, []).append((float(event.x), float(event.y)))
        elif isinstance(event, Bar):
            curves.setdefault(event.curve, []).append((float(event.start), float(event.end)))
        elif isinstance(event, Progress):
            done, total = int(event.done), int(event.total)
        else:
            raise TypeError(f"run must yield Metric, Point, Bar or Progress, got {event!r}")
        now = time.perf_counter()
        if now - told >= LIVE_SECONDS:
            told = now
            yield Live(job.key, done, total, dict(metrics))
    fault = _fault(job, metrics)
    if fault:
        yield Failed(job.key, fault)
        return
    seconds = time.perf_counter() - clock
    peak, cuda = _peaks(job.trial.device)
    points = {name: tuple(curve) for name, curve in curves.items()}
    stamp = started.isoformat(timespec="milliseconds")
    yield Done(job.key, Record(metrics, points, stamp, seconds, peak, cuda, environment(job.trial.device)))


def _fault(job: Job, metrics: dict[str, float]) -> str:
    if not metrics:
        return "left no metric"
    missing = [name for name in job.needed if name not in metrics]
    if missing:
        return f"left no metric {missing[0]!r}, only {', '.join(metrics)}"
    # A setting under trial may diverge: it is not picked. A seed that does leaves no evidence.
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad and not job.key.tuning:
        return f"left {bad[0]} = {metrics[bad[0]]}"
    return ""


def tail(text: str, lines: int = 12) -> str:
    """Return the last lines of what a worker said."""
    return "\n".join(text.strip().splitlines()[-lines:])


def _seed(trial: Trial) -> None:
    """Seed the global generators from study and seed: not the arm, so that whatever an arm leaves to them is paired."""
    import torch

    digest = hashlib.sha256(f"{trial.study}\0{trial.seed}".encode()).digest()
    seed = int.from_bytes(digest[:8], "big")
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - whatever a claim leaves to numpy's global generator
    torch.manual_seed(seed % 2**63)


def _reset_peaks(device: str) -> None:
    reset_peak()
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def _peaks(device: str) -> tuple[int, int | None]:
    if not device.startswith("cuda"):
        return peak_memory(), None
    import torch

    return peak_memory(), torch.cuda.max_memory_allocated(device)


@cache
def environment(device: str) -> dict[str, Any]:
    """Describe where cells of this process run: versions, hardware, threads, platform and device."""
    import psutil
    import torch

    hardware: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": int(psutil.virtual_memory().total),
    }
    if device.startswith("cuda"):
        hardware["gpu"] = torch.cuda.get_device_name(device)
    versions = {name: importlib.metadata.version(name) for name in ("provenn", "torch", "numpy")}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "device": device,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
