"""A stage among others: what it receives and sends, and the order of its tasks in a pass."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from provenn.core.pipelines.links import Links, Parcel, Route
from provenn.core.pipelines.progress import Progress
from provenn.core.pipelines.timeline import Kind, Task
from provenn.runtime._gpipe_skips import Skip
from provenn.runtime._gpipe_stage import Call, Stage


class Worker:
    """Takes a stage through the passes of a call, task after task, with its neighbours behind links.

    Args:
        stage: The stage.
        links: Its links.
        progress: Where it writes what it is at.
    """

    def __init__(self, stage: Stage, links: Links, progress: Progress) -> None:
        self.stage, self.links, self.progress = stage, links, progress
        self._tasks: list[Task] = []
        self._forms: dict[tuple[int, int], tuple[bool, int]] = {}  # of inputs: a tuple?, how many

    def forward(self, call: Call, i: int, fed: Parcel | None) -> Parcel | None:
        """Receive a micro-batch, run its forward task, and send the results on.

        Args:
            call: The call.
            i: The micro-batch.
            fed: The inputs, for the first stage.

        Returns:
            The outputs, of the last stage.
        """
        stage, here = self.stage, self.stage.index
        parcel = fed if fed is not None else self.links.receive(Route(here - 1, here, 0))
        if call.grad:
            self._forms[call.number, i] = parcel.is_tuple, len(parcel.tensors)
        skips = [self.links.receive(Route(skip.source, here, channel)) for skip, channel in stage.popped]
        with self._task("forward", i):
            outputs = stage.forward(call, i, _joined(parcel, skips))
        own = len(outputs.tensors) - len(stage.stashed)
        for place, (skip, channel) in enumerate(stage.stashed, start=own):
            part = Parcel(outputs.tensors[place : place + 1], outputs.needs_grad[place : place + 1])
            self.links.send(Route(here, skip.target, channel), part)
        result = Parcel(outputs.tensors[:own], outputs.needs_grad[:own], outputs.is_tuple)
        if here == stage.count - 1:
            return result
        self.links.send(Route(here, here + 1, 0), result)
        return None

    def recompute(self, call: Call, i: int) -> None:
        """Recompute a micro-batch where that is needed; its gradient need not be there yet.

        Args:
            call: The call.
            i: The micro-batch.
        """
        if self.stage.keeps(call, i)[1]:
            with self._task("recompute", i):
                self.stage.recompute(call, i, self._forms[call.number, i][0])

    def backward(self, call: Call, i: int, fed: Parcel | None) -> Parcel | None:
        """Receive a micro-batch's gradient, run its backward task, and send the results back.

        Args:
            call: The call.
            i: The micro-batch.
            fed: The gradients, for the last stage.

        Returns:
            The gradients of the inputs, of the first stage.
        """
        stage, here = self.stage, self.stage.index
        parcel = fed if fed is not None else self.links.receive(Route(here + 1, here, 0))
        skips = [self.links.receive(Route(skip.target, here, channel)) for skip, channel in stage.stashed]
        own = self._forms.pop((call.number, i))[1]
        gradients: tuple[Tensor | None, ...] = (None,) * (own + len(stage.popped))
        if stage.keeps(call, i)[0]:
            with self._task("backward", i):
                gradients = stage.backward(call, i, _joined(parcel, skips).tensors)
        for (skip, channel), gradient in zip(stage.popped, gradients[own:], strict=True):
            self.links.send(Route(here, skip.source, channel), Parcel((gradient,)))
        result = Parcel(gradients[:own])
        if here == 0:
            return result
        self.links.send(Route(here, here - 1, 0), result)
        return None

    def forward_pass(self, call: Call, fed: Sequence[Parcel] | None) -> list[Parcel]:
        """Take all micro-batches forward, in order; return the outputs of the last stage.

        Args:
            call: The call.
            fed: The inputs of the first stage.
        """
        self.begin(call)
        found = [self.forward(call, i, fed[i] if fed is not None else None) for i in range(call.micro_batches)]
        self.links.flush()
        return [one for one in found if one is not None]

    def backward_pass(self, call: Call, fed: Sequence[Parcel] | None) -> list[Parcel]:
        """Take all micro-batches backward, last to first; return the gradients of the first stage's inputs.

        Args:
            call: The call.
            fed: The gradients of the last stage's outputs, by micro-batch.
        """
        found = []
        for i in reversed(range(call.micro_batches)):
            self.recompute(call, i)
            found.append(self.backward(call, i, fed[i] if fed is not None else None))
        self.links.flush()
        return [one for one in reversed(found) if one is not None]

    def begin(self, call: Call) -> None:
        """Get ready for a call's forward pass.

        Args:
            call: The call.
        """
        self._tasks.clear()
        self.stage.begin(call)

    def take_tasks(self) -> list[Task]:
        """Return the tasks since it was last asked, with their times."""
        taken, self._tasks = self._tasks, []
        return taken

    def drop(self, number: int) -> None:
        """Forget a call.

        Args:
            number: Its number.
        """
        self.stage.drop(number)
        for key in [key for key in self._forms if key[0] == number]:
            del self._forms[key]

    @contextmanager
    def _task(self, kind: Kind, i: int) -> Iterator[None]:
        device = self.stage.device
        with self.progress.task(self.stage.index, kind, i):
            start = time.perf_counter()
            yield
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)  # a task ends when its device is done: what follows may be elsewhere
            self._tasks.append(Task(kind, self.stage.index, i, start, time.perf_counter()))


def _joined(parcel: Parcel, skips: Sequence[Parcel]) -> Parcel:
    tensors = parcel.tensors + tuple(one for skip in skips for one in skip.tensors)
    needs_grad = parcel.needs_grad + tuple(one for skip in skips for one in skip.needs_grad)
    return Parcel(tensors, needs_grad, parcel.is_tuple)


def routes(count: int, skips: Sequence[Skip]) -> list[Route]:
    """Return all routes of a pipeline, both ways.

    Args:
        count: Its stages.
        skips: Its skips.
    """
    forward = [Route(j, j + 1, 0) for j in range(count - 1)]
    forward += [Route(skip.source, skip.target, channel) for channel, skip in enumerate(skips, start=1)]
    return [*forward, *(Route(route.target, route.source, route.channel) for route in forward)]
