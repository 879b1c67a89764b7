"""The pipeline as one step of autograd: backward through its outputs takes the micro-batches backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from provenn.core.pipelines.links import Parcel
from provenn.runtime._gpipe_stage import Call

Backward = Callable[[Sequence[Parcel]], tuple[list[Tensor | None], list[Tensor | None]]]


class Pending:
    """A call whose backward pass is to come.

    Args:
        call: The call.
        backward: Takes the gradients of the outputs by micro-batch; returns those of the inputs and of the parameters.
        drop: Called when no backward pass can come any more.
        sizes: Samples of each micro-batch.
        needs_grad: For each output, whether it depends on what is trained.
    """

    def __init__(
        self,
        call: Call,
        backward: Backward,
        drop: Callable[[int], None],
        sizes: Sequence[int],
        needs_grad: Sequence[bool],
    ) -> None:
        self.sizes, self.needs_grad = tuple(sizes), tuple(needs_grad)
        self.arrived: tuple[Tensor | None, ...] = ()
        self._backward = backward
        self._finalizer = weakref.finalize(self, drop, call.number)

    def run(self) -> tuple[Tensor | None, ...]:
        """Take the call backward with the gradients that have arrived.

        Raises:
            RuntimeError: It has been taken backward before.
        """
        if not self._finalizer.alive:
            raise RuntimeError("a call of the pipeline can go backward once; what it kept is gone")
        gradients, self.arrived = self.arrived, ()
        parts = [[None] * len(self.sizes) if one is None else one.split(self.sizes) for one in gradients]
        fed = [Parcel(tuple(part[i] for part in parts)) for i in range(len(self.sizes))]
        try:
            inputs, parameters = self._backward(fed)
        finally:
            self._finalizer()
        return (*inputs, *parameters)


class Enter(torch.autograd.Function):
    """Where autograd leaves the pipeline, towards inputs and parameters; runs the backward pass.

    Its output is a number on the CPU, so that its backward runs on the caller's thread: a device's own thread, held
    up here, could not serve the stages.
    """

    @staticmethod
    def forward(ctx: Any, pending: Pending, *tensors: Tensor) -> Tensor:
        """Tie inputs and parameters to the call."""
        ctx.pending = pending
        return torch.zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Run the backward pass."""
        return (None, *ctx.pending.run())


class Leave(torch.autograd.Function):
    """Where autograd enters the pipeline, from its outputs."""

    @staticmethod
    def forward(ctx: Any, pending: Pending, ticket: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        """Tie outputs to the call."""
        ctx.pending = pending
        ctx.set_materialize_grads(False)
        tied = tuple(one.view_as(one) for one in outputs)
        ctx.mark_non_differentiable(*(one for one, needed in zip(tied, pending.needs_grad, strict=True) if not needed))
        return tied

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Hand over the gradients of the outputs."""
        ctx.pending.arrived = gradients
        return (None, torch.zeros(()), *(None for _ in gradients))
