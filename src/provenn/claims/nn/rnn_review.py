"""The survey's lessons of recurrent networks: how errors fade, and what gates, truncation, clipping and memory do."""

from __future__ import annotations

import math
from collections.abc import Iterator

from provenn.claims.claim import (
    Claim,
    Comparison,
    Event,
    Evidence,
    Figure,
    Outcome,
    Scalar,
    Settings,
    Study,
    Tier,
    Trial,
    Tuning,
    Verdict,
)
from provenn.claims.nn._rnn_review_runs import (
    CARRIED,
    RADII,
    run_clipping,
    run_copy,
    run_flow,
    run_order,
    run_tagging,
    run_truncation,
)
from provenn.core.experiment.statistics import Interval

FLOW, ORDER, TRUNCATION, CLIPPING, TAGGING, COPY = (
    "error flow",
    "temporal order",
    "truncation",
    "clipping",
    "tagging",
    "copy",
)
GATED = "LSTM, forget bias 1"
LONG, SHORT = "k₂ = 40", "k₂ = 10"
SLOPE_ERROR, LSTM_SLOPE = 0.05, 0.02
LEARNED, ELMAN_AT_MOST, CHANCE_AT_MOST = 0.95, 0.7, 0.6
FAILED_CLIPPED, FAILED_UNCLIPPED = 0.1, 0.5
TAGGING_GAIN, COPY_RATIO = 0.2, 0.5


def run(trial: Trial) -> Iterator[Event]:
    """Run one of the six experiments."""
    runs = {
        FLOW: run_flow,
        ORDER: run_order,
        TRUNCATION: run_truncation,
        CLIPPING: run_clipping,
        TAGGING: run_tagging,
        COPY: run_copy,
    }
    yield from runs[trial.study](trial)


def judge(evidence: Evidence) -> Verdict:
    """Apply the rule to means over seeds: how many of the six statements hold, the first three among them."""
    slopes = {r: evidence.mean(FLOW, "Elman", f"slope, ρ = {r}") for r in RADII}
    carried = evidence.mean(FLOW, CARRIED, "slope, unit inputs")
    lstm, elman = (evidence.mean(ORDER, arm, "test_accuracy") for arm in ("LSTM", "Elman"))
    long, short = (evidence.mean(TRUNCATION, arm, "test_accuracy") for arm in (LONG, SHORT))
    clipped, unclipped = (evidence.mean(CLIPPING, arm, "failed") for arm in ("clipped", "unclipped"))
    future = evidence.difference(TAGGING, "BRNN", "Elman", "test_accuracy")
    ntm, gates = (evidence.mean(COPY, arm, "wrong at longer") for arm in ("NTM", "LSTM"))
    holds = (
        all(abs(slope - math.log(r)) <= SLOPE_ERROR for r, slope in slopes.items()) and abs(carried) <= LSTM_SLOPE,
        lstm >= LEARNED and elman <= ELMAN_AT_MOST,
        long >= LEARNED and short <= CHANCE_AT_MOST,
        clipped <= FAILED_CLIPPED and unclipped >= FAILED_UNCLIPPED,
        future.estimate >= TAGGING_GAIN,
        ntm <= COPY_RATIO * gates,
    )
    count = sum(holds)
    outcome: Outcome = "not reproduced"
    if count >= 5 and all(holds[:3]):
        outcome = "reproduced"
    elif count >= 3:
        outcome = "partly"
    words = ", ".join(f"({place}) {'holds' if held else 'fails'}" for place, held in enumerate(holds, 1))
    measured = ", ".join(f"{slope:+.3f} at ρ = {r} (ln ρ = {math.log(r):+.3f})" for r, slope in slopes.items())
    reason = (
        f"{count} of 6: {words}. Slope of the log error a step back: {measured}, LSTM with f ≡ 1 {carried:+.4f}; "
        f"temporal order: LSTM {lstm:.1%}, Elman {elman:.1%}; exclusive or: k₂ = 40 {long:.1%}, k₂ = 10 {short:.1%}; "
        f"failed runs: clipped {clipped:.0%}, unclipped {unclipped:.0%}; tagging: BRNN − Elman {future.estimate:+.3f}; "
        f"bits wrong: NTM {ntm:.1%}, LSTM {gates:.1%}"
    )
    margins: dict[str, Interval | float] = {
        "statements that hold": float(count),
        "temporal order, LSTM − Elman": evidence.difference(ORDER, "LSTM", "Elman", "test_accuracy"),
        "exclusive or, k₂ = 40 − k₂ = 10": evidence.difference(TRUNCATION, LONG, SHORT, "test_accuracy"),
        "failed runs, clipped − unclipped": evidence.difference(CLIPPING, "clipped", "unclipped", "failed"),
        "tagging, BRNN − Elman": future,
        "bits wrong, NTM − LSTM": evidence.difference(COPY, "NTM", "LSTM", "wrong at longer"),
    }
    return Verdict(outcome, reason, margins)


