"""What the suite of runtimes watches and does: processes, ports, threads, stages that fail, calls with a deadline."""

from __future__ import annotations

import contextlib
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import psutil
from torch import nn

START = 60.0
"""Seconds that workers may take to start."""
GRACE = 5.0
"""Seconds beyond a time-out, and until what was closed must be gone."""


class StageError(Exception):
    """Raised by a stage of the suite's."""


class RaisingStage(nn.Module):
    """A stage that raises."""

    def forward(self, *inputs: Any) -> Any:
        """Raise a :class:`StageError`."""
        return self.fails_on_purpose()

    def fails_on_purpose(self) -> Any:
        """Raise a :class:`StageError`, with this name in its traceback."""
        raise StageError("the stage failed on purpose")


class HangingStage(nn.Module):
    """A stage that does not come back.

    Args:
        started: A file that it makes when it is called.
    """

    def __init__(self, started: Path) -> None:
        super().__init__()
        self.started = started

    def forward(self, *inputs: Any) -> Any:
        """Sleep far beyond every deadline, and then end for the sake of whoever is still waiting."""
        self.started.touch()
        time.sleep(5 * START)
        return inputs[0]


class Attempt:
    """A call in a thread of its own, so that its caller survives if it hangs.

    Args:
        call: What to call.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self.error = error

    def ended_within(self, seconds: float) -> bool:
        """Wait for the end, so long at most, and return whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def words(self) -> str:
        """The error's message, with those of its causes that Python would print; no traceback."""
        found, error = [], self.error
        while error is not None:
            found.append(f"{type(error).__name__}: {error}")
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        return "; from ".join(found)

    @property
    def report(self) -> str:
        """The error as Python prints it, with tracebacks and causes."""
        return "".join(traceback.format_exception(self.error)) if self.error is not None else ""


def wait_until(holds: Callable[[], bool], seconds: float) -> bool:
    """Wait until something holds, so long at most, and return whether it does."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _helpers() -> set[int | None]:
    """Return the processes that Python's multiprocessing keeps for itself."""
    return {
        getattr(multiprocessing.resource_tracker._resource_tracker, "_pid", None),
        getattr(multiprocessing.forkserver._forkserver, "_forkserver_pid", None),
    }


def _processes() -> dict[int, psutil.Process]:
    """Return this process's descendants, but for helpers that live as long as it does."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            # The kernel knows 15 characters of a name, which is all that is left of a zombie's.
            if process.pid not in _helpers() and not process.name().startswith("torch_shm_manag"):
                found[process.pid] = process
    return found


def _new_processes(before: Collection[int]) -> dict[int, psutil.Process]:
    """Return the descendants that are neither among these nor descend from them."""
    found, parents = _processes(), {}
    for pid, process in found.items():
        with contextlib.suppress(psutil.Error):
            parents[pid] = process.ppid()

    def is_new(pid: int | None) -> bool:
        return pid is None or (pid not in before and is_new(parents.get(pid)))

    return {pid: process for pid, process in found.items() if pid in parents and is_new(pid)}


def _ports() -> set[int]:
    """Return the ports that this process and its descendants listen on."""
    found = set()
    for process in (psutil.Process(), *_processes().values()):
        with contextlib.suppress(psutil.Error):
            connections = process.net_connections(kind="inet")
            found |= {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}
    return found


def _threads() -> set[str]:
    """Return the names of Python's threads, but for the one of multiprocessing that serves file descriptors."""
    return {f"{thread.name} {thread.ident}" for thread in threading.enumerate() if "_serve)" not in thread.name}


class Leftovers:
    """Watches for what a runtime leaves behind: made before it, asked after it.

    What a process starts that was there before is that process's own: a database server has workers come and go.
    """

    def __init__(self) -> None:
        self._before = _processes().keys(), _ports(), _threads()

    def now(self) -> list[str]:
        """Return in words what is there and was not before."""
        processes, ports, threads = self._before
        found = []
        for pid, process in _new_processes(processes).items():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(f"process {pid} ({process.status()})")
        found += [f"listening port {port}" for port in _ports() - ports]
        return found + [f"thread {name}" for name in _threads() - threads]

    def after_grace(self) -> list[str]:
        """Return in words what is still there when the grace is over."""
        end = time.monotonic() + GRACE
        while (found := self.now()) and time.monotonic() < end:
            time.sleep(0.01)
        return found

    def kill(self) -> None:
        """Kill the processes that were not there before."""
        for process in _new_processes(self._before[0]).values():
            with contextlib.suppress(psutil.Error):
                process.kill()
                process.wait(GRACE)


@contextlib.contextmanager
def cleaned_up() -> Iterator[Leftovers]:
    """Watch for leftovers, and at the end kill the processes among them, whatever happened."""
    leftovers = Leftovers()
    try:
        yield leftovers
    finally:
        leftovers.kill()
