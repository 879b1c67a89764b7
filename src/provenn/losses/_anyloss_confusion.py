"""Soft confusion matrices, and the metrics that are functions of one.

With p a predicted probability and A(p) = 1 / (1 + exp(−L(p − t))) its soft label, TP = Σ y A(p), FP = Σ (1 − y) A(p),
FN = Σ y (1 − A(p)), TN = Σ (1 − y)(1 − A(p)).

Source: Han, Moniz, Chawla, "AnyLoss", KDD 2024, arXiv 2405.14745.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_number

Counts = Float[Tensor, "*columns"]
Metric = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ROOT_GUARD = 1e-12


class ConfusionMatrix(NamedTuple):
    """The four counts of a binary confusion matrix, soft or hard, of one column or of several.

    Args:
        tp: Positives predicted positive.
        fp: Negatives predicted positive.
        fn: Positives predicted negative.
        tn: Negatives predicted negative.
    """

    tp: Counts
    fp: Counts
    fn: Counts
    tn: Counts


class _TwoSided(torch.autograd.Function):
    """σ(u) and σ(−u), each exact near 0, and the derivative ±σ(u)σ(−u), exact where 1 − σ(u) would cancel."""

    generate_vmap_rule = True
    # no_type_check: run-time checkers of signatures must not wrap what the compiler is to trace.

    @staticmethod
    @no_type_check
    def forward(u: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(u), torch.sigmoid(-u)

    @staticmethod
    @no_type_check
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    @no_type_check
    def backward(ctx: Any, by_upper: Tensor, by_lower: Tensor) -> Tensor:
        upper, lower = ctx.saved_tensors
        return (by_upper - by_lower) * upper * lower


def two_sided_labels(p: Tensor, slope: float, threshold: float) -> tuple[Tensor, Tensor]:
    """Return A(p) and 1 − A(p)."""
    labels: tuple[Tensor, Tensor] = _TwoSided.apply(slope * (p - threshold))
    return labels


def soft_label(p: Float[Tensor, "*shape"], slope: float = 73.0, threshold: float = 0.5) -> Float[Tensor, "*shape"]:
    """Return A(p) = 1 / (1 + exp(−L(p − t))), nearly 0 or 1, with a gradient.

    Args:
        p: Predicted probabilities.
        slope: L > 0. 73 is the largest integer for which A(1) < 1 in float64, at t = ½; in float32 it is 33.
        threshold: t in (0, 1), the probability above which a sample counts as positive.

    Shape:
        Any, in and out.

    Returns:
        The soft labels. Their derivative L·A(p)·A(2t − p) does not vanish where A(p) rounds to 1.

    Raises:
        ValueError: ``slope`` ≤ 0, or ``threshold`` outside (0, 1).

    Cost: two exponentials an element.

    Source: the paper's approximation function.
    """
    check_number("slope", slope, above=0)
    check_number("threshold", threshold, above=0, below=1)
    return two_sided_labels(p, slope, threshold)[0]


def soft_confusion(
    p: Float[Tensor, "batch *columns"],
    y: Float[Tensor, "batch *columns"] | Int[Tensor, "batch *columns"] | Bool[Tensor, "batch *columns"],
    slope: float = 73.0,
    threshold: float = 0.5,
    weight: Float[Tensor, "batch *columns"] | None = None,
) -> ConfusionMatrix:
    """Count a soft confusion matrix over the first dimension.

    Args:
        p: Predicted probabilities.
        y: Classes, 0 or 1.
        slope: L of :func:`soft_label`.
        threshold: t of :func:`soft_label`.
        weight: Weights of the samples, ≥ 0; without them every sample counts once.

    Shape:
        ``p``, ``y`` and ``weight`` (batch, ...); each count (...).

    Returns:
        The counts; TP + FN is the number of positives, FP + TN that of negatives.

    Raises:
        ValueError: ``slope`` ≤ 0, ``threshold`` outside (0, 1), or shapes that differ.

    Cost: linear in the number of elements, two exponentials each.

    Source: the paper's confusion matrix of approximated labels.
    """
    check_number("slope", slope, above=0)
    check_number("threshold", threshold, above=0, below=1)
    for name, tensor in (("y", y), ("weight", weight)):
        if tensor is not None and tensor.shape != p.shape:
            raise ValueError(f"{name} must have the shape of p, {tuple(p.shape)}, got {tuple(tensor.shape)}")
    return count(*two_sided_labels(p, slope, threshold), y.to(p.dtype), weight)


def count(label: Tensor, complement: Tensor, y: Tensor, weight: Tensor | None) -> ConfusionMatrix:
    """Sum soft labels and their complements into a confusion matrix, class by class."""
    positive, negative = y, 1 - y
    if weight is not None:
        positive, negative = weight * positive, weight * negative
    return ConfusionMatrix(
        tp=(positive * label).sum(0),
        fp=(negative * label).sum(0),
        fn=(positive * complement).sum(0),
        tn=(negative * complement).sum(0),
    )


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide; 0 where nothing is counted. Both branches are safe, so that no gradient is NaN."""
    counted = denominator > 0
    return torch.where(counted, numerator / torch.where(counted, denominator, 1.0), 0.0)


