"""GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism.

Huang, Cheng, Bapna, Firat, Chen, Chen, Lee, Ngiam, Le, Wu, Chen, NeurIPS 2019. https://arxiv.org/abs/1811.06965

A sequence of layers is cut into K stages on K workers, a mini-batch into M micro-batches that flow through them; what a
stage computed is recomputed in the backward pass. Outputs and gradients are those of one device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.pipelines.links import Parcel, Route
from provenn.core.pipelines.progress import StageError
from provenn.core.pipelines.schedule import clock_schedule
from provenn.core.pipelines.timeline import Task, Timeline, timeline
from provenn.runtime._gpipe_autograd import Enter, Leave, Pending
from provenn.runtime._gpipe_balance import balance_by_size, balance_by_time, optimal_partition
from provenn.runtime._gpipe_batch_norm import DeferredBatchNorm, convert_deferred_batch_norm
from provenn.runtime._gpipe_batches import autocast_now, gather, scatter
from provenn.runtime._gpipe_engine import Engine, LocalEngine
from provenn.runtime._gpipe_process import ProcessEngine
from provenn.runtime._gpipe_random import advance, peek_seed
from provenn.runtime._gpipe_report import PipelineReport, pipeline_report
from provenn.runtime._gpipe_skips import skip_layout, skippable
from provenn.runtime._gpipe_stage import Call, Stage

__all__ = [
    "DeferredBatchNorm",
    "GPipe",
    "PipelineReport",
    "StageError",
    "balance_by_size",
    "balance_by_time",
    "clock_schedule",
    "convert_deferred_batch_norm",
    "optimal_partition",
    "pipeline_report",
    "skippable",
]

Tensors = Tensor | tuple[Tensor, ...]


class GPipe(nn.Module):
    """Run a sequence of layers as a pipeline of stages, with the plain module's numbers and parameter names.

    Call it like the module, and go backward from the output by autograd: a loss that is a mean over the mini-batch
    weighs each micro-batch by its share. In the backward pass a stage takes its micro-batches in reverse order, so
    that gradients add up in a fixed order, and starts to recompute one before its gradient has arrived.

    Random numbers: task (micro-batch i, stage k) draws from a generator seeded by the state of torch's global one at
    the call, i and k; so dropout is the same in every back end and in the recomputation. The global generator moves on
    if any task has drawn. Buffers that layers update are not updated by a recomputation. Ordinary batch norm
    updates its statistics once a micro-batch; see :func:`convert_deferred_batch_norm`.

    Args:
        module: The layers. They are not copied; each layer and parameter belongs to one stage.
        balance: The number of layers of each stage; or ``"time"`` or ``"size"``, which cut for even measured time or
            memory into as many stages as there are ``devices``, at the first call, with its input.
        chunks: Micro-batches, M. A smaller batch is cut into single samples, with a notice.
        checkpoint: ``"always"`` recomputes every micro-batch in the backward pass, ``"except_last"`` all but the last,
            whose recomputation would start at once, ``"never"`` none.
        devices: Where each stage goes; by default layers stay where they are. The output is on the last one.
        backend: ``"thread"``, a thread a stage in this process; ``"process"``, a process a stage on this machine,
            which start at the first call and end with :meth:`close` (a script needs ``if __name__ == "__main__":``);
            ``"serial"``, the same schedule on one thread.
        timeout: Seconds in which no stage starts or ends a task, after which a call is given up.

    Shape:
        As the module: a tensor or a tuple of tensors, samples along dimension 0, between stages too.

    Raises:
        ValueError: ``module`` is not an ``nn.Sequential``; ``balance`` does not sum to the number of layers or has an
            empty stage; ``chunks`` < 1; a layer or parameter is in two stages; skips do not match; too few devices;
            in a call, tensors of different batch sizes, or of none.
        TypeError: An argument of the wrong type; in a call, no tensors.
        StageError: In a call or its backward pass: a stage raised, hung or was killed; the message names it.
            The thread of a stage that hangs ends when the stage does; a process is killed.

    Cost: the module's time with one more forward pass, over K workers with a bubble of (K − 1)/(M + K − 1); activation
    memory of a stage O(N + (n/K)(N/M)) for n layers and N samples, instead of O(N n).

    Source: the paper, section 2; the backward order and portals of skips by Kim et al., "torchgpipe", 2020.
    """

    def __init__(
        self,
        module: nn.Sequential,
        balance: Sequence[int] | Literal["time", "size"],
        chunks: int = 8,
        checkpoint: Literal["always", "except_last", "never"] = "except_last",
        devices: Iterable[torch.device | str | int] | None = None,
        backend: Literal["thread", "process", "serial"] = "thread",
        timeout: float = 300.0,
    ) -> None:
        super().__init__()
        check_integer("chunks", chunks, at_least=1)
        check_choice("checkpoint", checkpoint, ("always", "except_last", "never"))
        check_choice("backend", backend, ("thread", "process", "serial"))
        check_number("timeout", timeout, above=0)
        _check_module(module)
        self.chunks, self.checkpoint, self.backend, self.timeout = chunks, checkpoint, backend, timeout
        self.devices = None if devices is None else [torch.device(one) for one in devices]
        self._balance = _checked_balance(balance, len(module), self.devices)
        self._names = tuple(module._modules)
        self._numbers = count()
        self._engine: Engine | None = None
        self._closed = False
        self._parts: tuple[nn.Sequential, ...] = ()
        self._tasks: tuple[int, list[Task]] = (0, [])
        for name, layer in module._modules.items():
            if hasattr(self, name):
                raise ValueError(f"module must not name a layer {name!r}, which is an attribute of the pipeline")
            self.add_module(name, layer)
        if not isinstance(self._balance, str):
            self._cut(self._balance)

    @property
    def partitions(self) -> tuple[nn.Sequential, ...]:
        """The stages, as sequences of the module's layers under their names; none before ``balance`` is known."""
        return self._parts

    @property
    def balance(self) -> list[int]:
        """The number of layers of each stage; empty before it is known."""
        return [len(part) for part in self._parts]

    @property
    def workers(self) -> dict[str, int]:
        """The process ids of the stages' processes by name; empty where and while there are none."""
        return self._engine.workers() if self._engine is not None else {}

    @property
    def traffic(self) -> dict[Route, tuple[int, int]]:
        """Parcels and bytes so far, by route (source stage, target stage, channel); skips have channels from 1 on."""
        if self._engine is None:
            return {}
        counted = self._engine.traffic
        return {route: (parcels, counted.bytes[route]) for route, parcels in counted.parcels.items()}

    def timeline(self) -> Timeline:
        """Return the measured tasks of the last call, and of its backward pass if that has been.

        Raises:
            RuntimeError: There has been no call.
        """
        micro_batches, tasks = self._tasks
        if not tasks:
            raise RuntimeError("there is no timeline before the first call")
        return timeline(tasks, micro_batches, len(self._parts))

    def close(self) -> None:
        """End the workers. May be called twice; a pipeline of processes takes no calls afterwards."""
        self._closed = True
        if self._engine is not None:
            self._engine.close()

    def forward(self, x: Tensors) -> Tensors:
        """Run a mini-batch through the pipeline.

        Args:
            x: A tensor, or a tuple of tensors, with samples along dimension 0.

        Returns:
            What the module returns, micro-batches joined along dimension 0.
        """
        parcels, sizes = scatter(x, self.chunks)
        engine = self._ready(x)
        inputs = x if isinstance(x, tuple) else (x,)
        named = [(stage, name, one) for stage, part in enumerate(self._parts) for name, one in part.named_parameters()]
        tensors = [*inputs, *(one for _, _, one in named)]
        call = self._call(len(sizes), grad=torch.is_grad_enabled() and any(one.requires_grad for one in tensors))
        try:
            outputs, drawn, tasks = engine.forward(call, parcels)
        except BaseException:
            engine.drop(call.number)
            raise
        if drawn:
            advance()
        self._tasks = call.micro_batches, tasks
        joined = gather(outputs, None if self.devices is None else self.devices[len(self._parts) - 1])
        if call.grad:

            def backward(fed: Sequence[Parcel]) -> tuple[list[Tensor | None], list[Tensor | None]]:
                found, by_stage, tasks = engine.backward(call, fed)
                if self._tasks[1] and call.number == self._last:
                    self._tasks = call.micro_batches, self._tasks[1] + tasks
                gradients = (by_stage[stage].get(name) for stage, name, _ in named)
                moved = [None if g is None else g.to(one.device) for g, (*_, one) in zip(gradients, named, strict=True)]
                return _joined(found, inputs, sizes), moved

            needs_grad = [any(flags) for flags in zip(*(parcel.needs_grad for parcel in outputs), strict=True)]
            pending = Pending(call, backward, engine.drop, sizes, needs_grad)
            ticket = Enter.apply(pending, *tensors)  # type: ignore[no-untyped-call]
            joined = Leave.apply(pending, ticket, *joined)  # type: ignore[no-untyped-call]
        return joined if outputs[0].is_tuple else joined[0]

    def _call(self, micro_batches: int, grad: bool) -> Call:
        self._last = next(self._numbers)
        recomputed = {"always": micro_batches, "except_last": micro_batches - 1, "never": 0}[self.checkpoint]
        return Call(self._last, micro_batches, recomputed, peek_seed(), grad, autocast_now())

    def _ready(self, sample: Tensors) -> Engine:
        if isinstance(self._balance, str) and not self._parts:
            assert self.devices is not None
            layers = nn.Sequential(*self._layers.values())
            if self._balance == "time":
                self._cut(balance_by_time(len(self.devices), layers, sample))
            else:
                self._cut(balance_by_size(len(self.devices), layers, sample, chunks=self.chunks))
        if self._engine is None:
            skips = skip_layout(self._parts)
            devices: Sequence[torch.device | None] = self.devices or [None] * len(self._parts)
            if self.backend == "process":
                if self._closed:
                    raise RuntimeError("the pipeline has no workers: it was closed")
                self._engine = ProcessEngine(self._parts, skips, devices, self.timeout)
            else:
                threads = self.backend == "thread"
                stages = [
                    Stage(index, part, len(self._parts), skips, devices[index], threads)
                    for index, part in enumerate(self._parts)
                ]
                self._engine = LocalEngine(stages, skips, threads, self.timeout)
        return self._engine

    @property
    def _layers(self) -> dict[str, nn.Module]:
        return {name: self.get_submodule(name) for name in self._names}

    def _cut(self, balance: Sequence[int]) -> None:
        named = iter(self._layers.items())
        parts = tuple(nn.Sequential(OrderedDict(next(named) for _ in range(size))) for size in balance)
        _check_disjoint(parts)
        skip_layout(parts)
        for index, part in enumerate(parts):
            if self.devices is not None:  # processes share memory with this one, and move it by themselves
                part.to("cpu" if self.backend == "process" else self.devices[index])
        self._parts = parts

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles hold no workers; they start their own.
        return {**self.__dict__, "_engine": None, "_closed": False, "_numbers": count(), "_tasks": (0, [])}


