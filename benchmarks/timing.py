"""Timing by turns, and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from typing import Any

import psutil
import torch

from provenn.claims.memory import peak_memory as process_peak
from provenn.claims.memory import reset_peak


def alternate(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each function, run by turns in one process.

    Turns share whatever else the machine does, so that ratios of the medians hold where absolute times do not. Every
    second round goes backwards, so that no function always follows the same other. On CUDA the device is waited for.

    Args:
        functions: What to time, by name; each runs once beforehand, untimed.
        rounds: Timed runs of each, at least 1.

    Raises:
        ValueError: ``rounds`` is below 1, or there is no function.
    """
    if rounds < 1 or not functions:
        raise ValueError(f"needs at least one function and one round, got {len(functions)} and {rounds}")
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for turn in range(rounds):
        names = list(functions) if turn % 2 == 0 else list(reversed(functions))
        for name in names:
            times[name].append(_seconds(functions[name]))
    return {name: statistics.median(taken) for name, taken in times.items()}


def _seconds(function: Callable[[], Any]) -> float:
    _wait_for_device()
    began = time.perf_counter()
    function()
    _wait_for_device()
    return time.perf_counter() - began


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory(function: Callable[[], Any]) -> int:
    """Return by how many bytes a call raises a fresh process's peak of resident memory.

    Args:
        function: A module-level function (or a ``functools.partial`` of one); its module is imported first, uncounted.

    Raises:
        RuntimeError: The process died.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_rise, args=(function, theirs))
    process.start()
    theirs.close()
    try:
        rise: int = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the measuring process died with exit code {process.exitcode}") from None
    process.join()
    return rise


def _rise(function: Callable[[], Any], pipe: Any) -> None:
    reset_peak()
    before = psutil.Process().memory_info().rss
    function()
    pipe.send(max(0, process_peak() - before))
