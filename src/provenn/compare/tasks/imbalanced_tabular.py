"""Perceptrons on six tables with few positives, judged by F1 of the positives."""

from collections.abc import Iterator
from functools import partial

import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn

from provenn.claims.losses._anyloss_tables import TABLES, Folds, folds_of
from provenn.compare.loss_task import Learning, LossTask
from provenn.compare.task import LogUniform
from provenn.core.experiment.networks import mlp
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import predict
from provenn.losses import StratifiedBatchSampler

BATCH, FOLDS, HIDDEN = 100, 5, 16


def learnings(seed: int, device: str, tuning: bool) -> list[Learning]:
    """Return a perceptron for each table; the seed decides the split and the weights."""
    return [_learning(name, seed, device, tuning) for name in TABLES]


def _learning(name: str, seed: int, device: str, tuning: bool) -> Learning:
    folds = folds_of(TABLES[name](), FOLDS, seed, device=device)
    with seeded(seed, "weights", name):
        model = nn.Sequential(mlp([folds.x.shape[-1], HIDDEN, 1]), nn.Flatten(0)).to(device)
    held = folds.validation[0] if tuning else folds.test[0]
    return Learning(model, partial(_batches, folds, seed), partial(_f1, rows=held[0].float(), classes=held[1]))


def _batches(folds: Folds, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    x, y = folds.x[0].float(), folds.y[0].float()
    for picked in StratifiedBatchSampler(y, BATCH, generator(seed, "order", epoch)):
        rows = torch.tensor(picked, device=x.device)
        yield x[rows], y[rows]


def _f1(model: nn.Module, rows: Tensor, classes: Tensor) -> float:
    predicted = predict(model, rows) > 0
    return float(f1_score(classes.cpu().numpy(), predicted.cpu().numpy(), zero_division=0.0))


class BalancedCrossEntropy(nn.Module):
    """Cross-entropy in which both classes of a batch weigh the same."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits and classes 0 and 1."""
        share = targets.mean().clamp(1e-6, 1 - 1e-6)
        weight = torch.where(targets == 1, 0.5 / share, 0.5 / (1 - share))
        return nn.functional.binary_cross_entropy_with_logits(logits, targets, weight)


class SquaredError(nn.Module):
    """Squared error of the predicted probability."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits and classes 0 and 1."""
        return nn.functional.mse_loss(logits.sigmoid(), targets)


TASK = LossTask(
    name="imbalanced-tabular",
    summary="perceptrons with 16 hidden units on six tables with 3 to 10 % positives, 30 epochs of batch 100 by Adam",
    kinds={"losses": {"lr": LogUniform(1e-3, 1e-1)}},
    learnings=learnings,
    epochs=30,
    metric="F1, mean of the tables",
    references={"bce": nn.BCEWithLogitsLoss, "balanced-bce": BalancedCrossEntropy, "mse": SquaredError},
)
