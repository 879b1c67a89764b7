"""AnyLoss against closed-form gradients, scikit-learn's metrics, brute force and the formulas in plain numpy."""

import dataclasses
import functools
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.datasets import make_classification

from provenn.claims import Evidence
from provenn.claims.losses import _anyloss_tables as tables
from provenn.claims.losses import _anyloss_training as training
from provenn.claims.losses import anyloss as claim
from provenn.contracts import BadInput, EstimatorCase, FunctionCase, LossCase
from provenn.losses import (
    AnyLoss,
    AnyLossClassifier,
    ConfusionMatrix,
    ScoreOrientedLoss,
    StratifiedBatchSampler,
    confusion_metric,
    soft_confusion,
    soft_label,
)

NAMES = (
    "accuracy", "f1", "balanced_accuracy", "gmean", "precision", "recall", "specificity",
    "jaccard", "mcc", "kappa", "youden", "fowlkes_mallows",
)  # fmt: skip


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def batch(generator, dtype, samples=12):
    """Logits near the threshold, where the soft labels are neither 0 nor 1, and both classes."""
    logits = 0.15 * torch.randn(samples, generator=generator, dtype=torch.float64)
    return logits.to(dtype), (torch.arange(samples) % 3 == 0).to(dtype)


def multi_label(generator, dtype):
    logits = 0.15 * torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return logits.to(dtype), ((torch.arange(8)[:, None] + torch.arange(3)) % 3 == 0).to(dtype)


def multi_class(generator, dtype):
    logits = 0.15 * torch.randn(9, 3, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.arange(9) % 3


def extremes(dtype=torch.float32):
    big = torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=dtype)
    labels = torch.tensor([1, 0, 0, 1])
    return tuple(
        functools.partial(lambda x, y: (x, y), x, y)
        for x, y in (
            (big, labels),
            (-big, labels),
            (torch.zeros(4, dtype=dtype), labels),  # ties, on the threshold
            (big, torch.ones(4)),
            (big, torch.zeros(4)),
            (torch.tensor([-1e4, -1e4], dtype=dtype), torch.tensor([1, 0])),  # TP = FP = 0
            (torch.tensor([0.3], dtype=dtype), torch.tensor([1])),
            (torch.tensor([0.3], dtype=dtype), torch.tensor([0])),
        )
    )


Z, Y = torch.tensor([0.3, -0.2, 0.1]), torch.tensor([1, 0, 1])
WHOLE = "a metric of a whole batch is no mean over samples"


def bad_losses(make):
    return (
        BadInput("metric", lambda: make(metric="auc")),
        BadInput("beta", lambda: make(metric="fbeta", beta=-1.0)),
        BadInput("beta", lambda: make(metric="f1", beta=2.0)),
        BadInput("beta", lambda: make(metric=lambda tp, fp, fn, tn: tp, beta=2.0)),
        BadInput("threshold", lambda: make(threshold=0.0)),
        BadInput("threshold", lambda: make(threshold=1.0)),
        BadInput("empty", lambda: make(empty="ignore")),
        BadInput("average", lambda: make(average="weighted")),
        BadInput("target", lambda: make()(Z, torch.tensor([1, 0, 2]))),
        BadInput("target", lambda: make()(Z, torch.tensor([1.0, 0.0, math.nan]))),
        BadInput("target", lambda: make()(Z, torch.tensor([1.0, 0.5, 0.0]))),
        BadInput("target", lambda: make()(Z, Y[:2])),
        BadInput("target", lambda: make(average="macro")(Z[:, None].expand(3, 2), torch.tensor([0, 1, 2]))),
        BadInput("target", lambda: make(average="macro")(Z[:, None].expand(3, 2), torch.tensor([0.0, 1.0, 1.0]))),
        BadInput("target", lambda: make(empty="raise")(Z, torch.ones(3))),
        BadInput("input", lambda: make(from_logits=False)(torch.tensor([0.1, 1.5, 0.2]), Y)),
        BadInput("input", lambda: make(from_logits=False)(torch.tensor([0.1, math.nan, 0.2]), Y)),
        BadInput("input", lambda: make()(torch.zeros(3, 2), Y)),
        BadInput("input", lambda: make(average="macro")(Z, Y)),
        BadInput("input", lambda: make()(torch.tensor([1, 2, 3]), Y), TypeError),
        BadInput("weight", lambda: make()(Z, Y, torch.tensor([1.0, -1.0, 1.0]))),
        BadInput("weight", lambda: make()(Z, Y, torch.tensor([1.0, math.inf, 1.0]))),
        BadInput("weight", lambda: make()(Z, Y, torch.ones(2))),
        BadInput("metric", lambda: make(metric=lambda tp, fp, fn, tn: 0.5)(Z, Y)),
    )


def loss_case(make, label, inputs=batch, extreme=True, **options):
    return LossCase(
        part=f"provenn.losses.{make.__name__}",
        make=functools.partial(make, **options),
        label=label,
        inputs=inputs,
        extremes=extremes() if extreme else (),
        excluded={} if extreme else {"extremes": "the cases of one column have them"},
        reductions=False,
        reductions_reason=WHOLE,
        bad_input=bad_losses(make)
        + (
            (BadInput("slope", lambda: make(slope=0.0)), BadInput("slope", lambda: make(slope=math.nan)))
            if make is AnyLoss
            else (BadInput("delta", lambda: make(delta=0.0)), BadInput("delta", lambda: make(delta=0.6)))
        ),
    )


