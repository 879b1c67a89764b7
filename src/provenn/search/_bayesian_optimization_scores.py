"""The acquisitions that a search can be run with: each scores batches of points on a fitted model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from provenn.core.numerics.gaussian_processes import GaussianPosterior
from provenn.search._bayesian_optimization_entropy import entropy_search, predictive_entropy_search
from provenn.search._bayesian_optimization_fitting import maximise
from provenn.search._bayesian_optimization_improvement import (
    expected_improvement,
    lines_gain,
    probability_of_improvement,
    q_expected_improvement,
    ucb,
)
from provenn.search._bayesian_optimization_knowledge import knowledge_gradient, q_knowledge_gradient
from provenn.search._bayesian_optimization_normal import below
from provenn.search._bayesian_optimization_process import one_draw
from provenn.search._bayesian_optimization_targets import Environment, Target

_SAMPLES = 128
_INNER_SAMPLES = 8
_ALTERNATIVES = 64
_CLOUD = 64

IMPROVEMENTS = ("ei", "ei_observed", "noisy_ei", "pi", "ucb")
GLOBAL = ("kg", "kg_simulation", "kg_sgd", "es", "pes")
CHOICES = (*IMPROVEMENTS, *GLOBAL)
JOINT = ("ei", "kg")
"""Acquisitions that score a batch of points jointly."""

Score = Callable[[Tensor], Tensor]


class Problem(NamedTuple):
    """What an acquisition is asked on.

    Args:
        posterior: The model of the objective; leading dimensions are draws of hyperparameters.
        constraints: Models of the constraints, without draws, with thresholds that their values must not exceed.
        evaluated: Points whose values are known.
        best_observed: The largest value observed, among feasible ones where there are constraints; ``None`` if there
            is none.
        noiseless: Whether values are known to have no noise.
        environment: What the objective is summed over, in the unit cube.
        generator: Draws all random numbers of this acquisition.
        q: Points of a batch.
    """

    posterior: GaussianPosterior
    constraints: tuple[tuple[GaussianPosterior, float], ...]
    evaluated: Tensor
    best_observed: Tensor | None
    noiseless: bool
    environment: Environment | None
    generator: torch.Generator
    q: int

    @property
    def decisions(self) -> Tensor:
        """The evaluated points' decisions."""
        return Target(self.posterior, self.environment).decision(self.evaluated)

    def sobol(self, count: int, dims: int) -> Tensor:
        """Return points of a Sobol sequence that this acquisition draws."""
        seed = int(torch.randint(2**31, (), generator=self.generator, device=self.generator.device))
        engine = torch.quasirandom.SobolEngine(dims, scramble=True, seed=seed)
        return engine.draw(count, dtype=torch.float64).to(self.evaluated)

    def normals(self, count: int, columns: int) -> Tensor:
        """Return quasi-random standard normal draws."""
        return torch.special.ndtri(self.sobol(count, columns).clamp(1e-9, 1 - 1e-9))


def score_of(name: str, problem: Problem) -> Score:
    """Return the function (b, q, D) to (b,) that an acquisition maximises."""
    score = _improvement(name, problem) if name in IMPROVEMENTS else _averaged(problem, _MAKERS[name])
    if not problem.constraints:
        return score
    return lambda X: score(X) * _feasibility(problem, X[:, 0])


def _feasibility(problem: Problem, X: Tensor) -> Tensor:
    probability = torch.ones(len(X), dtype=X.dtype, device=X.device)
    for posterior, threshold in problem.constraints:
        mean, variance = posterior.mean_variance(X)
        probability = probability * below((threshold - mean) / variance.clamp_min(1e-18).sqrt())
    return probability


def _improvement(name: str, problem: Problem) -> Score:
    posterior = problem.posterior
    if problem.best_observed is None:  # nothing feasible yet: feasibility alone counts
        return lambda X: torch.ones(len(X), dtype=X.dtype, device=X.device)
    means = posterior.mean(problem.evaluated)
    feasible = _feasible(problem)
    best = means[..., feasible].amax(-1, keepdim=True)
    if name == "ei_observed" or problem.noiseless:
        best = problem.best_observed.expand_as(best)
    if name == "noisy_ei" and not problem.noiseless:  # without noise it is the closed form, to rounding
        known = problem.evaluated[feasible]
        return lambda X: _over_draws(lines_gain(posterior, X[:, 0], known, means[..., feasible]))
    if name == "ei" and problem.q > 1:
        samples = problem.normals(_SAMPLES, problem.q)
        return lambda X: _over_draws(
            q_expected_improvement(posterior.mean(X), posterior.covariance(X), best, _for(X, samples))
        )
    closed = {"pi": probability_of_improvement, "ucb": lambda mean, sd, _: ucb(mean, sd)}.get(
        name, expected_improvement
    )

    def score(X: Tensor) -> Tensor:
        mean, variance = posterior.mean_variance(X[:, 0])
        return _over_draws(closed(mean, variance.clamp_min(1e-18).sqrt(), best))

    return score


