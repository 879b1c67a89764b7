"""Worker processes, one a stage: asked together, watched while they work, and gone afterwards whatever happened."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from provenn.core.pipelines.progress import LostStageError, Progress, StageError, Watch

_START = 120.0
"""Seconds that workers have to start, at least."""
_OF_AUTOGRAD = "torch.fx.experimental.symbolic_shapes"
"""What autograd imports in a process's first backward pass, which takes a second or two."""
_SETTLE = 1.0
"""Seconds to look for the cause when a stage says that it has lost another one."""
_STOP = b""
Handler = Callable[[Any], Any]


class WorkerPool:
    """Processes that serve requests, one a stage, in one gloo process group on this machine.

    Args:
        serve: ``serve(index, payload, progress)`` is called once in each worker, and returns what answers requests
            there. A module-level function.
        payloads: What each worker gets; tensors in shared memory are shared with it.
        timeout: Seconds without a task's start or end in any stage after which a request is given up.
        threads: torch's threads in each worker.

    Raises:
        StageError: A worker does not start.

    When anything fails, all workers are killed, and the error names the stage that failed.
    """

    def __init__(
        self, serve: Callable[[int, Any, Progress], Handler], payloads: Sequence[Any], timeout: float, threads: int
    ) -> None:
        self._progress, self._timeout = Progress(len(payloads), shared=True), timeout
        context = multiprocessing.get_context(_start_method())
        folder = tempfile.mkdtemp(prefix="provenn-")
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._end = weakref.finalize(self, _end, self._processes, self._pipes, folder)
        for index, payload in enumerate(payloads):
            ours, theirs = context.Pipe()
            arguments = (serve, index, len(payloads), payload, self._progress, theirs, folder, timeout, threads)
            process = context.Process(  # type: ignore[attr-defined]
                target=_work, args=arguments, name=f"stage {index}", daemon=True
            )
            self._pipes.append(ours)
            try:
                process.start()
            except BaseException:
                self._end()
                raise
            theirs.close()
            self._processes.append(process)
        self._collect(max(_START, timeout))

    @property
    def pids(self) -> dict[str, int]:
        """The process ids of the living workers by name."""
        return {one.name: one.pid for one in self._processes if one.pid is not None and one.is_alive()}

    @property
    def closed(self) -> bool:
        """Whether the workers are gone."""
        return not self._end.alive

    def ask(self, requests: Sequence[Any]) -> list[Any]:
        """Send each worker its request, wait for all answers, and return them.

        Args:
            requests: A request for every worker.

        Raises:
            StageError: A worker raised, died, or did not end in time; then all are gone.
        """
        packed = [pickle.dumps(request, protocol=pickle.HIGHEST_PROTOCOL) for request in requests]
        # On a thread: a worker that has stopped does not read, and would hold up its sender for good.
        sender = threading.Thread(target=self._send, args=(list(self._pipes), packed), daemon=True)
        sender.start()
        try:
            return self._collect(self._timeout)
        finally:
            sender.join()

    @staticmethod
    def _send(pipes: list[Connection], packed: list[bytes]) -> None:
        for pipe, request in zip(pipes, packed, strict=True):
            with contextlib.suppress(OSError):  # who is dead is found by who collects the answers
                pipe.send_bytes(request)

    def close(self) -> None:
        """End the workers; may be called twice."""
        if self._end.alive:
            for pipe in self._pipes:
                with contextlib.suppress(OSError):
                    pipe.send_bytes(_STOP)
            deadline = time.monotonic() + 2
            for process in self._processes:
                process.join(max(0.0, deadline - time.monotonic()))
            self._end()

    def _collect(self, timeout: float) -> list[Any]:
        answers: dict[int, Any] = {}
        watch = Watch(self._progress, timeout)
        try:
            while len(answers) < len(self._pipes):
                for index, answer in self._arrivals(answers, watch.left()):
                    if isinstance(answer, BaseException):
                        raise self._cause(answer, answers, index)
                    answers[index] = answer
        except BaseException:
            self._end()
            raise
        return [answers[index] for index in range(len(self._pipes))]

    def _arrivals(self, answered: Mapping[int, Any], seconds: float) -> list[tuple[int, Any]]:
        """Wait for answers, and return those that came; an error stands for a worker that failed or is gone."""
        open_ones = [index for index in range(len(self._pipes)) if index not in answered]
        handles: list[Any] = [self._pipes[index] for index in open_ones]
        handles += [process.sentinel for process in self._processes]
        ready = wait(handles, min(seconds, 1.0))
        found = [(index, self._answer(index)) for index in open_ones if self._pipes[index] in ready]
        if not found:
            dead = [index for index, one in enumerate(self._processes) if one.sentinel in ready]
            found = [(index, self._death(index)) for index in dead]
        return found

    def _answer(self, index: int) -> Any:
        try:
            succeeded, answer = pickle.loads(self._pipes[index].recv_bytes())
        except (EOFError, OSError):
            return self._death(index)
        if succeeded:
            return answer
        lost, words, trace = answer
        error = StageError(index, words)
        error.__cause__ = LostStageError(trace) if lost else _RemoteError(trace)
        return error

    def _death(self, index: int) -> StageError:
        process = self._processes[index]
        process.join(_SETTLE)
        code, was = process.exitcode, self._progress.doing(index)
        how = "ended by itself" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by signal {-code} ({_signal_name(-code)})"
        return StageError(index, f"(process {process.pid}) {how}" + (f", in {was}" if was else ""))

    def _cause(self, error: BaseException, answers: Mapping[int, Any], index: int) -> BaseException:
        """Return why an error came about: who only lost a neighbour is not to blame."""
        failed = {index: error}
        deadline = time.monotonic() + _SETTLE
        while all(isinstance(one.__cause__, LostStageError) for one in failed.values()) and time.monotonic() < deadline:
            arrivals = self._arrivals({**answers, **failed}, 0.1)
            failed |= {other: answer for other, answer in arrivals if isinstance(answer, BaseException)}
        direct = [one for one in failed.values() if not isinstance(one.__cause__, LostStageError)]
        return direct[0] if direct else error


