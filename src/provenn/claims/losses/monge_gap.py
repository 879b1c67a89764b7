"""The Monge gap's claim: a fitting loss with the gap finds maps near the optimal one where the loss alone does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from provenn.claims.claim import (
    Claim,
    Comparison,
    Event,
    Evidence,
    Figure,
    Metric,
    Outcome,
    Point,
    Scalar,
    Settings,
    Study,
    Tier,
    Trial,
    Tuning,
    Verdict,
)
from provenn.claims.losses._monge_gap_arms import (
    ALONE,
    CONVEX,
    ENTROPIC,
    EUCLIDEAN,
    SQUARED,
    WITH_GAP,
    Map,
    Task,
    crossings,
    curves,
    fitted,
    fitted_between_curves,
    gaussians,
)
from provenn.losses import MongeGap, SinkhornDivergence, l2_uvp, transport_cost_ratio

DIMENSIONS = {"Gaussians, d = 2": 2, "Gaussians, d = 8": 8, "Gaussians, d = 16": 16}
CURVES = "moons to S-curve"
UVP, FIT, CROSSINGS, CHOSEN = "L2-UVP", "held-out Δ", "crossing pairs", "held-out Δ + gap"
HALF, LARGEST_UVP, FIT_RATIO, FALL = 0.5, 15.0, 1.2, 0.8
_ROUNDING = 1e-9

_RATES = (1e-3, 3e-3, 1e-2)
_FINE_RATES = (3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2)
_PLAIN: tuple[Settings, ...] = tuple({"lr": rate} for rate in _FINE_RATES)
SETTINGS: Mapping[str, Sequence[Settings]] = {
    WITH_GAP: tuple({"lr": rate, "gap_weight": weight} for rate in _RATES for weight in (0.1, 1.0, 10.0)),
    ALONE: _PLAIN,
    CONVEX: _PLAIN,
    ENTROPIC: tuple({"relative_epsilon": share} for share in (0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3)),
}
"""Nine settings an arm."""


def run(trial: Trial) -> Iterator[Event]:
    """Fit one map, and measure it on samples held back."""
    between_curves = trial.study == CURVES
    task = curves(trial) if between_curves else gaussians(trial, DIMENSIONS[trial.study])
    try:
        T, history = fitted_between_curves(trial, task) if between_curves else fitted(trial, task)
    except FloatingPointError:  # a rate too high: the setting loses, and a cell says so by its figures
        T, history = torch.zeros_like, []
    if trial.tuning:
        x, y = task.chosen_by
        yield Metric(CHOSEN, _fit(T, x, y) + max(0.0, float(MongeGap(epsilon=0)(x, T(x)))))
        return
    for record in history:
        yield Point("training loss", record.step, record.loss)
    yield from (_figures_of_curves if between_curves else _figures_of_gaussians)(T, task)


def _fit(T: Map, x: torch.Tensor, y: torch.Tensor) -> float:
    return float(SinkhornDivergence(tol=1e-3)(T(x), y))


def _figures_of_gaussians(T: Map, task: Task) -> Iterator[Event]:
    x, y = task.judged_by
    assert task.truth is not None
    yield Metric(UVP, l2_uvp(T, task.truth, x))
    yield Metric(FIT, _fit(T, x, y))
    yield Metric("gap", float(MongeGap(epsilon=0)(x, T(x))))
    yield Metric("cost over the optimal map's", float((T(x) - x).square().sum() / (task.truth(x) - x).square().sum()))
    yield Metric("cost over the least between samples", transport_cost_ratio(T, x, y))


def _figures_of_curves(T: Map, task: Task) -> Iterator[Event]:
    x, y = task.judged_by
    images = T(x)
    yield Metric(CROSSINGS, crossings(x, images))
    yield Metric("mean distance moved", float((images - x).norm(dim=1).mean()))
    yield Metric("mean squared distance moved", float((images - x).square().sum(dim=1).mean()))
    yield Metric(FIT, _fit(T, x, y))
    yield Metric("gap, Euclidean", float(MongeGap("euclidean", epsilon=0)(x, images)))


def judge(evidence: Evidence) -> Verdict:
    """Apply the rule to UVP and held-out Δ in each dimension, then to the crossings."""
    halved, close, level, reasons = 0, True, True, []
    for study in DIMENSIONS:
        uvp, alone = (evidence.mean(study, arm, UVP) for arm in (WITH_GAP, ALONE))
        fit, fit_alone = (evidence.mean(study, arm, FIT) for arm in (WITH_GAP, ALONE))
        halved += uvp <= HALF * alone + _ROUNDING
        close &= uvp <= LARGEST_UVP + _ROUNDING
        level &= fit <= FIT_RATIO * fit_alone + _ROUNDING
        others = ", ".join(f"{arm} {evidence.mean(study, arm, UVP):.1f} %" for arm in (CONVEX, ENTROPIC))
        reasons.append(
            f"{study}: UVP {uvp:.1f} % with the gap, {alone:.1f} % without ({others}); held-out Δ {fit:.3g} and "
            f"{fit_alone:.3g}"
        )
    crossed, crossed_alone = (evidence.mean(CURVES, arm, CROSSINGS) for arm in (EUCLIDEAN, ALONE))
    fell = crossed_alone > 0 and crossed <= (1 - FALL) * crossed_alone + _ROUNDING
    reasons.append(
        f"{CURVES}: {crossed:.0f} crossing pairs under the Euclidean gap, "
        f"{evidence.mean(CURVES, SQUARED, CROSSINGS):.0f} under the squared one, {crossed_alone:.0f} without"
    )
    everything = halved == len(DIMENSIONS) and close and level and fell
    outcome: Outcome = "reproduced" if everything else "partly" if halved >= 2 else "not reproduced"
    margins = {f"UVP, {study}": evidence.difference(study, WITH_GAP, ALONE, UVP) for study in DIMENSIONS}
    margins[f"crossing pairs, {CURVES}"] = evidence.difference(CURVES, EUCLIDEAN, ALONE, CROSSINGS)
    return Verdict(outcome, "; ".join(reasons), margins)


_TUNING = Tuning(SETTINGS, CHOSEN, maximize=False)
_SMOKE: dict[str, Scalar] = {"steps": 10, "tuning steps": 5, "batch": 32, "samples": 64, "held back": 64}
_SMALL: dict[str, Scalar] = {"steps": 800, "tuning steps": 250, "batch": 128, "samples": 4096, "held back": 512}
_FULL: dict[str, Scalar] = {"steps": 10_000, "tuning steps": 2000, "batch": 1024, "samples": 65_536, "held back": 2000}
_RATE = 3e-3

CLAIM = Claim(
    slug="monge-gap",
    statement=(
        "A fitting loss with the Monge gap teaches an ordinary network a map close to the optimal one, for squared "
        "Euclidean and other costs, where the fitting loss alone does not."
    ),
    figures=(
        Figure(
            "maps close to optimal for the squared Euclidean, the Euclidean and spherical costs, where the fitting "
            "loss alone finds others",
            "section 6.1, and the Monge gap tutorial of the authors' library (pictures, no figures)",
        ),
        Figure(
            "a smaller unexplained variance than ICNN methods on the W2 benchmark of Korotin et al. in higher "
            "dimensions, up to 256 (as far as known)",
            "section 6.2",
        ),
        Figure(
            "a smaller Sinkhorn divergence than ICNN methods on cell perturbation data (4i, scRNA) for most of 34 "
            "drugs (as far as known)",
            "section 6.3",
        ),
    ),
    rule=(
        "Means over seeds. Reproduced: (a) between random Gaussians in 2, 8 and 16 dimensions the L2-UVP with the gap "
        "is at most half of that of the fitting loss Δ alone and at most 15 % in all three, and held-out Δ is at most "
        "1.2 times that of Δ alone; (b) from two moons to an S-curve the pairs of segments x → T(x) that cross fall by "
        "at least 80 % under the Euclidean gap against Δ alone. Partly: UVP is halved in two dimensions. Else not "
        "reproduced."
    ),
    studies={
        **{
            study: Study(
                arms=(WITH_GAP, ALONE, CONVEX, ENTROPIC),
                tiers={
                    "smoke": Tier(seeds=1, budget=_SMOKE),
                    "small": Tier(seeds=3, budget=_SMALL),
                    "full": Tier(seeds=5, budget=_FULL),
                },
                tuning=_TUNING,
            )
            for study in DIMENSIONS
        },
        CURVES: Study(
            arms=(EUCLIDEAN, SQUARED, ALONE),
            tiers={
                "smoke": Tier(seeds=1, budget=_SMOKE | {"lr": _RATE}),
                "small": Tier(seeds=3, budget=_SMALL | {"lr": _RATE}),
                "full": Tier(seeds=5, budget=_FULL | {"lr": 1e-3}),
            },
        ),
    },
    comparisons=(
        *(
            Comparison(study, metric, WITH_GAP, arm, f"{metric}, {study}", maximize=False)
            for metric in (UVP, FIT)
            for study in DIMENSIONS
            for arm in (ALONE, CONVEX, ENTROPIC)
        ),
        Comparison(CURVES, CROSSINGS, EUCLIDEAN, ALONE, CROSSINGS, maximize=False),
        Comparison(CURVES, CROSSINGS, SQUARED, ALONE, CROSSINGS, maximize=False),
        Comparison(CURVES, FIT, EUCLIDEAN, ALONE, f"{FIT}, {CURVES}", maximize=False),
    ),
    run=run,
    judge=judge,
    deviations=(
        "800 steps on batches of 128 in place of 2 000 on 256, and 250 steps in tuning, for every arm alike; rates "
        "from 1e-3 to 1e-2 in place of around 1e-3, since the steps are fewer.",
        "Each arm tries nine settings on one seed and keeps the one of the least held-out Δ plus exact gap, both of "
        "weight 1: three rates by three weights of the gap; nine rates for Δ alone and for the ICNN's gradient, which "
        "have no weight; nine ε for the entropic map, which is solved on 1 024 points.",
        "Variances are drawn from ¼ to 4 along random axes, uniform in their logarithm, and means from a standard "
        "normal. The map between Gaussians is a plain perceptron, MLP(x); between the curves it is x + MLP(x), as in "
        "the authors' tutorial.",
        "ε is 0.1 of the mean target cost of each batch in Δ, and 0.01 of the mean cost in the gap; Sinkhorn ends at "
        "a marginal error of 1e-2 in training, with ε-scaling 0.5 and relaxation 1.7 in the gap.",
        "Between the curves nothing is tuned: a rate of 3e-3, and the tutorial's weights, 2 for the Euclidean cost and "
        "0.1 for the squared one. The tutorial has one moon; here there are two.",
    ),
)
