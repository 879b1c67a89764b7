"""NoProp's claim: blocks that learn alone are as accurate as the same network by back-propagation, in less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

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
from provenn.claims.training._noprop_arms import ARMS, Digits, digits_of
from provenn.core.experiment.statistics import Interval

STUDY = "digits"
DT, BACK_PROPAGATION, FORWARD = "NoProp-DT, one-hot", "back-propagation", "forward-forward"
RATES = ({"lr": 1e-3}, {"lr": 3e-3})
DRAWS = 5
"""Predictions from fresh noise, whose mean accuracy and spread are reported."""


def run(trial: Trial) -> Iterator[Event]:
    """Train one arm on a part of MNIST, or on scikit-learn's digits at the smoke tier."""
    digits = digits_of(trial)
    lr = float(trial.settings.get("lr", RATES[0]["lr"]))
    epochs, batch_size = int(trial.budget["epochs"]), int(trial.budget["batch_size"])
    arm = ARMS[trial.arm](trial, digits, lr)
    for done, epoch in enumerate(arm.train(epochs, batch_size), start=1):
        yield Progress(done, epochs)
        yield Point("training loss", done, epoch.loss)
    yield from _accuracies(digits, arm.predict)
    if not trial.tuning:
        yield Metric("saved bytes per update", arm.saved_bytes(batch_size))


def _accuracies(digits: Digits, predict: Callable[[Tensor, int], Tensor]) -> Iterator[Event]:
    found = [float((predict(digits.x_test, draw) == digits.y_test).double().mean()) for draw in range(DRAWS)]
    yield Metric("accuracy", float(np.mean(found)))
    yield Metric("spread of accuracy over noise", float(np.std(found, ddof=1)))


def judge(evidence: Evidence) -> Verdict:
    """Apply the rule to the means over seeds."""
    accuracy = {arm: 100 * evidence.mean(STUDY, arm, "accuracy") for arm in (DT, BACK_PROPAGATION, FORWARD)}
    ct = 100 * evidence.mean(STUDY, "NoProp-CT", "accuracy")
    saved = {arm: evidence.mean(STUDY, arm, "saved bytes per update") for arm in (DT, BACK_PROPAGATION)}
    share = saved[DT] / saved[BACK_PROPAGATION]
    level = accuracy[DT] >= accuracy[BACK_PROPAGATION] - 1.5
    ahead = accuracy[DT] >= accuracy[FORWARD] + 1
    outcome: Outcome = "not reproduced"
    if level and ahead and ct >= 90 and share <= 0.4:
        outcome = "reproduced"
    elif accuracy[DT] >= 93 and share <= 0.4:
        outcome = "partly"
    margins: dict[str, Interval | float] = {
        f"accuracy, DT minus {arm}": evidence.difference(STUDY, DT, arm, "accuracy")
        for arm in (BACK_PROPAGATION, FORWARD)
    }
    margins["saved bytes, DT over back-propagation"] = share
    return Verdict(
        outcome,
        f"DT {accuracy[DT]:.1f} %, back-propagation {accuracy[BACK_PROPAGATION]:.1f} %, forward-forward "
        f"{accuracy[FORWARD]:.1f} %, CT {ct:.1f} %; DT saves {share:.2f} of the bytes of back-propagation",
        margins,
    )


_BUDGET: dict[str, Scalar] = {
    "data": "mnist",
    "train": 4000,
    "test": 2000,
    "pooled": 2,
    "num_blocks": 5,
    "width": 16,
    "hidden": 64,
    "epochs": 8,
    "batch_size": 64,
}

CLAIM = Claim(
    slug="noprop",
    statement=(
        "Blocks that each learn to denoise a class embedding, without a forward or backward pass through the others, "
        "classify as well as the same network trained by back-propagation, better than forward-forward, and need less "
        "memory. Run here on MNIST at half resolution (14 × 14) with small blocks."
    ),
    figures=(
        Figure("MNIST, NoProp-DT: about 99.5 %, back-propagation 99.5 %", "table of test accuracies"),
        Figure("CIFAR-10, NoProp-DT: about 80 %, back-propagation 79.9 %", "table of test accuracies"),
        Figure("CIFAR-100, NoProp-DT: about 46 %, back-propagation 45.9 %", "table of test accuracies"),
        Figure("NoProp-CT trains faster than the adjoint method; NoProp takes less memory", "figure 3, memory table"),
    ),
    rule=(
        "Means over seeds of the test accuracy. Reproduced: DT (one-hot) at least back-propagation − 1.5 points, DT at "
        "least forward-forward + 1, CT at least 90 %, and the bytes that autograd keeps for one update of DT at most "
        "0.4 of back-propagation's. Partly: DT at least 93 %, and the memory. Else not reproduced."
    ),
    studies={
        STUDY: Study(
            arms=tuple(ARMS),
            tiers={
                "smoke": Tier(
                    seeds=1,
                    budget={
                        "data": "digits",
                        "train": 200,
                        "test": 100,
                        "pooled": 1,
                        "num_blocks": 2,
                        "width": 2,
                        "hidden": 8,
                        "epochs": 1,
                        "batch_size": 50,
                    },
                ),
                "small": Tier(seeds=3, budget=_BUDGET),
                "full": Tier(
                    seeds=3,
                    budget=_BUDGET
                    | {
                        "train": 60_000,
                        "test": 10_000,
                        "pooled": 1,
                        "num_blocks": 10,
                        "width": 32,
                        "hidden": 256,
                        "epochs": 100,
                        "batch_size": 128,
                    },
                ),
            },
            tuning=Tuning(RATES, metric="accuracy"),
        )
    },
    comparisons=(
        Comparison(STUDY, "accuracy", DT, BACK_PROPAGATION, "test accuracy"),
        Comparison(STUDY, "accuracy", DT, FORWARD, "test accuracy"),
        Comparison(STUDY, "accuracy", DT, "difference target propagation", "test accuracy"),
        Comparison(STUDY, "accuracy", "NoProp-DT, learned", BACK_PROPAGATION, "test accuracy, learned embeddings"),
        Comparison(STUDY, "accuracy", "NoProp-CT", BACK_PROPAGATION, "test accuracy, continuous time"),
        Comparison(STUDY, "accuracy", "NoProp-FM", BACK_PROPAGATION, "test accuracy, flow matching"),
        Comparison(STUDY, "saved bytes per update", DT, BACK_PROPAGATION, "bytes kept for one update", maximize=False),
    ),
    run=run,
    judge=judge,
    deviations=(
        "Images are averaged over 2 × 2 pixels to 14 × 14, for every arm, to stay within the tier's time; convolutions "
        "have 16 and 32 channels, other layers 64 units, T = 5, 8 epochs on 4 000 images. No dropout in any arm.",
        "Each arm picks one of two learning rates on the last fifth of the training images, held out for that.",
        "Accuracy is the mean of five predictions from fresh noise; their spread is a metric of its own.",
        "Back-propagation trains the network of NoProp-DT end to end on the head's cross entropy, from one fixed draw "
        "of z_0 and without noise in the blocks. Through the softmax of every block it learns slowly, and is far from "
        "the paper's accuracy after so few steps; to beat it here says little.",
        "Forward-forward and difference target propagation train fully connected networks: five layers of 320 units, "
        "the hidden units of all five blocks together.",
        "The paper's comparison of CT with the adjoint method of neural ODEs is left out, since it is one of time.",
    ),
)
