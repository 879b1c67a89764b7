"""SFace's heads, curves, training and noise against closed forms, loops, finite differences and invariances."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.special
import scipy.stats
import torch
from torch import nn
from torch.nn import functional as F

from provenn.contracts import BadInput, FunctionCase, LossCase, ProbeCase, TrainerCase
from provenn.core.experiment.seeding import generator as keyed
from provenn.losses import (
    ArcFaceLoss,
    ConstantRescale,
    CosFaceLoss,
    FaceTrainer,
    LinearRescale,
    NormFaceLoss,
    PiecewiseRescale,
    RescaledLoss,
    SFaceLoss,
    SigmoidRescale,
    SphereFaceLoss,
    blur_images,
    class_outliers,
    embedding_layer,
    flip_labels,
    gradient_curves,
    identification_rate,
    improved_resnet,
    mirror_embedding,
    occlude_images,
    pair_report,
    random_mirror,
    scale_pixels,
    verification_report,
)

D, C = 5, 4
HEADS = (SFaceLoss, NormFaceLoss, CosFaceLoss, ArcFaceLoss, SphereFaceLoss)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(generator, dtype, samples=6):
    return torch.randn(samples, D, generator=generator, dtype=torch.float64).to(dtype), torch.arange(samples) % C


X, Y = batch(seeded(), torch.float32)


def with_row(row, value):
    changed = X.clone()
    changed[row] = value
    return changed


def bad_heads(make, **options):
    return (
        BadInput("in_features", lambda: make(in_features=0)),
        BadInput("num_classes", lambda: make(num_classes=1)),
        BadInput("num_classes", lambda: make(num_classes=4.0), TypeError),
        BadInput("reduction", lambda: make(reduction="median")),
        BadInput("labels", lambda: make()(X, Y + 1)),
        BadInput("labels", lambda: make()(X, Y - 1)),
        BadInput("labels", lambda: make()(X, Y.float()), TypeError),
        BadInput("labels", lambda: make()(X, Y > 1), TypeError),
        BadInput("labels", lambda: make()(X, Y[:3])),
        BadInput("embeddings", lambda: make()(X[:, :3], Y)),
        BadInput("embeddings", lambda: make()(X[:0], Y[:0])),
        BadInput("embeddings", lambda: make()(X.long(), Y), TypeError),
        BadInput("embeddings", lambda: make()(with_row(3, 0.0), Y)),
        *(
            BadInput(name, lambda name=name, value=value: make(**{name: value}))
            for name, values in options.items()
            for value in values
        ),
    )


SCALES = (0.0, -1.0, math.nan)


def head_case(cls, bad, label="", **options):
    def make(in_features=D, num_classes=C, reduction="mean", **changed):
        return cls(in_features, num_classes, reduction=reduction, **(options | changed))

    detached = "the re-scale factors carry no gradient by design; see test_gradcheck_with_frozen_factors"
    return LossCase(
        part=f"provenn.losses.{cls.__name__}",
        make=make,
        inputs=batch,
        label=label,
        extremes=(
            lambda: (1e4 * X, Y),
            lambda: (-1e4 * X, Y),
            lambda: (1e-4 * X, Y),
            lambda: (torch.ones(6, D), Y),  # ties
            lambda: (X, torch.zeros(6, dtype=torch.long)),
            lambda: (X[:1], Y[:1]),
        ),
        excluded={"gradcheck": detached} if issubclass(cls, RescaledLoss) else {},
        bad_input=bad_heads(make, **bad),
        float32_tolerance=1e-4 if issubclass(cls, RescaledLoss) else 1e-5,
    )


ANGLES = (0.0, math.pi, -0.1)
IMAGES = torch.randn(3, 1, 8, 6, generator=seeded(1))
PEOPLE = torch.arange(12) % 3


class Embedder(nn.Module):
    """A small embedder with what a trainer must treat apart: batch normalisation and dropout."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
            nn.Linear(4 * 6 * 4, D), nn.BatchNorm1d(D),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


def trainer(model=None, seed=0, head=SFaceLoss, **options):
    if model is None:
        model = nn.ModuleDict({"backbone": Embedder(), "head": head(D, 3)})
    return FaceTrainer(
        model["backbone"], model["head"], seed=seed,
        **({"epochs": 4, "batch_size": 5, "lr": 0.02, "milestones": (2,)} | options),
    )  # fmt: skip


def faces(generator, samples=12):
    return torch.randn(samples, 1, 8, 6, generator=generator), PEOPLE[:samples]


SETS = (torch.randn(9, D, generator=seeded(2)), torch.arange(9) % 3)
SCORES, SAME = torch.linspace(-1, 1, 12), torch.arange(12) % 3 == 0