def _for(X: Tensor, samples: Tensor) -> Tensor | None:
    """Return base samples for a batch, none where the exact value is known."""
    return samples if X.shape[-2] > 2 else None


def _feasible(problem: Problem) -> Tensor:
    """Return which evaluated points the models of the constraints hold feasible, all if none is."""
    keep = torch.ones(len(problem.evaluated), dtype=torch.bool, device=problem.evaluated.device)
    for posterior, threshold in problem.constraints:
        keep &= posterior.mean(problem.evaluated) <= threshold
    return keep if keep.any() else ~keep


def _over_draws(values: Tensor) -> Tensor:
    return values.mean(0) if values.ndim == 2 else values


def _averaged(problem: Problem, make: Callable[[Problem], Score]) -> Score:
    """Return the mean of an acquisition over draws of hyperparameters, with the same random numbers for each."""
    posterior = problem.posterior
    if posterior.noise.ndim == 0:
        return make(problem)
    state = problem.generator.get_state()
    scores = []
    for draw in range(len(posterior.noise)):
        problem.generator.set_state(state)
        scores.append(make(problem._replace(posterior=one_draw(posterior, draw))))
    return lambda X: torch.stack([score(X) for score in scores]).mean(0)


def single(problem: Problem) -> Problem:
    """Return the problem with the first draw of hyperparameters, where there are several."""
    posterior = problem.posterior
    return problem if posterior.noise.ndim == 0 else problem._replace(posterior=one_draw(posterior, 0))


def alternatives_of(problem: Problem) -> Tensor:
    """Return decisions to seek the best mean among: those evaluated, a Sobol set, and the maximiser of the mean."""
    target = Target(problem.posterior, problem.environment)
    decisions = torch.cat([problem.decisions, problem.sobol(_ALTERNATIVES, problem.decisions.shape[1])])
    with torch.no_grad():
        starts = decisions[target.mean(decisions).topk(min(4, len(decisions))).indices]
    box = torch.stack([torch.zeros_like(starts[0]), torch.ones_like(starts[0])])
    ends, values = maximise(lambda a: target.mean(a), starts, box, iterations=40)
    return torch.cat([decisions, ends[values.argmax()].unsqueeze(0)])


def _kg(problem: Problem) -> Score:
    A, environment = alternatives_of(problem), problem.environment
    if problem.q > 1:
        samples = problem.normals(_SAMPLES, problem.q)
        return lambda X: q_knowledge_gradient(
            problem.posterior, X, A, samples[:, : X.shape[-2]], environment=environment
        )
    return lambda X: knowledge_gradient(problem.posterior, X[:, 0], A, environment=environment)


def _kg_simulation(problem: Problem) -> Score:
    A = alternatives_of(problem)
    box = torch.stack([torch.zeros_like(A[0]), torch.ones_like(A[0])])
    middle = (torch.arange(_INNER_SAMPLES, dtype=torch.float64) + 0.5) / _INNER_SAMPLES
    samples = torch.special.ndtri(middle).unsqueeze(-1).to(A)
    return lambda X: knowledge_gradient(
        problem.posterior,
        X[:, 0],
        A,
        "simulation",
        bounds=box,
        environment=problem.environment,
        base_samples=samples,
    )


def _candidates(problem: Problem) -> Tensor:
    """Return where the maximum may be: the alternatives, and a cloud around those of the largest means."""
    A = alternatives_of(problem)
    with torch.no_grad():
        leaders = A[Target(problem.posterior, problem.environment).mean(A).topk(min(4, len(A))).indices]
    widths = torch.logspace(-2.5, -0.7, _CLOUD, dtype=A.dtype, device=A.device).unsqueeze(-1)
    steps = widths * problem.normals(_CLOUD, A.shape[1])
    picks = torch.arange(_CLOUD, device=A.device) % len(leaders)
    return torch.cat([A, (leaders[picks] + steps).clamp(0, 1)])


def _es(problem: Problem) -> Score:
    C, state = _candidates(problem), problem.generator.get_state()

    def score(X: Tensor) -> Tensor:
        problem.generator.set_state(state)
        return entropy_search(
            problem.posterior, X[:, 0], C, problem.generator, environment=problem.environment, samples=128, nodes=5
        )

    return score


def _pes(problem: Problem) -> Score:
    C, state = _candidates(problem), problem.generator.get_state()
    method = "ep" if problem.environment is None else "rejection"

    def score(X: Tensor) -> Tensor:
        problem.generator.set_state(state)
        return predictive_entropy_search(
            problem.posterior, X[:, 0], C, problem.generator, method, environment=problem.environment, samples=128
        )

    return score


_MAKERS = {"kg": _kg, "kg_sgd": _kg_simulation, "kg_simulation": _kg_simulation, "es": _es, "pes": _pes}


def has_gradient(name: str, problem: Problem) -> bool:
    """Whether an acquisition's score can be climbed."""
    return name != "es" and not (name == "pes" and problem.environment is not None)
