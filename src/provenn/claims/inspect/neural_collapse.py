"""Neural collapse's claim: norms, frames and thresholds follow the theorem, in direct optimisation and in a network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

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
    Study,
    Tier,
    Trial,
    Verdict,
)
from provenn.core.experiment.networks import mlp
from provenn.core.experiment.seeding import generator, seeded
from provenn.data.toys import geometric_counts, imbalanced_subset
from provenn.inspect import NeuralCollapse, UnconstrainedFeatures, collapse_solution, neural_collapse_metrics
from provenn.inspect._neural_collapse_solution import CollapseSolution

WIDTH = 8
BALANCED, IMBALANCED = (20, 20, 20, 20), (40, 20, 10, 5)


@dataclass(frozen=True)
class Problem:
    """A problem of the theory: class counts, number of linear layers, and one λ for all factors."""

    counts: tuple[int, ...]
    depth: int
    strength: float

    @property
    def solution(self) -> CollapseSolution:
        """The predicted minimum."""
        found: CollapseSolution = collapse_solution(
            self.counts, (WIDTH,) * self.depth, (self.strength,) * (self.depth + 1)
        )
        return found


PROBLEMS = {
    **{f"balanced, M={depth}": Problem(BALANCED, depth, 5e-3) for depth in (1, 2, 3)},
    **{f"imbalanced, M={depth}": Problem(IMBALANCED, depth, 5e-3) for depth in (1, 2, 3)},
    # N² λ_W λ_H = 6.9: above the smallest class's 5 samples, below the next one's 10.
    "minority lost, M=1": Problem(IMBALANCED, 1, 0.035),
}
DEPTHS = {1: (2e-5, 5e-3), 3: (5e-6, 2e-3)}
"""For each depth of the network's head: λ of the features, and of every linear layer."""


def run(trial: Trial) -> Iterator[Event]:
    """Optimise free features, or train a network on imbalanced digits."""
    if trial.study in PROBLEMS:
        yield from _run_features(trial, PROBLEMS[trial.study])
    else:
        yield from _run_digits(trial, depth=int(trial.study[-1]))


