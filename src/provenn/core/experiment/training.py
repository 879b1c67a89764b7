"""One training loop: a generator that yields after every epoch.

What other loops do by callbacks is here the body of a ``for``: log a point, evaluate, stop early by ``break``::

    for epoch in train(model, optimizer, batches, loss, epochs=10):
        print(epoch.index, epoch.loss)
        if epoch.loss < 0.01:
            break
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from provenn.core.experiment.checkpoints import Epoch, Stateful, completed, resume, save
from provenn.core.experiment.checks import check_integer
from provenn.core.experiment.recording import evaluating

__all__ = ["Batch", "Epoch", "Loss", "Update", "accuracy", "completed", "minibatches", "predict", "run_to_end", "train"]

Batch = Sequence[Tensor]
Loss = Callable[..., Tensor]
Update = Callable[[Batch], Tensor]


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
        ValueError: The tensors differ in length, there are none, or ``batch_size`` < 1.
    """
    check_integer("batch_size", batch_size, at_least=1)
    if len({len(tensor) for tensor in tensors}) != 1:
        raise ValueError(f"tensors must share their first dimension, got lengths {[len(tensor) for tensor in tensors]}")
    return _slices(tensors, batch_size, generator)


def _slices(
    tensors: Sequence[Tensor], batch_size: int, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, ...]]:
    count = len(tensors[0])
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

    Nothing here draws random numbers. Where the model does (dropout), it draws from torch's global generator, which a
    checkpoint does not hold: seed it in ``batches``, by the epoch, for a run to resume exactly.

    Args:
        model: Trained in place; set to training mode at the start of every epoch.
        optimizer: Steps once every ``accumulate`` batches, and on what is left at an epoch's end.
        batches: Called with the epoch's index, returns its batches. Data order that depends on the index alone makes
            an interrupted run resume exactly.
        loss: ``loss(model, *batch)`` → scalar, the mean over the batch.
        epochs: Number of epochs.
        scheduler: Stepped after every optimizer step.
        accumulate: Batches whose gradients are averaged into one step.
        autocast: Type for mixed precision, ``torch.bfloat16``; ``None`` keeps the model's own. Not ``torch.float16``,
            whose gradients vanish without a loss scaler.
        update: Takes over a whole step: ``update(batch)`` does what it wants and returns the loss to report. The
            optimizer is then only checkpointed; the scheduler is stepped after each call.
        checkpoint: File that holds model, optimizer, scheduler and epoch after every epoch, replaced at once, and
            loaded to whatever device the model is on. If it exists, training continues after its last epoch; the
            epochs before are not yielded again, and ``completed(checkpoint)`` returns them.

    Yields:
        One :class:`Epoch` after every epoch.

    Raises:
        ValueError: ``epochs`` < 0, ``accumulate`` < 1, ``autocast`` is float16, ``update`` is given with ``accumulate``
            or ``autocast``, an epoch or a batch is empty, the loss is not a scalar, or the checkpoint is of another
            kind of run or cannot be read.
        TypeError: The loss is not a tensor.
        OSError: The checkpoint cannot be written there; found before training where it can be.
        FloatingPointError: The training loss is NaN or infinite, found at the epoch's end; the message names epoch and
            the step of the first such loss.
    """
    check_integer("epochs", epochs, at_least=0)
    check_integer("accumulate", accumulate, at_least=1)
    if autocast is torch.float16:
        raise ValueError("autocast must be torch.bfloat16 or None, got torch.float16, which needs a loss scaler")
    if update is not None and (accumulate > 1 or autocast is not None):
        raise ValueError(
            f"update takes over the whole step: leave out accumulate and autocast, got {accumulate} and {autocast}"
        )
    return _epochs(model, optimizer, batches, loss, epochs, scheduler, accumulate, autocast, update, checkpoint)


def run_to_end(
    epochs: Iterable[Epoch], checkpoint: str | Path | None = None, progress: Callable[[Epoch], None] | None = None
) -> list[Epoch]:
    """Run a training to its end and return its whole history, the epochs before an interruption included.

    Args:
        epochs: What :func:`train` returned, not begun yet.
        checkpoint: The file that it was given.
        progress: Called after every epoch, once it is saved; what it raises ends the training.

    Raises:
        ValueError: As :func:`completed`, and as the training.
    """
    history = completed(checkpoint)
    for epoch in epochs:
        history.append(epoch)
        if progress is not None:
            progress(epoch)
    return history


def _epochs(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Iterable[Batch]],
    loss: Loss,
    epochs: int,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    accumulate: int,
    autocast: torch.dtype | None,
    update: Update | None,
    checkpoint: str | Path | None,
) -> Iterator[Epoch]:
    stateful: dict[str, Stateful] = {"model": model, "optimizer": optimizer}
    if scheduler is not None:
        stateful["scheduler"] = scheduler
    done = resume(checkpoint, stateful)
    first, step = len(done), done[-1].step if done else 0
    for index in range(first, epochs):
        model.train()
        losses, sizes = [], []
        for group in _groups(batches(index), accumulate):
            if update is None:
                value = _gradient_step(model, optimizer, group, loss, autocast)
            else:
                value = _scalar("update", update(group[0])).detach()
            if scheduler is not None:
                scheduler.step()
            losses.append(value)
            sizes.append(sum(len(batch[0]) for batch in group))
        mean = _mean_loss(losses, sizes, index, step)
        step += len(losses)
        done.append(Epoch(index, step, mean))
        if checkpoint is not None:
            save(Path(checkpoint), stateful, done)
        yield done[-1]


def _mean_loss(losses: Sequence[Tensor], sizes: Sequence[int], epoch: int, step: int) -> float:
    """Average an epoch's losses over its samples, in float64; the one place that waits for the device."""
    if not losses:
        raise ValueError(f"batches must yield batches in every epoch, got none in epoch {epoch}")
    values = torch.stack(list(losses)).tolist()
    for place, value in enumerate(values):
        if not math.isfinite(value):
            raise FloatingPointError(f"the training loss is {value} in epoch {epoch} (step {step + place + 1})")
    return math.fsum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for batch in batches:
        if len(batch[0]) == 0:
            raise ValueError("batches must yield samples in every batch, got an empty batch")
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
    shares = []
    samples = sum(len(batch[0]) for batch in group)
    device = next(model.parameters(), group[0][0]).device  # the batches' may differ, where the loss moves them
    for batch in group:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            share = _scalar("loss", loss(model, *batch)) * (len(batch[0]) / samples)
        share.backward()
        shares.append(share.detach())
    optimizer.step()
    return torch.stack(shares).sum()