CASES = [
    *(loss_case(AnyLoss, name, metric=name) for name in NAMES),
    loss_case(AnyLoss, "fbeta", metric="fbeta", beta=2.0),
    loss_case(AnyLoss, "skip", empty="skip"),
    loss_case(AnyLoss, "multi-label macro", multi_label, extreme=False, average="macro"),
    loss_case(AnyLoss, "multi-class micro", multi_class, extreme=False, average="micro"),
    loss_case(ScoreOrientedLoss, "raised cosine"),
    loss_case(ScoreOrientedLoss, "uniform", metric="gmean", delta=None),
    loss_case(ScoreOrientedLoss, "macro", multi_class, extreme=False, average="macro"),
    FunctionCase(
        part="provenn.losses.soft_label",
        call=lambda: soft_label(Z.sigmoid()),
        bad_input=(
            BadInput("slope", lambda: soft_label(Z.sigmoid(), slope=-1.0)),
            BadInput("threshold", lambda: soft_label(Z.sigmoid(), threshold=1.0)),
        ),
    ),
    FunctionCase(
        part="provenn.losses.soft_confusion",
        call=lambda: soft_confusion(Z.sigmoid(), Y),
        bad_input=(
            BadInput("slope", lambda: soft_confusion(Z.sigmoid(), Y, slope=0.0)),
            BadInput("threshold", lambda: soft_confusion(Z.sigmoid(), Y, threshold=0.0)),
            BadInput("y", lambda: soft_confusion(Z.sigmoid(), Y[:2])),
            BadInput("weight", lambda: soft_confusion(Z.sigmoid(), Y, weight=torch.ones(2))),
        ),
    ),
    FunctionCase(
        part="provenn.losses.ConfusionMatrix",
        call=lambda: ConfusionMatrix(*f64(1, 2, 3, 4)),
        bad_input_reason="a plain tuple of four tensors",
    ),
    FunctionCase(
        part="provenn.losses.confusion_metric",
        call=lambda: confusion_metric("f1")(*f64(1, 2, 3, 4)),
        bad_input=(
            BadInput("name", lambda: confusion_metric("auc")),
            BadInput("beta", lambda: confusion_metric("fbeta", beta=-0.5)),
            BadInput("beta", lambda: confusion_metric("mcc", beta=0.5)),
        ),
    ),
    FunctionCase(
        part="provenn.losses.StratifiedBatchSampler",
        call=lambda: list(StratifiedBatchSampler([0, 1, 0, 0], 2)),
        bad_input=(
            BadInput("labels", lambda: StratifiedBatchSampler([], 2)),
            BadInput("labels", lambda: StratifiedBatchSampler(torch.zeros(2, 2), 2)),
            BadInput("batch_size", lambda: StratifiedBatchSampler([0, 1], 0)),
            BadInput("batch_size", lambda: StratifiedBatchSampler([0, 1], 1.5), TypeError),
        ),
    ),
]


def bad_fits():
    features, classes = np.arange(12.0).reshape(6, 2), np.array([0, 1] * 3)
    bad = {
        "metric": "auc", "hidden": 0, "beta": -1.0, "slope": 0.0, "threshold": 1.0,
        "lr": 0.0, "epochs": 0, "batch_fraction": 0.0,
    }  # fmt: skip
    one_class = BadInput("y", lambda: AnyLossClassifier().fit(features, np.ones(6)))
    return one_class, *(
        BadInput(name, lambda name=name, value=value: AnyLossClassifier(**{name: value}).fit(features, classes))
        for name, value in bad.items()
    )


CASES += [
    EstimatorCase(
        part="provenn.losses.AnyLossClassifier",
        make=functools.partial(AnyLossClassifier, epochs=100),
        label="single layer",
        bad_input=bad_fits(),
    ),
    EstimatorCase(
        part="provenn.losses.AnyLossClassifier",
        make=functools.partial(AnyLossClassifier, hidden=4, epochs=40, lr=0.05),
        label="hidden layer",
        bad_input=bad_fits(),
        excluded={
            "check_sample_weight_equivalence_on_dense_data": "batches and batch normalisation count rows, not weights"
        },
    ),
]


# The approximation.


def test_soft_label_is_the_formula():
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    expected = 1 / (1 + np.exp(-20 * (p.numpy() - 0.3)))
    np.testing.assert_allclose(soft_label(p, slope=20.0, threshold=0.3).numpy(), expected, rtol=1e-14)


def test_soft_label_is_one_half_at_the_threshold_and_mirrored_about_it():
    assert soft_label(f64(0.3), threshold=0.3).item() == 0.5
    p = torch.linspace(0, 1, 57, dtype=torch.float64)
    torch.testing.assert_close(soft_label(1 - p), 1 - soft_label(p), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("dtype", "steepest"), [(torch.float64, 73), (torch.float32, 33)])
def test_steepest_slope_at_which_a_certain_label_is_below_one(dtype, steepest):
    one = torch.ones((), dtype=dtype)
    assert soft_label(one, slope=float(steepest)).item() < 1
    assert soft_label(one, slope=float(steepest + 1)).item() == 1
    # The paper's choice by its own formula, evaluated by numpy.
    kind = np.float64 if dtype == torch.float64 else np.float32
    assert 1 / (1 + np.exp(kind(-steepest / 2))) < 1
    assert 1 / (1 + np.exp(kind(-(steepest + 1) / 2))) == 1


@pytest.mark.parametrize("slope", [10.0, 73.0, 200.0])
@pytest.mark.parametrize("p", [0.0, 1e-12, 0.3, 0.5, 0.8, 1 - 1e-12, 1.0])
def test_derivative_of_the_soft_label_keeps_its_relative_precision(p, slope):
    # At p = 1 and L = 73, ŷ(1 − ŷ) with 1 − ŷ by subtraction is off by more than half; at L = 200 it is 0.
    point = f64(p).requires_grad_()
    soft_label(point, slope=slope).sum().backward()
    u = slope * abs(p - 0.5)
    expected = slope * math.exp(-u) / (1 + math.exp(-u)) ** 2
    assert point.grad.item() == pytest.approx(expected, rel=1e-12, abs=0)
    assert point.grad.item() > 0


def test_soft_label_works_under_vmap_and_twice_differentiated():
    p = torch.linspace(0.4, 0.6, 6, dtype=torch.float64)
    derivative = torch.func.vmap(torch.func.grad(soft_label))(p)
    labels = soft_label(p)
    torch.testing.assert_close(derivative, 73 * labels * (1 - labels))
    assert torch.autograd.gradgradcheck(soft_label, (p.requires_grad_(),))


# The counts.


def counts_by_hand(p, y, slope, threshold, weight):
    tp = fp = fn = tn = 0.0
    for one, label, w in zip(p.tolist(), y.tolist(), weight.tolist(), strict=True):
        soft = 1 / (1 + math.exp(-slope * (one - threshold)))
        tp, fn = tp + w * label * soft, fn + w * label * (1 - soft)
        fp, tn = fp + w * (1 - label) * soft, tn + w * (1 - label) * (1 - soft)
    return [tp, fp, fn, tn]


def test_counts_are_the_sums():
    draws = torch.Generator().manual_seed(0)
    p, weight = torch.rand(2, 15, generator=draws, dtype=torch.float64)
    y = (torch.rand(15, generator=draws) < 0.4).int()
    matrix = soft_confusion(p, y, slope=9.0, threshold=0.35, weight=weight)
    np.testing.assert_allclose(torch.stack(matrix).numpy(), counts_by_hand(p, y, 9.0, 0.35, weight), rtol=1e-12)
    ones = torch.ones(15, dtype=torch.float64)
    np.testing.assert_allclose(
        torch.stack(soft_confusion(p, y)).numpy(), counts_by_hand(p, y, 73.0, 0.5, ones), rtol=1e-9
    )


