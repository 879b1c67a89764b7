"""Training through time, in full or truncated.

Source: the survey, arXiv 1506.00019, and what the parts name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import Batch, Epoch, minibatches, run_to_end, train
from provenn.nn._rnn_review_base import State, check_mask
from provenn.nn._rnn_review_gradients import Recurrent, cell_of, gradient_norm_penalty

StepLoss = Callable[[Tensor, Tensor], Tensor]
"""Maps outputs (batch, time, outputs) and targets to a loss for every sample and step."""


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(dim=-1)


def _binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(dim=-1)


LOSSES: dict[str, StepLoss] = {
    "cross_entropy": _cross_entropy,
    "mse": _squared_error,
    "binary_cross_entropy": _binary_cross_entropy,
}


@dataclass(frozen=True)
class TBPTTResult:
    """A finished training.

    Args:
        history: One record an epoch.
        model: The trained model.
    """

    history: list[Epoch]
    model: nn.Module


@dataclass(frozen=True)
class _Window:
    """A stretch of time: run from ``start``, with the loss of ``[scored, end)``; the next one starts at ``resume``."""

    start: int
    scored: int
    end: int
    resume: int


class TBPTT:
    """Truncated back-propagation through time: every k₁ steps an update, whose errors go back k₂ steps.

    The loss of a window is that of its newest k₁ steps; its errors go back through at most the k₂ steps up to its end.
    The state at the window's start comes from the window before, and is a constant. With k₂ no shorter than the
    sequences nothing is cut, and with k₁ too it is back-propagation through time.

    Args:
        model: A recurrent module, or a :class:`SequenceModel` of one, that goes step by step and gives an output at
            every step; trained in place.
        k1: Steps between updates.
        k2: Steps that errors go back; at least ``k1``.
        clip: Bound on the gradient; ``None`` for none.
        loss: ``"cross_entropy"`` of classes (B, T), ``"mse"`` or ``"binary_cross_entropy"`` (of logits) of numbers
            (B, T, outputs); or ``loss(outputs, targets)`` → (B, T).
        clip_by: ``"norm"`` scales the whole gradient down to the bound and keeps its direction; ``"value"`` cuts each
            element.
        penalty: Weight of :func:`gradient_norm_penalty` in every window's loss.
        optimizer: ``optimizer(parameters, lr=lr)`` builds the optimizer.
        lr: Step size.
        epochs: Passes over the data.
        batch_size: Sequences a batch.
        seed: Seed of the order of the sequences and of dropout.

    Raises:
        ValueError: ``k1`` or ``k2`` is below 1, ``k1`` > ``k2``, ``clip`` or ``lr`` is not positive, ``penalty`` is
            negative, ``loss`` or ``clip_by`` is unknown, or the model does not give an output at every step.
        TypeError: ``model`` is not recurrent, or a number is none.

    Cost: k₂/k₁ passes forward and backward over every sequence; activations of k₂ steps at once.

    Source: section 2.3 of the survey; Williams & Peng (1990), BPTT(h; h′); clipping and penalty: Pascanu et al., arXiv
    1211.5063.
    """

    def __init__(
        self,
        model: Recurrent,
        k1: int,
        k2: int,
        clip: float | None = 5.0,
        *,
        loss: str | StepLoss = "cross_entropy",
        clip_by: Literal["norm", "value"] = "norm",
        penalty: float = 0.0,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        lr: float = 1e-2,
        epochs: int = 10,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        cell_of(model)
        if getattr(model, "mode", "many_to_many") != "many_to_many":
            raise ValueError(f"model must give an output at every step, got the mode {model.mode!r}")
        check_integer("k1", k1, at_least=1)
        check_integer("k2", k2, at_least=1)
        if k1 > k2:
            raise ValueError(f"k1 must be at most k2, or steps between would be lost, got {k1} and {k2}")
        if clip is not None:
            check_number("clip", clip, above=0)
        check_choice("clip_by", clip_by, ("norm", "value"))
        check_number("penalty", penalty, at_least=0)
        check_number("lr", lr, above=0)
        check_integer("epochs", epochs, at_least=0)
        check_integer("batch_size", batch_size, at_least=1)
        if isinstance(loss, str):
            check_choice("loss", loss, LOSSES)
        self.model = model
        self.k1, self.k2 = k1, k2
        self.clip, self.clip_by, self.penalty = clip, clip_by, penalty
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self._loss: StepLoss = LOSSES[loss] if isinstance(loss, str) else loss
        self._optimizer = partial(optimizer, lr=lr)

    def fit(
        self,
        x: Float[Tensor, "sequences time input"],
        y: Tensor,
        target_mask: Bool[Tensor, "sequences time"] | None = None,
        mask: Bool[Tensor, "sequences time"] | None = None,
        *,
        checkpoint: str | Path | None = None,
        progress: Callable[[Epoch], None] | None = None,
    ) -> TBPTTResult:
        """Train, with an update after every window that has a target.

        Args:
            x: The inputs.
            y: The targets, (sequences, time) or (sequences, time, outputs).
            target_mask: Where there is a target; ``None``: wherever there is an input.
            mask: Where there is an input; ``None``: everywhere.
            checkpoint: File that holds everything after every epoch; if it exists, training goes on from it.
            progress: Called after every epoch, once it is saved.

        Returns:
            History, and the model.

        Raises:
            ValueError: A shape does not fit ``x``, or the checkpoint is of another run.
            FloatingPointError: The loss is no finite number any more.
        """
        epochs = self.train(x, y, target_mask, mask, checkpoint=checkpoint)
        return TBPTTResult(run_to_end(epochs, checkpoint, progress), self.model)

    def train(
        self,
        x: Float[Tensor, "sequences time input"],
        y: Tensor,
        target_mask: Bool[Tensor, "sequences time"] | None = None,
        mask: Bool[Tensor, "sequences time"] | None = None,
        *,
        checkpoint: str | Path | None = None,
    ) -> Iterator[Epoch]:
        """Train as :meth:`fit` does, yielding after every epoch; the arguments are the same."""
        data = self._data(x, y, target_mask, mask)
        optimizer = self._optimizer(self.model.parameters())

        def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
            order = generator(self.seed, "order", epoch)
            for place, batch in enumerate(minibatches(data, self.batch_size, order)):
                # Dropout has no generator of its own: seeded by place, so that a run resumes exactly.
                with seeded(self.seed, "dropout", epoch, place):
                    yield batch

        return train(
            self.model,
            optimizer,
            batches,
            self._loss,
            epochs=self.epochs,
            update=partial(self._update, optimizer),
            checkpoint=checkpoint,
        )

    def gradient(
        self,
        x: Float[Tensor, "batch time input"],
        y: Tensor,
        target_mask: Bool[Tensor, "batch time"] | None = None,
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Sum the gradients of all windows, unclipped, with the weights as they are.

        Args:
            x: The inputs.
            y: The targets.
            target_mask: Where there is a target.
            mask: Where there is an input.

        Returns:
            The loss, and its truncated gradient by every parameter that has one.

        Raises:
            ValueError: A shape does not fit ``x``.
        """
        parameters = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        sums = {name: torch.zeros_like(one) for name, one in parameters.items()}
        total = x.new_zeros(())
        for loss, _ in self._losses(*self._data(x, y, target_mask, mask)):
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, one in zip(parameters, found, strict=True):
                if one is not None:
                    sums[name] += one
            total = total + loss.detach()
        return total, sums

    def windows(self, steps: int) -> list[_Window]:
        """Return the windows of a sequence of so many steps, in order."""
        ends = [*range(self.k1, steps, self.k1), steps]
        starts = [max(0, end - self.k2) for end in ends]
        return [
            _Window(start, scored, end, resume)
            for start, scored, end, resume in zip(starts, [0, *ends], ends, [*starts[1:], starts[-1]], strict=False)
        ]

    def _update(self, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
        parameters = list(self.model.parameters())
        total = batch[0].new_zeros(())
        for loss, fit in self._losses(*batch):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if self.clip is not None and self.clip_by == "norm":
                nn.utils.clip_grad_norm_(parameters, self.clip)
            elif self.clip is not None:
                nn.utils.clip_grad_value_(parameters, self.clip)
            optimizer.step()
            total = total + fit.detach()
        return total

    def _data(self, x: Tensor, y: Tensor, target_mask: Tensor | None, mask: Tensor | None) -> tuple[Tensor, ...]:
        """Return inputs, targets, where a target counts, and where there is an input."""
        cell, _ = cell_of(self.model)
        if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != cell.input_size:
            raise ValueError(f"x must be (batch, time, {cell.input_size}) with at least one step, got {tuple(x.shape)}")
        if y.shape[:2] != x.shape[:2]:
            raise ValueError(f"y must have the batch and time {tuple(x.shape[:2])} of x, got shape {tuple(y.shape)}")
        check_mask(x, mask)
        there = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        if target_mask is None:
            return x, y, there, there
        if target_mask.shape != x.shape[:2]:
            raise ValueError(f"target_mask must have the shape {tuple(x.shape[:2])}, got {tuple(target_mask.shape)}")
        return x, y, target_mask & there, there

    def _losses(self, x: Tensor, y: Tensor, asked: Tensor, there: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each window's loss, with the penalty and without: its share of the mean over all that is asked for."""
        mask = None if bool(there.all()) else there
        share = asked.to(x) / asked.sum().clamp(min=1)
        state: State = self.model.initial_state(len(x), x)
        for window in self.windows(x.shape[1]):
            scored = slice(window.scored, window.end)
            if not bool(asked[:, scored].any()):
                with torch.no_grad():
                    _, state = self._piece(x, mask, state, window.start, window.resume)
                continue
            fit = partial(self._fit, y[:, scored], share[:, scored])
            early, between = self._piece(x, mask, state, window.start, window.resume)
            late, _ = self._piece(x, mask, between, window.resume, window.end)
            value = fit(torch.cat((early, late), dim=1))
            loss = value
            if self.penalty:
                stretch = slice(window.start, window.end)
                of = None if mask is None else mask[:, stretch]
                loss = value + self.penalty * gradient_norm_penalty(self.model, x[:, stretch], fit, state, of)
            yield loss, value
            state = tuple(one.detach() for one in between)

    def _fit(self, y: Tensor, share: Tensor, outputs: Tensor) -> Tensor:
        return (self._loss(outputs[:, -y.shape[1] :], y) * share).sum()

    def _piece(self, x: Tensor, mask: Tensor | None, state: State, start: int, end: int) -> tuple[Tensor, Any]:
        if start == end:
            return x.new_empty(len(x), 0, self.model.output_size), state
        return self.model(x[:, start:end], state, None if mask is None else mask[:, start:end])  # type: ignore[no-any-return]
