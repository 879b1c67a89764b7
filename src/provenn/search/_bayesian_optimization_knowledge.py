"""The knowledge gradient: how much the best posterior mean over the domain is expected to grow by an observation."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer
from provenn.core.numerics.gaussian_processes import GaussianPosterior
from provenn.search._bayesian_optimization_fitting import maximise
from provenn.search._bayesian_optimization_improvement import lines_gain, next_noise, stable_factor
from provenn.search._bayesian_optimization_normal import expected_max_affine
from provenn.search._bayesian_optimization_targets import Environment, Target

_FRESH_DRAWS = 4


def knowledge_gradient(
    posterior: GaussianPosterior,
    X: Float[Tensor, "b full"],
    alternatives: Float[Tensor, "m d"],
    method: Literal["discrete", "simulation", "sgd"] = "discrete",
    *,
    bounds: Float[Tensor, "2 d"] | None = None,
    environment: Environment | None = None,
    gradients: Literal["none", "all"] | int = "none",
    base_samples: Float[Tensor, "samples k"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*both"]:
    r"""Return E_n[max_a μ_{n+1}(a) | x observed] − max_a μ_n(a).

    The second maximum goes over the alternatives, or the box where the first one does; it does not depend on x.

    - ``"discrete"``: the maximum goes over the alternatives and x itself, exactly, by the envelope of lines. With the
      evaluated points for alternatives it is the noisy expected improvement.
    - ``"simulation"``: over the whole box, for each of the base samples by L-BFGS from the best alternative. The
      gradient follows from the envelope theorem: that of μ_{n+1}(x̂; x) with the maximiser x̂ held fixed.
    - ``"sgd"``: the same with a few fresh samples, so that each call's gradient is an unbiased draw for stochastic
      ascent (:func:`ascend_knowledge_gradient`).

    Args:
        posterior: The Gaussian process.
        X: Points to score.
        alternatives: A, the decisions that the best is sought among, or that inner searches start from.
        method: How the inner maximum is taken.
        bounds: The decisions' box; for ``"simulation"`` and ``"sgd"``.
        environment: What the decision's worth is summed over; default the value itself.
        gradients: What is observed beside the value: no derivative, all, or the one along axis i (from 1).
        base_samples: Standard normal draws, one column an observed number; with several observed numbers or
            ``"simulation"``.
        generator: Draws; for ``"sgd"``.

    Returns:
        The knowledge gradient of each point.

    Shape:
        (b, d) to (b,); draws of hyperparameters, for ``"discrete"`` only, come first.

    Raises:
        ValueError: An argument that the method needs is missing, or the method is unknown.

    Cost: discrete O(m² + m n) a point; the others one inner search of some 20 iterations for all samples and points.

    Source: Frazier, arXiv 1807.02811, section 4.2, algorithms 2 to 4; derivatives: Wu et al., NeurIPS 2017.
    """
    check_choice("method", method, ("discrete", "simulation", "sgd"))
    target = Target(posterior, environment)
    orders = _observed(gradients, X)
    if method == "discrete":
        if orders is None and environment is None:
            return lines_gain(posterior, X, alternatives, posterior.mean(alternatives))
        return _discrete(target, X.unsqueeze(-2), alternatives, orders, base_samples)
    if bounds is None:
        raise ValueError(f"bounds are needed for method {method!r}, got None")
    count = 1 if orders is None else len(orders)
    if method == "sgd":
        if generator is None:
            raise ValueError("generator is needed for method 'sgd', got None")
        draws = torch.randn(_FRESH_DRAWS, count, generator=generator, device=generator.device, dtype=X.dtype)
        base_samples = draws.to(X)
    if base_samples is None:
        raise ValueError("base_samples are needed for method 'simulation', got None")
    return _simulated(target, X.unsqueeze(-2), alternatives, orders, base_samples, bounds)


def q_knowledge_gradient(
    posterior: GaussianPosterior,
    X: Float[Tensor, "*batch q full"],
    alternatives: Float[Tensor, "m d"],
    base_samples: Float[Tensor, "samples q"],
    *,
    bounds: Float[Tensor, "2 d"] | None = None,
    environment: Environment | None = None,
) -> Float[Tensor, "*both"]:
    """Return the knowledge gradient of q observations at once, by simulation with common random numbers.

    Args:
        posterior: The Gaussian process.
        X: Batches of points to score.
        alternatives: A; the maximum goes over it and the batch.
        base_samples: Standard normal draws.
        bounds: If given, the maximum goes over this box, by L-BFGS from the best alternative for every sample; then X
            is (b, q, d).
        environment: What the decision's worth is summed over.

    Returns:
        The knowledge gradient of each batch.

    Shape:
        (..., q, d) to (...,).

    Raises:
        ValueError: ``base_samples`` do not have q columns.

    Cost: O(q³ + samples · (m + q) · q) a batch, with bounds one inner search beside.

    Source: Frazier, arXiv 1807.02811, section 5, "parallel"; Wu, Frazier, NeurIPS 2016.
    """
    target = Target(posterior, environment)
    if bounds is None:
        return _discrete(target, X, alternatives, None, base_samples)
    return _simulated(target, X, alternatives, None, base_samples, bounds)


def _observed(gradients: str | int, X: Tensor) -> Tensor | None:
    """Return the orders of what one evaluation shows."""
    dims = X.shape[-1]
    if isinstance(gradients, str):
        check_choice("gradients", gradients, ("none", "all"))
        return None if gradients == "none" else torch.arange(dims + 1, device=X.device)
    check_integer("gradients", gradients, at_least=1, at_most=dims)
    return torch.tensor([0, gradients], device=X.device)


def _rows(X: Tensor, orders: Tensor | None) -> Tensor:
    """Return the point of every observed number, (…, k, full)."""
    return X if orders is None else X.expand(*X.shape[:-2], len(orders), X.shape[-1])


def _whitener(posterior: GaussianPosterior, rows: Tensor, orders: Tensor | None) -> Tensor:
    """Return C of what will be observed: the next posterior mean changes by cross · C⁻ᵀ Z."""
    cov = posterior.covariance(rows, orders=orders)
    noise = next_noise(posterior, cov) * torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    return stable_factor(cov + noise)


def _slopes(target: Target, A: Tensor, X: Tensor, orders: Tensor | None, factor: Tensor) -> Tensor:
    """Return σ̃ (…, m, k): how the next posterior mean of decisions moves with k standard normal variables."""
    cross = target.cross(A, _rows(X, orders), orders)
    return torch.linalg.solve_triangular(factor, cross.mT, upper=False).mT


def _discrete(
    target: Target, X: Tensor, alternatives: Tensor, orders: Tensor | None, base_samples: Tensor | None
) -> Tensor:
    own = target.decision(X)
    A = torch.cat([alternatives.expand(*X.shape[:-2], *alternatives.shape), own], -2)
    heights = target.mean(A)
    slopes = _slopes(target, A, X, orders, _whitener(target.posterior, _rows(X, orders), orders))
    reference = heights[..., : len(alternatives)].amax(-1)
    if slopes.shape[-1] == 1:
        return expected_max_affine(heights, slopes.squeeze(-1)) - reference
    samples = _checked(base_samples, slopes.shape[-1])
    return (heights.unsqueeze(-1) + slopes @ samples.T).amax(-2).mean(-1) - reference


def _checked(base_samples: Tensor | None, columns: int) -> Tensor:
    if base_samples is None or base_samples.ndim != 2 or base_samples.shape[1] != columns:
        shape = None if base_samples is None else tuple(base_samples.shape)
        raise ValueError(f"base_samples must be (samples, {columns}), got {shape}")
    return base_samples


def _simulated(
    target: Target, X: Tensor, alternatives: Tensor, orders: Tensor | None, base_samples: Tensor, bounds: Tensor
) -> Tensor:
    factor = _whitener(target.posterior, _rows(X, orders), orders)
    samples = _checked(base_samples, factor.shape[-1])
    if factor.ndim != 3:
        raise ValueError(f"X must be one batch dimension and one draw of hyperparameters, got {tuple(X.shape)}")
    copies = len(samples)
    with torch.no_grad():
        frozen, fixed = X.detach(), factor.detach()
        A = torch.cat([alternatives.expand(len(X), *alternatives.shape), target.decision(frozen)], -2)
        steps = _slopes(target, A, frozen, orders, fixed) @ samples.T
        best = (target.mean(A).unsqueeze(-1) + steps).argmax(-2)
        starts = A.gather(1, best.unsqueeze(-1).expand(-1, -1, A.shape[-1])).flatten(0, 1)
        leaders = alternatives[target.mean(alternatives).topk(min(4, len(alternatives))).indices]
        reference = maximise(lambda a: target.mean(a), leaders, bounds.to(leaders), iterations=40)[1].max()

    def after(points: Tensor, at: Tensor, whitener: Tensor) -> Tensor:
        """Return μ_{n+1} at one decision for each point scored and sample, flat."""
        one = points.unflatten(0, (len(at), copies))
        moved = (_slopes(target, one, at, orders, whitener) * samples).sum(-1)
        return (target.mean(one) + moved).flatten()

    inner, _ = maximise(lambda points: after(points, frozen, fixed), starts, bounds.to(starts), iterations=20)
    return after(inner.detach(), X, factor).unflatten(0, (-1, copies)).mean(-1) - reference


def ascend_knowledge_gradient(
    posterior: GaussianPosterior,
    starts: Float[Tensor, "restarts full"],
    alternatives: Float[Tensor, "m d"],
    bounds: Float[Tensor, "2 full"],
    generator: torch.Generator,
    *,
    environment: Environment | None = None,
    steps: int = 30,
) -> Float[Tensor, "restarts full"]:
    """Climb the knowledge gradient by stochastic gradients, all restarts at once.

    Steps are α_t = 4/(4 + t) times the gradient, in units of a tenth of the box over the first gradient's length,
    which the source leaves to the user; points are moved back into the box.

    Args:
        posterior: The Gaussian process.
        starts: Where to begin.
        alternatives: Where inner searches start from.
        bounds: The box of points; its first columns are that of decisions.
        generator: Draws the samples.
        environment: What the decision's worth is summed over.
        steps: Steps to take.

    Cost: ``steps`` calls of the knowledge gradient with four samples.

    Source: Frazier, arXiv 1807.02811, algorithm 4.
    """
    low, high = bounds
    X = starts.detach().clamp(low, high)
    decisions = bounds[:, : alternatives.shape[1]]
    unit: Tensor | None = None
    for step in range(steps):
        leaf = X.requires_grad_()
        gain = knowledge_gradient(
            posterior, leaf, alternatives, "sgd", bounds=decisions, environment=environment, generator=generator
        )
        (slope,) = torch.autograd.grad(gain.sum(), leaf)
        scaled = slope.nan_to_num() * (high - low)
        if unit is None:
            unit = 0.1 / scaled.norm(dim=-1, keepdim=True).mean().clamp_min(1e-12)
        move = 4 / (4 + step) * unit * scaled
        move = move / (move.norm(dim=-1, keepdim=True) / 0.2).clamp_min(1)
        X = (X.detach() + move * (high - low)).clamp(low, high)
    return X.detach()
