"""Bayesian optimisation: its parts held to their contracts, and the judge."""

from __future__ import annotations

import math

import pytest
import torch

from provenn.claims.claim import Evidence
from provenn.claims.search.bayesian_optimization import ACQUISITIONS, NOISY, OBSERVED, RANDOM, STUDIES, judge
from provenn.contracts import BadInput, EstimatorCase, FunctionCase, SearcherCase
from provenn.core.numerics.covariance_functions import Hyperparameters, Matern
from provenn.core.numerics.gaussian_processes import GaussianPosterior
from provenn.core.numerics.objectives import branin
from provenn.search import BayesianOptimizer, GaussianProcess, acquisition

BRANIN = branin()
LOW, HIGH = BRANIN.bounds


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def posterior(noise: float = 0.05) -> GaussianPosterior:
    X = drawn(6, 2)
    weights = torch.tensor([8.0, 8.0], dtype=torch.float64)
    some = Hyperparameters(torch.tensor(1.0).double(), weights, torch.tensor(noise).double())
    return GaussianPosterior(Matern(2.5), some, X, (5 * X).sin().sum(1))


def line(value: float) -> torch.Tensor:
    return torch.tensor([value, 1.0], dtype=torch.float64)


def source() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def function(name: str, call, argument: str, bad) -> FunctionCase:
    return FunctionCase(f"provenn.search.acquisition.{name}", call, bad_input=(BadInput(argument, bad),))


A, Q = drawn(12, 2, seed=1), drawn(3, 2, seed=2)
BOX = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)

CASES = [
    EstimatorCase(
        "provenn.search.GaussianProcess",
        lambda **options: GaussianProcess(**options),
        bad_input=(
            BadInput("noise", lambda: GaussianProcess(noise=-1.0).fit(A, A.sum(1))),
            BadInput("hyperparameters", lambda: GaussianProcess(hyperparameters="best").fit(A, A.sum(1))),
            BadInput("mean", lambda: GaussianProcess(mean="linear").fit(A, A.sum(1))),
            BadInput("y", lambda: GaussianProcess(derivatives=True).fit(A, A)),
        ),
    ),
    SearcherCase(
        "provenn.search.BayesianOptimizer",
        make=lambda seed: BayesianOptimizer(BRANIN.bounds, noise=0.0, seed=seed, refit_every=4),
        valid=lambda point: point.shape == (2,) and bool(((point >= LOW) & (point <= HIGH)).all()),
        random_point=lambda draws: LOW + (HIGH - LOW) * torch.rand(2, dtype=torch.float64, generator=draws),
        objective=lambda point: BRANIN(point.unsqueeze(0)).item(),
        budget=24,  # six of a Sobol sequence; among random searches of fewer points the ranks say little
        bad_input=(
            BadInput("bounds", lambda: BayesianOptimizer(BRANIN.bounds.flip(0))),
            BadInput("bounds", lambda: BayesianOptimizer(torch.zeros(3, 2))),
            BadInput("acquisition", lambda: BayesianOptimizer(BRANIN.bounds, "best")),
            BadInput("noise", lambda: BayesianOptimizer(BRANIN.bounds, noise=-0.1)),
            BadInput("q", lambda: BayesianOptimizer(BRANIN.bounds, q=0)),
            BadInput("q", lambda: BayesianOptimizer(BRANIN.bounds, "pi", q=2)),
            BadInput("constraints", lambda: BayesianOptimizer(BRANIN.bounds, "kg", constraints=1)),
            BadInput("fidelity", lambda: BayesianOptimizer(BRANIN.bounds, "ei", fidelity=lambda x: x[:, 1])),
            BadInput("n", lambda: BayesianOptimizer(BRANIN.bounds).ask(0)),
            BadInput(
                "constraints", lambda: BayesianOptimizer(BRANIN.bounds, constraints=1).tell(LOW.unsqueeze(0), [1.0])
            ),
            BadInput("gradients", lambda: BayesianOptimizer(BRANIN.bounds).tell(LOW[None], [1.0], gradients=A)),
            BadInput("points", lambda: BayesianOptimizer(BRANIN.bounds).tell(LOW[None] * math.nan, [1.0])),
        ),
    ),
    function(
        "expected_improvement",
        lambda: acquisition.expected_improvement(line(0.2), line(1.0), 0.0),
        "sd",
        lambda: acquisition.expected_improvement(line(0.2), line(-1.0), 0.0),
    ),
    function(
        "probability_of_improvement",
        lambda: acquisition.probability_of_improvement(line(0.2), line(1.0), 0.0),
        "sd",
        lambda: acquisition.probability_of_improvement(line(0.2), line(-1.0), 0.0),
    ),
    function(
        "ucb",
        lambda: acquisition.ucb(line(0.2), line(1.0)),
        "beta",
        lambda: acquisition.ucb(line(0.2), line(1.0), beta=-1),
    ),
    function(
        "constrained_ei",
        lambda: acquisition.constrained_ei(line(0.2), line(1.0), 0.0, line(0.0)[None], line(1.0)[None]),
        "constraint_sd",
        lambda: acquisition.constrained_ei(line(0.2), line(1.0), 0.0, line(0.0)[None], line(-1.0)[None]),
    ),
    function(
        "expected_max_affine",
        lambda: acquisition.expected_max_affine(line(0.2), line(1.0)),
        "a",
        lambda: acquisition.expected_max_affine(line(0.2)[:0], line(1.0)[:0]),
    ),
    FunctionCase(
        "provenn.search.acquisition.noisy_expected_improvement",
        lambda: acquisition.noisy_expected_improvement(posterior(), Q),
        bad_input_reason="any posterior and points are fine",
    ),
    function(
        "knowledge_gradient",
        lambda: acquisition.knowledge_gradient(posterior(), Q, A),
        "bounds",
        lambda: acquisition.knowledge_gradient(posterior(), Q, A, "simulation"),
    ),
    function(
        "entropy_search",
        lambda: acquisition.entropy_search(posterior(), Q, A, source()),
        "samples",
        lambda: acquisition.entropy_search(posterior(), Q, A, source(), samples=0),
    ),
    function(
        "predictive_entropy_search",
        lambda: acquisition.predictive_entropy_search(posterior(), Q, A, source()),
        "method",
        lambda: acquisition.predictive_entropy_search(posterior(), Q, A, source(), "guess"),
    ),
    function(
        "q_expected_improvement",
        lambda: acquisition.q_expected_improvement(line(0.2), EYE[:2, :2], 0.0),
        "base_samples",
        lambda: acquisition.q_expected_improvement(EYE[0], EYE, 0.0),
    ),
    function(
        "q_knowledge_gradient",
        lambda: acquisition.q_knowledge_gradient(posterior(), Q, A, drawn(8, 3)),
        "base_samples",
        lambda: acquisition.q_knowledge_gradient(posterior(), Q, A, drawn(8, 2)),
    ),
]


