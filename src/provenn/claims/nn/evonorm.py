"""EvoNorm's claim: B0 beats BN-ReLU, S0 beats GN-ReLU and small batches, and rejection leaves layers that train."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch
from torch import Tensor, nn

from provenn import data
from provenn.claims.claim import (
    Claim,
    Comparison,
    Event,
    Evidence,
    Figure,
    Metric,
    Outcome,
    Point,
    Progress,
    Scalar,
    Study,
    Tier,
    Trial,
    Tuning,
    Verdict,
)
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.statistics import Interval
from provenn.core.experiment.training import accuracy, minibatches, train
from provenn.nn import EvoNormSearch, NormActAnchor, NormActGraph, NormActRejection, NormActSpace, replace_norm_act
from provenn.nn._evonorm_anchors import residual

B0, BN, S0, GN = "EvoNorm-B0", "BN-ReLU", "EvoNorm-S0", "GN-ReLU"
TESTED, UNTESTED = "with rejection", "without rejection"
TUNING_SEED = 99
GAIN = 0.2


def run(trial: Trial) -> Iterator[Event]:
    """Train a residual network on images, or search for layers; tuning has a seed of its own."""
    yield from (_run_search if trial.study == "search" else _run_images)(trial)


@dataclass(frozen=True)
class Images:
    """Images of mean 0 and variance 1 a channel, cut in three."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@cache
def images(name: str, train: int, validation: int, test: int) -> Images:
    """Cut a data set: training and validation images from the shuffled training set, test images from the test set."""
    if name == "digits":
        digits = data.load("digits")
        x, y = torch.from_numpy(digits.x).reshape(-1, 1, 8, 8), torch.from_numpy(digits.y)
    else:
        pixels = data.load("cifar10")
        x, y = torch.from_numpy(pixels.x_train), torch.from_numpy(pixels.y_train)
    sizes = [train, validation, test if name == "digits" else 0]
    order = torch.randperm(len(x), generator=generator("split"))[: sum(sizes)]
    parts = [(x[part].float(), y[part].long()) for part in order.split(sizes)]
    if name != "digits":
        parts[2] = torch.from_numpy(pixels.x_test[:test]).float(), torch.from_numpy(pixels.y_test[:test]).long()
    mean, deviation = (moment((0, 2, 3), keepdim=True) for moment in (parts[0][0].mean, parts[0][0].std))
    scaled = [((one - mean) / deviation, labels) for one, labels in parts]
    return Images(scaled[0], scaled[1], scaled[2])


