"""MAID's claim: as low a loss as the best-tuned HOAG, whatever the first accuracy and the first step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
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
    Study,
    Tier,
    Trial,
    Verdict,
)
from provenn.claims.optim._maid_bilevel_tasks import denoising, digits, exact_value, quadratic
from provenn.core.experiment.statistics import Interval, bootstrap_mean
from provenn.optim import HOAG, MAID, BilevelProblem, BilevelResult

STUDIES = ("quadratic", "digits", "tv")
SEQUENCES = ("geometric", "quadratic", "cubic")
ARMS = ("MAID", *(f"HOAG, {sequence}" for sequence in SEQUENCES))
SETTINGS = {f"ε₀ {eps:g}, β₀ {step:g}": (eps, step) for eps in (1e-1, 1e-3, 1e-5) for step in (1e-2, 1.0, 100.0)}
_STEPS = 10_000  # more than any budget allows


def run(trial: Trial) -> Iterator[Event]:
    """Run an arm from all nine settings of first accuracy and first step, each to the budget."""
    problem, test = _problem(trial)
    finals = []
    for done, (name, (eps, step)) in enumerate(SETTINGS.items()):
        yield Progress(done, len(SETTINGS))
        result = _solved(trial, problem, eps, step)
        finals.append(exact_value(problem, result.theta, result.x))
        yield Metric(f"{name}: final loss", finals[-1])
        yield Metric(f"{name}: outer iterations", len(result.history) - 1)
        if test is not None:
            yield Metric(f"{name}: test accuracy", (test[0] @ result.x).argmax(1).eq(test[1]).double().mean().item())
        for record in result.history[1:]:
            yield Point(f"{name}: loss", record.lower_iterations + record.cg_iterations, record.value)
    yield Metric("worst final loss", max(finals))
    yield Metric("median final loss", float(np.median(finals)))
    yield Metric("best final loss", min(finals))
    yield Metric("worst / best", max(finals) / min(finals))


def _problem(trial: Trial) -> tuple[BilevelProblem, tuple[Tensor, Tensor] | None]:
    """Build the study's problem for a seed, and the test set if there is one."""
    budget = trial.budget
    if trial.study == "quadratic":
        return _on(quadratic(trial.seed, int(budget["size"]), int(budget["rows"])), trial.device), None
    if trial.study == "digits":
        problem, x, y = digits(trial.seed, int(budget["training"]))
        return _on(problem, trial.device), (x.to(trial.device), y.to(trial.device))
    return _on(denoising(trial.seed, int(budget["images"]), int(budget["side"])), trial.device), None


def _on(problem: BilevelProblem, device: str) -> BilevelProblem:
    """Move a problem's tensors to a device."""

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(moved(one) for one in value)
        return value.to(device) if isinstance(value, Tensor) else value

    for name, value in vars(problem).items():
        setattr(problem, name, moved(value))
    return problem


def _solved(trial: Trial, problem: BilevelProblem, eps: float, step: float) -> BilevelResult:
    shared = {"eps0": eps, "step0": step, "lower_max_iter": int(trial.budget["lower_max_iter"])}
    method: Any
    if trial.arm == "MAID":
        method = MAID.for_problem(problem, delta0=eps, rho=0.5, tau=0.5, **shared)
    else:
        method = HOAG.for_problem(problem, sequence=trial.arm.removeprefix("HOAG, "), **shared)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the cap on lower solves is part of the budget
        result: BilevelResult = method.solve(budget=int(trial.budget["work"]), max_steps=_STEPS, tol=1e-9)
    return result


def judge(evidence: Evidence) -> Verdict:
    """Apply the rule to the geometric means over seeds of ratios of final losses."""
    spreads = {study: _geometric(_spread(evidence, study, "MAID")) for study in STUDIES}
    # The sequence that depends least on the setting speaks for HOAG.
    rivals = {
        study: min((_geometric(_spread(evidence, study, arm)) for arm in ARMS[1:]), key=lambda spread: spread.estimate)
        for study in STUDIES
    }
    against = {study: _geometric(_against_best(evidence, study)) for study in STUDIES}
    robust = all(spread.estimate <= 1.1 for spread in spreads.values())
    rival_depends = any(spread.estimate >= 1.5 for spread in rivals.values())
    as_low = sum(ratio.estimate <= 1 for ratio in against.values()) >= 2
    outcome: Outcome
    if robust and rival_depends and as_low:
        outcome = "reproduced"
    elif robust:
        outcome = "partly"
    else:
        outcome = "not reproduced"
    reason = (
        f"worst over best final loss of MAID's nine settings: {_listed(spreads)}; of HOAG's steadiest sequence: "
        f"{_listed(rivals)}; MAID's median over HOAG's best: {_listed(against)}"
    )
    margins: dict[str, Interval | float] = {}
    for title, found in (
        ("MAID: worst / best", spreads),
        ("HOAG's steadiest sequence: worst / best", rivals),
        ("MAID's median / HOAG's best", against),
    ):
        margins.update({f"{title}, {study}": value for study, value in found.items()})
    return Verdict(outcome, reason, margins)


def _spread(evidence: Evidence, study: str, arm: str) -> np.ndarray:
    ratio: np.ndarray = evidence.values(study, arm, "worst final loss") / evidence.values(study, arm, "best final loss")
    return ratio


