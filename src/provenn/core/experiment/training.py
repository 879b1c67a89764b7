"""One training loop: a generator that yields after every epoch.

What other loops do by callbacks is here the body of a ``for``: log a point, evaluate, stop early by ``break``::

    for epoch in train(model, optimizer, batches, loss, epochs=10):
        print(epoch.index, epoch.loss)
        if epoch.loss < 0.01:
            break
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer

Batch = Sequence[Tensor]
Loss = Callable[..., Tensor]
Update = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch: its index from 0, the optimizer steps taken so far, the mean training loss."""

    index: int
    step: int
    loss: float


def minibatches(
    tensors: Sequence[Tensor], batch_size: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of equal length into batches, shuffled if a generator is given.

    Args:
        tensors: Tensors that share their first dimension.
        batch_size: Samples a batch; the last batch holds what is left.
        generator: Draws the order. ``None`` keeps the order.

    Yields:
        One slice of every tensor.

    Raises:
        ValueError: The tensors differ in length, or ``batch_size`` < 1.
    """
    check_integer("batch_size", batch_size, at_least=1)
    lengths = {len(tensor) for tensor in tensors}
    if len(lengths) != 1:
        raise ValueError(f"tensors must share their first dimension, got lengths {[len(tensor) for tensor in tensors]}")
    count = lengths.pop()
    if generator is None:
        for start in range(0, count, batch_size):
            yield tuple(tensor[start : start + batch_size] for tensor in tensors)
        return
    order = torch.randperm(count, generator=generator, device=generator.device)
    for start in range(0, count, batch_size):
        picked = order[start : start + batch_size]
        yield tuple(tensor[picked.to(tensor.device)] for tensor in tensors)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Iterable[Batch]],
    loss: Loss,
    *,
    epochs: int,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    update: Update | None = None,
    checkpoint: str | Path | None = None,
) -> Iterator[Epoch]:
    """Train, yielding after every epoch.

    Args:
        model: Trained in place; set to training mode at the start of every epoch.
        optimizer: Steps once every ``accumulate`` batches, and on what is left at an epoch's end.
        batches: Called with the epoch's index, returns its batches. Data order that depends on the index alone makes
            an interrupted run resume exactly.
        loss: ``loss(model, *batch)`` → scalar, the mean over the batch.
        epochs: Number of epochs.
        scheduler: Stepped after every optimizer step.
        accumulate: Batches whose gradients are averaged into one step.
        autocast: Type for mixed precision (``torch.bfloat16``); ``None`` keeps the model's own.
        update: Takes over a whole step: ``update(batch)`` does what it wants and returns the loss to report. The
            optimizer is then only checkpointed.
        checkpoint: File that holds model, optimizer, scheduler and epoch after every epoch, replaced at once. If it
            exists, training continues after its last epoch, and the epochs before are not yielded again.

    Yields:
        One :class:`Epoch` after every epoch.

    Raises:
        ValueError: ``epochs`` < 0 or ``accumulate`` < 1.
        FloatingPointError: The training loss is NaN or infinite; the message names epoch and step.
    """
    check_integer("epochs", epochs, at_least=0)
    check_integer("accumulate", accumulate, at_least=1)
    stateful = {"model": model, "optimizer": optimizer} | ({} if scheduler is None else {"scheduler": scheduler})
    first, step = _resume(checkpoint, stateful)
    for index in range(first, epochs):
        model.train()
        total, seen = torch.zeros(()), 0
        for group in _groups(batches(index), accumulate):
            if update is None:
                value = _gradient_step(model, optimizer, group, loss, autocast)
            else:
                value = torch.stack([update(batch).detach() for batch in group]).mean()
            if scheduler is not None:
                scheduler.step()
            step += 1
            size = sum(len(batch[0]) for batch in group)
            total, seen = total.to(value.device) + value * size, seen + size
        mean = total.item() / max(seen, 1)
        if not math.isfinite(mean):
            raise FloatingPointError(f"the training loss is {mean} in epoch {index} (step {step})")
        if checkpoint is not None:
            _save(Path(checkpoint), stateful, index + 1, step)
        yield Epoch(index, step, mean)


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _gradient_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: Sequence[Batch],
    loss: Loss,
    autocast: torch.dtype | None,
) -> Tensor:
    """Average the gradients of a group of batches, step, and return the mean loss (on the device, no wait)."""
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros(())
    samples = sum(len(batch[0]) for batch in group)
    for batch in group:
        device = batch[0].device
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            value = loss(model, *batch) * (len(batch[0]) / samples)
        value.backward()
        total = total.to(device) + value.detach()
    optimizer.step()
    return total


def _resume(checkpoint: str | Path | None, stateful: dict[str, Any]) -> tuple[int, int]:
    if checkpoint is None or not Path(checkpoint).is_file():
        return 0, 0
    held = torch.load(checkpoint, weights_only=True)
    for name, part in stateful.items():
        part.load_state_dict(held[name])
    return held["epoch"], held["step"]


def _save(path: Path, stateful: dict[str, Any], epoch: int, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {name: part.state_dict() for name, part in stateful.items()} | {"epoch": epoch, "step": step}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as file:
        torch.save(held, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@torch.no_grad()
def predict(model: nn.Module, inputs: Tensor, batch_size: int = 512) -> Tensor:
    """Run a model in evaluation mode over inputs in batches, and put its mode back."""
    mode = model.training
    model.eval()
    outputs = [model(inputs[start : start + batch_size]) for start in range(0, max(len(inputs), 1), batch_size)]
    model.train(mode)
    return torch.cat(outputs)


def accuracy(model: nn.Module, inputs: Tensor, labels: Int[Tensor, " n"], batch_size: int = 512) -> float:
    """Return the share of samples whose largest output is at their label."""
    return (predict(model, inputs, batch_size).argmax(dim=-1) == labels).double().mean().item()