def _run_features(trial: Trial, problem: Problem) -> Iterator[Event]:
    solution = problem.solution
    with seeded(trial.seed, "weights"):
        model = UnconstrainedFeatures(
            problem.counts, (WIDTH,) * problem.depth, lambdas=(problem.strength,) * (problem.depth + 1)
        ).to(trial.device, torch.float64)
    steps = int(trial.budget["steps"]) if trial.arm == "optimised" else 0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4])
    for step in range(steps):
        optimizer.zero_grad()
        objective = model.objective()
        objective.backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % max(1, steps // 40) == 0:
            yield Progress(step + 1, steps)
            yield Point("objective over predicted", step + 1, objective.item() / solution.objective)
    yield Metric("objective over predicted", model.objective().item() / solution.objective)
    rows = model.weights[-1].detach().norm(dim=1).tolist()
    metrics = neural_collapse_metrics(
        model.features.detach(), model.labels, model.weights[-1].detach() @ _product(model), solution.targets(1)
    )
    errors = _relative(rows, solution.row_norms) + _relative(metrics["feature_norms"], solution.feature_norms)
    yield Metric("largest norm error", max(errors))
    alive = [label for label in range(len(rows)) if label not in solution.lost_classes]
    yield Metric("largest cosine", _largest_cosine(model, alive))
    yield Metric("nc1", metrics["nc1"] if len(alive) == len(rows) else 0.0)


def _product(model: UnconstrainedFeatures) -> Tensor:
    """The partial product of all layers but the last."""
    product = torch.eye(WIDTH, dtype=torch.float64, device=model.features.device)
    for weight in list(model.weights)[:-1]:
        product = weight.detach() @ product
    return product


def _largest_cosine(model: UnconstrainedFeatures, alive: list[int]) -> float:
    """The largest magnitude of a cosine between rows, or between class means, of two classes that are not lost."""
    means = torch.stack([model.features.detach()[model.labels == label].mean(0) for label in alive])
    largest = 0.0
    for vectors in (means, model.weights[-1].detach()[alive]):
        unit = nn.functional.normalize(vectors, dim=1)
        largest = max(largest, (unit @ unit.T).fill_diagonal_(0).abs().max().item())
    return largest


def _relative(found: tuple[float, ...] | list[float], predicted: tuple[float, ...]) -> list[float]:
    """Errors relative to the prediction; a norm that should be 0 is measured against the largest one."""
    scale = max(predicted)
    return [abs(one - wanted) / (wanted or scale) for one, wanted in zip(found, predicted, strict=True)]


class _Network(nn.Module):
    """A backbone that ends in features, and a head of linear layers without biases."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(mlp([64, 256, 256]), nn.ReLU(), nn.Linear(256, 64))
        widths = [64] * depth + [10]
        self.head = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(widths)))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.backbone(x))
        return outputs


def _run_digits(trial: Trial, depth: int) -> Iterator[Event]:
    digits = data.load("digits")
    counts = geometric_counts(150, 15, 10)
    x, y = imbalanced_subset(
        torch.from_numpy(digits.x).float() / 16, torch.from_numpy(digits.y).long(), counts, generator("digits", "cut")
    )
    x, y = x.to(trial.device), y.to(trial.device)
    with seeded(trial.seed, "weights"):
        model = _Network(depth).to(trial.device)
    strength_features, strength_weights = DEPTHS[depth]
    hot = nn.functional.one_hot(y, 10).float()
    steps = int(trial.budget["steps"]) if trial.arm == "trained" else 0
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 1))
    lambdas = (strength_features, *[strength_weights] * depth)
    solution = collapse_solution(counts, (64,) * depth, lambdas)
    # The linear map that ends the backbone is not part of the head.
    head = [f"head.{place}" for place in range(depth)]
    probe, against_etf = NeuralCollapse(head, target=solution), NeuralCollapse(head, target="etf")
    for step in range(steps):
        optimizer.zero_grad()
        features = model.backbone(x)
        loss = (model.head(features) - hot).square().sum() / (2 * len(x))
        penalty = sum(weight.square().sum() for weight in model.head.parameters()) * strength_weights
        loss = loss + (penalty + strength_features * features.square().sum()) / 2
        loss.backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % max(1, steps // 20) == 0:
            yield Progress(step + 1, steps)
            last = probe(model, [(x, y)]).layers[-1]
            yield Point("NC1", step + 1, last.nc1)
            yield Point("NC2 against the predicted frame", step + 1, last.nc2)
    layers, plain = probe(model, [(x, y)]).layers, against_etf(model, [(x, y)]).layers
    yield Metric("nc1", max(layer.nc1 for layer in layers))
    yield Metric("nc2", max(layer.nc2 for layer in layers))
    yield Metric("nc2 against an ETF", min(layer.nc2 for layer in plain))
    yield Metric("nc3", max(layer.nc3 for layer in layers))
    yield Metric("row norm error", max(_relative(layers[-1].row_norms, solution.row_norms)))


def judge(evidence: Evidence) -> Verdict:
    """Apply the rule: (a) direct optimisation reaches the prediction, (b) a trained network does."""
    norms = max(evidence.mean(study, "optimised", "largest norm error") for study in PROBLEMS)
    cosine = max(evidence.mean(study, "optimised", "largest cosine") for study in PROBLEMS)
    direct = norms <= 0.01 and cosine < 1e-3
    holds, words = [], []
    for depth in DEPTHS:
        study = f"digits, M={depth}"
        names = ("nc1", "nc2", "nc2 against an ETF", "row norm error")
        nc1, nc2, etf, rows = (evidence.mean(study, "trained", name) for name in names)
        holds.append(nc1 < 0.01 and nc2 < 0.1 and nc2 < etf / 3 and rows <= 0.03)
        words.append(f"M={depth}: NC1 {nc1:.2g}, NC2 {nc2:.3f} (ETF {etf:.3f}), row norms off by {100 * rows:.1f} %")
    outcome: Outcome = "not reproduced"
    if direct:
        outcome = "reproduced" if all(holds) else "partly"
    reason = f"(a) norms off by at most {100 * norms:.2g} %, cosines by {cosine:.2g}; (b) digits, {'; '.join(words)}"
    return Verdict(outcome, reason, {"largest norm error": norms, "largest cosine": cosine})


def _tiers(smoke: int, small: int) -> dict[str, Tier]:
    return {
        "smoke": Tier(seeds=1, budget={"steps": smoke}),
        "small": Tier(seeds=3, budget={"steps": small}),
        "full": Tier(seeds=10, budget={"steps": 5 * small}),
    }


CLAIM = Claim(
    slug="neural-collapse",
    statement=(
        "At the end of training, features collapse to their class means, and means and rows of every partial product "
        "of a linear head form the predicted frame: orthogonal when balanced, of lengths set by class size and weight "
        "decay when not; classes below a threshold are lost."
    ),
    figures=(
        Figure(
            "NC1 to NC3 go to zero on MLP, ResNet-18 and VGG-16 with one to several linear layers, on MNIST and "
            "CIFAR-10, balanced and imbalanced, and in direct optimisation",
            "figures of the experiments, as curves over epochs",
        ),
    ),
    rule=(
        "Reproduced: (a) in direct optimisation all norms within 1 % of the prediction and the largest off-diagonal "
        "cosine below 1e-3; and (b) on imbalanced digits NC1 < 0.01, NC2 against the predicted frame below 0.1 and "
        "below a third of NC2 against an ETF, row norms within 3 %. Partly: (a) only. Else not reproduced."
    ),
    studies={
        **{study: Study(arms=("optimised", "initial"), tiers=_tiers(40, 20_000)) for study in PROBLEMS},
        **{f"digits, M={depth}": Study(arms=("trained", "initial"), tiers=_tiers(20, 4000)) for depth in DEPTHS},
    },
    comparisons=(
        *(
            Comparison(f"digits, M={depth}", metric, "trained", "initial", maximize=False)
            for depth in DEPTHS
            for metric in ("nc1", "nc2")
        ),
        *(Comparison(study, "largest norm error", "optimised", "initial", maximize=False) for study in PROBLEMS),
    ),
    run=run,
    judge=judge,
    deviations=(
        "The paper gives curves without a single figure; the rule compares with its theorem instead.",
        "A norm that should be zero is measured against the largest norm of its kind.",
        "Where a head has several layers, the worst layer counts, and against an ETF the best one.",
    ),
)
