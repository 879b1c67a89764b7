"""Inexact hypergradients of bilevel problems, and the bound of their error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.numerics.krylov import NotPositiveDefiniteError, conjugate_gradient
from provenn.core.numerics.power_iteration import largest_eigenvalue, operator_norm

Lower = Callable[[Tensor, Tensor], Tensor]
"""(x, θ) ↦ h(x, θ)."""
Upper = Callable[[Tensor], Tensor]
"""x ↦ g(x)."""


class ConvexityError(ValueError):
    """The lower objective is not strongly convex: its Hessian has a direction without positive curvature.

    Args:
        message: What was seen.
        curvature: dᵀH d / dᵀd of the direction.

    Source: arXiv 2308.10098, the assumption of strong convexity.
    """

    def __init__(self, message: str, curvature: float) -> None:
        super().__init__(message)
        self.curvature = curvature

    def __reduce__(self) -> tuple[type[ConvexityError], tuple[str, float]]:
        return type(self), (str(self), self.curvature)


@dataclass(frozen=True)
class LipschitzConstants:
    """Constants of the hypergradient's error bound; ``None`` has the solver estimate one.

    Args:
        upper: L_g, of ∇g.
        jacobian: L_J, of ∇²_xθ h in x.
        inverse_hessian: L_{H⁻¹}, of (∇²_xx h)⁻¹ in x.

    Raises:
        ValueError: A constant is negative, NaN or infinite.
        TypeError: A constant is no number.

    Source: Salehi, Mukherjee, Roberts & Ehrhardt, arXiv 2308.10098, the theorem on the a-posteriori bound.
    """

    upper: float | None = None
    jacobian: float | None = None
    inverse_hessian: float | None = None

    def __post_init__(self) -> None:
        for name in ("upper", "jacobian", "inverse_hessian"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value, at_least=0)


class Linearization:
    """The lower objective around one point: its gradient by x, and products with H = ∇²_xx h and J = ∇²_xθ h.

    All vectors are flat. One graph serves all products.
    """

    def __init__(self, lower: Lower, x: Tensor, theta: Tensor) -> None:
        with torch.enable_grad():
            self.x = x.detach().requires_grad_()
            self.theta = theta.detach().requires_grad_()
            value = lower(self.x, self.theta)
            (self._gradient,) = torch.autograd.grad(value, self.x, create_graph=True)
        self.gradient = self._gradient.detach().flatten()

    def hessian(self, v: Tensor) -> Tensor:
        """Return H v."""
        return self._pulled_back(self.x, v)

    def jacobian_transposed(self, u: Tensor) -> Tensor:
        """Return Jᵀu, of θ's size."""
        return self._pulled_back(self.theta, u)

    def jacobian(self, v: Tensor) -> Tensor:
        """Return J v, of x's size: the derivative of u ↦ ⟨Jᵀu, v⟩."""
        if not self._gradient.requires_grad:
            return torch.zeros_like(self.gradient)
        with torch.enable_grad():
            u = torch.zeros_like(self._gradient).requires_grad_()
            (pulled,) = torch.autograd.grad(self._gradient, self.theta, u, create_graph=True, materialize_grads=True)
            if not pulled.requires_grad:
                return torch.zeros_like(self.gradient)
            (pushed,) = torch.autograd.grad(pulled, u, v.view_as(pulled), retain_graph=True, materialize_grads=True)
        return pushed.flatten()

    def _pulled_back(self, to: Tensor, v: Tensor) -> Tensor:
        if not self._gradient.requires_grad:  # h is linear in x
            return torch.zeros(to.numel(), dtype=to.dtype, device=to.device)
        (product,) = torch.autograd.grad(
            self._gradient, to, v.view_as(self._gradient), retain_graph=True, materialize_grads=True
        )
        return product.detach().flatten()


class Adjoint(NamedTuple):
    """An approximate solution q of H q = ∇g: residual ‖∇g − H q‖, and iterations."""

    q: Tensor
    residual: float
    iterations: int


