"""When M-FAC's gradual pruning prunes, and how it trains between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from provenn.core.experiment.checks import check_integer, check_number

TrainEpoch = Callable[[nn.Module, torch.optim.Optimizer], float | None]


@dataclass(frozen=True)
class GradualSchedule:
    """Prune in steps with fine-tuning between them and after.

    Step k prunes before epoch k · ``prune_every``. Until the last step the learning rate runs through ``prune_lrs``
    again and again, so that a lower one just before the next step settles the model; from then on it is ``lr``,
    multiplied by ``drop_by`` at every epoch of ``drop_at``.

    Args:
        sparsities: Share of the prunable weights that is 0 after each step, rising.
        train_epoch: ``train_epoch(model, optimizer)`` trains for one epoch in place; may return a score.
        make_optimizer: Builds the optimizer over parameters, anew after every step; its learning rate is set here.
        epochs: Epochs in all.
        prune_every: Epochs from one step to the next.
        prune_lrs: Learning rates of the epochs between steps, one for each; ``None`` takes ``lr``.
        lr: Learning rate after the last step.
        drop_at: Epochs, counted from the first step, at which the learning rate drops.
        drop_by: Factor by which it drops.

    Raises:
        ValueError: No sparsity, one outside (0, 1), or falling ones; ``epochs`` that end before the last step;
            ``prune_every`` < 1; ``prune_lrs`` of another length; or a rate or factor ≤ 0.

    Source: the schedule of the authors' pruning script.
    """

    sparsities: Sequence[float]
    train_epoch: TrainEpoch
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    epochs: int
    prune_every: int = 1
    prune_lrs: Sequence[float] | None = None
    lr: float = 0.005
    drop_at: Sequence[int] = ()
    drop_by: float = 0.1

    def __post_init__(self) -> None:
        if not self.sparsities:
            raise ValueError("sparsities must name at least one, got none")
        for sparsity in self.sparsities:
            check_number("sparsities", sparsity, above=0, below=1)
        if list(self.sparsities) != sorted(self.sparsities):
            raise ValueError(f"sparsities must rise, got {list(self.sparsities)}")
        check_integer("prune_every", self.prune_every, at_least=1)
        check_integer("epochs", self.epochs, at_least=self.last_step)
        check_number("lr", self.lr, above=0)
        check_number("drop_by", self.drop_by, above=0)
        for rate in self.prune_lrs or ():
            check_number("prune_lrs", rate, above=0)
        if self.prune_lrs is not None and len(self.prune_lrs) != self.prune_every:
            raise ValueError(
                f"prune_lrs must have one rate for each of the {self.prune_every} epochs between steps, "
                f"got {list(self.prune_lrs)}"
            )

    @property
    def last_step(self) -> int:
        """The epoch before which the last pruning step falls."""
        return (len(self.sparsities) - 1) * self.prune_every

    def sparsity_at(self, epoch: int) -> float | None:
        """Return the sparsity to prune to before an epoch.

        Args:
            epoch: Counted from the first step, 0.

        Returns:
            The sparsity, ``None`` if no step falls there.
        """
        step, rest = divmod(epoch, self.prune_every)
        return None if rest or step >= len(self.sparsities) else self.sparsities[step]

    def lr_at(self, epoch: int) -> float:
        """Return the learning rate of an epoch.

        Args:
            epoch: Counted from the first step, 0.
        """
        if epoch < self.last_step and self.prune_lrs is not None:
            return self.prune_lrs[epoch % self.prune_every]
        if epoch < self.last_step:
            return self.lr
        return self.lr * self.drop_by ** sum(at <= epoch for at in self.drop_at)