def _against_best(evidence: Evidence, study: str) -> np.ndarray:
    best = np.min([evidence.values(study, arm, "best final loss") for arm in ARMS[1:]], axis=0)
    ratio: np.ndarray = evidence.values(study, "MAID", "median final loss") / best
    return ratio


def _geometric(ratios: np.ndarray) -> Interval:
    """The geometric mean over seeds, with its bootstrap interval."""
    logs = bootstrap_mean(np.log(ratios))
    return Interval(math.exp(logs.estimate), math.exp(logs.low), math.exp(logs.high))


def _listed(ratios: Mapping[str, Interval]) -> str:
    return ", ".join(f"{study} {ratio}" for study, ratio in ratios.items())


_QUADRATIC = {"size": 10, "rows": 1000, "work": 20_000, "lower_max_iter": 300}
_DIGITS = {"training": 600, "work": 4000, "lower_max_iter": 300}
_TV = {"images": 6, "side": 32, "work": 3000, "lower_max_iter": 300}
_FULL = {"work": 1_000_000, "lower_max_iter": 2000}

CLAIM = Claim(
    slug="maid-bilevel",
    statement=(
        "With accuracies and steps that a bound of the hypergradient's error and a line search on inexact values "
        "choose, MAID reaches a lower upper-level loss than HOAG at the same number of lower-level iterations, and its "
        "result hardly depends on the first accuracy and the first step."
    ),
    figures=(
        Figure(
            "quadratic, total variation, field of experts: curves of the loss against lower-level iterations from ε₀ = "
            "δ₀ ∈ {1e-1, 1e-3, 1e-5} end together; with fixed accuracy they stall or lag",
            "section on numerical experiments, figures of loss against lower-level computations",
        ),
        Figure(
            "multinomial logistic regression and field of experts: below HOAG with geometric, quadratic and cubic "
            "sequences",
            "figures of MAID against HOAG; MAIDvsHOAG.png of the authors' code",
        ),
    ),
    rule=(
        "For ε₀ ∈ {1e-1, 1e-3, 1e-5} × β₀ ∈ {1e-2, 1, 100}, to a common budget of lower-level plus CG iterations, on "
        "three problems: (a) quadratic, (b) digits with 640 penalties, (c) TV denoising. Ratios of final losses are "
        "geometric means over seeds. Reproduced: MAID's worst is at most 1.1 times its best on all problems, that of "
        "HOAG's steadiest sequence at least 1.5 times its best on one or more, and MAID's median is at most the best "
        "of all HOAG runs on two of three. Partly: the first. Else not reproduced."
    ),
    studies={
        "quadratic": Study(
            arms=ARMS,
            tiers={
                "smoke": Tier(seeds=1, budget={**_QUADRATIC, "rows": 40, "work": 150, "lower_max_iter": 50}),
                "small": Tier(seeds=3, budget=_QUADRATIC),
                "full": Tier(seeds=5, budget={**_QUADRATIC, **_FULL}),
            },
        ),
        "digits": Study(
            arms=ARMS,
            tiers={
                "smoke": Tier(seeds=1, budget={**_DIGITS, "training": 100, "work": 60, "lower_max_iter": 20}),
                "small": Tier(seeds=3, budget=_DIGITS),
                "full": Tier(seeds=3, budget={**_DIGITS, **_FULL}),
            },
        ),
        "tv": Study(
            arms=ARMS,
            tiers={
                "smoke": Tier(seeds=1, budget={**_TV, "images": 1, "side": 16, "work": 60, "lower_max_iter": 20}),
                "small": Tier(seeds=3, budget=_TV),
                "full": Tier(seeds=3, budget={**_TV, "images": 24, "side": 96, **_FULL}),
            },
        ),
    },
    comparisons=tuple(
        Comparison(study, metric, "MAID", baseline, maximize=False)
        for study in STUDIES
        for metric in ("worst / best", "worst final loss", "median final loss", "best final loss")
        for baseline in ARMS[1:]
    ),
    run=run,
    judge=judge,
    deviations=(
        "The budgets count 20 000, 4000 and 3000 lower-level plus CG iterations where the paper's run to 10⁶ "
        "lower-level ones; a lower solve may take 300, not 2000, of them; three draws of the quadratic, not five; "
        "images of 32 × 32 pixels, not 64 × 64. All arms alike. A first run had 1000 iterations for digits and images "
        "and solves of at most 100, and was not reproduced: MAID's worst over best 1.43, 1.42 and 3.55.",
        "ρ = τ = ½, as in the authors' scripts for quadratic, TV and field of experts: with ρ = 0.9 no line search of "
        "this length could come down from β₀ = 100.",
        "HOAG takes the adaptive step of the authors' code from β₀, but goes back where the loss rose by a fifth.",
        "Digits stand in for MNIST, simulated images for Kodak's; DFO-LS is left out, as in the card.",
        "The final loss is f(θ) by an accurate lower solve outside the budget. Products with J and Jᵀ, and of "
        "constants' estimates all but CG iterations, are not counted, as in the authors' code.",
        "HOAG's spread is that of its steadiest sequence, the strictest reading of the rule.",
    ),
)
