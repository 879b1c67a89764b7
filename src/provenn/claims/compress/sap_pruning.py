"""SAP's claim: the PQ Index's course foretells underfitting, and pruning by it beats a fixed ratio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
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
    Settings,
    Study,
    Tier,
    Trial,
    Tuning,
    Verdict,
)
from provenn.compress import SAP, FixedRatio, IterativePruner, OneShot, SparsityMonitor
from provenn.compress.sap_pruning import watch
from provenn.core.experiment.networks import mlp
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import accuracy, minibatches, train

RULES = {
    "SAP": lambda settings: SAP(gamma=settings["gamma"]),
    "lottery ticket": lambda settings: FixedRatio(settings["ratio"]),
    "one-shot": lambda settings: OneShot(settings["ratio"]),
}
SPARSEST = 0.01
"""The share of weights at which the area under the accuracy ends."""


def run(trial: Trial) -> Iterator[Event]:
    """Prune one network round by round, and follow its accuracy and its index."""
    task = _task(trial)
    with seeded(trial.seed, "weights"):
        model = mlp([task["x_train"].shape[1], 128, 256, 10]).to(trial.device)
    rounds, epochs = int(trial.budget["rounds"]), int(trial.budget["epochs"])

    def fit(network: nn.Module) -> None:
        steps = epochs * -(-len(task["x_train"]) // int(trial.budget["batch_size"]))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

        def update(batch: Sequence[Tensor]) -> Tensor:
            x, y = batch
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)  # as the authors' code does
            optimizer.step()
            return loss

        def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
            order = generator(trial.seed, "order", epoch)
            return minibatches((task["x_train"], task["y_train"]), int(trial.budget["batch_size"]), order)

        for _ in train(network, optimizer, batches, _no_loss, epochs=epochs, scheduler=scheduler, update=update):
            pass

    monitor = SparsityMonitor()
    densities: list[float] = []
    held, test, ratios = [], [], []
    for state in IterativePruner(RULES[trial.arm](trial.settings), rounds=rounds).iterate(model, fit):
        watch(monitor, state)
        densities.append(state.round.density)
        held.append(accuracy(state.model, task["x_validation"], task["y_validation"]))
        test.append(accuracy(state.model, task["x_test"], task["y_test"]))
        ratios.append(state.round.pruned / state.round.remaining)
        yield Progress(state.round.index + 1, rounds + 1)
        yield Point("accuracy against −log₁₀ of the share left", -float(np.log10(densities[-1])), held[-1])
        yield Point("PQ index by round", state.round.index, monitor.report().retrained[-1].pq_global)
    yield Metric("validation area", area(densities, held))
    if trial.tuning:
        return
    yield Metric("area", area(densities, test))
    yield Metric("dense accuracy", test[0])
    yield Metric("accuracy at 20 % of weights", float(np.interp(np.log10(5), -np.log10(densities), test)))
    yield Metric("share left", densities[-1])
    yield Metric("ratio variation", max(ratios[:-1]) / max(min(ratios[:-1]), 1e-12))
    minimum, maximum = turns(monitor.report().smoothed, never=rounds + 1)
    yield Metric("index minimum", minimum)
    yield Metric("index maximum", maximum)
    yield Metric("accuracy drop", next((turn for turn, one in enumerate(test) if one < test[0] - 0.05), rounds + 1))


def _no_loss(model: nn.Module, *batch: Tensor) -> Tensor:
    raise TypeError("the update computes the loss itself")


def _task(trial: Trial) -> dict[str, Tensor]:
    """Flattened images in [0, 1]: scikit-learn's digits at the smoke tier, MNIST at the others."""
    name, size, held_out = str(trial.budget["data"]), int(trial.budget["train"]), int(trial.budget["validation"])
    bundle = data.load(name)
    if isinstance(bundle, data.ImageBundle):
        x, y, x_test, y_test = bundle.x_train, bundle.y_train, bundle.x_test, bundle.y_test
    else:
        assert isinstance(bundle, data.TableBundle)
        x, x_test = bundle.x[:1300], bundle.x[1300:]
        y, y_test = bundle.y[:1300], bundle.y[1300:]
    picked = torch.randperm(len(x), generator=generator("sap-pruning", "split"))[: size + held_out].numpy()
    parts = {
        "train": (x[picked[:size]], y[picked[:size]]),
        "validation": (x[picked[size:]], y[picked[size:]]),
        "test": (x_test, y_test),
    }
    brightest = float(x_test.max())
    task = {}
    for part, (images, labels) in parts.items():
        task[f"x_{part}"] = (torch.from_numpy(images).flatten(1).float() / brightest).to(trial.device)
        task[f"y_{part}"] = torch.from_numpy(labels).long().to(trial.device)
    return task


def area(densities: Sequence[float], accuracies: Sequence[float], chance: float = 0.1) -> float:
    """Return the mean accuracy over log₁₀ of the share left, from all weights to 1 %.

    Accuracies are interpolated between rounds; where a run did not get as far as 1 %, chance counts from its last
    round on, so that no arm gains by stopping early.
    """
    left = -np.log10(np.asarray(densities))
    end = -np.log10(SPARSEST)
    grid = np.linspace(0, end, 2001)
    curve = np.interp(grid, left, accuracies)
    curve[grid > left[-1] + 1e-12] = chance
    return float(np.trapezoid(curve, grid) / end)


