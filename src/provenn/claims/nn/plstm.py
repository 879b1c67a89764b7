"""pLSTM's claim: what it learns of arrow pointing holds at twice the image size, where a ViT's falls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from provenn.claims.nn._plstm_models import (
    ARMS,
    CHANNELS,
    CONSTANT,
    GATED,
    INTERPOLATED,
    NO_POSITION,
    classifier,
    sample,
)
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.statistics import Interval
from provenn.core.experiment.training import accuracy, train

TOKENS, PIXELS = "tokens", "pixels"
TRANSFORMERS = (INTERPOLATED, NO_POSITION)
MARGIN, DROP, LEARNED = 0.05, 0.10, 0.65
SLACK = 1e-9
"""A margin at the rule's edge counts, whichever way it rounds."""


def run(trial: Trial) -> Iterator[Event]:
    """Train a classifier on fresh samples of one size, and test it at that size and at twice it."""
    sizes = {name: int(value) for name, value in trial.budget.items()}
    side, pixels = sizes["side"], trial.study == PIXELS
    with seeded(trial.seed, "weights"):
        model = classifier(
            trial.arm, side, sizes["dim"], sizes["depth"], sizes["heads"], 1 if pixels else CHANNELS, sizes["patch"]
        ).to(trial.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=float(trial.settings.get("lr", 1e-3)))
    epochs = max(1, sizes["epochs"] // (sizes["tuning_divisor"] if trial.tuning else 1))
    steps = sizes["steps"] * (sizes["transformer_factor"] if trial.arm in TRANSFORMERS else 1)

    def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        draws = generator(trial.seed, "train", epoch)
        for _ in range(steps):
            yield tuple(one.to(trial.device) for one in sample(trial.study, sizes["batch_size"], side, draws))

    def right(part: str, size: int, count: int) -> float:
        images, labels = (one.to(trial.device) for one in sample(trial.study, count, size, generator(part, size)))
        return accuracy(model, images, labels, batch_size=32)

    for epoch in train(model, optimizer, batches, _loss, epochs=epochs):
        yield Progress(epoch.index + 1, epochs)
        yield Point("training loss", epoch.step, epoch.loss)
    yield Metric("parameters", sum(one.numel() for one in model.parameters()))
    yield Metric("validation_accuracy", right("validation", side, sizes["test"]))
    if trial.tuning:
        return
    test = right("test", side, sizes["test"])
    larger = right("test", 2 * side, sizes["test_larger"])
    yield Metric("test_accuracy", test)
    yield Metric("accuracy at twice the size", larger)
    yield Metric("drop", test - larger)


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def judge(evidence: Evidence) -> Verdict:
    """Apply the rule to means over seeds, in the task in tokens."""
    larger = {arm: evidence.mean(TOKENS, arm, "accuracy at twice the size") for arm in ARMS}
    test = {arm: evidence.mean(TOKENS, arm, "test_accuracy") for arm in ARMS}
    best = max(TRANSFORMERS, key=larger.__getitem__)
    gap = evidence.difference(TOKENS, GATED, best, "accuracy at twice the size")
    drop = evidence.mean(TOKENS, GATED, "drop")
    void = max(test[GATED], *(test[arm] for arm in TRANSFORMERS)) <= LEARNED
    outcome: Outcome = "not reproduced"
    if not void and gap.estimate >= MARGIN - SLACK:
        outcome = "reproduced" if drop <= DROP + SLACK else "not reproduced"
    elif not void and gap.estimate > 0:
        outcome = "partly"
    figures = "; ".join(f"{arm}: {test[arm]:.1%}, at twice the size {larger[arm]:.1%}" for arm in ARMS)
    reason = (
        f"{'Void, as no model learned the task (65 % asked for): ' if void else ''}pLSTM minus the better ViT "
        f"({best}) at twice the size {100 * gap.estimate:+.1f} points (5 asked for), pLSTM's drop {100 * drop:.1f} "
        f"points (at most 10). {figures}"
    )
    margins: dict[str, Interval | float] = {
        "accuracy at twice the size, pLSTM − best ViT": gap,
        "pLSTM's drop": drop,
        "accuracy at twice the size, pLSTM − constant gates": evidence.difference(
            TOKENS, GATED, CONSTANT, "accuracy at twice the size"
        ),
    }
    return Verdict(outcome, reason, margins)


_RATES = tuple({"lr": rate} for rate in (1e-3, 3e-3))
_MODELS: dict[str, Scalar] = {"patch": 1, "dim": 24, "depth": 2, "heads": 4}
_TOKENS: dict[str, Scalar] = {**_MODELS, "side": 8, "tuning_divisor": 2, "transformer_factor": 1}

CLAIM = Claim(
    slug="plstm",
    statement=(
        "On arrow pointing pLSTM generalises to twice the image size, where a vision transformer drops towards chance."
    ),
    figures=(
        Figure(
            "On arrow-pointing extrapolation from 192 × 192 to 384 × 384 pixels pLSTM generalises and ViT does not",
            "abstract; section 5",
        ),
        Figure("Competitive on ImageNet-1k and on small sets of molecular graphs", "section 5"),
    ),
    rule=(
        "In the task in tokens, with means over seeds: reproduced if pLSTM's accuracy at twice the size is at least 5 "
        "points above the better of the two ViTs' and its drop from the size it was trained at is at most 10 points; "
        "partly if it is above by less than 5 points; else not reproduced. Void, and so not reproduced, if neither "
        "pLSTM nor a ViT exceeds 65 % at the size of training."
    ),
    studies={
        TOKENS: Study(
            arms=ARMS,
            tiers={
                "smoke": Tier(
                    1,
                    {**_TOKENS, "side": 4, "epochs": 2, "steps": 4, "batch_size": 8, "test": 32, "test_larger": 16},
                ),
                "small": Tier(
                    3,
                    {**_TOKENS, "side": 4, "epochs": 8, "steps": 50, "transformer_factor": 5, "batch_size": 64}
                    | {"test": 1000, "test_larger": 1000},
                ),
                "full": Tier(
                    3, {**_TOKENS, "epochs": 100, "steps": 200, "batch_size": 64, "test": 4000, "test_larger": 4000}
                ),
            },
            tuning=Tuning(_RATES, metric="validation_accuracy"),
        ),
        PIXELS: Study(
            arms=ARMS,
            tiers={
                "full": Tier(
                    3,
                    {**_TOKENS, "side": 32, "patch": 4, "epochs": 100, "steps": 200, "batch_size": 64}
                    | {"test": 4000, "test_larger": 4000},
                ),
            },
            tuning=Tuning(_RATES, metric="validation_accuracy"),
        ),
    },
    comparisons=(
        Comparison(TOKENS, "accuracy at twice the size", GATED, INTERPOLATED, "accuracy at twice the size, tokens"),
        Comparison(TOKENS, "accuracy at twice the size", GATED, NO_POSITION, "accuracy at twice the size, tokens"),
        Comparison(TOKENS, "accuracy at twice the size", GATED, CONSTANT, "what gates by features give, tokens"),
        Comparison(PIXELS, "accuracy at twice the size", GATED, INTERPOLATED, "accuracy at twice the size, pixels"),
    ),
    run=run,
    judge=judge,
    deviations=(
        "Grids of tokens (arrow with its direction, circle, noise) stand in for images of 192 × 192 pixels, two blocks "
        "of 24 features for the paper's models, and fresh samples for a set of 100 000 images.",
        "The small tier trains at 4 × 4 and tests at 8 × 8, where the full tier has 8 × 8 and 16 × 16: at 8 × 8 a "
        "single run of pLSTM takes minutes before it is above chance.",
        "Runs of the small tier are set to equal time, about 20 s of an idle core: the ViTs take five times the steps "
        "of pLSTM. Trials of step sizes take half the steps.",
        "The ViTs' head sees the mean of the cells, pLSTM's the corners; MLPs are as wide as brings all arms within "
        "10 % of each other's parameters. Position embeddings start at unit variance.",
    ),
)
