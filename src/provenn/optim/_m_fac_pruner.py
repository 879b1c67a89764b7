"""The optimal brain surgeon of M-FAC: prune by the inverse Fisher matrix and move what is left to make up for it."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.core.compression.iterative import PruningReport, Round, costs
from provenn.core.compression.masks import Masks, prunable_weights
from provenn.core.experiment.checks import check_integer, check_number
from provenn.optim._m_fac_schedule import GradualSchedule
from provenn.optim._m_fac_static import StaticInverseFisher, check_block_size

Batch = tuple[Tensor, Tensor]
LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MFACPruningReport(PruningReport):
    """What the pruner did: a round for each time that the Fisher matrix was built, and what it foretold.

    A round's ``remaining`` and ``density`` are those after its pruning; its ``score`` is what the last epoch of
    fine-tuning after it returned. ``predicted_increase`` is the sum of the saliencies of a round's dropped weights.
    """

    predicted_increase: tuple[float, ...]


def surgeon_step(
    weights: Float[Tensor, " d"], inverse: StaticInverseFisher, count: int
) -> tuple[Float[Tensor, " d"], Bool[Tensor, " d"], float]:
    """Drop the weights of the lowest saliency wᵢ² / (2 [F⁻¹]ᵢᵢ), and move all others to make up for it.

    The move is −F⁻¹t with tᵢ = wᵢ / [F⁻¹]ᵢᵢ where dropped: the sum of what is best for each dropped weight alone.

    Args:
        weights: The weights.
        inverse: F⁻¹ at them.
        count: How many to drop; of equals, the earlier.

    Returns:
        The new weights, exactly 0 where dropped; where that is; and the sum of the dropped saliencies, by which the
        loss grows to second order if the dropped weights do not interact.

    Cost: O(m d + d log d).

    Source: the paper's section on pruning; Hassibi and Stork, "Second order derivatives for network pruning", 1992.
    """
    diagonal = inverse.diag()
    saliency = weights.square() / (2 * diagonal)
    places = torch.argsort(saliency, stable=True)[:count]
    dropped = torch.zeros_like(weights, dtype=torch.bool)
    dropped[places] = True
    moved = weights - inverse.mul(torch.where(dropped, weights / diagonal, 0))
    return moved.masked_fill_(dropped, 0), dropped, float(saliency[places].sum())


@dataclass(frozen=True)
class MFACPruner:
    """Prune the weights that the loss will miss least, by the inverse Fisher matrix of M-FAC.

    Biases and the vectors of norm layers are left alone. Weights that are exactly 0 at first count as pruned.

    Args:
        model: What :meth:`compress` prunes if it is given no other; left as it is.
        loss_fn: ``loss_fn(outputs, targets)`` → scalar, the mean over the batch.
        loader: Yields batches (inputs, targets) whenever it is iterated; each gives one gradient, and it starts anew
            when it runs out. The authors take shuffled batches of 32.
        num_grads: m, gradients of one Fisher matrix.
        block_size: Blocks of the Fisher matrix over the surviving weights, as in
            :class:`provenn.optim.StaticInverseFisher`; -1 for one block.
        damping: λ.
        n_recompute: Steps n in which a sparsity s is reached. Step j leaves the share (1 − s)^(j/n) of the weights,
            and each rebuilds the Fisher matrix on the survivors.

    Raises:
        ValueError: ``num_grads`` < 1, ``damping`` ≤ 0, ``n_recompute`` < 1 or a bad ``block_size``.

    Cost: a step takes m forward and backward passes of one batch, then O(d m²) time, d the surviving weights, and
    memory for 2 m·d numbers.

    Source: the paper's section on pruning; defaults as in the authors' code.
    """

    model: nn.Module
    loss_fn: LossFunction
    loader: Iterable[Batch]
    num_grads: int = 64
    block_size: int | None = 128
    damping: float = 1e-5
    n_recompute: int = 16

    def __post_init__(self) -> None:
        check_integer("num_grads", self.num_grads, at_least=1)
        check_block_size(self.block_size)
        check_number("damping", self.damping, above=0)
        check_integer("n_recompute", self.n_recompute, at_least=1)

    def compress(
        self,
        model: nn.Module | None = None,
        sparsity: float | None = None,
        schedule: GradualSchedule | None = None,
        example_inputs: tuple[Any, ...] | None = None,
    ) -> tuple[nn.Module, MFACPruningReport]:
        """Prune a copy of a model, at once or by a schedule.

        Args:
            model: Left as it is. ``None``: the pruner's own.
            sparsity: Share of the prunable weights that shall be 0; a model that is sparser stays as it is.
            schedule: Prune gradually instead, with fine-tuning.
            example_inputs: Arguments of one call, to count multiply–accumulates by.

        Returns:
            The pruned model (plain, zeros in place) and the report.

        Raises:
            ValueError: ``sparsity`` is outside (0, 1); not one of ``sparsity`` and ``schedule`` is given; the model
                has no weight of more than one dimension; the loader yields nothing; or a gradient is not finite.
        """
        if (sparsity is None) == (schedule is None):
            raise ValueError(f"sparsity or schedule must be given, not both, got {sparsity!r} and {schedule!r}")
        if sparsity is not None:
            check_number("sparsity", sparsity, above=0, below=1)
        pruned = copy.deepcopy(self.model if model is None else model)
        modes = {module: module.training for module in pruned.modules()}
        pruned.zero_grad(set_to_none=True)
        course = _Course(self, pruned)
        if sparsity is not None:
            course.prune_to(sparsity)
        if schedule is not None:
            course.follow(schedule)
        pruned.zero_grad(set_to_none=True)
        for module, mode in modes.items():
            module.training = mode
        rounds, increases = tuple(course.rounds), tuple(course.increases)
        return pruned, MFACPruningReport(**costs(pruned, example_inputs), rounds=rounds, predicted_increase=increases)


class _Course:
    """One pruning: the model that is pruned in place, its masks, and the rounds so far."""

    def __init__(self, pruner: MFACPruner, model: nn.Module) -> None:
        self.pruner, self.model = pruner, model
        self.masks = Masks(model)
        for name, weight in prunable_weights(model).items():
            self.masks.remove(name, weight.detach() == 0)
        self.rounds: list[Round] = []
        self.increases: list[float] = []

    def prune_to(self, sparsity: float) -> None:
        """Reach a sparsity in geometric steps from where the model is."""
        n, total, start = self.pruner.n_recompute, self.masks.total, self.masks.remaining
        final = 1 - sparsity
        for j in range(1, n + 1):
            share = final if j == n else (start / total) * (final * total / max(start, 1)) ** (j / n)
            # The guard keeps 100 · (1 − 0.9) from becoming 9.
            count = self.masks.remaining - math.floor(total * share * (1 + 1e-12))
            if count > 0:
                self._prune(count)

    def follow(self, schedule: GradualSchedule) -> None:
        """Prune and fine-tune by a schedule."""
        for epoch in range(schedule.epochs + 1):
            sparsity = schedule.sparsity_at(epoch)
            if sparsity is not None:
                self.prune_to(sparsity)
                optimizer = schedule.make_optimizer(self.model.parameters())
            if epoch == schedule.epochs:
                return
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr_at(epoch)
            self.model.train()
            with self.masks.held(self.model):
                score = schedule.train_epoch(self.model, optimizer)
            if self.rounds and score is not None:
                self.rounds[-1] = dataclasses.replace(self.rounds[-1], score=float(score))

    @torch.no_grad()
    def _prune(self, count: int) -> None:
        weights = list(prunable_weights(self.model).values())
        mask = torch.cat([self.masks[name].flatten() for name in self.masks])
        places = mask.nonzero().squeeze(1)
        grads = _gradients(self.model, weights, places, self.pruner)
        vector = torch.cat([weight.flatten() for weight in weights])
        inverse = StaticInverseFisher(grads, self.pruner.damping, self.pruner.block_size)
        moved, dropped, increase = surgeon_step(vector[places].to(grads.dtype), inverse, count)
        vector[places] = moved.to(vector.dtype)
        mask[places] = ~dropped
        sizes = [weight.numel() for weight in weights]
        for name, weight, new, kept in zip(self.masks, weights, vector.split(sizes), mask.split(sizes), strict=True):
            weight.copy_(new.view_as(weight))
            self.masks.remove(name, ~kept.view_as(weight))
        left = self.masks.remaining
        self.rounds.append(Round(len(self.rounds), left, left / self.masks.total, math.nan, count))
        self.increases.append(increase)


def _gradients(
    model: nn.Module, weights: list[nn.Parameter], places: Tensor, pruner: MFACPruner
) -> Float[Tensor, "m d"]:
    """Return the gradients of m batches by the weights at some places, a row each, with the model in eval mode."""
    model.eval()
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    grads = torch.empty(pruner.num_grads, len(places), dtype=dtype, device=places.device)
    batches = _endless(pruner.loader)
    with _requiring_gradients(weights), torch.enable_grad():
        for row in grads:
            inputs, targets = (tensor.to(places.device) for tensor in next(batches))
            loss = pruner.loss_fn(model(inputs), targets)
            pieces = torch.autograd.grad(loss, weights, materialize_grads=True)
            with torch.no_grad():
                row.copy_(torch.cat([piece.flatten() for piece in pieces])[places])
    return grads


@contextmanager
def _requiring_gradients(weights: list[nn.Parameter]) -> Iterator[None]:
    """Let weights require gradients inside the block, and put their flags back."""
    flags = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)


def _endless(loader: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise ValueError("loader must yield at least one batch each time it is iterated, got none")