def _root(x: Tensor) -> Tensor:
    """Take the square root; 0 with a zero gradient at 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def _recalls(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> tuple[Tensor, Tensor]:
    """Return the recall of the positives and of the negatives; of a class that is missing, the other's."""
    positives, negatives = tp + fn, fp + tn
    recall, specificity = _ratio(tp, positives), _ratio(tn, negatives)
    return torch.where(positives > 0, recall, specificity), torch.where(negatives > 0, specificity, recall)


def _accuracy(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    return _ratio(tp + tn, tp + fp + fn + tn)


def _fbeta(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor, *, beta: float) -> Tensor:
    # Divided by 1 + β², so that a large β does not drown the counts.
    recall_share = beta * beta / (1 + beta * beta)
    return _ratio(tp, recall_share * (tp + fn) + (1 - recall_share) * (tp + fp))


def _balanced_accuracy(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    recall, specificity = _recalls(tp, fp, fn, tn)
    return (recall + specificity) / 2


def _gmean(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    recall, specificity = _recalls(tp, fp, fn, tn)
    product = recall * specificity
    # A chord below the guard: 0 at 0 as the root, with a slope that is finite and points away from TP = 0.
    inside = product > ROOT_GUARD
    return torch.where(inside, torch.where(inside, product, 1.0).sqrt(), product / ROOT_GUARD**0.5)


def _precision(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    return _ratio(tp, tp + fp)


def _recall(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    return _ratio(tp, tp + fn)


def _specificity(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    return _ratio(tn, tn + fp)


def _jaccard(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    return _ratio(tp, tp + fp + fn)


def _mcc(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    margins = _root(tp + fp) * _root(tp + fn) * _root(tn + fp) * _root(tn + fn)
    return _ratio(tp * tn - fp * fn, margins)


def _kappa(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    return _ratio(2 * (tp * tn - fp * fn), (tp + fp) * (fp + tn) + (tp + fn) * (fn + tn))


def _youden(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    recall, specificity = _recalls(tp, fp, fn, tn)
    return recall + specificity - 1


def _fowlkes_mallows(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    return _ratio(tp, _root(tp + fp) * _root(tp + fn))


METRICS: dict[str, Metric] = {
    "accuracy": _accuracy,
    "f1": functools.partial(_fbeta, beta=1.0),
    "fbeta": _fbeta,
    "balanced_accuracy": _balanced_accuracy,
    "gmean": _gmean,
    "precision": _precision,
    "recall": _recall,
    "specificity": _specificity,
    "jaccard": _jaccard,
    "mcc": _mcc,
    "kappa": _kappa,
    "youden": _youden,
    "fowlkes_mallows": _fowlkes_mallows,
}


def confusion_metric(name: str, beta: float = 1.0) -> Metric:
    """Return a metric as a differentiable function of the counts of a confusion matrix.

    Args:
        name: ``"accuracy"``, ``"f1"``, ``"fbeta"``, ``"balanced_accuracy"`` (½(TPR + TNR)), ``"gmean"`` (√(TPR·TNR)),
            ``"precision"``, ``"recall"``, ``"specificity"``, ``"jaccard"``, ``"mcc"`` (Matthews), ``"kappa"`` (Cohen),
            ``"youden"`` (TPR + TNR − 1) or ``"fowlkes_mallows"`` (√(precision·recall)).
        beta: β of F_β: recall counts β times as much as precision. Only for ``"fbeta"``.

    Returns:
        A function of TP, FP, FN, TN (tensors of one shape), elementwise. What has nothing to divide by is 0, as in
        scikit-learn; of a class without samples, balanced accuracy, G-mean and Youden's J take the other's recall.
        The root of the G-mean is a chord where TPR·TNR < 1e-12, so that its gradient is finite at TP = 0.

    Raises:
        ValueError: An unknown ``name``, ``beta`` < 0, or ``beta`` given with a metric that has none.

    Source: the paper for accuracy, F_β, G-mean and balanced accuracy; the others by their definitions.
    """
    check_choice("name", name, METRICS)
    check_number("beta", beta, at_least=0)
    if name == "fbeta":
        return functools.partial(_fbeta, beta=beta)
    if beta != 1:
        raise ValueError(f"beta must be 1 unless the metric is 'fbeta', got {beta} with {name!r}")
    return METRICS[name]