def by_pairs(model, data):
    """AUC, TAR and k-fold accuracy with loops over pairs and thresholds."""
    embeddings, labels = (one.numpy() for one in data)
    unit = embeddings.astype(float) / np.linalg.norm(embeddings.astype(float), axis=1, keepdims=True)
    pairs = [(i, j) for i in range(len(labels)) for j in range(i + 1, len(labels))]
    score = np.array([unit[i] @ unit[j] for i, j in pairs])
    same = np.array([labels[i] == labels[j] for i, j in pairs])
    won = [float(p > q) + 0.5 * float(p == q) for p in score[same] for q in score[~same]]
    tars = []
    for far in (0.01, 0.2):
        allowed = [t for t in (*score, np.inf) if (score[~same] >= t).mean() <= far]
        tars.append(max((score[same] >= t).mean() for t in allowed))
    seen = {True: 0, False: 0}
    fold = []
    for one in same:
        fold.append(seen[bool(one)] % 3)
        seen[bool(one)] += 1
    fold, accuracies = np.array(fold), []
    for held in range(3):
        train, levels = fold != held, np.unique(score[fold != held])
        cuts = [levels[-1] + 1, *((levels[1:] + levels[:-1])[::-1] / 2), levels[0] - 1]
        right = [((score[train] >= cut) == same[train]).sum() for cut in cuts]
        accuracies.append(((score[~train] >= cuts[int(np.argmax(right))]) == same[~train]).mean())
    return {
        "pairs": len(pairs), "matching": int(same.sum()), "auc": float(np.mean(won)), "tars": tuple(tars),
        "fold_accuracies": tuple(accuracies), "accuracy": float(np.mean(accuracies)),
        "accuracy_std": float(np.std(accuracies)),
    }  # fmt: skip


def bad_reports(call, zero=True):
    x, y = SETS
    return (
        BadInput("labels", lambda: call(x, y.float()), TypeError),
        BadInput("labels", lambda: call(x, y[:4])),
        BadInput("labels", lambda: call(x, torch.arange(9))),
        BadInput("embeddings", lambda: call(x.long(), y), TypeError),
        BadInput("embeddings", lambda: call(x[0], y[0])),
        BadInput("embeddings", lambda: call(x * (torch.arange(9) != 4)[:, None], y)),
        BadInput("embeddings", lambda: call(torch.where(torch.arange(9)[:, None] == 4, torch.nan, x), y)),
    )


