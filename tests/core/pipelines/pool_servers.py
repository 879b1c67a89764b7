"""What worker processes of the tests serve; in a module of its own, so that they can load it."""

import os
import time

import torch

from provenn.core.pipelines.links import GlooLinks, Parcel, Route

TENSORS = (
    torch.arange(6.0).view(2, 3).mT,  # not contiguous
    torch.tensor(2.5, dtype=torch.float64),
    torch.empty(0, 3),
    torch.tensor([True, False]),
    torch.arange(3, dtype=torch.int16),
    torch.ones(2, dtype=torch.bfloat16),
    torch.tensor([1 + 2j]),
    None,
)


def sends(index, payload, progress):
    """Worker 0 sends parcels on two routes, worker 1 receives them the other way round, and returns them."""
    links = GlooLinks(None, 20.0)

    def handle(request):
        if index == 0:
            flags = tuple(place % 2 == 0 for place in range(len(TENSORS)))
            for size in (1, 2):
                links.send(Route(0, 1, 0), Parcel((torch.full((size,), float(size)),), (True,)))
            links.send(Route(0, 1, 5), Parcel(TENSORS, flags, True))
            links.flush()
            return links.traffic
        return [links.receive(Route(0, 1, channel)) for channel in (5, 0, 0)]

    return handle


def obeys(index, payload, progress):
    """Do what is asked: return, raise, die, hang at a task, or wait for another worker."""
    links = GlooLinks(None, 20.0)

    def handle(request):
        if request == "raise":
            raise KeyError("no such thing")
        if request == "exit":
            os._exit(3)
        if request == "hang":
            with progress.task(index, "backward", 4):
                time.sleep(60)
        if isinstance(request, int):
            links.receive(Route(request, index, 0))
        return payload, request, os.getpid(), torch.get_num_threads()

    return handle


def does_not_start(index, payload, progress):
    """Fail at the start of worker 1."""
    if index == 1:
        raise OSError("no room")
    return lambda request: request
