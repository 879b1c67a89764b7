"""Batch normalisation whose running statistics are those of mini-batches, fed with micro-batches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from provenn.core.experiment.checks import check_integer

_Module = TypeVar("_Module", bound=nn.Module)


class _Recomputing(threading.local):
    now = False


_recomputing = _Recomputing()


@contextmanager
def recomputing() -> Iterator[None]:
    """Mark the block as a recomputation, in this thread: what it normalises has been counted before."""
    _recomputing.now = True
    try:
        yield
    finally:
        _recomputing.now = False


class DeferredBatchNorm(_BatchNorm):
    """Batch normalisation for micro-batches: normalised one by one, running statistics updated once a mini-batch.

    In training each micro-batch is normalised by its own mean and variance. The running mean and variance move by
    ``momentum`` towards the mean and the (biased) variance of all ``chunks`` micro-batches together, when the last of
    them has passed. In a pipeline's recomputation nothing is counted again. In evaluation it is ordinary batch norm.

    Args:
        num_features: Channels, dimension 1 of the input.
        eps: Added to the variance.
        momentum: Weight of the new statistics; ``None`` averages all mini-batches.
        affine: Whether there are trainable scales and shifts.
        chunks: Micro-batches in a mini-batch. :class:`~provenn.runtime.GPipe` tells the layer when a mini-batch is
            cut into fewer.

    Shape:
        Input and output (N, C, ...), C being ``num_features``.

    Raises:
        ValueError: ``chunks`` < 1; an input of fewer than 2 dimensions or of other channels; one value a channel.

    Cost: O(N) time like batch norm; 2 C numbers of memory more.

    Source: GPipe, section 2.2 and appendix; Kim et al., "torchgpipe", 2020, section 3.3.
    """

    batch_mean: Tensor
    batch_squares: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        chunks: int = 8,
    ) -> None:
        check_integer("num_features", num_features, at_least=1)
        check_integer("chunks", chunks, at_least=1)
        super().__init__(num_features, eps, momentum, affine, track_running_stats=True)
        self.chunks = chunks
        self.register_buffer("batch_mean", torch.zeros(num_features), persistent=False)
        self.register_buffer("batch_squares", torch.zeros(num_features), persistent=False)
        self.begin(chunks)

    def begin(self, micro_batches: int) -> None:
        """Start a mini-batch, and forget what there is of an unfinished one.

        Args:
            micro_batches: How many micro-batches it has.
        """
        self._wanted, self._passed, self._count = micro_batches, 0, 0

    def forward(self, x: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        """Normalise a micro-batch.

        Args:
            x: The micro-batch.

        Returns:
            The normalised input.
        """
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"x must be (batch, {self.num_features}, ...), got {tuple(x.shape)}")
        if not self.training:
            return functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        y = functional.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        if not _recomputing.now:
            self._track(x.detach())
        return y

    @torch.no_grad()
    def _track(self, x: Tensor) -> None:
        """Merge a micro-batch's mean and sum of squared deviations; sums of squares themselves would cancel."""
        values = x.transpose(0, 1).flatten(1).to(self.batch_mean.dtype)
        count = values.shape[1]
        variance, mean = torch.var_mean(values, dim=1, correction=0)
        if self._passed == 0:
            self.batch_mean.zero_()
            self.batch_squares.zero_()
            self._count = 0
        total = self._count + count
        apart = mean - self.batch_mean
        self.batch_squares += variance * count + apart**2 * (self._count * count / total)
        self.batch_mean += apart * (count / total)
        self._count = total
        self._passed += 1
        if self._passed == self._wanted:
            self._commit()

    def _commit(self) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(self.batch_mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((self.batch_squares / self._count).to(self.running_var.dtype), share)
        self.begin(self.chunks)


def convert_deferred_batch_norm(module: _Module, chunks: int = 8) -> _Module:
    """Replace every batch norm in a module that keeps running statistics by a deferred one with the same tensors.

    Args:
        module: Changed in place, unless it is a batch norm itself.
        chunks: Micro-batches in a mini-batch.

    Returns:
        The module, or the layer that takes the place of a batch norm. Parameters and running statistics are the same
        tensors under the same names; layers without running statistics, and deferred ones of as many chunks, are kept.

    Raises:
        ValueError: ``chunks`` < 1.
        TypeError: ``module`` is not a module.

    Cost: O(number of modules) time.

    Source: Kim et al., "torchgpipe", 2020, section 3.3.
    """
    check_integer("chunks", chunks, at_least=1)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {module!r}")
    return _converted(module, chunks, {})


def _converted(module: _Module, chunks: int, done: dict[nn.Module, nn.Module]) -> _Module:
    if module not in done:
        done[module] = module  # a layer that is used twice stays one layer
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            done[module] = _deferred(module, chunks)
        for name, child in list(module._modules.items()):
            if child is not None:
                module._modules[name] = _converted(child, chunks, done)
    return done[module]  # type: ignore[return-value]


def _deferred(layer: _BatchNorm, chunks: int) -> DeferredBatchNorm:
    if isinstance(layer, DeferredBatchNorm):
        layer.chunks = chunks
        layer.begin(chunks)
        return layer
    made = DeferredBatchNorm(layer.num_features, layer.eps, layer.momentum, layer.affine, chunks)
    if layer.running_mean is not None:
        made.to(layer.running_mean.device, layer.running_mean.dtype)
    made._parameters.update(layer._parameters)
    made._buffers.update(layer._buffers)
    return made.train(layer.training)