def solve_adjoint(point: Linearization, b: Tensor, delta: float, start: Tensor | None, max_iter: int) -> Adjoint:
    """Solve H q = b by conjugate gradients to a residual of at most δ, from ``start`` or zero.

    Raises:
        ConvexityError: A direction has no positive curvature.
    """
    r = b if start is None else b - point.hessian(start)
    size = r.norm().item()
    if size <= delta or max_iter == 0:
        return Adjoint(torch.zeros_like(b) if start is None else start, size, 0)
    last: list[Tensor] = []

    def watched(v: Tensor) -> Tensor:
        product = point.hessian(v)
        last[:] = [v, product]
        return product

    try:
        trace = conjugate_gradient(watched, r, tol=delta / size, max_iter=max_iter)
    except NotPositiveDefiniteError as error:
        d, Hd = last
        curvature = (d.dot(Hd) / d.dot(d)).item()
        raise ConvexityError(
            f"lower must be strongly convex in x, but its Hessian has curvature {curvature:.3g} along a direction "
            f"of conjugate gradients",
            curvature,
        ) from error
    q = trace.x if start is None else start + trace.x
    return Adjoint(q, trace.residual_norms[-1], len(trace.energy_drops))


class Hypergradient(NamedTuple):
    """An inexact hypergradient.

    Args:
        gradient: z = −Jᵀq.
        adjoint: q, for a warm start.
        residual_norm: ‖∇g(x) − H q‖.
        iterations: Iterations of conjugate gradients.

    Shape:
        ``gradient`` as θ, ``adjoint`` as x.

    Source: arXiv 2308.10098, section 2.
    """

    gradient: Float[Tensor, "*theta"]
    adjoint: Float[Tensor, "*x"]
    residual_norm: float
    iterations: int


def hypergradient(
    lower: Lower,
    upper: Upper,
    x: Float[Tensor, "*x"],
    theta: Float[Tensor, "*theta"],
    delta: float,
    start: Float[Tensor, "*x"] | None = None,
    max_iter: int = 2000,
) -> Hypergradient:
    """Approximate ∇f(θ) for f(θ) = g(x̂(θ)) from a point x near the lower minimiser x̂(θ).

    Conjugate gradients solve H(x) q = ∇g(x) to a residual of δ, and z = −J(x)ᵀq.

    Args:
        lower: (x, θ) ↦ h(x, θ), twice differentiable, strongly convex in x.
        upper: x ↦ g(x).
        x: The approximate minimiser.
        theta: The hyperparameters θ.
        delta: Largest residual δ.
        start: Start of the iteration, of x's shape; ``None``: zero.
        max_iter: Most iterations; past them the residual is what it is.

    Shape:
        ``x`` any, ``theta`` any; ``gradient`` has θ's and ``adjoint`` x's.

    Returns:
        The hypergradient, q, its residual and the count of iterations.

    Raises:
        ValueError: ``delta`` ≤ 0, ``max_iter`` < 0, or ``start`` is not of x's shape.
        ConvexityError: A Hessian product shows curvature that is not positive; a ``ValueError``.

    Cost: one gradient of h with its graph, then one Hessian product (about two gradients) an iteration; at most
    √κ log(1/δ) iterations for a condition number κ of H.

    Source: arXiv 2308.10098, section 2; Pedregosa, ICML 2016.
    """
    check_number("delta", delta, above=0)
    check_integer("max_iter", max_iter, at_least=0)
    if start is not None and start.shape != x.shape:
        raise ValueError(f"start must have x's shape {tuple(x.shape)}, got {tuple(start.shape)}")
    point = Linearization(lower, x, theta)
    b = upper_gradient(upper, x)[1].flatten()
    found = solve_adjoint(point, b, delta, None if start is None else start.flatten(), max_iter)
    z = -point.jacobian_transposed(found.q)
    return Hypergradient(z.view_as(theta), found.q.view_as(x), found.residual, found.iterations)


