"""What stages send each other: parcels of tensors, point to point, counted; inside a process and between processes."""

from __future__ import annotations

import queue
from collections.abc import Iterable
from datetime import timedelta
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from provenn.core.pipelines.progress import LostStageError


class Route(NamedTuple):
    """Where a parcel goes: from a stage to a stage, on a channel of its own."""

    source: int
    target: int
    channel: int


class Parcel(NamedTuple):
    """Tensors on their way; ``None`` stands for a tensor that is not there, a gradient that is zero.

    Attributes:
        tensors: The tensors.
        needs_grad: Whether a gradient is wanted, for each.
        is_tuple: Whether a module returned them as a tuple, or as a bare tensor.
    """

    tensors: tuple[Tensor | None, ...]
    needs_grad: tuple[bool, ...] = ()
    is_tuple: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(one.nbytes for one in self.tensors if one is not None)


class Traffic:
    """Counts parcels and bytes by route."""

    def __init__(self) -> None:
        self.parcels: dict[Route, int] = {}
        self.bytes: dict[Route, int] = {}

    def add(self, route: Route, parcels: int, nbytes: int) -> None:
        """Count parcels.

        Args:
            route: The way they went.
            parcels: How many.
            nbytes: Their bytes together.
        """
        self.parcels[route] = self.parcels.get(route, 0) + parcels
        self.bytes[route] = self.bytes.get(route, 0) + nbytes

    def merge(self, other: Traffic) -> None:
        """Add what another counter has counted.

        Args:
            other: The other.
        """
        for route, parcels in other.parcels.items():
            self.add(route, parcels, other.bytes[route])


class Links(Protocol):
    """Sends parcels along routes and receives them in the order in which they were sent."""

    traffic: Traffic

    def send(self, route: Route, parcel: Parcel) -> None:
        """Send a parcel without waiting for who receives it."""

    def receive(self, route: Route) -> Parcel:
        """Wait for the next parcel of a route."""

    def flush(self) -> None:
        """Wait until everything sent is on its way."""


class QueueLinks:
    """Links between threads of one process: a queue a route; parcels are handed over, not copied.

    Args:
        routes: The routes that there are.
    """

    def __init__(self, routes: Iterable[Route]) -> None:
        self.traffic = Traffic()
        self._queues: dict[Route, queue.SimpleQueue[Parcel | None]] = {route: queue.SimpleQueue() for route in routes}
        self._whole = True

    def send(self, route: Route, parcel: Parcel) -> None:
        """Send a parcel."""
        self.traffic.add(route, 1, parcel.nbytes)
        self._queues[route].put(parcel)

    def receive(self, route: Route) -> Parcel:
        """Wait for the next parcel of a route.

        Raises:
            LostStageError: The links were cut.
        """
        parcel = self._queues[route].get()
        if parcel is None or not self._whole:
            raise LostStageError(f"stage {route.target} lost stage {route.source}")
        return parcel

    def flush(self) -> None:
        """Do nothing: a queue takes everything at once."""

    def cut(self) -> None:
        """End every stage that waits, now or later, whatever has been sent."""
        self._whole = False
        for one in self._queues.values():
            one.put(None)


_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
_HEADER = 256


class GlooLinks:
    """Links between processes over ``torch.distributed``: a header of fixed length, then each tensor, through the host.

    Args:
        device: Where received tensors go.
        timeout: Seconds to wait for a parcel.

    The process group is the default one, of the gloo back end, which a stage's rank has joined.
    """

    def __init__(self, device: torch.device | None, timeout: float) -> None:
        self.traffic = Traffic()
        self._device, self._timeout = device, timedelta(seconds=timeout)
        self._sent: list[tuple[Route, dist.Work, Tensor]] = []

    def send(self, route: Route, parcel: Parcel) -> None:
        """Send a parcel.

        Raises:
            ValueError: Its tensors have too many dimensions together, or an unknown type.
            LostStageError: The receiver is gone.
        """
        self.traffic.add(route, 1, parcel.nbytes)
        self._sent = [one for one in self._sent if not one[1].is_completed()]
        for tensor in (_header(parcel), *(one for one in parcel.tensors if one is not None)):
            plain = tensor.detach().to("cpu").contiguous()
            if plain.numel() > 0:
                self._isend(route, plain)

    def _isend(self, route: Route, tensor: Tensor) -> None:
        try:
            work = dist.isend(tensor, route.target, tag=route.channel)
        except RuntimeError as error:
            raise LostStageError(f"stage {route.source} lost stage {route.target}: {error}") from error
        assert work is not None
        self._sent.append((route, work, tensor))

    def receive(self, route: Route) -> Parcel:
        """Wait for the next parcel of a route.

        Raises:
            LostStageError: It did not come in time, or its sender is gone.
        """
        header = torch.empty(_HEADER, dtype=torch.int64)
        self._receive_into(route, header)
        return self._contents(route, header.tolist())

    def _contents(self, route: Route, header: list[int]) -> Parcel:
        count, is_tuple, place = header[0], bool(header[1]), 2
        tensors: list[Tensor | None] = []
        needs_grad = []
        for _ in range(count):
            code, wanted, dims = header[place : place + 3]
            shape = header[place + 3 : place + 3 + dims]
            place += 3 + dims
            needs_grad.append(bool(wanted))
            if code < 0:
                tensors.append(None)
                continue
            tensor = torch.empty(shape, dtype=_DTYPES[code])
            if tensor.numel() > 0:
                self._receive_into(route, tensor)
            tensors.append(tensor if self._device is None else tensor.to(self._device))
        return Parcel(tuple(tensors), tuple(needs_grad), is_tuple)

    def _receive_into(self, route: Route, tensor: Tensor) -> None:
        try:
            work = dist.irecv(tensor, route.source, tag=route.channel)
            assert work is not None
            work.wait(self._timeout)
        except RuntimeError as error:
            raise LostStageError(f"stage {route.target} lost stage {route.source}: {error}") from error

    def flush(self) -> None:
        """Wait until everything has been sent.

        Raises:
            LostStageError: A receiver did not take it in time.
        """
        for route, work, _ in self._sent:
            try:
                work.wait(self._timeout)
            except RuntimeError as error:
                raise LostStageError(f"stage {route.source} lost stage {route.target}: {error}") from error
        self._sent.clear()


def _header(parcel: Parcel) -> Tensor:
    numbers = [len(parcel.tensors), int(parcel.is_tuple)]
    wanted = parcel.needs_grad or (False,) * len(parcel.tensors)
    for tensor, needs_grad in zip(parcel.tensors, wanted, strict=True):
        if tensor is None:
            numbers += [-1, int(needs_grad), 0]
        elif tensor.dtype not in _DTYPES:
            raise ValueError(f"tensors between stages must be of a plain type, got {tensor.dtype}")
        else:
            numbers += [_DTYPES.index(tensor.dtype), int(needs_grad), tensor.dim(), *tensor.shape]
    if len(numbers) > _HEADER:
        raise ValueError(f"too many tensors and dimensions between two stages: {len(parcel.tensors)} tensors")
    return torch.tensor(numbers + [0] * (_HEADER - len(numbers)))