CASES = [
    head_case(SFaceLoss, {"s": SCALES, "k": SCALES, "a": ANGLES, "b": ANGLES}),
    head_case(RescaledLoss, {}, "constant", curves=ConstantRescale()),
    head_case(RescaledLoss, {}, "linear", curves=LinearRescale()),
    head_case(RescaledLoss, {}, "piecewise", curves=PiecewiseRescale()),
    head_case(NormFaceLoss, {"s": SCALES}, s=8.0),
    head_case(CosFaceLoss, {"s": SCALES, "m": (-0.1,)}),
    head_case(ArcFaceLoss, {"s": SCALES, "m": (-0.1, math.pi)}),
    head_case(
        SphereFaceLoss,
        {"s": SCALES, "m": (0,), "lambda_min": (-1.0,), "lambda_start": (4.0,)},
        lambda_start=6.0,
        s=8.0,
    ),
    *(
        FunctionCase(
            part=f"provenn.losses.{cls.__name__}",
            call=lambda cls=cls: (cls().intra(f64(0.5, 1.0)), cls().inter(f64(0.5, 1.0))),
            bad_input=tuple(
                BadInput(name, lambda cls=cls, name=name, value=value: cls(**{name: value}))
                for name in names
                for value in (ANGLES if name in "ab" else SCALES)
            ),
        )
        for cls, names in (
            (SigmoidRescale, "skab"),
            (ConstantRescale, "s"),
            (LinearRescale, "s"),
            (PiecewiseRescale, "sab"),
        )
    ),
    FunctionCase(
        part="provenn.losses.gradient_curves",
        call=lambda: gradient_curves(SFaceLoss(D, C), [0.5, 1.0]),
        bad_input=(
            BadInput("head", lambda: gradient_curves(nn.Linear(2, 2), [0.5]), TypeError),
            BadInput("theta", lambda: gradient_curves(SFaceLoss(D, C), [])),
            BadInput("theta", lambda: gradient_curves(SFaceLoss(D, C), [0.5, 3.2])),
            BadInput("own", lambda: gradient_curves(SFaceLoss(D, C), [0.5], own=-0.1)),
            BadInput("others", lambda: gradient_curves(SFaceLoss(D, C), [0.5], others=3.2)),
        ),
    ),
    ProbeCase(
        part="provenn.losses.verification_report",
        run=lambda model, data: verification_report(*data, folds=3, fars=(0.01, 0.2)),
        model=lambda: nn.Linear(2, 2),
        data=lambda generator: (torch.randn(9, D, generator=generator), torch.arange(9) % 3),
        brute_force=by_pairs,
        excluded={"model_restored_after_error": "it looks at embeddings, not at the model that made them"},
        bad_input=(
            *bad_reports(verification_report),
            BadInput("labels", lambda: verification_report(SETS[0], SETS[1] * 0)),
            BadInput("folds", lambda: verification_report(*SETS, folds=1)),
            BadInput("folds", lambda: verification_report(*SETS, folds=37)),
            BadInput("fars", lambda: verification_report(*SETS, fars=(0.0,))),
            BadInput("fars", lambda: verification_report(*SETS, fars=(1.1,))),
        ),
    ),
    FunctionCase(
        part="provenn.losses.pair_report",
        call=lambda: pair_report(SCORES, SAME),
        bad_input=(
            BadInput("same", lambda: pair_report(SCORES, SAME.long()), TypeError),
            BadInput("same", lambda: pair_report(SCORES, SAME & False)),
            BadInput("same", lambda: pair_report(SCORES, SAME | True)),
            BadInput("scores", lambda: pair_report(SCORES.long(), SAME), TypeError),
            BadInput("scores", lambda: pair_report(SCORES[:5], SAME)),
            BadInput("scores", lambda: pair_report(SCORES / 0, SAME)),
            BadInput("folds", lambda: pair_report(SCORES, SAME, folds=13)),
            BadInput("folds", lambda: pair_report(SCORES, SAME, folds=0)),
            BadInput("fars", lambda: pair_report(SCORES, SAME, fars=(-0.1,))),
        ),
    ),
    FunctionCase(
        part="provenn.losses.identification_rate",
        call=lambda: identification_rate(*SETS),
        bad_input=(
            *bad_reports(identification_rate),
            BadInput("distractors", lambda: identification_rate(SETS[0], SETS[1] * 0)),
            BadInput("distractors", lambda: identification_rate(*SETS, torch.zeros(2, D))),
            BadInput("distractors", lambda: identification_rate(*SETS, SETS[0][:0])),
            BadInput("rank", lambda: identification_rate(*SETS, rank=0)),
        ),
    ),
    FunctionCase(
        part="provenn.losses.mirror_embedding",
        call=lambda: mirror_embedding(Embedder(), IMAGES),
        bad_input=(
            BadInput("x", lambda: mirror_embedding(Embedder(), IMAGES[0])),
            BadInput("batch_size", lambda: mirror_embedding(Embedder(), IMAGES, 0)),
        ),
    ),
    TrainerCase(
        part="provenn.losses.FaceTrainer",
        make=trainer,
        model=lambda: nn.ModuleDict({"backbone": Embedder(), "head": SFaceLoss(D, 3)}),
        data=faces,
        rounds=4,
        bad_input=(
            BadInput("head", lambda: FaceTrainer(Embedder(), nn.Linear(2, 2)), TypeError),
            BadInput("head", lambda: FaceTrainer(Embedder(), SFaceLoss(D, 3, reduction="none"))),
            *(
                BadInput(name, lambda name=name, value=value: trainer(**{name: value}))
                for name, value in {
                    "lr": 0.0,
                    "momentum": 1.0,
                    "weight_decay": -1e-4,
                    "batch_size": 0,
                    "epochs": 0,
                    "milestones": (0,),
                }.items()
            ),
            BadInput("seed", lambda: trainer(seed=0.5), TypeError),
            BadInput("labels", lambda: trainer().fit(*faces(seeded())[:1], PEOPLE + 1)),
            BadInput("labels", lambda: trainer().fit(*faces(seeded())[:1], PEOPLE[:5])),
            BadInput("labels", lambda: trainer().fit(*faces(seeded())[:1], PEOPLE.float()), TypeError),
        ),
    ),
    TrainerCase(
        part="provenn.losses.FaceTrainer",
        label="SphereFace, which counts its calls",
        make=trainer,
        model=lambda: nn.ModuleDict({"backbone": Embedder(), "head": SphereFaceLoss(D, 3, s=8.0)}),
        data=faces,
        rounds=4,
        bad_input_reason="see the other case",
    ),
    FunctionCase(
        part="provenn.losses.random_mirror",
        call=lambda: random_mirror(IMAGES, seeded()),
        bad_input=(BadInput("images", lambda: random_mirror(IMAGES[0], seeded())),),
    ),
    FunctionCase(
        part="provenn.losses.scale_pixels",
        call=lambda: scale_pixels(torch.zeros(2, 3, dtype=torch.uint8)),
        bad_input=(
            BadInput("images", lambda: scale_pixels(torch.tensor([[256]]))),
            BadInput("images", lambda: scale_pixels(torch.tensor([[-1.0]]))),
        ),
    ),
    FunctionCase(
        part="provenn.losses.embedding_layer",
        call=lambda: embedding_layer(2, 3, 3, 4)(torch.ones(2, 2, 3, 3)),
        bad_input=(
            BadInput("channels", lambda: embedding_layer(0, 3, 3)),
            BadInput("height", lambda: embedding_layer(2, 0, 3)),
            BadInput("width", lambda: embedding_layer(2, 3, 0)),
            BadInput("features", lambda: embedding_layer(2, 3, 3, 0)),
            BadInput("dropout", lambda: embedding_layer(2, 3, 3, dropout=1.0)),
        ),
    ),
    FunctionCase(
        part="provenn.losses.improved_resnet",
        call=lambda: improved_resnet((1, 1), (2, 3), (6, 5), 1, 4)(torch.ones(2, 1, 6, 5)),
        bad_input=(
            BadInput("blocks", lambda: improved_resnet((1,), (2, 3))),
            BadInput("blocks", lambda: improved_resnet((), ())),
            BadInput("blocks", lambda: improved_resnet((0,), (2,))),
            BadInput("dropout", lambda: improved_resnet((1,), (2,), dropout=-0.1)),
        ),
    ),
    FunctionCase(
        part="provenn.losses.flip_labels",
        call=lambda: flip_labels(Y, 0.5, C),
        bad_input=(
            BadInput("share", lambda: flip_labels(Y, 1.1, C)),
            BadInput("num_classes", lambda: flip_labels(Y, 0.5, 1)),
            BadInput("labels", lambda: flip_labels(Y + 1, 0.5, C)),
            BadInput("labels", lambda: flip_labels(Y.float(), 0.5, C), TypeError),
        ),
    ),
    FunctionCase(
        part="provenn.losses.class_outliers",
        call=lambda: class_outliers(IMAGES, -IMAGES, 0.5),
        bad_input=(
            BadInput("share", lambda: class_outliers(IMAGES, IMAGES, -0.1)),
            BadInput("outliers", lambda: class_outliers(IMAGES, IMAGES[:1], 1.0)),
            BadInput("outliers", lambda: class_outliers(IMAGES, IMAGES[:, :, :2], 0.5)),
        ),
    ),
    FunctionCase(
        part="provenn.losses.blur_images",
        call=lambda: blur_images(IMAGES, 0.5),
        bad_input=(
            BadInput("sigma", lambda: blur_images(IMAGES, 0.0)),
            BadInput("images", lambda: blur_images(IMAGES, 2.0)),
            BadInput("images", lambda: blur_images(IMAGES[0], 0.5)),
        ),
    ),
    FunctionCase(
        part="provenn.losses.occlude_images",
        call=lambda: occlude_images(IMAGES, 2),
        bad_input=(
            BadInput("size", lambda: occlude_images(IMAGES, 0)),
            BadInput("size", lambda: occlude_images(IMAGES, 7)),
            BadInput("images", lambda: occlude_images(IMAGES[0], 2)),
        ),
    ),
]