def turns(smoothed: Sequence[float], never: int) -> tuple[int, int]:
    """Return the rounds of the curve's first local minimum and of the local maximum after it; ``never`` if none."""
    signs = [1 if after > before else -1 for before, after in pairwise(smoothed)]
    changes = [(place + 1, after) for place, (before, after) in enumerate(pairwise(signs)) if before != after]
    minimum = next((place for place, sign in changes if sign > 0), None)
    if minimum is None:
        return never, never
    return minimum, next((place for place, sign in changes if sign < 0 and place > minimum), never)


def judge(evidence: Evidence) -> Verdict:
    """Apply the rule: (a) the index's course, (b) areas, (c) how far the pruned share varies."""
    minimum, maximum, drop = (
        evidence.values("mnist", "SAP", name) for name in ("index minimum", "index maximum", "accuracy drop")
    )
    foretold = (minimum < drop) & (maximum <= drop)
    over_ticket = evidence.difference("mnist", "SAP", "lottery ticket", "area")
    over_one_shot = evidence.difference("mnist", "SAP", "one-shot", "area")
    variation = evidence.mean("mnist", "SAP", "ratio variation")
    left = evidence.mean("mnist", "SAP", "share left")
    course = int(foretold.sum()) * 3 >= 2 * len(foretold)
    better = over_ticket.estimate >= -0.002 and over_one_shot.estimate > 0
    adapts = variation >= 2
    outcome: Outcome = "not reproduced"
    if better and adapts:
        outcome = "reproduced" if course else "partly"
    reason = (
        f"(a) the index turned before the accuracy fell in {int(foretold.sum())} of {len(foretold)} seeds; "
        f"(b) area minus lottery ticket's {100 * over_ticket.estimate:+.2f} points, minus one-shot's "
        f"{100 * over_one_shot.estimate:+.2f}; (c) the share pruned varies {variation:.1f}-fold over rounds. "
        f"SAP got down to {100 * left:.1f} % of the weights"
    )
    return Verdict(
        outcome,
        reason,
        {
            "area over lottery ticket": over_ticket,
            "area over one-shot": over_one_shot,
            "ratio variation": variation,
        },
    )


_BUDGET: Settings = {"rounds": 15, "epochs": 3, "batch_size": 50, "data": "mnist", "train": 3000, "validation": 1000}
_SMOKE: Settings = {"rounds": 3, "epochs": 1, "data": "digits", "train": 1000, "validation": 300}
_FULL: Settings = {"rounds": 30, "epochs": 200, "train": 55_000, "validation": 5000}

CLAIM = Claim(
    slug="sap-pruning",
    statement=(
        "While a network is pruned and retrained, the PQ Index of its weights falls, rises and falls again, and turns "
        "before accuracy is lost; pruning by the index beats lottery tickets and one-shot pruning at equal size, "
        "without a ratio to choose."
    ),
    figures=(
        Figure(
            "on every model and data set the index falls, rises and falls over 30 rounds",
            "figures of the PQ Index of retrained and pruned models, main text and appendix",
        ),
        Figure(
            "SAP with tuned γ and η: higher accuracy than lottery ticket and one-shot at equal remaining weights",
            "figures of accuracy against remaining weights, main text and appendix",
        ),
    ),
    rule=(
        "Reproduced: (a) in at least two of three seeds the smoothed index of retrained models has its first minimum "
        "before, and its following maximum at or before, the round where accuracy falls 5 points under dense; "
        "(b) SAP's area under accuracy against log₁₀ of remaining weights, from 100 % to 1 %, is at least lottery "
        "ticket's minus 0.2 points and above one-shot's; (c) SAP's share pruned varies at least 2-fold over rounds. "
        "Partly: (b) and (c). Else not reproduced."
    ),
    studies={
        "mnist": Study(
            arms=tuple(RULES),
            tiers={
                "smoke": Tier(
                    seeds=1,
                    budget={**_BUDGET, "rounds": 3, "epochs": 1, "data": "digits", "train": 1000, "validation": 300},
                ),
                "small": Tier(seeds=3, budget=_BUDGET),
                "full": Tier(
                    seeds=3,
                    budget={
                        **_BUDGET,
                        "rounds": 30,
                        "epochs": 200,
                        "batch_size": 250,
                        "train": 55_000,
                        "validation": 5000,
                    },
                ),
            },
            tuning=Tuning(
                {
                    "SAP": ({"gamma": 1.0}, {"gamma": 3.0}),
                    "lottery ticket": ({"ratio": 0.2}, {"ratio": 0.4}),
                    "one-shot": ({"ratio": 0.2}, {"ratio": 0.4}),
                },
                metric="validation area",
            ),
        )
    },
    comparisons=(
        Comparison("mnist", "area", "SAP", "lottery ticket", "mean accuracy, 100 % to 1 % of weights"),
        Comparison("mnist", "area", "SAP", "one-shot", "mean accuracy, 100 % to 1 % of weights"),
        Comparison("mnist", "accuracy at 20 % of weights", "SAP", "lottery ticket", "accuracy at 20 % (not judged)"),
        Comparison("mnist", "accuracy at 20 % of weights", "SAP", "one-shot", "accuracy at 20 % (not judged)"),
        Comparison("mnist", "share left", "SAP", "lottery ticket", "share of weights at the end", maximize=False),
        Comparison("mnist", "dense accuracy", "SAP", "lottery ticket", "accuracy before pruning"),
    ),
    run=run,
    judge=judge,
    deviations=(
        "3 000 MNIST images, 15 rounds of 3 epochs instead of 30 rounds of 200 epochs on full sets.",
        "Batches of 50 instead of 250: 12 steps an epoch leave the dense network at 79 %, and the method prunes "
        "trained networks.",
        "A run that stops short of 1 % of the weights counts at chance level from there on.",
    ),
)
