"""AnyLoss: Transforming Classification Metrics into Loss Functions.

Han, Moniz, Chawla, KDD 2024. https://arxiv.org/abs/2405.14745

Soft labels of predicted probabilities make the counts of a confusion matrix differentiable, and with them every metric
that is a function of the counts:

    A(p) = 1 / (1 + exp(−L(p − t)))
    TP = Σ y A(p),  FP = Σ (1 − y) A(p),  FN = Σ y (1 − A(p)),  TN = Σ (1 − y)(1 − A(p))
    loss = 1 − metric(TP, FP, FN, TN)

The rooms: ``_anyloss_confusion`` (soft labels, counts, metrics), ``_anyloss_loss`` (the losses), ``_anyloss_inputs``
(what they accept), ``_anyloss_sampler`` and ``_anyloss_classifier``.
"""

from provenn.losses._anyloss_classifier import AnyLossClassifier
from provenn.losses._anyloss_confusion import ConfusionMatrix, confusion_metric, soft_confusion, soft_label
from provenn.losses._anyloss_loss import AnyLoss, ScoreOrientedLoss
from provenn.losses._anyloss_sampler import StratifiedBatchSampler

__all__ = [
    "AnyLoss",
    "AnyLossClassifier",
    "ConfusionMatrix",
    "ScoreOrientedLoss",
    "StratifiedBatchSampler",
    "confusion_metric",
    "soft_confusion",
    "soft_label",
]
