"""How the next points are found: many are scored, the best are climbed from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from provenn.search._bayesian_optimization_fitting import maximise
from provenn.search._bayesian_optimization_knowledge import ascend_knowledge_gradient
from provenn.search._bayesian_optimization_scores import Problem, Score, alternatives_of, has_gradient, score_of, single

_SCORED = {"kg_simulation": 16, "kg_sgd": 16, "es": 96, "pes": 96}
_ITERATIONS = {"kg_simulation": 6, "pes": 15}
"""Of L-BFGS, where a score is dear; else 60."""
_USUAL = 256
_RESTARTS = 5


def propose(acquisition: str, problem: Problem, cost: Callable[[Tensor], Tensor] | None, fixed_nodes: bool) -> Tensor:
    """Return the batch of points (q, D), in the unit cube, of the highest score.

    Args:
        acquisition: What is maximised.
        problem: On what.
        cost: Cost of points (n, D) in the unit cube, by which the score is divided.
        fixed_nodes: Whether the last coordinates may only be an environment's nodes.
    """
    worth = score_of(acquisition, problem)
    dims = problem.evaluated.shape[1]

    def score(X: Tensor) -> Tensor:
        return worth(X) if cost is None else worth(X) / cost(X[:, 0])

    with torch.no_grad():
        batches = _batches(problem, _SCORED.get(acquisition, _USUAL), fixed_nodes)
        values = score(batches).nan_to_num(-torch.inf)
    if not has_gradient(acquisition, problem):
        return batches[values.argmax()]
    starts = batches[values.topk(min(_RESTARTS, len(batches))).indices]
    free = dims
    if fixed_nodes and problem.environment is not None:
        free -= problem.environment.nodes.shape[1]
    if acquisition == "kg_sgd":
        ends = _ascended(single(problem), starts[:, 0])
        with torch.no_grad():
            return ends[score(ends).argmax()]
    return _climbed(score, starts, free, _ITERATIONS.get(acquisition, 60))


def _ascended(problem: Problem, starts: Tensor) -> Tensor:
    box = torch.stack([torch.zeros_like(starts[0]), torch.ones_like(starts[0])])
    A = alternatives_of(problem)
    return ascend_knowledge_gradient(problem.posterior, starts, A, box, problem.generator, steps=15).unsqueeze(1)


def _batches(problem: Problem, count: int, fixed_nodes: bool) -> Tensor:
    """Return batches to score: of a Sobol sequence, and around the points with the largest posterior mean."""
    dims, q = problem.evaluated.shape[1], problem.q
    spread = problem.sobol(count, q * dims).unflatten(-1, (q, dims))
    means = problem.posterior.mean(problem.evaluated)
    leaders = problem.evaluated[
        (means.mean(0) if means.ndim == 2 else means).topk(min(2, len(problem.evaluated))).indices
    ]
    draws = problem.generator
    steps = torch.randn(count // 4, q, dims, dtype=spread.dtype, generator=draws, device=draws.device).to(spread)
    picks = torch.arange(len(steps) * q, device=spread.device).reshape(-1, q) % len(leaders)
    near = (leaders[picks] + 0.05 * steps).clamp(0, 1)
    batches = torch.cat([spread, near])
    if fixed_nodes and problem.environment is not None:
        nodes = problem.environment.nodes
        turns = torch.arange(len(batches) * q, device=spread.device).reshape(-1, q) % len(nodes)
        batches = torch.cat([batches[..., : dims - nodes.shape[1]], nodes[turns]], -1)
    return batches


def _climbed(score: Score, starts: Tensor, free: int, iterations: int) -> Tensor:
    """Climb in the free coordinates from all starts at once, and return the best batch found."""
    fixed = starts[..., free:]

    def worth(flat: Tensor) -> Tensor:
        return score(torch.cat([flat.unflatten(-1, (starts.shape[1], free)), fixed], -1))

    flat = starts[..., :free].flatten(1)
    box = torch.stack([torch.zeros_like(flat[0]), torch.ones_like(flat[0])])
    ends, values = maximise(worth, flat, box, iterations)
    best = values.argmax()
    return torch.cat([ends[best].unflatten(-1, (starts.shape[1], free)), fixed[best]], -1)