def upper_gradient(upper: Upper, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return g(x) and ∇g(x); zeros where g does not depend on x."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = upper(leaf)
        if not value.requires_grad:
            return value, torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(value, leaf, materialize_grads=True)
    return value.detach(), gradient


def hypergradient_bound(
    epsilon: float,
    delta: float,
    mu: float,
    jacobian_norm: float,
    upper_gradient_norm: float,
    constants: LipschitzConstants,
) -> float:
    """Bound the error of an inexact hypergradient from what is known at the inexact point.

    ω = cε + (‖J‖/μ)δ + (L_J L_g/μ)ε² with c = L_g‖J‖/μ + L_{H⁻¹}‖∇g‖‖J‖ + L_J‖∇g‖/μ.

    Args:
        epsilon: ε ≥ ‖x − x̂(θ)‖.
        delta: δ ≥ ‖H q − ∇g‖.
        mu: Strong convexity μ.
        jacobian_norm: ‖J(x)‖.
        upper_gradient_norm: ‖∇g(x)‖.
        constants: L_g, L_J and L_{H⁻¹}, all given.

    Returns:
        ω ≥ ‖z − ∇f(θ)‖.

    Raises:
        ValueError: ``mu`` ≤ 0, another number is negative, or ``constants`` leaves one out.

    Cost: O(1).

    Source: arXiv 2308.10098, theorem on the a-posteriori bound of the hypergradient.
    """
    check_number("mu", mu, above=0)
    named = {
        "epsilon": epsilon,
        "delta": delta,
        "jacobian_norm": jacobian_norm,
        "upper_gradient_norm": upper_gradient_norm,
    }
    for name, value in named.items():
        check_number(name, value, at_least=0)
    L_g, L_J, L_inverse = constants.upper, constants.jacobian, constants.inverse_hessian
    if L_g is None or L_J is None or L_inverse is None:
        raise ValueError(f"constants must all be given, got {constants}")
    c = L_g * jacobian_norm / mu + L_inverse * upper_gradient_norm * jacobian_norm + L_J * upper_gradient_norm / mu
    return c * epsilon + jacobian_norm / mu * delta + L_J * L_g / mu * epsilon * epsilon


class Estimates:
    """Running estimates of what the bound needs: ‖J‖, and the Lipschitz constants that are not given.

    L_J and L_{H⁻¹} are difference quotients between x and a random point as far away as ε, and are kept as maxima; the
    difference of inverse Hessians is H(x')⁻¹(H(x') − H(x))q, which loses no digits to cancellation. L_g is the largest
    eigenvalue of ∇²g by power iteration, also kept as a maximum. The random numbers are the estimates' own.
    """

    def __init__(self, lower: Lower, upper: Upper, cg_max_iter: int) -> None:
        self._lower, self._upper, self._cg_max_iter = lower, upper, cg_max_iter
        self._generator = torch.Generator().manual_seed(0)
        self._direction: Tensor | None = None
        self.upper = self.jacobian = self.inverse_hessian = 0.0

    def jacobian_norm(self, point: Linearization, z: Tensor) -> float:
        """Estimate ‖J‖ by ten power iterations from z at first, then by three from where the last call ended."""
        start, steps = (z.flatten(), 10) if self._direction is None else (self._direction, 3)
        norm, self._direction = operator_norm(point.jacobian, point.jacobian_transposed, start, steps)
        return norm

    def fill(
        self, given: LipschitzConstants, point: Linearization, q: Tensor, b: Tensor, epsilon: float
    ) -> tuple[LipschitzConstants, int]:
        """Return all constants, estimated where none is given, and the iterations of conjugate gradients spent."""
        spent = 0
        if given.upper is None:
            self.upper = max(self.upper, self._upper_smoothness(point.x))
        if given.jacobian is None or given.inverse_hessian is None:
            spent = self._quotients(given, point, q, b, epsilon)
        return LipschitzConstants(
            self.upper if given.upper is None else given.upper,
            self.jacobian if given.jacobian is None else given.jacobian,
            self.inverse_hessian if given.inverse_hessian is None else given.inverse_hessian,
        ), spent

    def random_direction(self, like: Tensor) -> Tensor:
        """Draw a flat unit vector of a tensor's size."""
        v = torch.randn(like.numel(), dtype=like.dtype, generator=self._generator, device="cpu").to(like.device)
        return v / v.norm()

    def _upper_smoothness(self, x: Tensor) -> float:
        flat = Linearization(lambda at, _: self._upper(at), x, torch.zeros((), dtype=x.dtype, device=x.device))
        return max(0.0, largest_eigenvalue(flat.hessian, self.random_direction(x))[0])

    def _quotients(self, given: LipschitzConstants, point: Linearization, q: Tensor, b: Tensor, epsilon: float) -> int:
        size_q, size_b = q.norm().item(), b.norm().item()
        if size_q == 0 or size_b == 0:
            return 0
        x = point.x.detach()
        # Below this length rounding would be measured instead.
        length = max(epsilon, math.sqrt(torch.finfo(x.dtype).eps) * (1 + x.norm().item()))
        moved = x + length * self.random_direction(x).view_as(x)
        other = Linearization(self._lower, moved, point.theta)
        if given.jacobian is None:
            change = other.jacobian_transposed(q) - point.jacobian_transposed(q)
            self.jacobian = max(self.jacobian, change.norm().item() / (size_q * length))
        if given.inverse_hessian is not None:
            return 0
        change = other.hessian(q) - point.hessian(q)
        found = solve_adjoint(other, change, 0.1 * change.norm().item(), None, self._cg_max_iter)
        self.inverse_hessian = max(self.inverse_hessian, found.q.norm().item() / (size_b * length))
        return found.iterations
