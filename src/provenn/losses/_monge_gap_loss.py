"""The Monge gap of a map's samples."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.numerics.transport import Transport, as_weights, sinkhorn
from provenn.losses._monge_gap_costs import Cost, check_clouds, check_cost, cost_matrix

Gradient = Literal["envelope", "implicit", "unrolled"]
Entropy = Literal["shannon", "kl"]
Scale = Literal["mean", "std"]


class MongeGap(nn.Module):
    """How much more a map costs than the cheapest way from its inputs to its outputs.

        M_ε = Σ_i a_i c(x_i, y_i) − min_P ⟨P, C⟩ − ε H(P),   y_i = T(x_i),  P with marginals a and a

    Without entropy it is at least 0, and 0 just if T is optimal between the samples and their images. With
    ``"shannon"`` it lies above that by ε log n to 2ε log n, with ``"kl"`` below it by at most ε log n.

    Args:
        cost: ``"sqeuclidean"``, ``"half_sqeuclidean"``, ``"euclidean"``, ``"cosine"``, ``"geodesic"``, or a function
            of points (n, d) and (m, d) that returns costs (n, m).
        epsilon: ε, in the cost's unit; 0: the optimal assignment, without entropy; ``None``: relative.
        relative_epsilon: With ``epsilon=None``, ε over the mean of C, or over its standard deviation; ε then counts as
            a constant in gradients.
        relative_to: Whether the mean or the standard deviation.
        entropy: ``"shannon"``, −ε H(P); or ``"kl"``, +ε KL(P ‖ a aᵀ).
        max_iters: Most Sinkhorn iterations.
        tol: They end once the plan meets its marginals to this sum of absolute deviations.
        scaling: Factor < 1 by which ε falls to its value from the range of C; 1: no scaling.
        relaxation: Factor in (0, 2) on every change of a potential; above 1 often saves iterations.
        gradient: ``"envelope"``: with P held fixed, exact at convergence; ``"implicit"``: through P by the equations
            that it solves; ``"unrolled"``: through the iterations. The last two are for checking.
        strict: Whether iterations that do not converge are an error rather than a warning.

    Shape:
        x (n, d), y (n, d), weights (n,) → ().

    Raises:
        ValueError: A number out of range, or an unknown name.
        TypeError: ``cost`` is neither a name nor a function.

    Cost: O(n² d) for the costs and O(n²) an iteration, more of them the smaller ε; with ``epsilon=0`` O(n³) on the CPU,
    sensible to n ≈ 2 000; ``"implicit"`` O(n³), ``"unrolled"`` memory O(n²) an iteration.

    Source: arXiv 2302.04953, definition 3.1 and equation 8.
    """

    def __init__(
        self,
        cost: Cost = "sqeuclidean",
        epsilon: float | None = None,
        relative_epsilon: float = 0.01,
        entropy: Entropy = "shannon",
        max_iters: int = 2000,
        tol: float = 1e-3,
        *,
        relative_to: Scale = "mean",
        scaling: float = 1.0,
        relaxation: float = 1.0,
        gradient: Gradient = "envelope",
        strict: bool = False,
    ) -> None:
        super().__init__()
        check_cost(cost)
        if epsilon is not None:
            check_number("epsilon", epsilon, at_least=0)
        check_number("relative_epsilon", relative_epsilon, above=0)
        check_choice("entropy", entropy, ("shannon", "kl"))
        check_integer("max_iters", max_iters, at_least=1)
        check_number("tol", tol, above=0)
        check_choice("relative_to", relative_to, ("mean", "std"))
        check_number("scaling", scaling, above=0, at_most=1)
        check_number("relaxation", relaxation, above=0, below=2)
        check_choice("gradient", gradient, ("envelope", "implicit", "unrolled"))
        self.cost, self.epsilon, self.relative_epsilon, self.relative_to = cost, epsilon, relative_epsilon, relative_to
        self.entropy, self.max_iters, self.tol = entropy, max_iters, tol
        self.scaling, self.relaxation, self.gradient, self.strict = scaling, relaxation, gradient, strict

    def forward(
        self, x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], weights: Float[Tensor, " n"] | None = None
    ) -> Float[Tensor, ""]:
        """Return the gap.

        Args:
            x: Samples of the reference measure.
            y: What the map makes of each.
            weights: a, above 0 and adding up to 1; ``None``: equal. Not with ``epsilon=0``.

        Returns:
            The gap, in the cost's unit.

        Raises:
            ValueError: Clouds of different sizes, costs of a wrong shape or not finite, bad weights; or, if ``strict``,
                no convergence.
            TypeError: x or y are no floating-point numbers.

        Warns:
            RuntimeWarning: No convergence within ``max_iters``.
        """
        check_clouds(x, y)
        if len(x) != len(y):
            raise ValueError(f"y must have one point for each of x's {len(x)}, got {len(y)}")
        if weights is not None and self.epsilon == 0:
            raise ValueError("weights must be None with epsilon=0, whose assignment is of equal weights")
        C = cost_matrix(self.cost, x, y)
        if self.epsilon == 0:
            return C.diagonal().mean() - assignment_cost(C)
        epsilon = self.epsilon or relative(C, self.relative_epsilon, self.relative_to)
        a = as_weights("weights", weights, C, len(x))
        solution = sinkhorn(
            C,
            a,
            a,
            epsilon=epsilon,
            tol=self.tol,
            max_iter=self.max_iters,
            scaling=self.scaling,
            relaxation=self.relaxation,
        )
        if self.strict and not solution.converged:
            raise ValueError(
                f"max_iters = {self.max_iters} must suffice: Sinkhorn's marginals are off by {solution.error:.2g}"
            )
        value = self._value(C, a, solution, epsilon)
        if self.entropy == "kl":
            value = value - 2 * epsilon * (a * a.log()).sum()  # KL(P ‖ a aᵀ) = 2 H(a) − H(P)
        return a.dot(C.diagonal()) - value

    def _value(self, C: Tensor, a: Tensor, solution: Transport, epsilon: float) -> Tensor:
        """Return min ⟨P, C⟩ − ε H(P) with the gradient asked for."""
        if self.gradient == "envelope":
            return solution.value
        P = solution.plan if self.gradient == "implicit" else _unrolled(C, a, epsilon, solution.iterations)
        return (P * C).sum() + epsilon * torch.xlogy(P, P).sum()


def relative(C: Tensor, share: float, to: Scale = "mean") -> float:
    """Return a share of the mean of costs, or of their deviation; the share itself if those are 0."""
    costs = C.detach()
    scale = float(costs.mean() if to == "mean" else costs.std(correction=0))
    return share * scale if scale > 0 else share


def assignment_cost(C: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """Return the least mean cost over assignments of rows to columns, with the gradient by the costs it takes.

    Args:
        C: Costs.

    Cost: O(n³), on the CPU.
    """
    rows, columns = linear_sum_assignment(C.detach().cpu().double().numpy())
    taken = C[torch.as_tensor(rows, device=C.device), torch.as_tensor(columns, device=C.device)]
    return taken.mean()


def _unrolled(C: Tensor, a: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Return the plan after so many iterations from potentials 0, as a function of C that autograd sees through."""
    log_a, scaled = a.log(), C / epsilon
    g = torch.zeros_like(a)
    for _ in range(iterations):
        f = log_a - torch.logsumexp(g - scaled, dim=1)
        g = log_a - torch.logsumexp(f[:, None] - scaled, dim=0)
    return torch.exp(f[:, None] + g - scaled)