def double(cls, seed=0, d=D, classes=C, **options):
    torch.manual_seed(seed)
    return cls(d, classes, **options).double()


def sigmoid_factors(theta, s=64.0, k=80.0, a=0.87, b=1.2):
    """The two curves, in NumPy and with exponentials, as the paper writes them."""
    with np.errstate(over="ignore"):
        return s / (1 + np.exp(-k * (theta - a))), s / (1 + np.exp(k * (theta - b)))


def by_loops(x, w, y, **options):
    """SFace's losses, and their gradients by the tangential formula, example by example and class by class."""
    losses, by_x, by_w = np.zeros(len(x)), np.zeros_like(x), np.zeros_like(w)
    for i in range(len(x)):
        for j in range(len(w)):
            long, far = np.linalg.norm(x[i]), np.linalg.norm(w[j])
            u, v = x[i] / long, w[j] / far
            cosine = u @ v
            intra, inter = sigmoid_factors(np.arccos(np.clip(cosine, -1, 1)), **options)
            r = -intra if y[i] == j else inter
            losses[i] += r * cosine
            by_x[i] += r * (v - cosine * u) / long
            by_w[j] += r * (u - cosine * v) / far
    return losses, by_x, by_w


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_values_and_gradients_by_hand(reduction):
    loss = double(SFaceLoss, a=1.4, b=1.5, k=6.0, s=3.0, reduction=reduction)  # flat curves: every term counts
    x, y = batch(seeded(3), torch.float64, 9)
    x.requires_grad_()
    value = loss(x, y)
    value.sum().backward()
    losses, by_x, by_w = by_loops(
        x.detach().numpy(), loss.weight.detach().numpy(), y.numpy(), a=1.4, b=1.5, k=6.0, s=3.0
    )
    scale = 9 if reduction == "mean" else 1
    expected = losses if reduction == "none" else losses.sum() / scale
    np.testing.assert_allclose(value.detach().numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), by_x / scale, atol=1e-10)
    np.testing.assert_allclose(loss.weight.grad.numpy(), by_w / scale, atol=1e-10)
    assert (x.grad * x).sum(1).abs().max() < 1e-12  # no radial part
    assert (loss.weight.grad * loss.weight).sum(1).abs().max() < 1e-12


def test_default_angles_are_those_of_casia():
    loss = double(SFaceLoss, d=32)
    x, y = torch.randn(9, 32, generator=seeded(4), dtype=torch.float64), torch.arange(9) % C
    losses, _, _ = by_loops(x.numpy(), loss.weight.detach().numpy(), y.numpy())
    np.testing.assert_allclose(loss(x, y).item(), losses.mean(), rtol=1e-12)


def test_gradcheck_with_frozen_factors():
    loss = double(SFaceLoss, k=5.0, reduction="sum")
    x, y = batch(seeded(5), torch.float64)
    pull, push = loss.rescale(loss.cosine(x), y)
    assert not pull.requires_grad
    assert not push.requires_grad
    assert torch.equal(push[torch.arange(6), y], torch.zeros(6, dtype=torch.float64))

    def frozen(x, w):
        cosine = F.cosine_similarity(x[:, None], w, dim=2)
        return (push * cosine).sum() - (pull * cosine[torch.arange(6), y]).sum()

    x.requires_grad_()
    assert torch.autograd.gradcheck(frozen, (x, loss.weight))
    expected = torch.autograd.grad(frozen(x, loss.weight), (x, loss.weight))
    found = torch.autograd.grad(loss(x, y), (x, loss.weight))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_half_height_and_slopes():
    curves, step = SigmoidRescale(s=10.0, k=30.0, a=0.7, b=1.3), 1e-5
    assert curves.intra(f64(0.7)).item() == 5.0
    assert curves.inter(f64(1.3)).item() == 5.0
    for curve, centre, slope in ((curves.intra, 0.7, 75.0), (curves.inter, 1.3, -75.0)):
        high, low = curve(f64(centre + step, centre - step))
        assert (high - low).item() / (2 * step) == pytest.approx(slope, rel=1e-6)