def _scalar(name: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a tensor, got {value!r}")
    if value.numel() != 1:
        raise ValueError(f"{name} must return a scalar, got shape {tuple(value.shape)}")
    return value.reshape(())


def predict(model: nn.Module, inputs: Tensor, batch_size: int = 512) -> Tensor:
    """Run a model in evaluation mode, without gradients, over inputs in batches, and put the modes of its parts back.

    Args:
        model: Maps a batch of inputs to a tensor with one entry a sample.
        inputs: Samples along the first dimension; with none, the model is called once on the empty batch.
        batch_size: Samples a call.

    Returns:
        The outputs of all samples, in their order.

    Raises:
        ValueError: ``batch_size`` < 1.
    """
    check_integer("batch_size", batch_size, at_least=1)
    with evaluating(model):
        starts = range(0, max(len(inputs), 1), batch_size)
        return torch.cat([model(inputs[start : start + batch_size]) for start in starts])


def accuracy(model: nn.Module, inputs: Tensor, labels: Int[Tensor, " n"], batch_size: int = 512) -> float:
    """Return the share of samples whose largest output is at their label.

    Args:
        model: As in :func:`predict`; its last dimension is the classes.
        inputs: As in :func:`predict`.
        labels: One class a sample.
        batch_size: As in :func:`predict`.

    Returns:
        The share, in [0, 1]; NaN for no samples.

    Raises:
        ValueError: ``labels`` has not the shape of the predicted classes, or ``batch_size`` < 1.
    """
    predicted = predict(model, inputs, batch_size).argmax(dim=-1)
    if predicted.shape != labels.shape:
        raise ValueError(f"labels must have the shape {tuple(predicted.shape)} of outputs, got {tuple(labels.shape)}")
    return (predicted == labels).double().mean().item()
