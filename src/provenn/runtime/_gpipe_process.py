"""The engine with a process a stage: parameters and buffers in shared memory, boundary tensors by send and receive."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from provenn.core.pipelines.links import GlooLinks, Parcel, Traffic
from provenn.core.pipelines.progress import Progress
from provenn.core.pipelines.timeline import Task
from provenn.core.pipelines.workers import Handler, WorkerPool
from provenn.runtime._gpipe_skips import Skip
from provenn.runtime._gpipe_stage import Call, Stage
from provenn.runtime._gpipe_worker import Worker


class _Payload(NamedTuple):
    """What a worker gets at its start."""

    layers: nn.Sequential
    gradients: dict[str, Tensor]
    stages: int
    skips: tuple[Skip, ...]
    device: torch.device | None
    timeout: float


class _Request(NamedTuple):
    """What a worker is asked for."""

    what: str
    call: Call
    fed: list[Parcel] | None
    training: tuple[bool, ...]
    trainable: tuple[bool, ...]
    dropped: tuple[int, ...]


class _Answer(NamedTuple):
    """What a worker returns from a pass."""

    parcels: list[Parcel]
    drawn: bool
    tasks: list[Task]
    traffic: Traffic
    gradients: tuple[str, ...]


class ProcessEngine:
    """Runs each stage in a process of its own, which starts with the first call.

    Parameters and buffers are moved into memory that the workers share, so that an optimizer in this process is felt
    there without a copy. Gradients come back the same way.

    Args:
        partitions: The layers of each stage.
        skips: The skips that cross stages.
        devices: Where each stage works; ``None`` is the CPU.
        timeout: Seconds without a task's start or end after which a call is given up.
    """

    def __init__(
        self,
        partitions: Sequence[nn.Sequential],
        skips: Sequence[Skip],
        devices: Sequence[torch.device | None],
        timeout: float,
    ) -> None:
        self.traffic = Traffic()
        self._partitions, self._skips, self._devices, self._timeout = partitions, tuple(skips), devices, timeout
        self._shared = [_Shared(part) for part in partitions]
        self._pool: WorkerPool | None = None
        self._dropped: list[int] = []
        self._end = ""

    def forward(self, call: Call, fed: Sequence[Parcel]) -> tuple[list[Parcel], bool, list[Task]]:
        """Take a call forward.

        Args:
            call: The call.
            fed: Its inputs by micro-batch.

        Raises:
            StageError: A stage raised, hung or died.
            RuntimeError: The engine was closed.
        """
        answers = self._ask("forward", call, fed, first=0)
        return answers[-1].parcels, any(one.drawn for one in answers), [task for one in answers for task in one.tasks]

    def backward(self, call: Call, fed: Sequence[Parcel]) -> tuple[list[Parcel], list[dict[str, Tensor]], list[Task]]:
        """Take a call backward.

        Args:
            call: The call.
            fed: The gradients of its outputs by micro-batch.

        Raises:
            StageError: A stage raised, hung or died.
            RuntimeError: The engine was closed.
        """
        answers = self._ask("backward", call, fed, first=len(self._partitions) - 1)
        gradients = [
            # copies: autograd may keep what it is given, and the shared memory is written to again
            {name: shared.gradients[name].clone() for name in answer.gradients}
            for shared, answer in zip(self._shared, answers, strict=True)
        ]
        return answers[0].parcels, gradients, [task for one in answers for task in one.tasks]

    def drop(self, number: int) -> None:
        """Forget a call, with the next request.

        Args:
            number: Its number.
        """
        self._dropped.append(number)

    def workers(self) -> dict[str, int]:
        """Return the process ids of the workers by name."""
        return self._pool.pids if self._pool is not None and not self._pool.closed else {}

    def close(self) -> None:
        """End the workers."""
        self._end = self._end or "it was closed"
        if self._pool is not None:
            self._pool.close()

    def _ask(self, what: str, call: Call, fed: Sequence[Parcel], first: int) -> list[_Answer]:
        if self._end:
            raise RuntimeError(f"the pipeline has no workers: {self._end}")
        dropped, self._dropped = tuple(self._dropped), []
        for shared in self._shared:
            shared.renew()
        try:
            if self._pool is None:
                self._pool = WorkerPool(_serve, self._payloads(), self._timeout, self._threads())
            requests = [
                _Request(
                    what,
                    call,
                    [_on_cpu(one) for one in fed] if index == first else None,
                    tuple(module.training for module in part.modules()),
                    tuple(parameter.requires_grad for parameter in part.parameters()),
                    dropped,
                )
                for index, part in enumerate(self._partitions)
            ]
            answers: list[_Answer] = self._pool.ask(requests)
        except BaseException as error:
            self._end = str(error) or "its last call was interrupted"
            raise
        for answer in answers:
            self.traffic.merge(answer.traffic)
        return answers

    def _payloads(self) -> list[_Payload]:
        return [
            _Payload(part, shared.gradients, len(self._partitions), self._skips, device, self._timeout)
            for part, shared, device in zip(self._partitions, self._shared, self._devices, strict=True)
        ]

    def _threads(self) -> int:
        return max(1, torch.get_num_threads() // len(self._partitions))


def _on_cpu(parcel: Parcel) -> Parcel:
    # a contiguous copy of a slice: what is pickled of a view is all that it is a view of
    return parcel._replace(
        tensors=tuple(None if one is None else one.detach().to("cpu").clone() for one in parcel.tensors)
    )


class _Shared:
    """A stage's parameters and buffers in shared memory, one block a type, and as much room for gradients.

    Args:
        layers: The stage; its tensors are moved.
    """

    def __init__(self, layers: nn.Sequential) -> None:
        self._layers = layers
        self._views: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.renew()

    def renew(self) -> None:
        """Move what is not in shared memory, or not any more.

        Raises:
            RuntimeError: A tensor has changed its shape or type since the workers know it.
        """
        if not self._views:
            named = dict(_tensors(self._layers))
            self._views = _block({name: one.detach().cpu() for name, one in named.items()})
            parameters = {name: one.detach().cpu() for name, one in self._layers.named_parameters()}
            self.gradients = _block(parameters)
        for name, tensor in _tensors(self._layers):
            view = self._views.get(name)
            if view is None or (view.shape, view.dtype) != (tensor.shape, tensor.dtype):
                raise RuntimeError(f"{name} has changed its shape or type since the pipeline was built")
            if tensor.data_ptr() != view.data_ptr() and tensor.numel() > 0:
                view.copy_(tensor.detach())
                tensor.data = view


def _tensors(layers: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from layers.named_parameters()
    yield from layers.named_buffers()


def _block(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return views of blocks of shared memory with the same values: a block a type, since each costs a descriptor."""
    views: dict[str, Tensor] = {}
    for dtype in {one.dtype for one in tensors.values()}:
        of_type = {name: one for name, one in tensors.items() if one.dtype == dtype}
        block = torch.empty(sum(one.numel() for one in of_type.values()), dtype=dtype).share_memory_()
        start = 0
        for name, one in of_type.items():
            views[name] = block[start : start + one.numel()].view(one.shape)
            views[name].copy_(one)
            start += one.numel()
    return views