def test_curves_of_the_ablations():
    theta = f64(0.0, 0.5, math.pi / 4, 1.0, 1.2, math.pi / 2, 3.0)
    step = PiecewiseRescale(2.0, a=0.6, b=1.1)
    assert step.intra(theta).tolist() == [0, 0, 2, 2, 2, 2, 2]
    assert step.inter(theta).tolist() == [2, 2, 2, 2, 0, 0, 0]
    assert ConstantRescale(3.0).intra(theta).tolist() == [3.0] * 7
    assert ConstantRescale(3.0).inter(theta).tolist() == [3.0] * 7
    line = LinearRescale(4.0)
    np.testing.assert_allclose(line.intra(theta), np.minimum(4, 8 / np.pi * theta.numpy()))
    np.testing.assert_allclose(line.inter(theta), np.maximum(0, 4 - 8 / np.pi * theta.numpy()), atol=1e-15)


def test_steep_sigmoids_are_switches():
    theta = torch.linspace(0, math.pi, 101, dtype=torch.float64)
    theta = theta[((theta - 0.87).abs() > 1e-3) & ((theta - 1.2).abs() > 1e-3)]
    steep, hard = SigmoidRescale(k=1e5), PiecewiseRescale()
    torch.testing.assert_close(steep.intra(theta), hard.intra(theta))
    torch.testing.assert_close(steep.inter(theta), hard.inter(theta))


def test_constant_curves_give_the_plain_loss():
    loss = double(RescaledLoss, curves=ConstantRescale(7.0))
    x, y = batch(seeded(6), torch.float64)
    cosine = F.normalize(x) @ F.normalize(loss.weight).T
    own = cosine[torch.arange(6), y]
    torch.testing.assert_close(loss(x, y), (7 * (cosine.sum(1) - 2 * own)).mean())


def on_axes(angles):
    """A head whose centres are the axes, and an embedding at an angle to its own one, orthogonal to the others."""
    loss = double(SFaceLoss, d=6, classes=3)
    with torch.no_grad():
        loss.weight.copy_(torch.eye(3, 6))
    x = torch.zeros(len(angles), 6, dtype=torch.float64)
    x[:, 0], x[:, 5] = angles.cos(), angles.sin()
    return loss, x.requires_grad_(), torch.zeros(len(angles), dtype=torch.long)


def test_good_examples_are_left_alone():
    loss, x, y = on_axes(f64(0.0, 0.3, 0.62))  # a − θ ≥ 0.25, and π/2 − b ≥ 0.25
    loss(x, y).backward()
    assert x.grad.norm(dim=1).max() < 1e-6 * 64
    assert loss.weight.grad.norm(dim=1).max() < 1e-6 * 64


def test_gradient_on_the_sphere_is_r_sine():
    angles = f64(0.8, 0.87, 1.0, 1.5, 2.5)
    loss, x, y = on_axes(angles)
    loss.reduction = "sum"
    loss(x, y).backward()
    pull = sigmoid_factors(angles.numpy())[0]
    towards = x.grad[:, 5] * angles.cos() - x.grad[:, 0] * angles.sin()  # along growing θ
    np.testing.assert_allclose(towards.detach().numpy(), pull * np.sin(angles.numpy()), rtol=1e-6)


@pytest.mark.parametrize("cls", HEADS)
def test_invariances(cls):
    loss = double(cls, reduction="none").eval()  # in training mode SphereFace counts its calls
    x, y = batch(seeded(7), torch.float64)
    value = loss(x, y)
    torch.testing.assert_close(loss(x * torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None], y), value)
    turn, _ = torch.linalg.qr(torch.randn(D, D, generator=seeded(8), dtype=torch.float64))
    order = torch.tensor([2, 0, 3, 1])
    place = torch.argsort(order)
    other = double(cls, reduction="none").eval()
    for weight, inputs, labels in (
        (loss.weight * f64(0.1, 1.0, 5.0, 30.0)[:, None], x, y),
        (loss.weight @ turn, x @ turn, y),
        (loss.weight[order], x, place[y]),
    ):
        with torch.no_grad():
            other.weight.copy_(weight)
        torch.testing.assert_close(other(inputs, labels), value)


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("other", [0, 1])
def test_aligned_vectors_stay_finite(cls, sign, other):
    torch.manual_seed(0)
    loss = cls(D, C)
    with torch.no_grad():
        loss.weight.copy_(F.normalize(loss.weight))
        loss.weight[0] = F.one_hot(torch.tensor(0), D).float()  # cos θ = ±1 exactly
    x = (sign * loss.weight.detach()).clone().requires_grad_()
    assert loss.cosine(x)[0, 0].item() == sign
    value = loss(x, (torch.arange(C) + other) % C)
    value.backward()
    assert value.isfinite()
    assert x.grad.isfinite().all()
    assert loss.weight.grad.isfinite().all()


@pytest.mark.parametrize("cls", HEADS)
def test_cosines_that_round_above_one_stay_finite(cls):
    """Without a clamp arccos gives NaN here, in float32 as in the authors' code."""
    torch.manual_seed(0)
    loss = cls(7, 200)
    x = loss.weight.detach().clone().requires_grad_()
    assert loss.cosine(x).max() > 1
    value = loss(x, torch.arange(200))
    value.backward()
    assert value.isfinite()
    assert x.grad.isfinite().all()


def softmax_oracle(cosine, y, s, own):
    logits = s * cosine.copy()
    rows = np.arange(len(y))
    logits[rows, y] = s * own(np.arccos(cosine[rows, y]))
    return scipy.special.logsumexp(logits, axis=1) - logits[rows, y], scipy.special.softmax(logits, axis=1)


