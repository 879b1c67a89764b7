"""Random numbers of a task: the same in every back end, and in a recomputation."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from provenn.core.experiment.seeding import derive_seed

_turn = threading.Lock()


def peek_seed() -> int:
    """Return a seed that depends on the state of torch's global generator, and leave that as it is."""
    state = torch.get_rng_state()
    try:
        return int(torch.randint(2**62, ()))
    finally:
        torch.set_rng_state(state)


def advance() -> None:
    """Move torch's global generator on by what :func:`peek_seed` has drawn."""
    torch.randint(2**62, ())


def task_seed(seed: int, micro_batch: int, stage: int) -> int:
    """Return the seed of a task's generator.

    Args:
        seed: The seed of the call.
        micro_batch: The task's micro-batch.
        stage: The task's stage.
    """
    return derive_seed(seed, micro_batch, stage)


class Drawn:
    """Whether a task has drawn random numbers."""

    def __init__(self) -> None:
        self.any = False


@contextmanager
def own_generator(seed: int, drawn: Drawn) -> Iterator[None]:
    """Seed the global generators inside the block, and put them back; for the only thread that draws.

    Args:
        seed: The seed.
        drawn: Told whether the block drew from the CPU's generator or a CUDA one.
    """
    started = torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if started else ()):
        torch.manual_seed(seed)
        before = _states(started)
        yield
        drawn.any |= any(not torch.equal(a, b) for a, b in zip(before, _states(started), strict=True))


def _states(cuda: bool) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if cuda else ())]


class SharedGenerator(TorchDispatchMode):
    """Give a task random numbers of its own while other threads draw from the same global generators.

    torch has one default generator a device, and none a thread. Every operation that draws from it takes its turn: the
    task's state goes in, the operation runs, and the global state comes back.

    Args:
        seed: The task's seed.
        drawn: Told whether the task drew.
    """

    def __init__(self, seed: int, drawn: Drawn) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed, self._drawn = seed, drawn
        self._states: dict[torch.device, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if any(isinstance(one, torch.Generator) for one in args):
            return func(*args, **kwargs)
        device = _device_of(args, kwargs)
        generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
        with _turn:
            self._drawn.any = True
            before = generator.get_state()
            try:
                generator.set_state(self._state(device))
                return func(*args, **kwargs)
            finally:
                self._states[device] = generator.get_state()
                generator.set_state(before)

    def _state(self, device: torch.device) -> Tensor:
        if device not in self._states:
            self._states[device] = torch.Generator(device).manual_seed(self._seed).get_state()
        return self._states[device]


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    tensors = (one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor))
    device = torch.device(kwargs.get("device") or next((one.device for one in tensors), "cpu"))
    if device.type == "cuda" and device == torch.device("cuda"):  # without an index it is the current one
        return torch.device("cuda", torch.cuda.current_device())
    return device
