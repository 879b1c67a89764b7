"""The claim of generalised scattering: bounds on shifts and deformations, for every frame and non-linearity."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import product

import numpy as np
import torch
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor

from provenn.claims.claim import (
    Claim,
    Comparison,
    Event,
    Evidence,
    Figure,
    Metric,
    Outcome,
    Progress,
    Scalar,
    Study,
    Tier,
    Trial,
    Verdict,
)
from provenn.claims.nn import _semi_discrete_frames_signals as signals
from provenn.core.experiment.seeding import generator
from provenn.nn import (
    FilterBank,
    GeneralizedScattering,
    ScatteringLayer,
    deformation_probe,
    translation_probe,
)

BANKS: Mapping[str, Callable[[tuple[int, int]], FilterBank]] = {
    "Morlet": lambda grid: FilterBank.morlet(grid, 2, 3),
    "Haar": FilterBank.haar,
    "Gabor": lambda grid: FilterBank.gabor(grid, 3),
    "curvelet": lambda grid: FilterBank.curvelet(grid, 2, 2),
}
KINDS = ("modulus", "relu", "tanh")
DEPTH, STRIDE = 3, 2
NETWORKS = tuple(f"{bank}, {kind}" for bank, kind in product(BANKS, KINDS))
PIXELS = "pixels"
TRANSLATION, DEFORMATION, CLASSES = "translation", "deformation", "classification"
STUDIES = {
    TRANSLATION: NETWORKS,
    DEFORMATION: tuple(f"{bank}, modulus" for bank in BANKS),
    CLASSES: (*(f"{bank}, modulus" for bank in BANKS), PIXELS),
}
SHIFTS = (1, 2, 3, 4, 5, 6, 7, 8)
AMPLITUDES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
BAND, CARTOON = (0.85, 1.15), (0.4, 0.7)
ROUNDING = 1e-6
PENALTIES = (1e-4, 1e-3, 1e-2)


def network(arm: str, size: int) -> GeneralizedScattering:
    """Return an admissible network of three layers, each with averages over 2 × 2 points."""
    bank, kind = arm.split(", ")
    layers = []
    for level in range(DEPTH):
        side = size // STRIDE**level
        layers.append(ScatteringLayer(BANKS[bank]((side, side)), kind, "average", STRIDE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # not yet normalised
        return GeneralizedScattering(layers).normalized()


def run(trial: Trial) -> Iterator[Event]:
    """Measure shifts or deformations beside their bounds, or classify by features."""
    studies = {TRANSLATION: _translation, DEFORMATION: _deformation, CLASSES: _classification}
    yield from studies[trial.study](trial)


def _translation(trial: Trial) -> Iterator[Event]:
    size, count = int(trial.budget["size"]), int(trial.budget["images"])
    net = network(trial.arm, size).to(trial.device)
    x, _ = signals.digits(str(trial.budget["data"]), size, count, trial.seed)
    report = translation_probe(net, x.to(trial.device), SHIFTS)
    measured, bound, mean = (np.array(one) for one in (report.measured, report.bound, report.mean))
    yield Progress(1, 1)
    # An atom that passes nothing but the mean has the bound 0, and leaves changes of rounding size.
    shares = np.maximum(measured - ROUNDING, 0) / np.maximum(bound, ROUNDING)
    yield Metric("largest share of the bound", float(shares.max()))
    yield Metric("shifts at which deeper layers change less", float((np.diff(mean, axis=0) < 0).all(0).mean()))
    for layer in range(DEPTH + 1):
        yield Metric(f"mean change, n = {layer}", float(mean[layer].mean()))


def _deformation(trial: Trial) -> Iterator[Event]:
    size, count = int(trial.budget["size"]), int(trial.budget["signals"])
    net = network(trial.arm, size).double().to(trial.device)
    draws = generator(trial.seed, "deformations")
    found: dict[str, list[float]] = {"band-limited": [], "cartoon": [], "Lipschitz": []}
    share, fields = 0.0, int(trial.budget["fields"])
    for field in range(fields):
        tau = signals.displacement(size, draws)
        smooth = signals.band_limited(count, size, draws).to(trial.device)
        report = deformation_probe(net, smooth, tau.to(trial.device), AMPLITUDES)
        found["band-limited"].append(report.slope)
        share = max(share, max(m / b for m, b in zip(report.measured, report.bound, strict=True)))
        shape = signals.shapes(count, size, draws)
        for name, make in (("cartoon", signals.discs), ("Lipschitz", signals.cones)):
            slope, worst = _sampled(net, [make(shape, size, a * tau).to(trial.device) for a in (0.0, *AMPLITUDES)])
            found[name].append(slope)
            share = max(share, worst)
        yield Progress(field + 1, fields)
    for name, slopes in found.items():
        yield Metric(f"slope, {name}", float(np.mean(slopes)))
    yield Metric("largest share of the bound", share)


@torch.no_grad()
def _sampled(net: GeneralizedScattering, moved: list[Tensor]) -> tuple[float, float]:
    """Return the slope of the features' change over the amplitudes, and its largest share of the signals' change."""
    still, features = moved[0], net(moved[0])
    size = still.flatten(1).norm(dim=1)
    changes, worst = [], 0.0
    for signal in moved[1:]:
        squares = [(a - b).abs().square().flatten(1).sum(1) for a, b in zip(net(signal), features, strict=True)]
        change, bound = torch.stack(squares).sum(0).sqrt(), (signal - still).flatten(1).norm(dim=1)
        worst = max(worst, float((change / bound.clamp(min=1e-12)).max()))
        changes.append(float((change / size).mean()))
    return float(np.polyfit(np.log(AMPLITUDES), np.log(np.maximum(changes, 1e-300)), 1)[0]), worst


def _classification(trial: Trial) -> Iterator[Event]:
    size, count = int(trial.budget["size"]), int(trial.budget["digits"])
    x, y = signals.digits(str(trial.budget["data"]), size, count + count // 2 + count // 4, trial.seed)
    rows = (
        x.flatten(1) if trial.arm == PIXELS else _features(network(trial.arm, size).to(trial.device), x, trial.device)
    )
    train, held = slice(0, count), slice(count, count + count // 4)
    scores = []
    for place, penalty in enumerate(PENALTIES):
        scores.append(_svm(rows, y, train, penalty).score(rows[held], y[held]))
        yield Progress(place + 1, len(PENALTIES) + 1)
    best = PENALTIES[int(np.argmax(scores))]
    test = slice(count + count // 4, None)
    yield Metric("features", rows.shape[1])
    yield Metric("test accuracy", float(_svm(rows, y, train, best).score(rows[test], y[test])))


def _svm(rows: Tensor, y: Tensor, train: slice, penalty: float) -> Pipeline:
    return make_pipeline(StandardScaler(), SVC(kernel="linear", C=penalty)).fit(rows[train], y[train])


@torch.no_grad()
def _features(net: GeneralizedScattering, x: Tensor, device: str) -> Tensor:
    """Return the features of deeper layers, and those of the image itself sampled every fourth point."""
    found = []
    for batch in x.split(100):
        first, *deeper = net(batch.to(device))
        coarse = [first[..., ::4, ::4], deeper[0][..., ::2, ::2], *deeper[1:]]
        found.append(torch.cat([one.flatten(1) for one in coarse], 1).cpu())
    return torch.cat(found)


def judge(evidence: Evidence) -> Verdict:
    """Apply the rule."""
    share = max(
        float(evidence.values(study, arm, "largest share of the bound").max())
        for study in (TRANSLATION, DEFORMATION)
        for arm in STUDIES[study]
    )
    falling = min(
        float(evidence.values(TRANSLATION, arm, "shifts at which deeper layers change less").min()) for arm in NETWORKS
    )
    slopes = {
        name: float(np.mean([evidence.mean(DEFORMATION, arm, f"slope, {name}") for arm in STUDIES[DEFORMATION]]))
        for name in ("band-limited", "cartoon", "Lipschitz")
    }
    accuracy = {arm: evidence.mean(CLASSES, arm, "test accuracy") for arm in STUDIES[CLASSES]}
    best = max((arm for arm in accuracy if arm != PIXELS), key=lambda arm: accuracy[arm])
    bounds = share <= 1 + 1e-6
    others = (
        falling >= 1 - 1e-9,
        BAND[0] <= slopes["band-limited"] <= BAND[1] and CARTOON[0] <= slopes["cartoon"] <= CARTOON[1],
        accuracy[best] >= accuracy[PIXELS] - 1e-9,
    )
    outcome: Outcome = "not reproduced"
    if bounds and sum(others) >= 2:
        outcome = "reproduced" if all(others) else "partly"
    reason = (
        f"largest share of a bound {share:.3f}; the mean change falls with the layer at {100 * falling:.0f} % of the "
        f"shifts in the worst network; slopes: {', '.join(f'{name} {slope:.3f}' for name, slope in slopes.items())}; "
        "accuracy: " + ", ".join(f"{arm} {100 * value:.1f} %" for arm, value in accuracy.items())
    )
    margins = {f"{best} over {PIXELS}": evidence.difference(CLASSES, best, PIXELS, "test accuracy")}
    return Verdict(outcome, reason, margins)


_SMALL: dict[str, dict[str, Scalar]] = {
    TRANSLATION: {"data": "mnist", "size": 32, "images": 60},
    DEFORMATION: {"size": 32, "signals": 40, "fields": 3},
    CLASSES: {"data": "mnist", "size": 32, "digits": 1000},
}
_SMOKE: dict[str, dict[str, Scalar]] = {
    TRANSLATION: {"data": "digits", "size": 16, "images": 3},
    DEFORMATION: {"size": 16, "signals": 3, "fields": 1},
    CLASSES: {"data": "digits", "size": 16, "digits": 60},
}
_FULL: dict[str, dict[str, Scalar]] = {
    TRANSLATION: {"data": "mnist", "size": 32, "images": 200},
    DEFORMATION: {"size": 64, "signals": 100, "fields": 10},
    CLASSES: {"data": "mnist", "size": 32, "digits": 10_000},
}

CLAIM = Claim(
    slug="semi-discrete-frames",
    statement=(
        "For every frame, Lipschitz non-linearity and pooling within the admissibility condition, features of deeper "
        "layers change less under shifts, and all features change little under small deformations."
    ),
    figures=(
        Figure("|||Φⁿ(T_t f) − Φⁿ(f)||| ≤ 2π|t|K ‖f‖ / (S_1 ⋯ S_n)", "theorem 1"),
        Figure("|||Φ(F_τ f) − Φ(f)||| ≤ C R ‖τ‖ ‖f‖ for band-limited f, ∝ ‖τ‖^½ for cartoon functions", "theorem 2"),
    ),
    rule=(
        "Reproduced: no measured change exceeds its bound; in every network the mean change falls from layer to layer "
        "at every shift; the mean slope of log change over log amplitude is within 0.85 to 1.15 for band-limited and "
        "0.4 to 0.7 for cartoon signals; and the best bank's features with a linear SVM are at least as accurate as "
        "pixels. Partly: the bounds hold, and two of the other three. Else not reproduced."
    ),
    studies={
        study: Study(
            arms,
            {"smoke": Tier(1, _SMOKE[study]), "small": Tier(3, _SMALL[study]), "full": Tier(5, _FULL[study])},
        )
        for study, arms in STUDIES.items()
    },
    comparisons=(
        *(
            Comparison(
                TRANSLATION, "largest share of the bound", NETWORKS[0], arm, "share of the bound", maximize=False
            )
            for arm in NETWORKS[1:]
        ),
        *(
            Comparison(DEFORMATION, "slope, cartoon", STUDIES[DEFORMATION][0], arm, "slope, cartoon", maximize=False)
            for arm in STUDIES[DEFORMATION][1:]
        ),
        *(
            Comparison(CLASSES, "test accuracy", arm, PIXELS, "test accuracy")
            for arm in STUDIES[CLASSES]
            if arm != PIXELS
        ),
    ),
    run=run,
    judge=judge,
    deviations=(
        "On a grid, sub-sampling alone can raise the energy of a signal: the layers average over 2 × 2 points before "
        "they sample, and the admissibility condition takes the pooling's constant on the grid.",
        "Discs and cones are deformed before they are sampled; noise is deformed by trigonometric interpolation. The "
        "bound of deformations is the signals' own change. Slopes of a pilot with three banks, 0.64 to 0.86 for discs, "
        "were seen before the run; the rule was not touched.",
        "The bound of shifts is exceeded, by up to 3.8 times, in two networks with modulus, at n = 3 alone and for "
        "shifts that the strides' product 8 does not divide: moduli are not band-limited, and every second point of "
        "them moves otherwise than they do. At t = 8, where the theorem holds on the grid exactly, no change is above "
        "a tenth of its bound from n = 3 on.",
        "60 digits for shifts, 1000 to train the SVM on, whose penalty is picked on 250 others for every arm.",
    ),
)
