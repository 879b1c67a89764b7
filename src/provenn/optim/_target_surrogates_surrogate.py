"""The surrogate of a loss in its targets, and what distances in target space are measured by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_number

Reduction = Literal["mean", "sum"]
REDUCTIONS = ("mean", "sum")


def as_rows(z: Tensor) -> Float[Tensor, "n K"]:
    """Return targets with what belongs to one sample flattened."""
    return z.flatten(1) if z.dim() > 1 else z.unsqueeze(1)


def samples(z: Tensor, reduction: str) -> int:
    """Return by how many times a sample's own gradient exceeds its row in the gradient of the reduced loss."""
    return max(len(z), 1) if reduction == "mean" else 1


class BregmanDivergence:
    """The divergence D(z, w) = φ(z) − φ(w) − ⟨∇φ(w), z − w⟩ of a convex function φ.

    Args:
        potential: φ of each row, differentiable: (n, …) → (n,).

    Shape:
        Called with z and w, both (n, …); returns (n,).

    Raises:
        TypeError: ``potential`` cannot be called.

    Cost: two values and one gradient of φ a call.

    Source: arXiv 2302.02607, the surrogate of mirror descent in targets; Bregman 1967.
    """

    def __init__(self, potential: Callable[[Tensor], Tensor]) -> None:
        if not callable(potential):
            raise TypeError(f"potential must be a function of targets, got {potential!r}")
        self.potential = potential

    def __call__(self, z: Float[Tensor, "n *K"], w: Float[Tensor, "n *K"]) -> Float[Tensor, " n"]:
        """Return the divergence of each row of z from that of w; gradients flow to z alone."""
        with torch.enable_grad():
            leaf = w.detach().requires_grad_()
            value = self.potential(leaf)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        return self.potential(z) - value.detach() - as_rows(slope * (z - w.detach())).sum(1)


class KLDivergence(BregmanDivergence):
    """The Kullback–Leibler divergence Σ z log(z/w) − z + w, of targets that are probabilities.

    With it, a step on unconstrained distributions is z ∝ z_t exp(−η g_t): exponentiated gradient.

    Shape:
        Called with z ≥ 0 and w > 0, both (n, …); returns (n,).

    Cost: O(n K).

    Source: arXiv 2302.02607, the mirror-descent surrogate; φ(z) = Σ z log z.
    """

    def __init__(self) -> None:
        super().__init__(_negative_entropy)

    def __call__(self, z: Float[Tensor, "n *K"], w: Float[Tensor, "n *K"]) -> Float[Tensor, " n"]:
        """Return the divergence of each row of z from that of w; gradients flow to z alone."""
        w = w.detach()
        return as_rows(torch.xlogy(z, z) - torch.xlogy(z, w) - z + w).sum(1)


def _negative_entropy(z: Tensor) -> Tensor:
    return as_rows(torch.xlogy(z, z)).sum(1)


class TargetSurrogate(nn.Module):
    """A cheap model of a loss around the targets at which its gradient was taken.

    With N the number of rows for a loss that is a mean over them, and 1 for a sum:

        g̃(z) = ℓ(z_t) + ⟨g_t, z − z_t⟩ + (1/(2ηN)) ‖z − z_t‖²

    Value and gradient at z_t are those of ℓ; for a loss whose rows are L-smooth and η ≤ 1/L it is an upper bound.

    Args:
        z_t: Targets (logits, actions).
        grad_t: Gradient of the reduced loss there, as autograd gives it.
        eta: η, the step size in target space, for one sample's loss.
        loss_t: ℓ(z_t), which only shifts the value.
        metric: What replaces the square: A for ⟨Δ, AΔ⟩, as one number for all, a diagonal, a matrix, or a matrix for
            each row; or a :class:`BregmanDivergence`, whose double replaces it. ``None``: the identity.
        reduction: How the loss reduces its rows.

    Shape:
        ``z_t``, ``grad_t`` and the call's z (n, …), with K numbers a row; ``metric`` (), (K,), (K, K) or (n, K, K).
        Returns a scalar.

    Raises:
        ValueError: ``eta`` ≤ 0; ``grad_t`` or ``metric`` of another shape; ``z_t`` without dimensions; ``reduction``
            is unknown.
        RuntimeError: In the call: z of another shape than ``z_t``.

    Cost: O(n K), with matrices O(n K²).

    Source: arXiv 2302.02607, the smoothness-based surrogate.
    """

    z_t: Tensor
    grad_t: Tensor
    loss_t: Tensor
    metric: Tensor | None

    def __init__(
        self,
        z_t: Float[Tensor, "n *K"],
        grad_t: Float[Tensor, "n *K"],
        eta: float,
        *,
        loss_t: Float[Tensor, ""] | float = 0.0,
        metric: Tensor | BregmanDivergence | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_number("eta", eta, above=0)
        check_choice("reduction", reduction, REDUCTIONS)
        if z_t.dim() == 0:
            raise ValueError("z_t must have one row a sample, got a tensor without dimensions")
        if grad_t.shape != z_t.shape:
            raise ValueError(f"grad_t must have the shape of z_t, {tuple(z_t.shape)}, got {tuple(grad_t.shape)}")
        self.eta, self.reduction = eta, reduction
        self._divergence = metric if isinstance(metric, BregmanDivergence) else None
        matrix = metric if isinstance(metric, Tensor) else None
        if matrix is not None:
            _check_metric(matrix, as_rows(z_t))
        self.register_buffer("z_t", z_t.detach())
        self.register_buffer("grad_t", grad_t.detach())
        self.register_buffer("loss_t", torch.as_tensor(loss_t, dtype=z_t.dtype, device=z_t.device).detach())
        self.register_buffer("metric", None if matrix is None else matrix.detach())

    def forward(self, z: Float[Tensor, "n *K"]) -> Float[Tensor, ""]:
        """Return the surrogate's value.

        Args:
            z: Targets, with their graph.

        Returns:
            g̃(z).

        Raises:
            RuntimeError: They are of another shape.
        """
        if z.shape != self.z_t.shape:
            raise RuntimeError(
                f"targets must keep their shape {tuple(self.z_t.shape)} while the surrogate is minimised, got "
                f"{tuple(z.shape)}: is the batch drawn anew inside forward?"
            )
        change = z - self.z_t
        far = self._distance(z, change) / (self.eta * samples(z, self.reduction))
        return self.loss_t + (self.grad_t * change).sum() + far

    def _distance(self, z: Tensor, change: Tensor) -> Tensor:
        """Return ½⟨Δ, AΔ⟩, or the divergence."""
        if self._divergence is not None:
            return self._divergence(z, self.z_t).sum()
        rows = as_rows(change)
        if self.metric is None:
            return rows.square().sum() / 2
        if self.metric.dim() < 2:
            return (self.metric * rows.square()).sum() / 2
        return (rows.unsqueeze(1) @ self.metric @ rows.unsqueeze(2)).sum() / 2


def _check_metric(metric: Tensor, rows: Tensor) -> None:
    n, K = rows.shape
    if metric.shape not in ((), (K,), (K, K), (n, K, K)):
        raise ValueError(
            f"metric must have the shape (), ({K},), ({K}, {K}) or ({n}, {K}, {K}), got {tuple(metric.shape)}"
        )