_RATES = ({"lr": 3e-3}, {"lr": 1e-2})
_FLOW: dict[str, Scalar] = {"hidden": 32, "features": 4}
_ORDER: dict[str, Scalar] = {"hidden": 48, "batch_size": 32, "tuning_divisor": 1}
_TRUNCATION: dict[str, Scalar] = {"hidden": 32, "batch_size": 32, "tuning_divisor": 3}
_CLIPPING: dict[str, Scalar] = {"hidden": 32, "batch_size": 32}
_TAGGING: dict[str, Scalar] = {"symbols": 4, "ahead": 3, "batch_size": 32, "tuning_divisor": 3}
_COPY: dict[str, Scalar] = {"bits": 4, "batch_size": 32, "tuning_divisor": 3}


def _tiers(shared: Settings, smoke: Settings, small: Settings, full: Settings) -> dict[str, Tier]:
    return {
        "smoke": Tier(1, {**shared, **smoke}),
        "small": Tier(3, {**shared, **small}),
        "full": Tier(3, {**shared, **full}),
    }


CLAIM = Claim(
    slug="rnn-review",
    statement=(
        "Errors of simple recurrent networks fade or grow exponentially with the lag, those of an LSTM do not, so that "
        "it learns long dependencies; truncation loses what lies beyond it; clipping stops explosions; future context "
        "helps where it informs; external memory carries copying over to longer sequences."
    ),
    figures=(
        Figure("No figures of its own: the six statements are the survey's", "sections 2.3, 2.4, 4.1, 4.2, 4.3"),
        Figure("LSTM bridges time lags of more than 1000 steps", "section 4.1, of Hochreiter & Schmidhuber (1997)"),
    ),
    rule=(
        "With means over seeds: (1) the slope of the log error a step back is within 0.05 of ln ρ for tanh Elman "
        "networks of spectral radius ρ = 0.5, 0.9 and 1.1 in their linear range, over 200 steps, and within 0.02 of 0 "
        "for an LSTM with f ≡ 1; (2) temporal order over 60 steps: LSTM ≥ 95 %, Elman ≤ 70 %; (3) delayed exclusive "
        "or, lag 30: k₂ = 40 ≥ 95 %, k₂ = 10 ≤ 60 %; (4) adding with ReLU networks from 1.2 of the identity: at most "
        "10 % of runs fail (no number, or a loss above the first) with clipping, at least 50 % without; (5) naming the "
        "symbol three steps ahead: BRNN at least 20 points above Elman; (6) copying twice the longest trained length: "
        "NTM has at most half the LSTM's wrong bits. Reproduced: at least five, the first three among them. Partly: at "
        "least three. Else not reproduced."
    ),
    studies={
        FLOW: Study(
            arms=(CARRIED, GATED, "Elman"),
            tiers=_tiers(_FLOW, {"nets": 1, "steps": 40}, {"nets": 7, "steps": 200}, {"nets": 100, "steps": 1000}),
        ),
        ORDER: Study(
            arms=("LSTM", "Elman"),
            tiers=_tiers(
                _ORDER,
                {"length": 10, "train": 128, "epochs": 2, "test": 64},
                {"length": 60, "train": 16_000, "epochs": 6, "test": 1000},
                {"length": 200, "train": 100_000, "epochs": 60, "test": 10_000},
            ),
            tuning=Tuning(_RATES, metric="validation_accuracy"),
        ),
        TRUNCATION: Study(
            arms=(LONG, SHORT),
            tiers=_tiers(
                _TRUNCATION,
                {"lag": 12, "train": 128, "epochs": 2, "test": 64},
                {"lag": 30, "train": 8000, "epochs": 12, "test": 1000},
                {"lag": 30, "train": 8000, "epochs": 100, "test": 10_000},
            ),
            tuning=Tuning(_RATES, metric="validation_accuracy"),
        ),
        CLIPPING: Study(
            arms=("clipped", "unclipped"),
            tiers=_tiers(
                _CLIPPING,
                {"length": 20, "train": 128, "epochs": 1, "test": 64, "runs": 1},
                {"length": 50, "train": 1600, "epochs": 4, "test": 500, "runs": 4},
                {"length": 200, "train": 16_000, "epochs": 20, "test": 5000, "runs": 20},
            ),
            tuning=Tuning(_RATES, metric="validation_loss", maximize=False),
        ),
        TAGGING: Study(
            arms=("BRNN", "Elman"),
            tiers=_tiers(
                _TAGGING,
                {"hidden": 16, "length": 10, "steps": 20, "test": 64},
                {"hidden": 32, "length": 20, "steps": 600, "test": 1000},
                {"hidden": 64, "length": 100, "steps": 10_000, "test": 10_000},
            ),
            tuning=Tuning(_RATES, metric="validation_accuracy"),
        ),
        COPY: Study(
            arms=("NTM", "LSTM"),
            tiers=_tiers(
                _COPY,
                {"hidden": 16, "slots": 8, "width": 6, "longest": 2, "tested": 4, "train": 64, "epochs": 2, "test": 32},
                {"hidden": 64, "slots": 24, "width": 10, "longest": 6, "tested": 12}
                | {"train": 16_000, "epochs": 5, "test": 500},
                {"bits": 8, "hidden": 100, "slots": 128, "width": 20, "longest": 20, "tested": 100}
                | {"train": 100_000, "epochs": 50, "test": 1000},
            ),
            tuning=Tuning(_RATES, metric="validation_wrong", maximize=False),
        ),
    },
    comparisons=(
        Comparison(FLOW, "slope, unit inputs", CARRIED, GATED, "slope of the log error a step back"),
        Comparison(ORDER, "test_accuracy", "LSTM", "Elman", "temporal order over 60 steps"),
        Comparison(TRUNCATION, "test_accuracy", LONG, SHORT, "exclusive or over 30 steps"),
        Comparison(CLIPPING, "failed", "clipped", "unclipped", "share of failed runs", maximize=False),
        Comparison(TAGGING, "test_accuracy", "BRNN", "Elman", "the symbol three steps ahead"),
        Comparison(COPY, "wrong at longer", "NTM", "LSTM", "bits wrong at twice the trained length", maximize=False),
    ),
    run=run,
    judge=judge,
    deviations=(
        "A forget bias of 1 alone gives f = 0.73 in a fresh LSTM, whose errors fade like 0.73 a step; statement (1) is "
        "judged on f ≡ 1, the form of 1997 (with its full gradient), and the other is shown beside it.",
        "Elman networks are judged on inputs of 1e-10, where tanh is linear for all 200 steps, as the theory supposes; "
        "with unit inputs saturation sets in, and the slopes are shown beside.",
        "Seven random networks a seed, 21 in all. The clipping study counts four runs a seed, by plain gradient "
        "descent; all other training is by Adam on gradients clipped at 5.",
        "Step sizes are picked on a third of the steps, in the clipping study on one run, and on all steps for "
        "temporal order: there a third left every arm at chance and the choice to a tie, with which one LSTM of three "
        "learned nothing in a first run of this claim.",
        "Short copies are of 1 to 6 items of 4 bits, the long ones of 12.",
    ),
)