def psi(theta, m):
    """SphereFace's falling cosine, piece by piece as it is defined."""
    values = []
    for one in np.atleast_1d(theta):
        n = next(n for n in range(m) if n * np.pi / m <= one <= (n + 1) * np.pi / m)
        values.append((-1) ** n * np.cos(m * one) - 2 * n)
    return np.array(values)


MARGINS = [
    (NormFaceLoss, {"s": 9.0}, np.cos),
    (CosFaceLoss, {"s": 9.0, "m": 0.2}, lambda t: np.cos(t) - 0.2),
    (
        ArcFaceLoss,
        {"s": 9.0, "m": 0.4},
        lambda t: np.where(t + 0.4 < np.pi, np.cos(t + 0.4), np.cos(t) - 0.4 * np.sin(0.4)),
    ),
    (
        SphereFaceLoss,
        {"s": 9.0, "m": 3, "lambda_start": 2.0, "lambda_min": 1.0},
        lambda t: (2 * np.cos(t) + psi(t, 3)) / 3,
    ),
]


@pytest.mark.parametrize(("cls", "options", "own"), MARGINS)
def test_softmax_heads_in_angles(cls, options, own):
    loss = double(cls, reduction="none", **options).eval()
    x, y = batch(seeded(9), torch.float64, 24)
    x[0] = -loss.weight[0].detach() + 0.01  # an angle near π
    w = loss.weight.detach().numpy()
    cosine = (x.numpy() @ w.T) / np.outer(np.linalg.norm(x.numpy(), axis=1), np.linalg.norm(w, axis=1))
    expected, _ = softmax_oracle(cosine, y.numpy(), options["s"], own)
    np.testing.assert_allclose(loss(x, y).detach().numpy(), expected, atol=1e-10)


def test_defaults_of_the_softmax_heads():
    assert (NormFaceLoss(D, C).s, CosFaceLoss(D, C).s, ArcFaceLoss(D, C).s, SphereFaceLoss(D, C).s) == (64.0,) * 4
    assert (CosFaceLoss(D, C).m, ArcFaceLoss(D, C).m, SphereFaceLoss(D, C).m) == (0.35, 0.5, 4)


def test_normface_as_a_rescaler():
    loss = double(NormFaceLoss, s=9.0, reduction="sum")
    x, y = batch(seeded(10), torch.float64)
    cosine = F.normalize(x) @ F.normalize(loss.weight).T
    p = scipy.special.softmax(9 * cosine.detach().numpy(), axis=1)
    rows = np.arange(6)
    pull, push = loss.rescale(cosine, y)
    np.testing.assert_allclose(pull.numpy(), 9 * (1 - p[rows, y]), atol=1e-10)
    expected = 9 * p
    expected[rows, y] = 0
    np.testing.assert_allclose(push.numpy(), expected, atol=1e-10)
    # With these factors frozen, pull and push have the gradient of cross entropy.
    rescaled = (push * cosine).sum() - (pull * cosine[torch.arange(6), y]).sum()
    entropy = F.cross_entropy(9 * (F.normalize(x) @ F.normalize(loss.weight).T), y, reduction="sum")
    torch.testing.assert_close(
        torch.autograd.grad(rescaled, loss.weight)[0], torch.autograd.grad(entropy, loss.weight)[0], atol=1e-10, rtol=0
    )


def test_sphereface_falls_and_anneals():
    loss = double(SphereFaceLoss, lambda_start=0.0, lambda_min=0.0)
    theta = torch.linspace(1e-3, math.pi - 1e-3, 400, dtype=torch.float64)
    values = loss.own(theta.cos())
    np.testing.assert_allclose(values.numpy(), psi(theta.numpy(), 4), atol=1e-9)
    assert (values.diff() < 0).all()
    annealed = double(SphereFaceLoss, reduction="none")
    x, y = batch(seeded(11), torch.float64)
    with torch.no_grad():
        for _ in range(3):
            annealed(x, y)
        annealed.eval()(x, y)
    assert annealed.calls.item() == 3
    cosine = f64(0.3, -0.6)
    weight = 1000 / 1.36
    expected = (weight * cosine.numpy() + psi(np.arccos(cosine.numpy()), 4)) / (1 + weight)
    np.testing.assert_allclose(annealed.own(cosine).numpy(), expected, atol=1e-12)
    annealed.calls.fill_(10**6)
    expected = (5 * cosine.numpy() + psi(np.arccos(cosine.numpy()), 4)) / 6
    np.testing.assert_allclose(annealed.own(cosine).numpy(), expected, atol=1e-12)


def test_terms():
    loss = double(SFaceLoss)
    with pytest.raises(ValueError, match="terms"):
        loss.terms()
    x, y = batch(seeded(12), torch.float64)
    value = loss(x, y)
    terms = loss.terms()
    assert terms.intra + terms.inter == pytest.approx(value.item(), abs=1e-12)
    cosine = F.cosine_similarity(x[:, None], loss.weight, dim=2).detach().numpy()
    theta, own = np.arccos(cosine), np.eye(C, dtype=bool)[y]
    assert terms.own_angle == pytest.approx(theta[own].mean())
    assert terms.other_angle == pytest.approx(theta[~own].mean())
    assert terms.intra == pytest.approx((-sigmoid_factors(theta[own])[0] * cosine[own]).mean())


