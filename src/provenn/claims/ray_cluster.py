"""An executor that runs each cell as a task of a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from provenn.claims.cells import Done, Failed, Job, Message, prepare, run_cell
from provenn.claims.errors import WorkerStartError


class RayTasks:
    """Runs cells on a Ray cluster, one CPU each (and one GPU each on CUDA).

    Args:
        address: The cluster's address; ``"local"`` starts one on this machine, which ends with this process.
        count: Cells at a time; by default as many as the cluster has CPUs.
        timeout: Seconds without any event after which a cell counts as hung and its task is cancelled. A task that
            waits for its turn on the cluster counts too: leave room when others use it.

    Raises:
        ImportError: Ray is not installed; the message names the extra.
        WorkerStartError: The cluster does not answer.
    """

    def __init__(self, address: str, count: int | None, timeout: float) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError("--ray needs Ray: pip install 'provenn[ray]'") from error
        self._ray = ray
        self._timeout = timeout
        self._flying: dict[Any, tuple[Job, float]] = {}
        if not _answers(address):
            raise WorkerStartError(f"Ray at {address!r} does not answer")
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "include_dashboard": False}
        started_here = {"num_cpus": count, **quiet} if address == "local" else {"logging_level": logging.ERROR}
        try:
            ray.init(address=address, **started_here)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise WorkerStartError(f"Ray at {address!r} does not start: {error}") from error
        self._count = count or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._task = ray.remote(_task)

    def idle(self) -> int:
        return self._count - len(self._flying)

    def submit(self, job: Job) -> None:
        gpus = 1 if job.trial.device.startswith("cuda") else 0
        options = self._task.options(num_returns="streaming", max_retries=0, num_cpus=1, num_gpus=gpus)
        self._flying[options.remote(job, list(sys.path))] = (job, time.monotonic())

    def wait(self) -> list[Message]:
        patience = min(sign for _, sign in self._flying.values()) + self._timeout - time.monotonic()
        ready, _ = self._ray.wait(list(self._flying), num_returns=1, timeout=max(0.0, patience), fetch_local=False)
        messages = [self._next(stream) for stream in ready]
        return messages + [self._hung(stream) for stream in self._overdue()]

    def close(self) -> None:
        for stream in self._flying:
            with contextlib.suppress(Exception):
                self._ray.cancel(stream, force=True)
        self._flying.clear()
        self._ray.shutdown()

    def _next(self, stream: Any) -> Message:
        job, _ = self._flying[stream]
        try:
            message: Message = self._ray.get(next(stream))
        except (self._ray.exceptions.RayError, StopIteration) as error:
            del self._flying[stream]
            return Failed(job.key, f"Ray task was lost: {type(error).__name__}: {error}")
        if isinstance(message, (Done, Failed)):
            del self._flying[stream]
        else:
            self._flying[stream] = (job, time.monotonic())
        return message

    def _overdue(self) -> list[Any]:
        now = time.monotonic()
        return [stream for stream, (_, sign) in self._flying.items() if now - sign > self._timeout]

    def _hung(self, stream: Any) -> Failed:
        job, _ = self._flying.pop(stream)
        self._ray.cancel(stream, force=True)
        return Failed(job.key, f"Ray task hung: no event for {self._timeout:g} s, cancelled")


def _answers(address: str) -> bool:
    """Return whether anything listens at ``host:port``, since Ray itself waits for minutes; other forms pass."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return True
    try:
        socket.create_connection((host.rpartition("/")[2], int(port)), timeout=10).close()
    except OSError:
        return False
    return True


def _task(job: Job, path: list[str]) -> Iterator[Message]:
    sys.path[:] = path
    prepare(threads=1)
    yield from run_cell(job)