class _RemoteError(Exception):
    """The traceback of an error in a worker, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def _start_method() -> str:
    """Fork from a process that has torch in memory and no threads, where there is one; else start afresh."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", __name__, _OF_AUTOGRAD])
    return "forkserver"


def _end(processes: list[BaseProcess], pipes: list[Connection], folder: str) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
        process.close()
    for pipe in pipes:
        pipe.close()
    processes.clear()
    shutil.rmtree(folder, ignore_errors=True)


def _work(
    serve: Callable[[int, Any, Progress], Handler],
    index: int,
    count: int,
    payload: Any,
    progress: Progress,
    pipe: Connection,
    folder: str,
    timeout: float,
    threads: int,
) -> None:
    """Be a worker: join the group, and answer requests until there are no more."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its workers
    torch.set_num_threads(threads)
    handler: Handler | None = None

    def start(_: Any) -> None:
        nonlocal handler
        importlib.import_module(_OF_AUTOGRAD)  # now, and not in a task, whose time counts
        _join_group(index, count, folder, max(_START, timeout))
        handler = serve(index, payload, progress)

    _reply(pipe, start, None)
    while handler is not None:
        try:
            request = pipe.recv_bytes()
        except (EOFError, OSError):
            break
        if request == _STOP:
            break
        _reply(pipe, lambda request: handler(pickle.loads(request)), request)
    with contextlib.suppress(Exception):
        dist.destroy_process_group()
    os._exit(0)  # not to wait for threads of a group whose other members are gone


def _reply(pipe: Connection, handler: Handler, request: Any) -> None:
    try:
        answer = True, handler(request)
    except BaseException as error:
        lost = isinstance(error, LostStageError)
        words = str(error).partition(" ")[2].partition(" ")[2] if lost else f"raised {type(error).__name__}: {error}"
        answer = False, (lost, words, traceback.format_exc())
    with contextlib.suppress(OSError):
        pipe.send_bytes(pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _join_group(index: int, count: int, folder: str, seconds: float) -> None:
    """Join the workers' gloo group, by a file and over the loopback interface, so that no port is open to others."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    dist.init_process_group(
        "gloo",
        init_method=Path(folder, "rendezvous").as_uri(),
        rank=index,
        world_size=count,
        timeout=timedelta(seconds=seconds),
    )
