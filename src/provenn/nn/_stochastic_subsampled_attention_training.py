"""Training with subsampled attention, then a short time with dense attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import Epoch, Loss, minibatches, run_to_end, train
from provenn.nn._stochastic_subsampled_attention_convert import choose_pathway, subsampled_layers

Progress = Callable[[Epoch], None]


def class_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of scores in the last dimension of the model's output."""
    return nn.functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


class SubsampledResult(NamedTuple):
    """What ``fit`` returns.

    Attributes:
        history: One epoch a record, those before an interruption included.
        model: The trainer's own.
    """

    history: list[Epoch]
    model: nn.Module


class SubsampledTraining:
    """Train by Adam with subsets drawn anew for every step and layer, and densely in the last steps.

    Args:
        model: With layers of :class:`SubsampledAttention` (:func:`convert_to_ssa` makes one); trained in place, its
            layers' sparsity put back in the end.
        sparsity: s of every layer; or ``sparsity(t)``, s at the share t ∈ [0, 1) of all steps.
        dense_finetune_fraction: Share of the steps, the last ones, that attend densely.
        loss: ``loss(model, inputs, targets)``, a scalar; default the cross-entropy of classes.
        lr: Rate of Adam.
        finetune_lr_factor: Factor of the rate in the dense steps.
        batch_size: Samples a batch.
        epochs: Passes over the data.
        seed: Of order, subsets and dropout.

    Raises:
        TypeError: ``model`` is not a module, or a number of another type.
        ValueError: A model without subsampled attention, ``sparsity`` < 1, or a number out of bounds.

    Cost: attention's share of the steps falls to (1 − f)/s + f of dense training's, f being the dense fraction.

    Source: section 4 of the paper: subsampled training, optionally with a dense fine-tuning at its end.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: int | Callable[[float], int] = 4,
        dense_finetune_fraction: float = 0.1,
        *,
        loss: Loss = class_loss,
        lr: float = 1e-3,
        finetune_lr_factor: float = 0.1,
        batch_size: int = 32,
        epochs: int = 10,
        seed: int = 0,
    ) -> None:
        self.layers = subsampled_layers(model)
        if not callable(sparsity):
            check_integer("sparsity", sparsity, at_least=1)
        check_number("dense_finetune_fraction", dense_finetune_fraction, at_least=0, at_most=1)
        check_number("lr", lr, above=0)
        check_number("finetune_lr_factor", finetune_lr_factor, above=0)
        check_integer("batch_size", batch_size, at_least=1)
        check_integer("epochs", epochs, at_least=1)
        check_integer("seed", seed)
        self.model, self.sparsity, self.dense_finetune_fraction = model, sparsity, dense_finetune_fraction
        self.loss, self.lr, self.finetune_lr_factor = loss, lr, finetune_lr_factor
        self.batch_size, self.epochs, self.seed = batch_size, epochs, seed

    def sparsity_at(self, step: int, total: int) -> int:
        """Return s at a step, counted from 0; 1 in the dense steps.

        Args:
            step: The step.
            total: All steps.
        """
        if step >= total - round(self.dense_finetune_fraction * total):
            return 1
        return self.sparsity(step / total) if callable(self.sparsity) else self.sparsity

    def prepare(self, step: int, total: int) -> None:
        """Set every layer's sparsity and subset for a step; own loops call it before each one.

        Args:
            step: The step, counted from 0.
            total: All steps.

        Raises:
            ValueError: The schedule ``sparsity`` returned a number < 1.
        """
        sparsity = self.sparsity_at(step, total)
        check_integer("sparsity", sparsity, at_least=1)
        for layer in self.layers:
            layer.sparsity = sparsity
        choose_pathway(self.layers, self.seed, "step", step)

    def fit(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> SubsampledResult:
        """Train.

        Args:
            inputs: On the model's device, samples along the first dimension.
            targets: One row a sample.
            checkpoint: File that holds everything after every epoch; if it exists, training goes on from it, with
                the subsets that it would have had.
            progress: Called after every epoch, once it is saved.

        Returns:
            History and model.

        Raises:
            ValueError: No inputs, lengths that differ, or a checkpoint of another run.
            FloatingPointError: The loss is no finite number any more.
        """
        if len(inputs) == 0 or len(inputs) != len(targets):
            raise ValueError(f"targets must be one a sample and at least 1, got {len(targets)} and {len(inputs)}")
        steps = -(-len(inputs) // self.batch_size)
        total = steps * self.epochs
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr)
        dense = total - round(self.dense_finetune_fraction * total)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.finetune_lr_factor if step >= dense else 1.0
        )

        def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
            cut = minibatches((inputs, targets), self.batch_size, generator(self.seed, "order", epoch))
            with seeded(self.seed, "pass", epoch):  # dropout draws from torch's global generator
                for place, batch in enumerate(cut):
                    self.prepare(epoch * steps + place, total)
                    yield batch

        before = [(layer.sparsity, layer.pathway_seed) for layer in self.layers]
        try:
            epochs = train(
                self.model, optimizer, batches, self.loss,
                epochs=self.epochs, scheduler=scheduler, checkpoint=checkpoint,
            )  # fmt: skip
            return SubsampledResult(run_to_end(epochs, checkpoint, progress), self.model)
        finally:
            for layer, (sparsity, seed) in zip(self.layers, before, strict=True):
                layer.sparsity, layer.pathway_seed = sparsity, seed