def network(arm: str, channels_in: int, group_size: int) -> nn.Module:
    """Build an arm's pre-activation ResNet-8: the arms share the weights, and differ in what is in BN-ReLU's place."""
    plain = residual(_batch_norm, channels_in, classes=10, width=8)
    if arm in (B0, S0):
        plain = replace_norm_act(plain, arm.removeprefix("EvoNorm-"), group_size=group_size)
    if arm == GN:
        for module in list(plain.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.GroupNorm(child.num_features // group_size, child.num_features))
    return plain


def _batch_norm(channels: int, apply_act: bool) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU() if apply_act else nn.Identity())


def _run_images(trial: Trial) -> Iterator[Event]:
    seed = TUNING_SEED if trial.tuning else trial.seed
    sizes = {name: int(value) for name, value in trial.budget.items() if name != "data"}
    found = images(str(trial.budget["data"]), sizes["train"], sizes["validation"], sizes["test"])
    held, test = ((x.to(trial.device), y.to(trial.device)) for x, y in (found.validation, found.test))
    with seeded(seed, "weights"):
        model = network(trial.arm, found.train[0].shape[1], sizes["group_size"]).to(trial.device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=float(trial.settings["lr"]), momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    total = sizes["epochs"] * -(-sizes["train"] // sizes["batch_size"])

    def rate(step: int) -> float:
        return min(10 * (step + 1) / total, 0.5 * (1 + math.cos(math.pi * step / total)))

    def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        for batch in minibatches(found.train, sizes["batch_size"], generator(seed, "order", epoch)):
            yield tuple(one.to(trial.device) for one in batch)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    diverged = False
    try:
        for epoch in train(model, optimizer, batches, loss, epochs=sizes["epochs"], scheduler=scheduler):
            yield Progress(epoch.step, total)
            yield Point("training loss", epoch.step, epoch.loss)
            yield Point("validation accuracy", epoch.step, accuracy(model, *held))
    except FloatingPointError:
        diverged = True
    yield Metric("diverged", float(diverged))
    yield Metric("validation_accuracy", 0.0 if diverged else accuracy(model, *held))
    if not trial.tuning:
        yield Metric("test_accuracy", 0.0 if diverged else accuracy(model, *test))


def _run_search(trial: Trial) -> Iterator[Event]:
    sizes = {name: int(value) for name, value in trial.budget.items()}
    found = images("digits", sizes["train"], sizes["validation"], 0)
    options = {name: sizes[name] for name in ("width", "group_size", "steps", "batch_size")}
    (x, y), (held_x, held_y) = ((x.to(trial.device), y.to(trial.device)) for x, y in (found.train, found.validation))
    anchors = [
        NormActAnchor(name, x, y, held_x, held_y, momentum=0.3, seed=trial.seed, **options)
        for name in ("resnet", "mobilenet")
    ]
    tests = NormActRejection(quality_steps=sizes["quality_steps"], stability_steps=sizes["stability_steps"])
    search = EvoNormSearch(
        NormActSpace(),
        anchors,
        population=sizes["population"],
        rejection=tests if trial.arm == TESTED else None,
        tournament=0.3,
        seed=trial.seed,
    )
    start = [NormActGraph.named(name) for name in ("BN-ReLU", "SiLU")]
    scores = [tuple(anchor.accuracy(graph) for anchor in anchors) for graph in start]
    copies = -(-sizes["population"] // len(start))
    search.tell(start * copies, scores * copies)
    told = len(search.history)
    for proposal in range(sizes["proposals"]):
        points = search.ask(1)
        search.tell(points, [search.evaluate(point) for point in points])
        yield Progress(proposal + 1, sizes["proposals"])
    accepted = search.history[told:]
    for place, one in enumerate(accepted):
        yield Point("accuracy of what was trained in full", place, one.value)
    yield Metric("accepted_share", len(accepted) / sizes["proposals"])
    yield Metric("median_accuracy", median(one.value for one in accepted) if accepted else 0.0)
    yield Metric("trained_share", sum(one.value > 0.5 for one in accepted) / max(1, len(accepted)))
    yield Metric("best_accuracy", search.best.value)
    for reason in ("quality", "stability"):
        yield Metric(f"rejected_{reason}", search.rejected[reason])


def judge(evidence: Evidence) -> Verdict:
    """Apply the rule: count which of its four parts hold."""
    batch = evidence.difference("images", B0, BN, "test_accuracy")
    sample = evidence.difference("images", S0, GN, "test_accuracy")
    small = evidence.difference("small batches", S0, BN, "test_accuracy")
    kept = evidence.difference("search", TESTED, UNTESTED, "median_accuracy")
    parts = (batch.estimate >= 0, sample.estimate > 0, small.estimate > 0, kept.estimate >= GAIN)
    held = sum(parts)
    outcome: Outcome = "reproduced" if held == 4 else "partly" if held == 3 else "not reproduced"
    reason = (
        f"accuracy in points: B0 − BN-ReLU {100 * batch.estimate:+.2f} (0 asked for), S0 − GN-ReLU "
        f"{100 * sample.estimate:+.2f} (more than 0), S0 − BN-ReLU in batches of 4 {100 * small.estimate:+.2f} (more "
        f"than 0); median of the accepted proposals − of all {100 * kept.estimate:+.1f} (20): {held} of 4 hold"
    )
    margins: dict[str, Interval | float] = {
        "accuracy, B0 − BN-ReLU": batch,
        "accuracy, S0 − GN-ReLU": sample,
        "accuracy in batches of 4, S0 − BN-ReLU": small,
        "median accuracy, accepted − all proposals": kept,
    }
    return Verdict(outcome, reason, margins)


_CIFAR: dict[str, Scalar] = {"data": "cifar10", "validation": 1000, "test": 4000, "group_size": 8}
_DIGITS: dict[str, Scalar] = {"data": "digits", "train": 256, "validation": 128, "test": 128, "group_size": 8}
_SEARCH: dict[str, Scalar] = {
    "train": 600, "validation": 300, "width": 8, "group_size": 4, "batch_size": 32, "population": 10,
}  # fmt: skip

CLAIM = Claim(
    slug="evonorm",
    statement=(
        "EvoNorm layers, found by evolution, do better than a normalisation followed by an activation: B0 than BN-ReLU "
        "and S0 than GN-ReLU; S0 keeps its accuracy in small batches; and the rejection of bad layers before they are "
        "trained in full leaves those that train."
    ),
    figures=(
        Figure(
            "ImageNet, ResNet-50: BN-ReLU 76.3 % top-1 accuracy, EvoNorm-B0 77.8 %", "table of batch-dependent layers"
        ),
        Figure(
            "ImageNet, ResNet-50: EvoNorm-S0 about 2 points above GN-ReLU's 75.3 %, and as accurate with 4 images a "
            "worker as with 128",
            "table of batch-independent layers",
        ),
        Figure("Better than BN-ReLU in MobileNetV2, EfficientNet and Mask R-CNN too", "experiments"),
        Figure("With the tests of quality and stability, nearly all candidates that pass train", "on rejection"),
    ),
    rule=(
        "With means over seeds: (1) B0's test accuracy ≥ BN-ReLU's, (2) S0's > GN-ReLU's, (3) in batches of 4 S0's > "
        "BN-ReLU's, (4) of 60 proposals of a search, the median accuracy of those that rejection accepts exceeds by ≥ "
        "20 points that of all 60 where nothing is rejected. Reproduced: all four. Partly: three. Else not reproduced."
    ),
    studies={
        "images": Study(
            arms=(B0, BN, S0, GN),
            tiers={
                "smoke": Tier(1, {**_DIGITS, "batch_size": 64, "epochs": 1}),
                "small": Tier(3, {**_CIFAR, "train": 1280, "batch_size": 64, "epochs": 4}),
                "full": Tier(3, {**_CIFAR, "train": 45_000, "test": 10_000, "batch_size": 128, "epochs": 100}),
            },
            tuning=Tuning(tuple({"lr": rate} for rate in (0.05, 0.15)), metric="validation_accuracy"),
        ),
        "small batches": Study(
            arms=(S0, BN),
            tiers={
                "smoke": Tier(1, {**_DIGITS, "batch_size": 4, "epochs": 1}),
                "small": Tier(3, {**_CIFAR, "train": 1280, "batch_size": 4, "epochs": 2}),
                "full": Tier(3, {**_CIFAR, "train": 45_000, "test": 10_000, "batch_size": 4, "epochs": 30}),
            },
            # the rates of the larger batches, over 16 as the batches are
            tuning=Tuning(tuple({"lr": rate / 16} for rate in (0.05, 0.15)), metric="validation_accuracy"),
        ),
        "search": Study(
            arms=(TESTED, UNTESTED),
            tiers={
                "smoke": Tier(1, {**_SEARCH, "proposals": 3, "steps": 3, "quality_steps": 2, "stability_steps": 1}),
                "small": Tier(3, {**_SEARCH, "proposals": 60, "steps": 30, "quality_steps": 20, "stability_steps": 2}),
                "full": Tier(
                    3,
                    {**_SEARCH, "train": 1200, "width": 16, "population": 100, "proposals": 3000}
                    | {"steps": 2000, "quality_steps": 100, "stability_steps": 100},
                ),
            },
        ),
    },
    comparisons=(
        Comparison("images", "test_accuracy", B0, BN, "test accuracy, CIFAR-10"),
        Comparison("images", "test_accuracy", S0, GN, "test accuracy, CIFAR-10"),
        Comparison("small batches", "test_accuracy", S0, BN, "test accuracy in batches of 4, CIFAR-10"),
        Comparison("search", "median_accuracy", TESTED, UNTESTED, "median accuracy of proposals, digits"),
    ),
    run=run,
    judge=judge,
    deviations=(
        "ResNet-8 with 8, 16 and 32 channels on CIFAR-10 (from JPEG files) stands in for ResNet-50 on ImageNet. 1280 "
        "training images in place of 4000, equally for all arms, to keep the whole run within minutes. Groups hold 8 "
        "channels. The network is pre-activation, so that every batch norm feeds a ReLU and EvoNorm takes every place.",
        "In batches of 4 the learning rates are those of batches of 64, divided by 16.",
        "The search starts from BN-ReLU and SiLU, five times each, in a window of 10, as hardly one random graph in a "
        "hundred passes the tests: a random start population would take most of the 60 proposals. Anchors are a "
        "ResNet and a MobileNetV2 on digits; quality is asked after 20 steps, stability over 2 steps of ascent, a full "
        "training takes 30 steps.",
    ),
)
