"""The claim of invariant coordinates: a plain network behind them ignores how its points are moved."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

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
from provenn.claims.nn import _tinvnn_tours as tours
from provenn.claims.nn._tinvnn_clouds import data_set, moved, turned
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import accuracy, minibatches, train
from provenn.nn import InvariantMDS, PointNetBackbone, TinvWrapper, TSPAttention

RAW, AUGMENTED, TINV = "raw", "raw, turned in training", "TinvNN"
SHAPES, TOURS = "shapes", "tours"
POSES = ("canonical", "moved")
MARKS = 10


def run(trial: Trial) -> Iterator[Event]:
    """Train a point network or a tour model, and test it as trained and moved."""
    yield from _tours(trial) if trial.study == TOURS else _shapes(trial)


def _wrapped(network: nn.Module, arm: str) -> nn.Module:
    return TinvWrapper(network, InvariantMDS()) if arm == TINV else network


def _shapes(trial: Trial) -> Iterator[Event]:
    budget, device, seed = trial.budget, trial.device, trial.seed
    (x, y), (x_held, y_held), (x_test, y_test) = (
        _on(device, data_set(name, seed, int(budget[name]), bool(budget["meshes"])))
        for name in ("train", "validation", "test")
    )
    with seeded(seed, "weights"):
        model = _wrapped(PointNetBackbone(3, int(y.max()) + 1), trial.arm).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=float(trial.settings["lr"]))
    epochs = int(budget["epochs"])

    def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        turns = generator(seed, "turns", epoch)
        for clouds, classes in minibatches((x, y), 32, generator(seed, "order", epoch)):
            yield turned(clouds, turns) if trial.arm == AUGMENTED else clouds, classes

    for epoch in train(model, optimizer, batches, _loss, epochs=epochs):
        yield Progress(epoch.index + 1, epochs)
        yield Point("training loss", epoch.step, epoch.loss)
    if trial.tuning:
        yield Metric("validation accuracy", accuracy(model, x_held, y_held))
        return
    yield Metric("canonical accuracy", accuracy(model, x_test, y_test))
    yield Metric("moved accuracy", accuracy(model, moved(x_test, generator(seed, "moves")), y_test))


def _on(device: str, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].to(device), pair[1].to(device)


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def _tours(trial: Trial) -> Iterator[Event]:
    budget, device = trial.budget, trial.device
    points, steps = int(budget["points"]), int(budget["steps"])
    with seeded(trial.seed, "weights"):
        model = _wrapped(TSPAttention(), trial.arm).to(device)
    draws = generator(trial.seed, "instances")
    every = max(1, steps // MARKS)
    course = tours.train(model, steps, int(budget["batch"]), points, float(trial.settings["lr"]), draws, device)
    for step, length in course:
        if (step + 1) % every == 0:
            yield Progress(step + 1, steps)
            yield Point("length of drawn tours", step + 1, length)
    name = "validation instances" if trial.tuning else "test instances"
    x = torch.rand(int(budget["test"]), points, 2, generator=generator(name)).to(device)
    shortest = tours.shortest_tours(x.cpu())
    plain = tours.gap(model, x, shortest, lambda points: points)
    if trial.tuning:
        yield Metric("validation gap", plain)
        return
    yield Metric("gap", plain)
    yield Metric("gap, moved", tours.gap(model, x, shortest, partial(moved, draws=generator("moved instances"))))


def judge(evidence: Evidence) -> Verdict:
    """Apply the rule."""
    mean = partial(evidence.mean, SHAPES)
    canonical, turned_accuracy = mean(TINV, "canonical accuracy"), mean(TINV, "moved accuracy")
    gain = evidence.difference(SHAPES, TINV, RAW, "moved accuracy")
    over_augmentation = evidence.difference(SHAPES, TINV, AUGMENTED, "moved accuracy")
    change = {arm: evidence.mean(TOURS, arm, "gap, moved") - evidence.mean(TOURS, arm, "gap") for arm in (TINV, RAW)}
    invariant = abs(canonical - turned_accuracy) <= 0.005 + 1e-9 and abs(change[TINV]) <= 1e-4
    gains = gain.estimate >= 0.2 - 1e-9 and change[RAW] > 0
    outcome: Outcome = "not reproduced"
    if invariant and gains:
        outcome = "reproduced" if over_augmentation.estimate >= -0.02 - 1e-9 else "partly"
    accuracies = "; ".join(
        f"{arm} " + ", ".join(f"{pose} {100 * mean(arm, pose + ' accuracy'):.1f} %" for pose in POSES)
        for arm in (TINV, AUGMENTED, RAW)
    )
    gaps = "; ".join(
        f"{arm} {100 * evidence.mean(TOURS, arm, 'gap'):.2f} % above the shortest tour, moved "
        f"{100 * evidence.mean(TOURS, arm, 'gap, moved'):.2f} %"
        for arm in (TINV, RAW)
    )
    margins = {f"{TINV} over {RAW}, moved": gain, f"{TINV} over {AUGMENTED}, moved": over_augmentation}
    return Verdict(outcome, f"shapes: {accuracies}. tours: {gaps}", margins)


_SHAPES: dict[str, Scalar] = {"train": 75, "validation": 25, "test": 40, "meshes": True, "epochs": 30}
_TOURS: dict[str, Scalar] = {"points": 10, "steps": 500, "batch": 64, "test": 500}
_RATES = ({"lr": 1e-3}, {"lr": 3e-3})

CLAIM = Claim(
    slug="tinvnn",
    statement=(
        "Behind coordinates that are invariant from the start, plain point networks keep their accuracy, and tour "
        "models their tours, when the input is turned, scaled and shifted."
    ),
    figures=(
        Figure(
            "Accuracy under arbitrary rotation equals the accuracy in canonical pose on ModelNet40 and ShapeNet; tours "
            "no longer degrade (as far as known; the paper's tables were not at hand)",
            "abstract",
        ),
    ),
    rule=(
        "Reproduced: TinvNN's mean accuracy on moved shapes is within 0.5 points of that in canonical pose, at least "
        "20 points above the raw network's, and not more than 2 points below that of the raw network trained on "
        "turned shapes; and moving the instances changes TinvNN's mean gap to the shortest tour by at most 1e-4, while "
        "it raises the raw model's. Partly: all but the comparison with training on turned shapes. Else not reproduced."
    ),
    studies={
        SHAPES: Study(
            (TINV, AUGMENTED, RAW),
            {
                "smoke": Tier(1, {"train": 4, "validation": 2, "test": 3, "meshes": False, "epochs": 2}),
                "small": Tier(3, _SHAPES),
                "full": Tier(5, {**_SHAPES, "train": 500, "test": 200, "epochs": 100}),
            },
            Tuning(_RATES, metric="validation accuracy"),
        ),
        TOURS: Study(
            (TINV, RAW),
            {
                "smoke": Tier(1, {"points": 5, "steps": 2, "batch": 4, "test": 5}),
                "small": Tier(3, _TOURS),
                "full": Tier(3, {**_TOURS, "steps": 20_000, "batch": 256}),
            },
            Tuning(_RATES, metric="validation gap", maximize=False),
        ),
    },
    comparisons=(
        *(
            Comparison(SHAPES, metric, TINV, arm, f"{metric}, shapes")
            for arm in (AUGMENTED, RAW)
            for metric in ("moved accuracy", "canonical accuracy")
        ),
        *(Comparison(TOURS, metric, TINV, RAW, f"{metric}, tours", maximize=False) for metric in ("gap, moved", "gap")),
    ),
    run=run,
    judge=judge,
    deviations=(
        "Eight shapes of 128 points (five surfaces; a bunny, a cow and a man as meshes) in place of ModelNet40 and "
        "ShapeNet; PointNet without transformation networks, with layer norm.",
        "The network trained on turned shapes sees neither shifts nor scales in training, but does in the moved tests, "
        "as the rule has it: that comparison says little. On shapes that are turned alone it has not been made.",
        "Tours of 10 points after 500 steps of REINFORCE with four tours an instance as each other's baseline.",
    ),
)
