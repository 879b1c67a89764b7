"""What a model costs: parameters, bytes, multiply–accumulates, latency, memory."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class ModelSize:
    """Counts of a model: parameters, those that are not zero, and bytes of parameters and buffers."""

    parameters: int
    nonzero: int
    bytes: int


def model_size(model: nn.Module) -> ModelSize:
    """Count a model's parameters (shared ones once), their non-zeros, and the bytes of parameters and buffers."""
    parameters = list(model.parameters())
    held = [*parameters, *model.buffers()]
    return ModelSize(
        parameters=sum(one.numel() for one in parameters),
        nonzero=sum(int(torch.count_nonzero(one)) for one in parameters),
        bytes=sum(one.numel() * one.element_size() for one in held),
    )


def multiply_accumulates(function: Callable[..., Any], *inputs: Any) -> int:
    """Count the multiply–accumulates of matrix products, convolutions and attention in one call.

    Half of what :class:`torch.utils.flop_counter.FlopCounterMode` counts; elementwise work is left out, as is usual.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return int(counter.get_total_flops()) // 2


def median_seconds(function: Callable[[], Any], rounds: int = 20, warmup: int = 3) -> float:
    """Return the median time of a call; on CUDA the device is waited for."""
    times = []
    for turn in range(warmup + rounds):
        start = time.perf_counter()
        function()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        if turn >= warmup:
            times.append(time.perf_counter() - start)
    return float(torch.tensor(times, dtype=torch.float64).median())


class TensorMemory(TorchDispatchMode):
    """Count the bytes of tensors that come to life inside the block, and the most alive at once.

    Works on every device alike, since it watches storages and not an allocator; what a kernel holds inside itself is
    not seen. Storages that existed before the block do not count.

    Attributes:
        current: Bytes alive now.
        peak: The most bytes alive at any moment of the block.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {_storage(one)._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and _storage(one)._cdata not in before:
                self._add(one)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def saved_bytes(function: Callable[[], Any]) -> int:
    """Count the bytes that autograd keeps for the backward pass of one call, each storage once."""
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        kept[storage._cdata] = storage.nbytes()
        alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())
