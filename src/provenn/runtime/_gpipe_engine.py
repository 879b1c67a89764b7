"""The engines within one process: all stages on the caller's thread, or a thread each."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from provenn.core.pipelines.links import Parcel, QueueLinks, Traffic
from provenn.core.pipelines.progress import LostStageError, Progress, StageError, Watch
from provenn.core.pipelines.schedule import clock_schedule
from provenn.core.pipelines.timeline import Task
from provenn.runtime._gpipe_skips import Skip
from provenn.runtime._gpipe_stage import Call, Stage
from provenn.runtime._gpipe_worker import Worker, routes


class Engine(Protocol):
    """Takes calls through the stages."""

    traffic: Traffic

    def forward(self, call: Call, fed: Sequence[Parcel]) -> tuple[list[Parcel], bool, list[Task]]:
        """Return the outputs by micro-batch, whether random numbers were drawn, and the tasks."""

    def backward(self, call: Call, fed: Sequence[Parcel]) -> tuple[list[Parcel], list[dict[str, Tensor]], list[Task]]:
        """Return the gradients of the inputs by micro-batch, those of the parameters by stage, and the tasks."""

    def drop(self, number: int) -> None:
        """Forget a call."""

    def workers(self) -> dict[str, int]:
        """Return the process ids of the workers by name."""

    def close(self) -> None:
        """End the workers."""


class LocalEngine:
    """Runs the stages in this process.

    Args:
        stages: The stages.
        skips: The skips that cross them.
        threads: Whether each stage has a thread; else tasks run one after another, in the order of the clocks.
        timeout: Seconds without a task's start or end after which threads are given up.
    """

    def __init__(self, stages: Sequence[Stage], skips: Sequence[Skip], threads: bool, timeout: float) -> None:
        self.traffic = Traffic()
        self._progress = Progress(len(stages))
        self._routes = routes(len(stages), skips)
        self._workers = [Worker(stage, QueueLinks(self._routes), self._progress) for stage in stages]
        self._threads, self._timeout = threads, timeout
        self._hung: list[threading.Thread] = []

    def forward(self, call: Call, fed: Sequence[Parcel]) -> tuple[list[Parcel], bool, list[Task]]:
        """Take a call forward.

        Args:
            call: The call.
            fed: Its inputs by micro-batch.

        Raises:
            StageError: A stage raised or hangs.
        """
        if self._threads:
            outputs = self._in_threads(lambda worker, given: worker.forward_pass(call, given), fed, first=0)
        else:
            outputs = self._forward_by_clock(call, fed)
        drawn = any(worker.stage.drawn.any for worker in self._workers)
        return outputs, drawn, self._tasks()

    def backward(self, call: Call, fed: Sequence[Parcel]) -> tuple[list[Parcel], list[dict[str, Tensor]], list[Task]]:
        """Take a call backward.

        Args:
            call: The call.
            fed: The gradients of its outputs by micro-batch.

        Raises:
            StageError: A stage raised or hangs.
        """
        if self._threads:
            last = len(self._workers) - 1
            found = self._in_threads(lambda worker, given: worker.backward_pass(call, given), fed, first=last)
        else:
            found = self._backward_by_clock(call, fed)
        return found, [worker.stage.take_gradients() for worker in self._workers], self._tasks()

    def drop(self, number: int) -> None:
        """Forget a call.

        Args:
            number: Its number.
        """
        for worker in self._workers:
            worker.drop(number)

    def workers(self) -> dict[str, int]:
        """Return no workers: there is one process."""
        return {}

    def close(self) -> None:
        """Do nothing: threads end with their pass."""

    def _tasks(self) -> list[Task]:
        return [task for worker in self._workers for task in worker.take_tasks()]

    def _link(self) -> QueueLinks:
        links = QueueLinks(self._routes)
        links.traffic = self.traffic
        for worker in self._workers:
            worker.links = links
        return links

    def _forward_by_clock(self, call: Call, fed: Sequence[Parcel]) -> list[Parcel]:
        self._link()
        for worker in self._workers:
            worker.begin(call)
        found = []
        for clock in clock_schedule(call.micro_batches, len(self._workers)):
            for i, j in clock:
                with _named(j):
                    output = self._workers[j].forward(call, i, fed[i] if j == 0 else None)
                if output is not None:
                    found.append(output)
        return found

    def _backward_by_clock(self, call: Call, fed: Sequence[Parcel]) -> list[Parcel]:
        self._link()
        last = len(self._workers) - 1
        found = []
        for clock in reversed(clock_schedule(call.micro_batches, len(self._workers))):
            for i, j in reversed(clock):
                with _named(j):
                    self._workers[j].recompute(call, i)
                    gradient = self._workers[j].backward(call, i, fed[i] if j == last else None)
                if gradient is not None:
                    found.append(gradient)
        return found[::-1]

    def _in_threads(
        self, run: Callable[[Worker, Sequence[Parcel] | None], list[Parcel]], fed: Sequence[Parcel], first: int
    ) -> list[Parcel]:
        self._hung = [thread for thread in self._hung if thread.is_alive()]
        if self._hung:
            raise StageError(int(self._hung[0].name.split()[1]), "still hangs in an earlier call")
        links, ends = self._link(), queue.SimpleQueue[tuple[int, list[Parcel] | BaseException]]()

        def work(worker: Worker) -> None:
            index = worker.stage.index
            try:
                ends.put((index, run(worker, fed if index == first else None)))
            except BaseException as error:
                ends.put((index, error))

        threads = [
            threading.Thread(
                target=contextvars.copy_context().run,
                args=(work, worker),
                name=f"stage {worker.stage.index}",
                daemon=True,
            )
            for worker in self._workers
        ]
        for thread in threads:
            thread.start()
        try:
            found = self._gather(ends, len(threads))
        except StageError as error:
            links.cut()
            for thread in threads:
                if error.__cause__ is not None or thread is not threads[error.stage]:  # else that one hangs
                    thread.join(self._timeout)
            self._hung = threads
            raise
        for thread in threads:
            thread.join()
        return found

    def _gather(self, ends: queue.SimpleQueue[tuple[int, list[Parcel] | BaseException]], count: int) -> list[Parcel]:
        watch, found = Watch(self._progress, self._timeout), []
        while count > 0:
            try:
                index, end = ends.get(timeout=watch.left())
            except queue.Empty:
                continue
            if isinstance(end, BaseException) and not isinstance(end, LostStageError):
                raise _raised(index, end) from end
            if isinstance(end, list):
                found += end
            count -= 1
        return found


def _raised(stage: int, error: BaseException) -> StageError:
    return StageError(stage, f"raised {type(error).__name__}: {error}")


@contextmanager
def _named(stage: int) -> Iterator[None]:
    """Name the stage in the error of what it runs."""
    try:
        yield
    except Exception as error:
        raise _raised(stage, error) from error
