"""What a model costs: parameters, bytes, multiply–accumulates, latency, memory."""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn, mha
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from provenn.core.experiment.checks import check_integer


@dataclass(frozen=True)
class ModelSize:
    """Counts of a model: parameters, those that are not zero, and bytes of parameters and buffers."""

    parameters: int
    nonzero: int
    bytes: int


def model_size(model: nn.Module) -> ModelSize:
    """Count a model's parameters (shared ones once), their non-zeros, and the bytes of parameters and buffers.

    Args:
        model: Any module.

    Returns:
        The counts.
    """
    parameters = list(model.parameters())
    held = [*parameters, *model.buffers()]
    return ModelSize(
        parameters=sum(one.numel() for one in parameters),
        nonzero=sum(int(torch.count_nonzero(one)) for one in parameters),
        bytes=sum(one.numel() * one.element_size() for one in held),
    )


def multiply_accumulates(function: Callable[..., Any], *inputs: Any) -> int:
    """Count the multiply–accumulates of matrix products, convolutions and attention in one call.

    Half of what :class:`torch.utils.flop_counter.FlopCounterMode` counts, with its gaps closed: products with vectors,
    and fused kernels that it does not know (attention and encoder layers in evaluation mode, recurrent layers).
    Elementwise work is left out, as is usual; causal attention counts in full.

    Args:
        function: What is called, without gradients; a module, for one.
        inputs: Its arguments.

    Returns:
        The count.
    """
    with torch.no_grad(), _unfused(), FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter:
        function(*inputs)
    return int(counter.get_total_flops()) // 2


_FLOPS: dict[Any, Any] = {
    torch.ops.aten.mv: lambda matrix, vector, **_: 2 * math.prod(matrix),
    torch.ops.aten.addmv: lambda bias, matrix, vector, **_: 2 * math.prod(matrix),
    torch.ops.aten.dot: lambda first, second, **_: 2 * math.prod(first),
    torch.ops.aten.mkldnn_rnn_layer: lambda inputs, from_inputs, from_state, *_, **__: (
        2 * math.prod(inputs[:-1]) * (math.prod(from_inputs) + math.prod(from_state))
    ),
}


@contextmanager
def _unfused() -> Iterator[None]:
    """Keep torch from fused kernels; which there are differs by device and version, so they have no formulas here."""
    fast = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), cudnn.flags(enabled=False):
            yield
    finally:
        mha.set_fastpath_enabled(fast)


def median_seconds(function: Callable[[], Any], rounds: int = 20, warmup: int = 3) -> float:
    """Return the median time of a call; on CUDA the device is waited for.

    Args:
        function: What is called.
        rounds: Calls that are timed.
        warmup: Calls before them that are not.

    Returns:
        Seconds.

    Raises:
        ValueError: ``rounds`` < 1 or ``warmup`` < 0.
    """
    check_integer("rounds", rounds, at_least=1)
    check_integer("warmup", warmup, at_least=0)
    times = []
    for turn in range(warmup + rounds):
        start = time.perf_counter()
        function()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        if turn >= warmup:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


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
        fresh = func is torch.ops.aten.lift_fresh.default  # wraps what torch.tensor has just made
        before = set() if fresh else {one._cdata for one in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for one in _storages(result):
            if one._cdata not in before:
                self._add(one)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
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


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """Yield what holds the tensors of nested lists, tuples and dicts; a sparse tensor has one storage a component."""
    for one in tree_leaves(tree):
        if not isinstance(one, Tensor):
            continue
        if one.layout is torch.sparse_coo:
            yield from _storages((one._indices(), one._values()))
        elif one.layout in (torch.sparse_csr, torch.sparse_bsr):
            yield from _storages((one.crow_indices(), one.col_indices(), one.values()))
        elif one.layout in (torch.sparse_csc, torch.sparse_bsc):
            yield from _storages((one.ccol_indices(), one.row_indices(), one.values()))
        else:
            yield one.untyped_storage()


def saved_bytes(function: Callable[[], Any]) -> int:
    """Count the bytes that autograd keeps for the backward pass of one call, each storage once.

    Args:
        function: What is called; inputs and weights that autograd keeps for it count too.

    Returns:
        The bytes.
    """
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        for storage in _storages(tensor):
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor.detach()  # the tensor itself would hold its own graph, and never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())