def test_logits_and_centres():
    torch.manual_seed(0)
    loss = SFaceLoss(64, 400)
    assert loss.weight.std().item() == pytest.approx(2 * math.sqrt(2 / 400), rel=0.02)  # 25 600 draws: 0.4 % off
    x = torch.randn(7, 64, generator=seeded(13))
    torch.testing.assert_close(loss.logits(x), 64 * F.cosine_similarity(x[:, None], loss.weight, dim=2))


def test_half_precision_is_worked_on_in_float32():
    torch.manual_seed(0)
    loss = SFaceLoss(D, C)
    x = X.bfloat16()
    torch.testing.assert_close(loss(x, Y), loss(x.float(), Y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(x, Y), loss(x.float(), Y))


@pytest.mark.parametrize("cls", HEADS)
def test_heads_compile_without_a_break(cls):
    torch.manual_seed(0)
    loss = cls(D, C).eval()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X, Y), loss(X, Y))


def test_errors_name_the_row():
    with pytest.raises(ValueError, match="row 3"):
        SFaceLoss(D, C)(with_row(3, 0.0), Y)
    with pytest.raises(ValueError, match="got 9 in row 2"):
        SFaceLoss(D, C)(X, torch.tensor([0, 1, 9, 0, 0, 0]))


@pytest.mark.parametrize("cls", HEADS)
def test_gradient_curves_by_finite_differences(cls):
    """Pull and push are slopes of the loss, but for SFace, whose factors are not differentiated: there by formula."""
    theta = np.array([0.2, 0.7, 0.87, 1.1, 1.2, 1.9, 2.9])
    options = {"s": 9.0, "lambda_start": 3.0, "lambda_min": 3.0} if cls is SphereFaceLoss else {"s": 9.0}
    head = double(cls, **options).eval()
    curves = gradient_curves(head, theta.tolist(), own=0.9, others=1.4)
    assert curves.theta == tuple(theta)
    assert curves.head == cls.__name__
    if cls is SFaceLoss:
        expected = sigmoid_factors(theta, s=9.0)
    else:
        rows = np.full((2, len(theta), C), np.cos(1.4))
        rows[0, :, 0], rows[1, :, 0], rows[1, :, 1] = np.cos(theta), np.cos(0.9), np.cos(theta)
        labels, step, expected = torch.zeros(len(theta), dtype=torch.long), 1e-6, []
        for varied, column, sign in ((0, 0, -1), (1, 1, 1)):
            ends = []
            for shift in (step, -step):
                moved = rows[varied].copy()
                moved[:, column] += shift
                ends.append(head.losses(torch.tensor(moved), labels).detach().numpy())
            expected.append(sign * (ends[0] - ends[1]) / (2 * step))
    np.testing.assert_allclose(curves.intra, expected[0], atol=1e-5)
    np.testing.assert_allclose(curves.inter, expected[1], atol=1e-5)
    assert type(curves).from_json(curves.to_json()) == curves
    assert len(curves.plot().axes) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        curves.head = "another"


def test_sface_pushes_hold_whatever_the_others_do():
    """SFace's pull does not depend on the other classes, softmax's does: what makes wrong labels cheap."""
    near, far = (gradient_curves(SFaceLoss(D, C), [1.0], others=others) for others in (0.5, 1.5))
    assert near.intra == far.intra
    near, far = (gradient_curves(NormFaceLoss(D, C, s=4.0), [1.0], others=others) for others in (0.5, 1.5))
    assert near.intra[0] > far.intra[0] + 0.1


def test_training_step_by_step():
    """The trainer against SGD with momentum and decay written out, on the batches that its seed gives."""
    model = nn.ModuleDict({"backbone": Embedder(), "head": NormFaceLoss(D, 3, s=4.0)})
    model["backbone"].layers[4].p = 0.0
    twin = nn.ModuleDict({"backbone": Embedder(), "head": NormFaceLoss(D, 3, s=4.0)})
    twin.load_state_dict(model.state_dict())
    twin["backbone"].layers[4].p = 0.0
    model, twin = model.double(), twin.double()
    images, labels = faces(seeded(14))
    images = images.double()
    options = {"augment": None, "lr": 0.1, "momentum": 0.8, "weight_decay": 0.05, "milestones": (1, 3), "seed": 5}
    result = trainer(model, **options).fit(images, labels)
    speed = {name: torch.zeros_like(one) for name, one in twin.named_parameters()}
    for epoch in range(4):
        order, losses = torch.randperm(12, generator=keyed(5, "order", epoch)), []
        for picked in (order[:5], order[5:10]):  # two images are left over
            twin.zero_grad()
            loss = twin["head"](twin["backbone"](images[picked]), labels[picked])
            loss.backward()
            losses.append(loss.item())
            for name, one in twin.named_parameters():
                norm = ".1." in name or ".6." in name
                speed[name] = 0.8 * speed[name] + one.grad + (0 if norm else 0.05) * one.detach()
                one.data -= (0.1, 0.01, 0.01, 0.001)[epoch] * speed[name]
        assert result.history[epoch].loss == pytest.approx(np.mean(losses))
        assert result.history[epoch].step == 2 * (epoch + 1)
    for name, one in twin.named_parameters():
        torch.testing.assert_close(result.model.get_parameter(name), one)