def _serve(index: int, payload: _Payload, progress: Progress) -> Handler:
    """Set up a stage in its process, and return what takes it through passes."""
    device = payload.device
    shared, layers = payload.layers, payload.layers
    if device is not None and device.type != "cpu":
        layers = copy.deepcopy(shared).to(device)
    stage = Stage(index, layers, payload.stages, payload.skips, device)
    # Its own wait is a backstop: the parent, which sees all stages, gives up first and ends everyone.
    links = GlooLinks(device, payload.timeout * (payload.stages + 1))
    worker = Worker(stage, links, progress)

    def handle(request: _Request) -> _Answer:
        for number in request.dropped:
            worker.drop(number)
        for module, training in zip(layers.modules(), request.training, strict=True):
            module.training = training
        for parameter, trainable in zip(layers.parameters(), request.trainable, strict=True):
            parameter.requires_grad_(trainable)
        links.traffic = Traffic()
        with _synchronised(shared, layers):
            if request.what == "forward":
                parcels = worker.forward_pass(request.call, request.fed)
                return _answer(worker, links, parcels, ())
            parcels = worker.backward_pass(request.call, request.fed)
        gradients = stage.take_gradients()
        for name, gradient in gradients.items():
            payload.gradients[name].copy_(gradient.to_dense() if gradient.is_sparse else gradient)
        return _answer(worker, links, parcels, tuple(gradients))

    return handle


def _answer(worker: Worker, links: GlooLinks, parcels: list[Parcel], gradients: tuple[str, ...]) -> _Answer:
    drawn = worker.stage.drawn.any
    return _Answer([_on_cpu(one) for one in parcels], drawn, worker.take_tasks(), links.traffic, gradients)


@contextmanager
def _synchronised(shared: nn.Module, layers: nn.Module) -> Iterator[None]:
    """Bring a stage's tensors up to date from shared memory, and buffers back to it.

    Only what lies elsewhere is copied: the tensors of another device, and buffers that a layer has replaced.
    """
    held = dict(_tensors(shared)) if shared is not layers else {}
    with torch.no_grad():
        for name, tensor in _tensors(layers):
            if name in held:
                tensor.data.copy_(held[name])
    before = dict(shared.named_buffers())
    yield
    for name, buffer in layers.named_buffers():
        if buffer is not before[name]:
            before[name].data.copy_(buffer)
            if shared is layers:
                owner, _, last = name.rpartition(".")
                layers.get_submodule(owner)._buffers[last] = before[name]
