"""Metrics of target space that adapt to past gradients, or to the loss' curvature."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from provenn.optim._target_surrogates_surrogate import as_rows

METRICS = ("euclidean", "adagrad-norm", "diag-adagrad", "adagrad", "adam", "newton")
_BETAS = (0.9, 0.999)


class Adapted(NamedTuple):
    """A metric, and the gradient that the surrogate is linear in."""

    metric: Tensor | None
    gradient: Tensor


def adapt(
    name: str, state: dict[str, Any], gradient: Tensor, scale: int, eps: float, hessian: Tensor | None
) -> Adapted:
    """Return the metric of an outer step, and keep in the state what the next one needs.

    Args:
        name: One of :data:`METRICS`.
        state: Moments of past gradients; changed.
        gradient: ∇ℓ of the reduced loss.
        scale: N, which makes its rows gradients of one sample's loss.
        eps: Added to the metric.
        hessian: For ``"newton"``, each row's block of ∇²ℓ of the reduced loss.
    """
    rows = as_rows(gradient) * scale
    if name == "euclidean":
        return Adapted(None, gradient)
    if name == "newton":
        assert hessian is not None
        return Adapted(_ridged(hessian * scale, eps), gradient)
    if name == "adam":
        return _adam(state, gradient, rows, scale, eps)
    seen = _outer(name, rows)
    state["moment"] = seen if "moment" not in state else state["moment"] + seen
    if name == "adagrad":
        return Adapted(_ridged(_root(state["moment"]), eps), gradient)
    return Adapted(state["moment"].sqrt() + eps, gradient)


def _outer(name: str, rows: Tensor) -> Tensor:
    """Return the sum of g gᵀ over rows, its diagonal, or its trace."""
    if name == "adagrad":
        return rows.mT @ rows
    squares = rows.square().sum(0)
    return squares if name == "diag-adagrad" else squares.sum()


def _ridged(matrix: Tensor, eps: float) -> Tensor:
    return matrix + eps * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def _root(matrix: Tensor) -> Tensor:
    """Return the square root of a positive semidefinite matrix; no factorisation exists in half precision."""
    values, vectors = torch.linalg.eigh(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    return root.to(matrix.dtype)


def _adam(state: dict[str, Any], gradient: Tensor, rows: Tensor, scale: int, eps: float) -> Adapted:
    """Batches change rows, so that moments are those of columns; with one row this is Adam on the targets."""
    first, second = _BETAS
    count = state["adam_steps"] = state.get("adam_steps", 0) + 1
    zeros = torch.zeros_like(rows[0]) if len(rows) else rows.sum(0)
    mean, square = state.get("mean", zeros), state.get("moment", zeros)
    direction = (first * mean + (1 - first) * rows) / (1 - first**count)
    average = max(len(rows), 1)
    state["mean"] = first * mean + (1 - first) * rows.sum(0) / average
    state["moment"] = second * square + (1 - second) * rows.square().sum(0) / average
    metric = (state["moment"] / (1 - second**count)).sqrt() + eps
    return Adapted(metric, direction.view_as(gradient) / scale)


def row_hessians(gradient: Tensor, z: Tensor) -> Tensor:
    """Return each row's block of the Hessian of a loss that is a sum over rows, from its gradient's graph.

    Args:
        gradient: ∇ℓ(z) with its graph.
        z: The targets, a leaf of that graph.

    Returns:
        The blocks, (n, K, K).

    Cost: one batched backward pass with K vectors.
    """
    n, K = as_rows(z).shape
    if not gradient.requires_grad:
        return z.new_zeros(n, K, K)
    unit = torch.eye(K, dtype=z.dtype, device=z.device).unsqueeze(1).expand(K, n, K).reshape(K, *z.shape)
    (products,) = torch.autograd.grad(gradient, z, unit, is_grads_batched=True, materialize_grads=True)
    blocks: Tensor = products.reshape(K, n, K).transpose(0, 1).detach()
    return (blocks + blocks.mT) / 2
