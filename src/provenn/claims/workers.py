"""Executors on this machine: worker processes, and one that runs cells in this process.

A worker is a fresh interpreter that imports torch once and then runs cell after cell. It lives in its own process
group, so that Ctrl-C reaches the parent alone and a hung cell is killed with its children; and it dies with its parent,
even when that is killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Protocol

from provenn.claims.cells import Done, Failed, Job, Live, Message, load, prepare, run_cell, tail
from provenn.claims.errors import WorkerStartError

_SPAWN = multiprocessing.get_context("spawn")
_OUTPUT_KEPT = 4096
START_SECONDS = 300.0
"""How long a worker may take to start, and to import torch and the claim."""


class Executor(Protocol):
    """Something that runs cells."""

    def idle(self) -> int:
        """Return how many more cells it takes now."""

    def submit(self, job: Job) -> None:
        """Take a cell."""

    def wait(self) -> list[Message]:
        """Return what happened, as soon as something did; may be empty."""

    def close(self) -> None:
        """Stop everything at once; cells in flight are lost."""


class Inline:
    """Runs each cell in this process, when waited for. For tests, and for debugging a claim."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()

    def idle(self) -> int:
        return 1 - len(self._jobs)

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self) -> list[Message]:
        return list(run_cell(self._jobs.popleft()))

    def close(self) -> None:
        self._jobs.clear()


class Workers:
    """Runs cells in worker processes.

    Args:
        count: Number of processes, at least 1. They start when there is work for them.
        threads: torch threads of each.
        timeout: Seconds without any event after which a cell counts as hung and its worker is killed.
    """

    def __init__(self, count: int, threads: int, timeout: float) -> None:
        self._count = count
        self._threads = threads
        self._timeout = timeout
        self._workers: list[_Worker] = []

    def idle(self) -> int:
        return self._count - sum(worker.job is not None for worker in self._workers)

    def submit(self, job: Job) -> None:
        free = next((worker for worker in self._workers if worker.job is None), None)
        if free is None:
            free = _Worker(self._threads)
            self._workers.append(free)
        free.begin(job)

    def wait(self) -> list[Message]:
        busy = [worker for worker in self._workers if worker.job is not None]
        patience = min(worker.deadline(self._timeout) for worker in busy) - time.monotonic()
        wait([source for worker in busy for source in worker.sources], max(0.0, patience))
        messages = [message for worker in busy for message in worker.collect(self._timeout)]
        self._workers = [worker for worker in self._workers if worker.alive]
        return messages

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.bury()
        self._workers = []


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, threads: int) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._output, output_end = _SPAWN.Pipe(duplex=False)
        self._printed = b""
        self._ready = False
        self.alive = True
        self.job: Job | None = None
        self.last_sign = time.monotonic()
        arguments = (theirs, output_end, threads, os.getpid(), list(sys.path))
        self._process: SpawnProcess = _SPAWN.Process(target=_serve, args=arguments, name="provenn-worker")
        with _interrupts_blocked():
            self._process.start()
        theirs.close()
        output_end.close()

    @property
    def sources(self) -> list[Connection | int]:
        return [self._pipe, self._output, self._process.sentinel]

    def begin(self, job: Job) -> None:
        self.job = job
        self.last_sign = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it died idle: `collect` says so
            self._pipe.send(job)

    def deadline(self, timeout: float) -> float:
        """Return when the worker counts as hung; importing torch and the claim is given its own time."""
        return self.last_sign + (timeout if self._ready else max(timeout, START_SECONDS))

    def collect(self, timeout: float) -> list[Message]:
        """Return what arrived; a worker that died or hangs fails its cell."""
        ended = not self._process.is_alive()  # asked first: what it sent before it died is read below
        messages = self._received()
        self._drain()
        if self.job is None:
            return messages
        if ended:
            messages.append(self._lost(_death(self._process.exitcode or 0)))
        elif time.monotonic() > self.deadline(timeout):
            self.kill()
            messages.append(self._lost(f"hung: no event for {timeout:g} s, killed"))
        return messages

    def _received(self) -> list[Message]:
        messages: list[Message] = []
        with contextlib.suppress(EOFError, ConnectionResetError):
            while self._pipe.poll():
                message = self._pipe.recv()
                self.last_sign = time.monotonic()
                self._ready = True
                if isinstance(message, str):
                    raise WorkerStartError(f"a worker could not start:\n{message}")
                if isinstance(message, (Live, Done, Failed)):
                    messages.append(message)
                if isinstance(message, (Done, Failed)):
                    self.job = None
        return messages

    def _lost(self, cause: str) -> Failed:
        assert self.job is not None
        self.bury()
        printed = self._printed.decode(errors="replace").partition("\nExtension modules:")[0]
        said = f"; it last printed\n{tail(printed)}" if printed.strip() else ""
        if not self._ready:
            raise WorkerStartError(f"a worker {cause} before it was ready{said}")
        failed = Failed(self.job.key, f"worker {cause}{said}")
        self.job = None
        return failed

    def _drain(self) -> None:
        """Read what the worker printed, so that it never blocks on it; the tail is kept for a message."""
        with contextlib.suppress(EOFError, OSError):
            while self._output.poll():
                chunk = os.read(self._output.fileno(), 65536)
                if not chunk:
                    break
                self._printed = (self._printed + chunk)[-_OUTPUT_KEPT:]

    def kill(self) -> None:
        """Kill the worker and its children."""
        pid = self._process.pid
        if pid is None or not self._process.is_alive():
            return
        self._process.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)

    def bury(self) -> None:
        self._process.join()
        self._drain()
        self._pipe.close()
        self._output.close()
        self.alive = False


def _death(code: int) -> str:
    if code >= 0:
        return f"died with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Start a process with SIGINT blocked, which it inherits: Ctrl-C is the parent's alone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, output: Connection, threads: int, parent: int, path: list[str]) -> None:
    """Run cells as they come: the worker's whole life."""
    os.setpgid(0, 0)
    _die_with(parent)
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    sys.path[:] = path
    try:
        faulthandler.enable()
        prepare(threads)
    except Exception:
        pipe.send(traceback.format_exc())
        return
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        hindrance = _hindrance(job)
        pipe.send(hindrance)
        if hindrance:
            return
        for message in run_cell(job):
            pipe.send(message)


def _hindrance(job: Job) -> str | None:
    """Import the claim; what hinders it hinders every cell, and so stops the run."""
    try:
        load(job.reference)
    except Exception:
        return traceback.format_exc()
    return None


def _die_with(parent: int) -> None:
    """Make this process end when its parent does, however that ends."""
    if platform.system() == "Linux":
        import ctypes

        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        return
    threading.Thread(target=_watch, name="provenn-parent-watch", daemon=True).start()


def _watch() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