def _check_module(module: nn.Sequential) -> None:
    if not isinstance(module, nn.Sequential):
        raise ValueError(f"module must be an nn.Sequential, got {type(module).__name__}")
    if len(module) == 0:
        raise ValueError("module must have a layer, got an empty nn.Sequential")


def _checked_balance(balance: Any, layers: int, devices: list[torch.device] | None) -> Any:
    if isinstance(balance, str):
        check_choice("balance", balance, ("time", "size"))
        if devices is None or not 1 <= len(devices) <= layers:
            found = 0 if devices is None else len(devices)
            raise ValueError(f"balance {balance!r} needs 1 to {layers} devices, one a stage, got {found}")
        return balance
    sizes = list(balance)
    for stage, size in enumerate(sizes):
        check_integer(f"balance[{stage}]", size, at_least=1)
    if sum(sizes) != layers:
        raise ValueError(f"balance must sum to the number of layers, {layers}, got {sizes}")
    if devices is not None and len(devices) < len(sizes):
        raise ValueError(f"devices must be one a stage, {len(sizes)}, got {len(devices)}")
    return sizes


def _check_disjoint(parts: Sequence[nn.Sequential]) -> None:
    owners: dict[int, tuple[int, str]] = {}
    for stage, part in enumerate(parts):
        found = [*part.named_modules(), *part.named_parameters(), *part.named_buffers()]
        for name, one in found:
            owner, known = owners.setdefault(id(one), (stage, name))
            if owner != stage:
                raise ValueError(f"module must not share {name} between stages: {known} of stage {owner} is the same")


def _joined(found: Sequence[Parcel], inputs: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor | None]:
    """Join the gradients of the inputs; where a micro-batch has none it is zero."""
    gradients: list[Tensor | None] = []
    for place, one in enumerate(inputs):
        pieces = [parcel.tensors[place] for parcel in found]
        if not one.requires_grad or all(piece is None for piece in pieces):
            gradients.append(None)
            continue
        parts = zip(pieces, one.split(list(sizes)), strict=True)
        gradients.append(
            torch.cat([torch.zeros_like(part) if piece is None else piece.to(part.device) for piece, part in parts])
        )
    return gradients