def evidence(noisy: tuple[float, float], gap_at_zero: float = 0.0, random: float = 0.0) -> Evidence:
    """Make up figures: noisy EI's mean log regrets at noise 0.3; plug-in EI's are −1; each with a spread of 0.1."""
    seeds = [-0.1, 0.1, -0.1, 0.1]
    figures = {}
    for study in STUDIES:
        for arm in (*ACQUISITIONS, RANDOM):
            level = random if arm == RANDOM else -1.0
            figures[study, arm] = {"log10 regret": [level + 0.0 * spread for spread in seeds]}
    for function_, level in zip(("Branin", "Hartmann-6"), noisy, strict=True):
        figures[f"{function_}, noise 0.3", NOISY] = {"log10 regret": [level + spread for spread in seeds]}
        figures[f"{function_}, noise 0", NOISY] = {"log10 regret": [-1.0 + gap_at_zero] * 4}
    assert figures["Branin, noise 0", OBSERVED]["log10 regret"] == [-1.0] * 4
    return Evidence.of(figures)


@pytest.mark.parametrize(
    ("made", "outcome"),
    [
        (evidence((-1.2, -1.2)), "reproduced"),
        (evidence((-1.2, -1.01)), "reproduced"),
        (evidence((-1.01, -1.01)), "not reproduced"),  # no worse anywhere, lower by a standard error nowhere
        (evidence((-1.2, -0.9)), "partly"),
        (evidence((-0.9, -0.9)), "not reproduced"),
        (evidence((-1.2, -1.2), gap_at_zero=0.05), "partly"),
        (evidence((-1.2, -1.2), random=-1.1), "partly"),
        (evidence((-0.9, -0.9), random=-1.1), "not reproduced"),
    ],
)
def test_judge(made: Evidence, outcome: str) -> None:
    assert judge(made).outcome == outcome


def test_judge_takes_one_seed() -> None:
    one = {(study, arm): {"log10 regret": [-1.0]} for study in STUDIES for arm in (*ACQUISITIONS, RANDOM)}
    assert judge(Evidence.of(one)).outcome == "not reproduced"