def test_counts_add_up_to_the_classes_and_columns_are_apart():
    draws = torch.Generator().manual_seed(1)
    p = torch.rand(40, 3, generator=draws, dtype=torch.float64)
    y = (torch.rand(40, 3, generator=draws) < 0.2).double()
    matrix = soft_confusion(p, y)
    torch.testing.assert_close(matrix.tp + matrix.fn, y.sum(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(matrix.fp + matrix.tn, (1 - y).sum(0), rtol=1e-14, atol=0)
    for column in range(3):
        alone = soft_confusion(p[:, column], y[:, column])
        torch.testing.assert_close(torch.stack(matrix)[:, column], torch.stack(alone))


def test_counts_keep_their_relative_precision_near_zero():
    small = math.exp(-36.5) / (1 + math.exp(-36.5))
    for p, place in ((0.0, 0), (1.0, 2)):  # a positive surely missed, a positive surely found
        matrix = soft_confusion(f64(p), torch.tensor([1]))
        assert matrix[place].item() == pytest.approx(small, rel=1e-12, abs=0)
        swapped = soft_confusion(f64(p), torch.tensor([0]))
        assert swapped[place + 1].item() == pytest.approx(small, rel=1e-12, abs=0)


def test_counts_are_the_hard_ones_in_the_limit_of_a_steep_slope():
    p, y = f64(0.01, 0.29, 0.31, 0.7, 0.99, 0.2), torch.tensor([0, 1, 1, 0, 1, 0])
    matrix = soft_confusion(p, y, slope=1e5, threshold=0.3)
    tn, fp, fn, tp = metrics.confusion_matrix(y.numpy(), p.numpy() > 0.3).ravel()
    assert [count.item() for count in matrix] == [tp, fp, fn, tn]


# The metrics, and the losses in the limit of hard labels.

BY_SCIKIT_LEARN = {
    "accuracy": metrics.accuracy_score,
    "f1": metrics.f1_score,
    "balanced_accuracy": metrics.balanced_accuracy_score,
    "gmean": lambda y, h: math.sqrt(metrics.recall_score(y, h) * metrics.recall_score(y, h, pos_label=0)),
    "precision": metrics.precision_score,
    "recall": metrics.recall_score,
    "specificity": lambda y, h: metrics.recall_score(y, h, pos_label=0),
    "jaccard": metrics.jaccard_score,
    "mcc": metrics.matthews_corrcoef,
    "kappa": metrics.cohen_kappa_score,
    "youden": lambda y, h: metrics.balanced_accuracy_score(y, h, adjusted=True),
    "fowlkes_mallows": lambda y, h: math.sqrt(metrics.precision_score(y, h) * metrics.recall_score(y, h)),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", NAMES)
def test_hard_predictions_give_scikit_learns_metric(name, seed):
    draws = torch.Generator().manual_seed(seed)
    hard = (torch.rand(60, generator=draws) < 0.4).double()
    y = torch.where(torch.rand(60, generator=draws) < 0.7, hard, 1 - hard)
    p = torch.where(hard == 1, 0.9, 0.1) + (torch.rand(60, generator=draws, dtype=torch.float64) - 0.5) * 0.2
    p = torch.where(hard == 1, p.clamp(0.9, 1.0), p.clamp(0.0, 0.1))
    loss = AnyLoss(name, from_logits=False)(p, y).item()
    assert loss == pytest.approx(1 - BY_SCIKIT_LEARN[name](y.numpy(), hard.numpy()), abs=1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0, 7.0])
def test_fbeta_is_scikit_learns(beta):
    y, hard = np.array([1, 1, 1, 0, 0, 0, 0, 1]), np.array([1, 0, 1, 1, 0, 0, 1, 1])
    loss = AnyLoss("fbeta", beta=beta, from_logits=False)(torch.from_numpy(hard).double(), torch.from_numpy(y))
    expected = metrics.fbeta_score(y, hard, beta=beta) if beta else metrics.precision_score(y, hard)
    assert loss.item() == pytest.approx(1 - expected, abs=1e-10)


def test_fbeta_runs_from_the_precision_to_the_recall_loss():
    z, y = batch(torch.Generator().manual_seed(0), torch.float64)
    assert AnyLoss("fbeta", beta=0.0)(z, y).item() == pytest.approx(AnyLoss("precision")(z, y).item(), rel=1e-14)
    assert AnyLoss("fbeta", beta=1e8)(z, y).item() == pytest.approx(AnyLoss("recall")(z, y).item(), rel=1e-12)
    assert AnyLoss("fbeta", beta=1.0)(z, y).item() == AnyLoss("f1")(z, y).item()


# Gradients.


def gradient(loss, z, y, **more):
    z = z.detach().clone().requires_grad_()
    value = loss(z, y, **more)
    value.backward()
    return value.item(), z.grad


def closed_forms(z, y, slope=73.0, beta=2.0):
    """The quotient rule by hand, in numpy, from dŷ/dz = L ŷ (1 − ŷ) p (1 − p)."""
    z, y = z.numpy(), y.numpy()
    p = 1 / (1 + np.exp(-z))
    soft = 1 / (1 + np.exp(-slope * (p - 0.5)))
    d = slope * soft * (1 - soft) * p * (1 - p)
    n, P, S, T = len(y), y.sum(), soft.sum(), (y * soft).sum()
    N, TN = n - P, n - P - S + T
    bottom = beta**2 * P + S
    return {
        "accuracy": (d - 2 * y * d) / n,
        "fbeta": -(1 + beta**2) * (y * bottom - T) / bottom**2 * d,
        "balanced_accuracy": -(n * y * d - P * d) / (2 * P * N),
        # With the factor ½; the authors' code has 2.
        "gmean": -0.5 * (y * d * TN + (y * d - d) * T) / np.sqrt(P * N * T * TN),
        "precision": -(y * d * S - T * d) / S**2,
        "recall": -y * d / P,
        "jaccard": -(y * d * (P + S - T) - T * (d - y * d)) / (P + S - T) ** 2,
    }


@pytest.mark.parametrize("name", ["accuracy", "fbeta", "balanced_accuracy", "gmean", "precision", "recall", "jaccard"])
def test_gradient_is_the_closed_form(name):
    z, y = batch(torch.Generator().manual_seed(3), torch.float64, samples=30)
    _, found = gradient(AnyLoss(name, beta=2.0 if name == "fbeta" else 1.0), z, y)
    np.testing.assert_allclose(found.numpy(), closed_forms(z, y)[name], rtol=1e-9, atol=1e-15)


def test_balanced_data_make_accuracy_and_balanced_accuracy_one():
    z = 0.2 * torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(20) % 2
    first, second = gradient(AnyLoss("accuracy"), z, y), gradient(AnyLoss("balanced_accuracy"), z, y)
    assert first[0] == pytest.approx(second[0], rel=1e-14)
    torch.testing.assert_close(first[1], second[1], rtol=1e-12, atol=0)


def test_f1_is_a_monotone_image_of_jaccard():
    # F = 2J / (1 + J): the gradients are parallel, with the factor 2 / (1 + J)².
    z, y = batch(torch.Generator().manual_seed(5), torch.float64)
    (f1, by_f1), (jaccard, by_jaccard) = gradient(AnyLoss("f1"), z, y), gradient(AnyLoss("jaccard"), z, y)
    overlap = 1 - jaccard
    assert 1 - f1 == pytest.approx(2 * overlap / (1 + overlap), rel=1e-12)
    torch.testing.assert_close(by_f1, by_jaccard * 2 / (1 + overlap) ** 2, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_doubled_examples_weigh_as_weights_of_two(name):
    z, y = batch(torch.Generator().manual_seed(6), torch.float64)
    loss = AnyLoss(name)
    value, by_z = gradient(loss, z, y)
    doubled, by_doubled = gradient(loss, torch.cat([z, z]), torch.cat([y, y]))
    weighted, by_weighted = gradient(loss, z, y, weight=torch.full((12,), 2.0, dtype=torch.float64))
    assert value == pytest.approx(doubled, rel=1e-12)
    assert value == pytest.approx(weighted, rel=1e-12)
    torch.testing.assert_close(by_doubled[:12] + by_doubled[12:], by_z, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(by_weighted, by_z, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("make", [AnyLoss, ScoreOrientedLoss])
def test_weights_are_repetitions_and_zero_leaves_out(make):
    z, y = batch(torch.Generator().manual_seed(7), torch.float64, samples=6)
    times = torch.tensor([1, 3, 0, 2, 1, 1])
    repeated = make("f1")(z.repeat_interleave(times), y.repeat_interleave(times))
    assert make("f1")(z, y, times.double()).item() == pytest.approx(repeated.item(), rel=1e-12)


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_swapped_classes_turn_recall_into_specificity(threshold):
    z, y = batch(torch.Generator().manual_seed(8), torch.float64)
    p = (z + math.log(threshold / (1 - threshold))).sigmoid()
    recall = AnyLoss("recall", threshold=threshold, from_logits=False)(p, y)
    specificity = AnyLoss("specificity", threshold=1 - threshold, from_logits=False)(1 - p, 1 - y)
    assert recall.item() == pytest.approx(specificity.item(), rel=1e-10)


def test_slope_acts_on_probabilities_and_not_on_logits():
    z, y = f64(0.05, -0.1, 2.0), torch.tensor([1, 0, 0])
    soft = 1 / (1 + np.exp(-73 * (1 / (1 + np.exp(-z.numpy())) - 0.5)))
    assert AnyLoss("f1")(z, y).item() == pytest.approx(1 - 2 * soft[0] / (1 + soft.sum()), rel=1e-12)
    assert AnyLoss("f1")(z, y).item() == AnyLoss("f1", from_logits=False)(z.sigmoid(), y).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:slope")
def test_extreme_logits_have_a_finite_loss_and_no_gradient(name, dtype):
    for y in (torch.tensor([1, 0, 0, 1]), torch.tensor([0, 1, 1, 0]), torch.zeros(4)):
        value, by_z = gradient(AnyLoss(name), torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=dtype), y)
        assert math.isfinite(value)
        assert torch.equal(by_z, torch.zeros_like(by_z))


def test_gmean_without_true_positives_has_a_finite_gradient_that_points_out():
    # All positives are far below the threshold, and L is so steep that TP is 0 in float64.
    p = f64(0.1, 0.2, 0.3, 0.2).requires_grad_()
    y = torch.tensor([1, 1, 0, 0])
    AnyLoss("gmean", slope=3000.0, from_logits=False)(p, y).backward()
    assert p.grad.isfinite().all()
    p = f64(0.1, 0.2, 0.3, 0.2).requires_grad_()
    AnyLoss("gmean", from_logits=False)(p, y).backward()
    assert (p.grad[:2] < 0).all()
    assert confusion_metric("gmean")(*f64(0, 1, 2, 3)).item() == 0
    tp = f64(0.0).requires_grad_()
    confusion_metric("gmean")(tp, f64(1.0), f64(2.0) - tp, f64(3.0)).backward()
    assert 0 < tp.grad.item() < math.inf


def test_nothing_divides_by_the_size_of_another_set():
    # The authors' networks divide a batch's accuracy by the size of the training set.
    z, y = f64(5.0, -5.0, 5.0, -5.0), torch.tensor([1, 0, 0, 0])
    assert AnyLoss("accuracy")(z, y).item() == pytest.approx(0.25, abs=1e-9)


# Precision.


def test_float32_is_worked_on_in_float64_with_a_warning():
    z, y = batch(torch.Generator().manual_seed(9), torch.float32)
    with pytest.warns(UserWarning, match=r"slope 73 > 33 .*float32: computing in float64"):
        value = AnyLoss("mcc")(z, y)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(AnyLoss("mcc")(z.double(), y).item(), rel=1e-7)
    certain = torch.tensor([-40.0, 40.0, 0.01], requires_grad=True)
    with pytest.warns(UserWarning, match="soft labels round"):
        assert AnyLoss("f1", upcast=False)(certain, y[:3]).dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AnyLoss("f1", slope=33.0)(z, y)
        AnyLoss("f1")(z.double(), y)


@pytest.mark.filterwarnings("ignore:slope")
def test_upcast_keeps_what_float32_loses():
    # A sum of 1 and of many labels of 1e-12 each: float32 drops all of them.
    z = torch.full((200_001,), -1.2)
    z[0] = 40.0
    y = torch.zeros(200_001)
    y[0] = 1
    p = torch.sigmoid(z.double()).numpy()
    small = 1 / (1 + np.exp(-73 * (p[1] - 0.5)))
    expected = 1 - 2 / (1 + 1 + 200_000 * small)
    assert AnyLoss("f1", upcast=True)(z, y).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:slope")
def test_half_precision_is_widened_and_given_back(dtype):
    z, y = batch(torch.Generator().manual_seed(10), dtype)
    for slope in (20.0, 73.0):
        value, by_z = gradient(AnyLoss("f1", slope=slope), z, y.float())
        expected = AnyLoss("f1", slope=slope)(z.double(), y.double()).item()
        assert value == pytest.approx(expected, rel=1e-2)
        assert by_z.dtype == dtype


# Batches without one of the classes.


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("name", ["balanced_accuracy", "gmean", "youden"])
def test_a_missing_class_leaves_the_other_recall(name, label):
    z = 0.2 * torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.full((7,), label)
    half = AnyLoss("recall" if label else "specificity")
    expected, by_expected = gradient(half, z, y)
    scale = 2 if name == "youden" else 1  # J = TPR + TNR − 1
    value, by_z = gradient(AnyLoss(name), z, y)
    assert value == pytest.approx(scale * expected, rel=1e-12)
    torch.testing.assert_close(by_z, scale * by_expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["f1", "precision", "recall", "jaccard", "mcc", "kappa", "fowlkes_mallows"])
def test_without_positives_metrics_are_zero_as_scikit_learns_are(name):
    z, y = f64(0.1, -0.2, 0.05), torch.zeros(3)
    value, by_z = gradient(AnyLoss(name), z, y)
    assert value == 1
    assert torch.equal(by_z, torch.zeros_like(by_z))


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("metric", [*NAMES, lambda tp, fp, fn, tn: tp / (tp + fn) * tn / (fp + tn)])
def test_skip_gives_zero_and_keeps_the_graph(metric, label):
    z = f64(0.1, -0.2, 0.05)
    value, by_z = gradient(AnyLoss(metric, empty="skip"), z, torch.full((3,), label))
    assert value == 0
    assert torch.equal(by_z, torch.zeros_like(by_z))
    y = torch.tensor([1, 0, 1])
    assert AnyLoss(metric, empty="skip")(z, y).item() == AnyLoss(metric)(z, y).item()


def test_raise_names_the_counts():
    with pytest.raises(ValueError, match=r"target .* got 0 positives and 3 negatives"):
        AnyLoss(empty="raise")(f64(0.1, 0.2, 0.3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"target .* got 2 positives and 0 negatives"):
        AnyLoss(empty="raise")(f64(0.1, 0.2), torch.ones(2))
    assert AnyLoss(empty="raise")(f64(0.1, 0.2), torch.tensor([0, 1])).isfinite()


def test_weights_of_zero_make_a_class_missing():
    with pytest.raises(ValueError, match="got 0 positives"):
        AnyLoss(empty="raise")(f64(0.1, 0.2), torch.tensor([1, 0]), f64(0.0, 1.0))


# Callables, columns, compiled code.


def test_a_callable_is_a_metric():
    z, y = batch(torch.Generator().manual_seed(11), torch.float64)

    def mine(tp, fp, fn, tn):
        return 2 * tp / (2 * tp + fp + fn)

    value, by_z = gradient(AnyLoss(mine), z, y)
    expected, by_expected = gradient(AnyLoss("f1"), z, y)
    assert value == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(by_z, by_expected)


def test_a_column_vector_is_a_batch():
    z, y = batch(torch.Generator().manual_seed(12), torch.float64)
    for target in (y, y[:, None], y.bool(), y.int()):
        assert AnyLoss()(z[:, None], target).item() == AnyLoss()(z, y).item()


@pytest.mark.parametrize("make", [AnyLoss, ScoreOrientedLoss])
def test_macro_is_the_mean_of_one_against_the_rest_and_micro_of_all_in_one(make):
    z, classes = multi_class(torch.Generator().manual_seed(13), torch.float64)
    weight = torch.rand(9, generator=torch.Generator().manual_seed(14), dtype=torch.float64)
    one_hot = torch.stack([classes == label for label in range(3)], dim=1)
    each = [make("gmean")(z[:, label], one_hot[:, label], weight).item() for label in range(3)]
    pooled = make("gmean")(z.flatten(), one_hot.flatten(), weight.repeat_interleave(3)).item()
    for target in (classes, one_hot):
        assert make("gmean", average="macro")(z, target, weight).item() == pytest.approx(np.mean(each), rel=1e-12)
        assert make("gmean", average="micro")(z, target, weight).item() == pytest.approx(pooled, rel=1e-12)


def test_hard_multi_class_averages_are_scikit_learns():
    classes, predicted = np.array([0, 1, 2, 2, 1, 0, 0, 1]), np.array([0, 2, 2, 1, 1, 0, 1, 1])
    p = torch.nn.functional.one_hot(torch.from_numpy(predicted)).double()
    for average in ("macro", "micro"):
        loss = AnyLoss("f1", from_logits=False, average=average)(p, torch.from_numpy(classes))
        assert loss.item() == pytest.approx(1 - metrics.f1_score(classes, predicted, average=average), abs=1e-10)


def test_one_column_of_weights_per_class():
    z, y = multi_label(torch.Generator().manual_seed(15), torch.float64)
    weight = torch.rand(8, 3, generator=torch.Generator().manual_seed(16), dtype=torch.float64)
    each = [AnyLoss("f1")(z[:, k], y[:, k], weight[:, k]).item() for k in range(3)]
    assert AnyLoss("f1", average="macro")(z, y, weight).item() == pytest.approx(np.mean(each), rel=1e-12)


def test_compiles_without_a_graph_break():
    z, y = batch(torch.Generator().manual_seed(17), torch.float64)
    loss = AnyLoss("gmean", empty="skip")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value, by_z = gradient(compiled, z, y)
    expected, by_expected = gradient(loss, z, y)
    assert value == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(by_z, by_expected)


# The baseline with a random threshold.


@pytest.mark.parametrize(("delta", "threshold"), [(0.1, 0.5), (0.25, 0.4), (None, 0.5)])
def test_expected_labels_are_the_distribution_function_of_the_threshold(delta, threshold):
    # By numerical integration of the prior's density.
    grid = np.linspace(0, 1, 400_001)
    density = np.ones_like(grid)
    if delta is not None:
        inside = np.abs(grid - threshold) <= delta
        density = np.where(inside, (1 + np.cos(np.pi * (grid - threshold) / delta)) / (2 * delta), 0)
    cumulated = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(grid))])
    p = torch.tensor([0.0, 0.2, 0.31, 0.42, 0.5, 0.55, 0.63, 0.9, 1.0], dtype=torch.float64)
    expected = np.interp(p.numpy(), grid, cumulated)
    y = torch.eye(9, dtype=torch.float64)
    loss = ScoreOrientedLoss(lambda tp, fp, fn, tn: tp, delta, threshold=threshold, from_logits=False, average="macro")
    # TP of a column with one positive is that positive's expected label.
    found = [1 - loss(p[:, None], y[:, k : k + 1]).item() for k in range(9)]
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_prior_is_the_one_that_the_authors_compare_with_unless_told_otherwise():
    z, y = batch(torch.Generator().manual_seed(0), torch.float64)
    assert ScoreOrientedLoss()(z, y).item() == ScoreOrientedLoss("f1", 0.1, threshold=0.5)(z, y).item()
    assert ScoreOrientedLoss()(z, y).item() != ScoreOrientedLoss("f1", 0.2)(z, y).item()


def test_expected_counts_are_the_mean_over_thresholds():
    draws = torch.Generator().manual_seed(18)
    p = torch.rand(30, generator=draws, dtype=torch.float64)
    y = (torch.rand(30, generator=draws) < 0.3).double()
    thresholds = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # uniform
    hard = (p > thresholds[:, None]).double()
    expected = [(hard * y).sum(1).mean(), (hard * (1 - y)).sum(1).mean()]
    expected += [((1 - hard) * y).sum(1).mean(), ((1 - hard) * (1 - y)).sum(1).mean()]
    for place, value in enumerate(expected):
        loss = ScoreOrientedLoss(lambda *counts, place=place: counts[place], None, from_logits=False)
        assert 1 - loss(p, y).item() == pytest.approx(value.item(), rel=1e-3)


# The sampler.


def test_batches_hold_every_sample_once_and_both_classes_in_proportion():
    labels = (torch.arange(413) % 13 == 0).int()
    sampler = StratifiedBatchSampler(labels, 50, torch.Generator().manual_seed(0))
    batches = list(sampler)
    assert len(batches) == len(sampler) == 9
    assert sorted(index for one in batches for index in one) == list(range(413))
    assert {len(one) for one in batches} <= {45, 46}
    share = labels.double().mean().item()
    for one in batches:
        assert abs(labels[one].sum().item() - share * len(one)) <= 1


def test_batches_change_by_epoch_and_repeat_by_seed():
    labels = torch.arange(40) % 4 == 0
    first = StratifiedBatchSampler(labels, 10, torch.Generator().manual_seed(0))
    again = StratifiedBatchSampler(labels, 10, torch.Generator().manual_seed(0))
    one, two = list(first), list(first)
    assert one != two
    assert [list(again), list(again)] == [one, two]
    free = StratifiedBatchSampler(labels, 10)
    assert list(free) != list(free)


def test_sampler_feeds_a_data_loader():
    x, y = torch.arange(20.0), torch.arange(20) % 5 == 0
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, batch_sampler=StratifiedBatchSampler(y, 5))
    assert [labels.sum().item() for _, labels in loader] == [1, 1, 1, 1]


# The classifier.


def imbalanced(samples=400, seed=0):
    return make_classification(
        samples, 6, n_informative=3, n_redundant=0, weights=[0.9], class_sep=0.7, flip_y=0.02, random_state=seed
    )


@pytest.mark.parametrize(("slope", "threshold"), [(73.0, 0.5), (30.0, 0.4)])
def test_single_layer_is_full_batch_gradient_descent_from_zero(slope, threshold):
    x, y = imbalanced(120)
    fitted = AnyLossClassifier("balanced_accuracy", slope=slope, threshold=threshold, epochs=25, lr=0.3).fit(x, y)
    z = (x - x.mean(0)) / x.std(0)
    rows = np.column_stack([z, np.ones(len(z))])
    theta, P, n = np.zeros(7), y.sum(), len(y)
    for _ in range(25):
        p = 1 / (1 + np.exp(-rows @ theta))
        soft = 1 / (1 + np.exp(-slope * (p - threshold)))
        d = slope * soft * (1 - soft) * p * (1 - p)
        theta += 0.3 * rows.T @ ((n * y - P) * d) / (2 * P * (n - P))
    margin = rows @ theta - np.log(threshold / (1 - threshold))
    np.testing.assert_allclose(fitted.decision_function(x), margin, rtol=1e-8, atol=1e-10)
    probability = 1 / (1 + np.exp(-rows @ theta))
    np.testing.assert_allclose(fitted.predict_proba(x), np.column_stack([1 - probability, probability]), atol=1e-10)
    np.testing.assert_array_equal(fitted.predict(x), probability > threshold)


def test_weights_of_samples_are_repetitions():
    x, y = imbalanced(60)
    times = np.arange(60) % 3
    weighted = AnyLossClassifier(epochs=20).fit(x, y, sample_weight=times)
    repeated = AnyLossClassifier(epochs=20).fit(x.repeat(times, axis=0), y.repeat(times))
    np.testing.assert_allclose(weighted.decision_function(x), repeated.decision_function(x), atol=1e-9)


def test_fitted_network_predicts_as_the_classifier_does():
    x, y = imbalanced(100)
    fitted = AnyLossClassifier(hidden=3, epochs=3, random_state=0).fit(x, y)
    logits = fitted.network_(torch.from_numpy((x - fitted.mean_) / fitted.scale_))[:, 0].detach().numpy()
    np.testing.assert_allclose(fitted.decision_function(x), logits, rtol=1e-12)
    assert np.abs(fitted.decision_function(x[:1]) - logits[:1]) < 1e-12


def test_defaults_are_the_papers():
    x, y = imbalanced(40)

    def scores(x=x, y=y, **options):
        fitted = AnyLossClassifier(random_state=0, **options).fit(x, y)
        return fitted.decision_function(x)

    assert AnyLossClassifier().fit(x, y).n_iter_ == 1000
    assert AnyLossClassifier(hidden=2).fit(x, y).n_iter_ == 100
    np.testing.assert_array_equal(
        scores(epochs=9), scores(epochs=9, metric="f1", beta=1.0, slope=73.0, threshold=0.5, lr=0.1)
    )
    np.testing.assert_array_equal(scores(hidden=2, epochs=9), scores(hidden=2, epochs=9, lr=1e-3))
    x, y = imbalanced(300)
    few = {"hidden": 2, "epochs": 2}
    np.testing.assert_array_equal(scores(x, y, **few), scores(x, y, batch_fraction=0.05, **few))
    assert np.abs(scores(x, y, **few) - scores(x, y, batch_fraction=0.1, **few)).max() > 0
    network = AnyLossClassifier(**few).fit(x, y).network_
    assert [type(layer).__name__ for layer in network] == ["Linear", "BatchNorm1d", "Sigmoid", "Linear"]
    assert network[0].out_features == 2


@pytest.mark.parametrize("options", [{}, {"hidden": (8, 4), "lr": 0.02, "epochs": 70}])
def test_classifier_finds_the_rare_class_where_the_cross_entropy_does_not(options):
    from sklearn.linear_model import LogisticRegression

    x, y = imbalanced(1000)
    recall = metrics.recall_score(y, LogisticRegression().fit(x, y).predict(x))
    fitted = AnyLossClassifier("balanced_accuracy", random_state=0, **options).fit(x, y)
    assert metrics.recall_score(y, fitted.predict(x)) > recall + 0.2
    assert metrics.balanced_accuracy_score(y, fitted.predict(x)) > 0.7


def test_numpys_integers_are_integers():
    x, y = imbalanced(60)
    fits = [
        AnyLossClassifier(hidden=kind(3), epochs=kind(2), random_state=kind(0)).fit(x, y) for kind in (int, np.int64)
    ]
    np.testing.assert_array_equal(*(fitted.decision_function(x) for fitted in fits))


def test_threshold_moves_the_decision():
    x, y = imbalanced(200)
    fitted = AnyLossClassifier(threshold=0.3, epochs=50).fit(x, y)
    np.testing.assert_array_equal(fitted.predict(x), fitted.predict_proba(x)[:, 1] > 0.3)
    np.testing.assert_array_equal(fitted.predict(x), fitted.decision_function(x) > 0)


def test_random_state_decides_the_fit():
    x, y = imbalanced(200)
    fits = [
        AnyLossClassifier(hidden=3, epochs=3, random_state=seed).fit(x, y).decision_function(x) for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(fits[0], fits[1])
    assert np.abs(fits[0] - fits[2]).max() > 1e-3


def test_classes_keep_their_names_and_a_constant_feature_does_no_harm():
    x, y = imbalanced(150)
    x[:, 2] = 7.1
    names = np.where(y == 1, "yes", "no")
    fitted = AnyLossClassifier(epochs=100).fit(x, names)
    assert fitted.classes_.tolist() == ["no", "yes"]
    assert fitted.n_features_in_ == 6
    assert set(fitted.predict(x)) <= {"no", "yes"}
    assert np.isfinite(fitted.decision_function(x)).all()
    restored = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(restored.predict(x), fitted.predict(x))


# The claim.


def test_tables_are_as_imbalanced_as_the_claim_says():
    shares = {name: make()[1].mean() for name, make in tables.TABLES.items()}
    assert len(shares) == 6
    assert shares["breast cancer, 9 %"] == pytest.approx(0.09, abs=0.002)
    assert shares["digits, 8 against rest"] == pytest.approx(174 / 1797)
    for name in ("3 %", "5 %", "7 %", "10 %"):
        # Two in a hundred labels are drawn anew with even odds.
        asked = int(name.split()[0]) / 100
        assert shares[f"simulated, {name}"] == pytest.approx(0.98 * asked + 0.01, abs=0.006)


def test_folds_are_apart_and_standardised_by_their_training_part():
    x, y = imbalanced(300)
    x[:, 0] = np.arange(300)  # tells the rows apart
    folds = tables.folds_of((x, y), 3, seed=0)
    tested = np.concatenate([rows[:, 1:].numpy() * 0 + rows[:, :1].numpy() for rows, _ in folds.test])
    assert len(tested) == 300
    for fold in range(3):
        parts = [folds.x[fold], folds.validation[fold][0], folds.test[fold][0]]
        seen = torch.cat([part[:, 0] for part in parts])
        assert len(seen.unique()) == len(seen) >= 298
        # The trimmed row or two are in the moments.
        assert folds.x[fold].mean(0).abs().max() < 0.02
        assert (folds.x[fold].std(0, correction=0) - 1).abs().max() < 0.02
    held = torch.stack([one[1].mean() for one in (*folds.validation, *folds.test)])
    assert (held - y.mean()).abs().max() < 0.02
    other = tables.folds_of((x, y), 3, seed=1)
    assert not torch.equal(folds.test[0][0], other.test[0][0])
    assert torch.equal(folds.x, tables.folds_of((x, y), 3, seed=0).x)


def test_smote_fills_up_with_points_between_near_positives():
    x, y = imbalanced(300)
    made_x, made_y = tables.smote(x, y, np.random.default_rng(0))
    np.testing.assert_array_equal(made_x[:300], x)
    assert made_y.sum() == pytest.approx(0.2 * (y == 0).sum(), abs=1)
    positives = x[y == 1]
    distances = np.linalg.norm(positives[:, None] - positives, axis=2)
    near = np.argsort(distances, axis=1)[:, 1:6]
    for point in made_x[300:]:
        # On a segment, distances to its ends add up to its length.
        detours = [
            np.linalg.norm(point - positives[a]) + np.linalg.norm(point - positives[b]) - distances[a, b]
            for a in range(len(positives))
            for b in near[a]
        ]
        assert min(detours) < 1e-9
    assert len(np.unique(made_x[300:], axis=0)) == len(made_x) - 300


def test_undersampling_keeps_every_positive():
    x, y = imbalanced(300)
    kept_x, kept_y = tables.undersample(x, y, np.random.default_rng(0))
    assert kept_y.sum() == y.sum()
    assert (kept_y == 0).sum() == 5 * y.sum()
    np.testing.assert_array_equal(kept_x[kept_y == 1], x[y == 1])
    assert {tuple(row) for row in kept_x} <= {tuple(row) for row in x}


def run_through(curve):
    """The points of a training, and what it returns."""
    points = []
    while True:
        try:
            points.append(next(curve))
        except StopIteration as stopped:
            return points, stopped.value


def test_batched_single_layers_are_those_trained_one_by_one():
    folds = tables.folds_of(imbalanced(200), 2, seed=0)
    # Small rates: at large ones, descent on so steep a loss magnifies rounding until nothing agrees.
    # Standardised to the last bit, so that the classifier's own standardisation does nothing.
    exact = (folds.x - folds.x.mean(1, keepdim=True)) / folds.x.std(1, correction=0, keepdim=True)
    folds = dataclasses.replace(folds, x=exact)
    loss = claim.ARMS["F1 loss"].loss["single layer"]
    points, trained = run_through(training.train_single_layer(folds, loss, (0.04, 0.1), 55, "curve"))
    assert [point.x for point in points] == [55]
    for fold, (rows, _) in enumerate(folds.test):
        for place, rate in enumerate((0.04, 0.1)):
            alone = AnyLossClassifier("f1", lr=rate, epochs=55).fit(folds.x[fold].numpy(), folds.y[fold].numpy())
            for features, found in ((rows, trained.logits(fold, rows)), (folds.x[fold], trained.training[fold])):
                np.testing.assert_allclose(found[:, place], alone.decision_function(features.numpy()), atol=1e-8)


def test_batched_hidden_layers_are_those_trained_one_by_one():
    folds = tables.folds_of(imbalanced(200), 2, seed=0)
    loss, rates = claim.ARMS["balanced-accuracy loss"].loss["hidden layer"], (0.01, 0.1)
    _, trained = run_through(training.train_hidden_layer(folds, loss, rates, 3, 30, 7, "curve"))
    layer = training.HiddenLayer(6)
    start = layer.start(2, 1, training.generator(7, "weights"))
    for fold in range(2):
        for place, rate in enumerate(rates):
            first, _, _, _, last, _ = start[fold, 0].split(layer.sizes)
            network = torch.nn.Sequential(
                torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.Sigmoid(), torch.nn.Linear(16, 1)
            )
            with torch.no_grad():
                network[0].weight.copy_(first.reshape(6, 16).T)
                network[3].weight.copy_(last[None])
                network[0].bias.zero_()
                network[3].bias.zero_()
            network.double()
            optimizer = torch.optim.Adam(network.parameters(), lr=rate)
            sampler = StratifiedBatchSampler(folds.y[fold], 30, training.generator(7, "batches", fold))
            for _ in range(3):
                for batch in sampler:
                    optimizer.zero_grad()
                    AnyLoss("balanced_accuracy")(network(folds.x[fold][batch]), folds.y[fold][batch]).backward()
                    optimizer.step()
            # Batch normalisation by the moments of the whole training part.
            network[1].momentum = None
            network[1].reset_running_stats()
            network(folds.x[fold])
            network[1].running_var *= 1 - 1 / len(folds.x[fold])
            network.eval()
            for rows, found in (
                (folds.test[fold][0], trained.logits(fold, folds.test[fold][0])),
                (folds.x[fold], trained.training[fold]),
            ):
                # float32 against float64, over twelve steps
                np.testing.assert_allclose(found[:, place], network(rows)[:, 0].detach(), atol=2e-4)


def test_losses_of_the_baselines_are_torchs_a_column_at_a_time():
    draws = torch.Generator().manual_seed(0)
    z = torch.randn(20, 3, generator=draws, dtype=torch.float64)
    y = (torch.rand(20, 3, generator=draws) < 0.3).double()
    functional = torch.nn.functional
    expected = {
        ("BCE", "single layer"): functional.binary_cross_entropy_with_logits,
        ("MSE", "hidden layer"): lambda z, y: functional.mse_loss(z.sigmoid(), y),
        ("MSE", "single layer"): lambda z, y: functional.mse_loss(z, 2 * y - 1) / 2,
        ("F1 loss", "single layer"): AnyLoss("f1"),
        ("SOL F1", "hidden layer"): ScoreOrientedLoss("f1"),
    }
    for (arm, study), loss in expected.items():
        found = claim.ARMS[arm].loss[study](z, y).item()
        assert found == pytest.approx(sum(loss(z[:, k], y[:, k]).item() for k in range(3)), rel=1e-12)


@pytest.mark.parametrize("score", claim.SCORES)
def test_tuned_threshold_is_the_best_of_all(score):
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(25, 2, generator=draws, dtype=torch.float64).mul(4).round().div(4)  # with ties
    y = (torch.rand(25, generator=draws) < 0.4).double()
    found = claim.best_threshold(logits, y, confusion_metric(score))
    for column in range(2):
        z = logits[:, column].numpy()
        cuts = np.unique(z)
        values = [BY_SCIKIT_LEARN[score](y.numpy(), z > cut) for cut in (cuts[1:] + cuts[:-1]) / 2]
        at_found = BY_SCIKIT_LEARN[score](y.numpy(), z > found[column].item())
        assert at_found == pytest.approx(max(values), abs=1e-9)


def test_held_out_score_picks_the_rate_by_the_validation_part():
    # Three perceptrons that look at one feature each; on the validation part the second is right, on the test part
    # the third.
    eye = torch.eye(3, dtype=torch.float64)
    y = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    good, bad = (2 * y - 1)[:, None], (1 - 2 * y)[:, None]
    validation = torch.cat([bad, good, bad], dim=1), y
    test = torch.cat([bad, bad * torch.tensor([[1.0], [1], [-1], [-1]]), good], dim=1), y
    folds = tables.Folds(torch.zeros(1, 4, 3), y[None], (validation,), (test,))
    trained = training.Trained(lambda fold, rows: rows @ eye, torch.zeros(1, 4, 3, dtype=torch.float64))
    assert claim.held_out_score(folds, trained, confusion_metric("accuracy"), tunes_threshold=False) == 0.5


def evidence(f1, balanced, hidden=0.02, sets=6):
    """Gains in points over BCE on the first ``sets`` tables with a single layer, −1 elsewhere; MSE is worse."""
    figures = {}
    for study in ("single layer", "hidden layer"):
        rows = {arm: {} for arm in ("F1 loss", "balanced-accuracy loss", "BCE", "MSE")}
        for place, name in enumerate(tables.TABLES):
            for method, score, gain in (
                ("F1 loss", "f1", f1),
                ("balanced-accuracy loss", "balanced_accuracy", balanced),
            ):
                if study == "hidden layer":
                    gain = hidden
                elif place >= sets:
                    gain = -0.01
                key = f"{name}: {score}"
                rows[method][key] = [0.5 + gain - 0.01, 0.5 + gain + 0.01]
                rows["BCE"][key] = [0.49, 0.51]
                rows["MSE"][key] = [0.4, 0.4]
        figures |= {(study, arm): row for arm, row in rows.items()}
    return Evidence.of(figures)


@pytest.mark.parametrize(
    ("options", "outcome"),
    [
        ({"f1": 0.06, "balanced": 0.1}, "reproduced"),
        ({"f1": 0.04, "balanced": 0.1}, "partly"),
        ({"f1": 0.06, "balanced": -0.1}, "partly"),
        ({"f1": 0.04, "balanced": 0.04}, "not reproduced"),
        ({"f1": 0.2, "balanced": 0.2, "sets": 4}, "reproduced"),
        ({"f1": 0.5, "balanced": 0.5, "sets": 3}, "not reproduced"),  # a large mean on too few sets
        ({"f1": 0.2, "balanced": 0.2, "hidden": -0.001}, "not reproduced"),
        ({"f1": 0.2, "balanced": 0.2, "hidden": 0.0}, "reproduced"),
    ],
)
def test_judge(options, outcome):
    assert claim.judge(evidence(**options)).outcome == outcome


def test_judge_measures_against_the_better_baseline_of_each_set():
    made = evidence(0.06, 0.1)
    for study in ("single layer", "hidden layer"):
        (cell, other) = made.cells[study, "MSE"]
        for one in (cell, other):
            one.metrics["simulated, 3 %: f1"] = 0.9
    verdict = claim.judge(made)
    assert verdict.margins["f1 gain, single layer"].estimate == pytest.approx((5 * 0.06 - 0.34) / 6)
    assert verdict.outcome == "partly"


def test_every_arm_has_the_same_rates_and_runs():
    from provenn.claims.claim import Trial

    assert claim.RATES == (0.03, 0.1, 0.3)
    for study, budget in (("single layer", {"folds": 2, "steps": 2}), ("hidden layer", {"folds": 2, "epochs": 1})):
        trial = Trial(study, "BCE, tuned threshold", 0, "smoke", {**budget, "batch_size": 300})
        events = list(claim.run(trial))
        found = {event.name: event.value for event in events if hasattr(event, "value")}
        assert set(found) == {*claim.SCORES, *(f"{name}: {score}" for name in tables.TABLES for score in claim.SCORES)}
        assert all(0 <= value <= 1 for value in found.values())
        again = [event for event in claim.run(trial) if hasattr(event, "value")]
        assert [event for event in events if hasattr(event, "value")] == again