def test_small_sets_are_one_batch_and_images_are_augmented():
    seen = []

    def augment(images, draws):
        seen.append(len(images))
        return random_mirror(images, draws)

    trainer(augment=augment, batch_size=100, epochs=2).fit(*faces(seeded(15)))
    assert seen == [12, 12]


def test_training_tells_people_apart():
    who = torch.arange(60) % 3
    patterns = torch.randn(3, 1, 8, 6, generator=seeded(16))
    images = patterns[who] + 0.3 * torch.randn(60, 1, 8, 6, generator=seeded(17))
    torch.manual_seed(0)
    learner = trainer(epochs=15, batch_size=20, milestones=(10,), augment=None)
    result = learner.fit(images, who)
    report = verification_report(learner.embed(images), who)
    assert report.auc > 0.99
    assert result.model["head"].terms().own_angle < 1.0
    torch.testing.assert_close(learner.embed(images), mirror_embedding(result.model["backbone"], images))


def test_mirror_embedding_by_hand():
    torch.manual_seed(0)
    model = Embedder()
    model.layers[1].running_mean.fill_(0.3)
    found = mirror_embedding(model, IMAGES, batch_size=2)
    assert model.training
    model.eval()
    with torch.no_grad():
        for image, one in zip(IMAGES, found, strict=True):
            both = model(image[None]) + model(torch.flip(image, dims=(2,))[None])
            torch.testing.assert_close(one, both[0] / both.norm())
    torch.testing.assert_close(mirror_embedding(model, IMAGES.flip(3)), found)


def test_random_mirror():
    images = torch.arange(400 * 6.0).reshape(400, 1, 2, 3)
    changed = random_mirror(images, seeded())
    kept = (changed == images).flatten(1).all(1)
    assert ((changed == images.flip(3)).flatten(1).all(1) != kept).all()
    assert 150 < int(kept.sum()) < 250  # ±5 standard deviations
    assert torch.equal(random_mirror(images, seeded()), changed)


def test_scale_pixels():
    assert scale_pixels(torch.tensor([[0, 255]], dtype=torch.uint8)).tolist() == [[-0.99609375, 0.99609375]]
    assert scale_pixels(f64(127.5)[None]).item() == 0.0


def test_the_default_network_is_the_authors():
    with torch.device("meta"):
        network = improved_resnet()
    assert sum(one.numel() for one in network.parameters()) == 43_574_976  # of the authors' IR_50, tensor by tensor
    assert network(torch.empty(2, 3, 112, 112, device="meta")).shape == (2, 512)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 1 + 2 * 24 + 3
    assert [one.p for one in network.modules() if isinstance(one, nn.Dropout)] == [0.5]


def test_small_network_shapes_and_start():
    torch.manual_seed(0)
    network = improved_resnet((2, 1), (16, 32), (9, 7), 1, 24)
    assert network(torch.randn(3, 1, 9, 7, generator=seeded())).shape == (3, 24)
    inner = network[3].branch[1]
    assert inner.weight.std().item() == pytest.approx(2 * math.sqrt(2 / (16 * 9)), rel=0.1)  # 2304 draws: 1.5 % off
    assert isinstance(network[3].skip, nn.MaxPool2d)
    assert network[-1][3].bias.abs().max() == 0


def test_flips_are_exact_and_uniform():
    labels = torch.arange(9000) % 5
    changed, wrong = flip_labels(labels, 0.3, 5, seeded())
    assert int(wrong.sum()) == 2700
    assert torch.equal(changed != labels, wrong)
    step = ((changed - labels) % 5)[wrong].bincount(minlength=5)
    assert step[0] == 0
    assert scipy.stats.chisquare(step[1:].numpy()).pvalue > 1e-4
    assert scipy.stats.chisquare(labels[wrong].bincount().numpy()).pvalue > 1e-4
    assert torch.equal(labels, torch.arange(9000) % 5)
    assert torch.equal(flip_labels(labels, 0.0, 5)[0], labels)
    assert flip_labels(labels[:2], 1.0, 5)[1].all()


def test_outliers_replace_images_once():
    images, outliers = torch.zeros(10, 2), torch.arange(1.0, 9.0)[:, None].expand(8, 2)
    changed, replaced = class_outliers(images, outliers, 0.6, seeded())
    assert int(replaced.sum()) == 6
    assert torch.equal(changed[:, 0] > 0, replaced)
    assert len(changed[replaced, 0].unique()) == 6
    assert images.abs().max() == 0


def test_blur_is_a_gaussian():
    images = torch.randn(2, 3, 12, 10, generator=seeded(18), dtype=torch.float64)
    expected = scipy.ndimage.gaussian_filter(images.numpy(), (0, 0, 1.3, 1.3), mode="mirror", radius=4)
    np.testing.assert_allclose(blur_images(images, 1.3).numpy(), expected, atol=1e-12)


def test_occlusion_covers_one_square_each():
    images = torch.ones(300, 2, 5, 7)
    covered = occlude_images(images, 3, value=-1.0, generator=seeded())
    places = set()
    for one in covered:
        assert torch.equal(one[0], one[1])
        rows, columns = (one[0] == -1).nonzero(as_tuple=True)
        assert len(rows) == 9
        assert int(rows.max() - rows.min()) == int(columns.max() - columns.min()) == 2
        places.add((int(rows.min()), int(columns.min())))
    assert len(places) == 3 * 5
    assert torch.equal(images, torch.ones(300, 2, 5, 7))
