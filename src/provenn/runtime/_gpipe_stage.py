"""A stage at work: its layers, its tasks, and what it keeps of each micro-batch between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from provenn.core.pipelines.links import Parcel
from provenn.runtime._gpipe_batch_norm import DeferredBatchNorm, recomputing
from provenn.runtime._gpipe_random import Drawn, SharedGenerator, own_generator, task_seed
from provenn.runtime._gpipe_skips import Skip, skips_under_way


class Call(NamedTuple):
    """One forward call of the pipeline: what every stage must know of it.

    Attributes:
        number: Tells calls apart whose backward pass is still to come.
        micro_batches: M.
        checkpointed: The first so many micro-batches are recomputed in the backward pass.
        seed: Seeds the random numbers of all tasks.
        grad: Whether gradients are wanted.
        autocast: For each type of device in autocast, its name and the type.
    """

    number: int
    micro_batches: int
    checkpointed: int
    seed: int
    grad: bool
    autocast: tuple[tuple[str, torch.dtype], ...] = ()


class _Kept(NamedTuple):
    """What is kept of a micro-batch for its backward task: only inputs, where it is recomputed."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...] | None


class Stage:
    """A block of consecutive layers on its worker.

    Args:
        index: Which stage it is.
        layers: Its layers.
        count: How many stages there are.
        skips: All skips that cross stages.
        device: Where its inputs go; ``None`` leaves them where they are.
        threaded: Whether other threads of the process draw random numbers at the same time.
    """

    def __init__(
        self,
        index: int,
        layers: nn.Sequential,
        count: int,
        skips: Sequence[Skip] = (),
        device: torch.device | None = None,
        threaded: bool = False,
    ) -> None:
        self.index, self.count, self.layers, self.device = index, count, layers, device
        self.popped = [(skip, channel) for channel, skip in enumerate(skips, start=1) if skip.target == index]
        self.stashed = [(skip, channel) for channel, skip in enumerate(skips, start=1) if skip.source == index]
        self.gradients: dict[str, Tensor] = {}
        self.drawn = Drawn()
        self._threaded = threaded
        self._inplace = bool(getattr(layers[0], "inplace", False))
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._is_tuple = False

    def begin(self, call: Call) -> None:
        """Get ready for a call's forward pass.

        Args:
            call: The call.
        """
        self.drawn.any = False
        for layer in self.layers.modules():
            if isinstance(layer, DeferredBatchNorm):
                layer.begin(call.micro_batches)

    def forward(self, call: Call, i: int, parcel: Parcel) -> Parcel:
        """Run a micro-batch's forward task.

        Args:
            call: The call.
            i: The micro-batch.
            parcel: The inputs of the first layer, and after them the popped skips.

        Returns:
            The outputs of the last layer, and after them the stashed skips.
        """
        inputs = tuple(
            _leaf(tensor, self.device, call.grad and needed)
            for tensor, needed in zip(_present(parcel.tensors), parcel.needs_grad, strict=True)
        )
        checkpointed = call.grad and i < call.checkpointed
        outputs = self._run(call, i, inputs, parcel.is_tuple, grad=call.grad and not checkpointed)
        trainable = any(one.requires_grad for one in (*inputs, *self.layers.parameters()))
        if call.grad and trainable:
            self._kept[call.number, i] = _Kept(inputs, None if checkpointed else outputs)
        needed = tuple(call.grad and trainable and _differentiable(one) for one in outputs)
        if not checkpointed:
            needed = tuple(one.requires_grad for one in outputs)
        return Parcel(tuple(one.detach() for one in outputs), needed, self._is_tuple)

    def recompute(self, call: Call, i: int, is_tuple: bool) -> None:
        """Run the forward task again, with the random numbers of the first time and without updating any buffer.

        Args:
            call: The call.
            i: The micro-batch.
            is_tuple: Whether the first layer takes a tuple.
        """
        inputs = self._kept[call.number, i].inputs
        with self._buffers_as_they_were(), recomputing():
            outputs = self._run(call, i, inputs, is_tuple, grad=True)
        self._kept[call.number, i] = _Kept(inputs, outputs)

    def backward(self, call: Call, i: int, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Run a micro-batch's backward task, and add the gradients of parameters to those of later micro-batches.

        Args:
            call: The call.
            i: The micro-batch.
            gradients: Those of what :meth:`forward` returned.

        Returns:
            The gradients of the inputs.
        """
        kept = self._kept.pop((call.number, i))
        assert kept.outputs is not None
        ends = [
            (output, gradient.to(output.device, output.dtype))
            for output, gradient in zip(kept.outputs, gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        named = {name: one for name, one in self.layers.named_parameters() if one.requires_grad}
        leaves = [one for one in kept.inputs if one.requires_grad]
        wanted = [*leaves, *named.values()]
        if not ends or not wanted:
            return (None,) * len(kept.inputs)
        outputs, weights = zip(*ends, strict=True)
        found = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
        for name, gradient in zip(named, found[len(leaves) :], strict=True):
            if gradient is not None:
                self.gradients[name] = self.gradients[name] + gradient if name in self.gradients else gradient
        of_inputs = iter(found[: len(leaves)])
        return tuple(next(of_inputs) if one.requires_grad else None for one in kept.inputs)

    def keeps(self, call: Call, i: int) -> tuple[bool, bool]:
        """Return whether a backward task is to come, and whether it needs a recomputation.

        Args:
            call: The call.
            i: The micro-batch.
        """
        kept = self._kept.get((call.number, i))
        return kept is not None, kept is not None and kept.outputs is None

    def drop(self, number: int) -> None:
        """Forget a call.

        Args:
            number: Its number.
        """
        for key in [key for key in self._kept if key[0] == number]:
            del self._kept[key]

    def take_gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the parameters by name, and start anew."""
        taken, self.gradients = self.gradients, {}
        return taken

    def _run(self, call: Call, i: int, inputs: tuple[Tensor, ...], is_tuple: bool, grad: bool) -> tuple[Tensor, ...]:
        first = len(inputs) - len(self.popped)
        popped = {skip.name: one for (skip, _), one in zip(self.popped, inputs[first:], strict=True)}
        seed = task_seed(call.seed, i, self.index)
        with ExitStack() as modes:
            if self.device is not None and self.device.type == "cuda":
                modes.enter_context(torch.cuda.device(self.device))
            modes.enter_context(torch.set_grad_enabled(grad))
            for device, dtype in call.autocast:
                modes.enter_context(torch.autocast(device, dtype))
            modes.enter_context(
                SharedGenerator(seed, self.drawn) if self._threaded else own_generator(seed, self.drawn)
            )
            skips = modes.enter_context(skips_under_way(popped))
            versions = [one._version for one in inputs]
            given = tuple(one.clone() for one in inputs[:first]) if self._inplace else inputs[:first]
            result = self.layers(given if is_tuple else given[0])
        if versions != [one._version for one in inputs]:
            raise ValueError("a layer changes the input of its stage in place, which is kept for the recomputation")
        self._is_tuple = isinstance(result, tuple)
        outputs = result if isinstance(result, tuple) else (result,)
        for place, one in enumerate(outputs):
            if not isinstance(one, Tensor):
                raise TypeError(f"stages must return a tensor or a tuple of tensors, got {type(one)} at {place}")
        return (*outputs, *(skips[skip.name] for skip, _ in self.stashed))

    @contextmanager
    def _buffers_as_they_were(self) -> Iterator[None]:
        before = [(name, buffer, buffer.clone()) for name, buffer in self.layers.named_buffers()]
        try:
            yield
        finally:
            now = dict(self.layers.named_buffers())
            for name, buffer, value in before:
                if now[name] is not buffer:
                    owner, _, last = name.rpartition(".")
                    self.layers.get_submodule(owner)._buffers[last] = buffer
                # through .data, which autograd does not hold against a graph that has saved the buffer
                buffer.data.copy_(value)


def _present(tensors: Sequence[Tensor | None]) -> Iterator[Tensor]:
    for one in tensors:
        assert one is not None  # only gradients may be absent
        yield one


def _leaf(tensor: Tensor, device: torch.device | None, needs_grad: bool) -> Tensor:
    moved = tensor.detach() if device is None else tensor.detach().to(device, non_blocking=True)
    return moved.requires_grad_(needs_grad)


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
