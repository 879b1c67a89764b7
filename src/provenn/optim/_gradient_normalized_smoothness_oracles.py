"""Functions with gradients, Hessians and the approximations of the Hessian that the method is made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number
from provenn.optim._gradient_normalized_smoothness_systems import Curvature, RankOne

HessianChoice = Literal["exact", "approximate", "zero"] | Callable[[Tensor], Curvature]


class Oracle:
    """A twice differentiable function of a vector; what a subclass does not bring along comes from autograd.

    Args:
        function: x (n,) ↦ f(x), a scalar, made of torch's functions.

    Shape:
        ``x`` (n,) everywhere; gradients (n,), Hessians (n, n).

    Cost: a gradient is a backward pass, a Hessian n of them in one batch.

    Source: the interface of the authors' experiments: value, gradient, Hessian.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function

    def value(self, x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return f(x)."""
        return self._function(x)

    def gradient(self, x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return ∇f(x)."""
        g: Tensor = torch.func.grad(self.value)(x)
        return g

    def evaluate(self, x: Float[Tensor, " n"]) -> tuple[Float[Tensor, ""], Float[Tensor, " n"]]:
        """Return f(x) and ∇f(x)."""
        return self.value(x), self.gradient(x)

    def hessian(self, x: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
        """Return ∇²f(x)."""
        H: Tensor = torch.func.hessian(self.value)(x)
        return H

    def approximation(self, x: Float[Tensor, " n"]) -> Curvature:
        """Return the approximation of ∇²f(x) that suits the function.

        Raises:
            ValueError: It has none.
        """
        raise ValueError(f"hessian 'approximate': {type(self).__name__} has no approximation of its own")


def curvature_at(oracle: Oracle, x: Tensor, hessian: HessianChoice) -> Curvature:
    """Return H at a point, by the name of an approximation or by a function of the user's."""
    if callable(hessian):
        return hessian(x)
    if hessian == "zero":
        return None
    return oracle.hessian(x) if hessian == "exact" else oracle.approximation(x)


def check_hessian(hessian: str | Callable[[Tensor], Curvature], choices: tuple[str, ...]) -> None:
    """Check that H is one of a few names, or can be called."""
    if not callable(hessian) and hessian not in choices:
        raise ValueError(f"hessian must be one of {', '.join(map(repr, choices))} or a function, got {hessian!r}")


class LogSumExp(Oracle):
    """f(x) = μ log Σᵢ exp((⟨aᵢ, x⟩ − bᵢ)/μ), a smooth maximum.

    Its approximation is the weighted Gauss–Newton matrix AᵀDiag(π)A/μ, π the softmax; it exceeds the Hessian by
    ∇f∇fᵀ/μ.

    Args:
        A: The vectors aᵢ, one a row.
        b: The shifts bᵢ.
        mu: μ, the width over which the maximum is smoothed.

    Shape:
        ``A`` (m, n), ``b`` (m,).

    Raises:
        ValueError: ``mu`` ≤ 0, or A and b do not fit or are not finite.

    Cost: O(m n) for value and gradient, O(m n²) for a Hessian.

    Source: the paper's section on experiments (soft maximum).
    """

    def __init__(self, A: Float[Tensor, "m n"], b: Float[Tensor, " m"], mu: float) -> None:
        check_number("mu", mu, above=0)
        _check_rows(A, b)
        self.A, self.b, self.mu = A, b.to(A), mu

    @classmethod
    def centred(cls, A: Float[Tensor, "m n"], b: Float[Tensor, " m"], mu: float) -> LogSumExp:
        """Return the function whose rows are shifted by its gradient at 0, so that its minimum is at 0.

        Args:
            A: As in the class.
            b: As in the class.
            mu: As in the class.
        """
        start = cls(A, b, mu).gradient(A.new_zeros(A.shape[1]))
        return cls(A - start, b, mu)

    def _exponents(self, x: Tensor) -> Tensor:
        return (self.A @ x - self.b) / self.mu

    def value(self, x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return f(x)."""
        return self.mu * self._exponents(x).logsumexp(0)

    def gradient(self, x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return Aᵀπ."""
        return self._exponents(x).softmax(0) @ self.A

    def evaluate(self, x: Float[Tensor, " n"]) -> tuple[Float[Tensor, ""], Float[Tensor, " n"]]:
        """Return f(x) and ∇f(x) from one product with A."""
        exponents = self._exponents(x)
        return self.mu * exponents.logsumexp(0), exponents.softmax(0) @ self.A

    def hessian(self, x: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
        """Return (AᵀDiag(π)A − ∇f∇fᵀ)/μ, as the covariance that it is: nothing cancels where π is nearly one row."""
        pi = self._exponents(x).softmax(0)
        return _weighted_gram(self.A - pi @ self.A, pi) / self.mu

    def approximation(self, x: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
        """Return the weighted Gauss–Newton matrix AᵀDiag(π)A/μ."""
        return _weighted_gram(self.A, self._exponents(x).softmax(0)) / self.mu


class PowerResidual(Oracle):
    """f(x) = ‖u(x)‖^p/p, the equations u(x) = 0 as a minimisation.

    With J the Jacobian of u, ∇²f = ‖u‖^{p−2}(JᵀJ + Σ uᵢ∇²uᵢ) + (p − 2)‖u‖^{p−4}(Jᵀu)(Jᵀu)ᵀ. The last term is
    :meth:`fisher_term`; the approximation leaves out the sum alone.

    Args:
        residual: u, x (n,) ↦ (m,).
        p: p, at least 2.
        jacobian: x (n,) ↦ J (m, n); ``None``: by autograd.

    Shape:
        ``x`` (n,).

    Raises:
        ValueError: ``p`` < 2.

    Cost: O(m n) beside u and J for value and gradient, O(m n²) for a Hessian.

    Source: the paper's section on nonlinear equations.
    """

    def __init__(
        self,
        residual: Callable[[Tensor], Tensor],
        p: float = 2.0,
        jacobian: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_number("p", p, at_least=2)
        self.residual, self.p = residual, p
        self.jacobian = torch.func.jacrev(residual) if jacobian is None else jacobian

    @classmethod
    def linear(cls, A: Float[Tensor, "m n"], b: Float[Tensor, " m"], p: float = 2.0) -> PowerResidual:
        """Return the function of u(x) = A x − b, whose approximation is its Hessian.

        Args:
            A: The matrix.
            b: The right-hand side.
            p: As in the class.

        Shape:
            ``A`` (m, n), ``b`` (m,).
        """
        _check_rows(A, b)
        return cls(lambda x: A @ x - b, p, lambda x: A)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return u, J, ‖u‖ and Jᵀu/‖u‖, the last 0 where u is."""
        u, J = self.residual(x), self.jacobian(x)
        size = u.norm()
        return u, J, size, (u / size.clamp(min=torch.finfo(u.dtype).tiny)) @ J

    def value(self, x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return ‖u(x)‖^p/p."""
        square: Tensor = self.residual(x).square().sum()
        return square ** (self.p / 2) / self.p

    def gradient(self, x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return ‖u‖^{p−2} Jᵀu."""
        u, J, size, _ = self._parts(x)
        slope: Tensor = u @ J
        return slope * size.pow(self.p - 2)

    def hessian(self, x: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
        """Return ∇²f(x)."""
        u = self.residual(x)
        scale: Tensor = u.norm() ** (self.p - 2)
        return self.approximation(x) + scale * self.bend(x, u)

    def bend(self, x: Float[Tensor, " n"], weights: Float[Tensor, " m"]) -> Float[Tensor, "n n"]:
        """Return Σ wᵢ ∇²uᵢ(x), which is what the approximation leaves out.

        Args:
            x: The point.
            weights: w.
        """
        bend: Tensor = torch.func.hessian(lambda z: self.residual(z) @ weights)(x)
        return bend

    def fisher_term(self, x: Float[Tensor, " n"]) -> RankOne:
        """Return (p − 2)/‖u‖^p ∇f∇fᵀ as a rank-one matrix."""
        _, _, size, direction = self._parts(x)
        return RankOne(((self.p - 2) * size ** (self.p - 2)).item(), direction)

    def approximation(self, x: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
        """Return ‖u‖^{p−2}JᵀJ plus the Fisher term."""
        _, J, size, direction = self._parts(x)
        return size ** (self.p - 2) * (J.mT @ J + (self.p - 2) * torch.outer(direction, direction))


class Rosenbrock(PowerResidual):
    """Rosenbrock's function (a − x)² + b(y − x²)², as √2 times the residuals a − x and √b(y − x²).

    Its approximation is the Gauss–Newton matrix. A power of the residuals is ``PowerResidual(Rosenbrock().residual,
    p)``.

    Args:
        a: a; the minimum is at (a, a²).
        b: b, the steepness of the valley.

    Shape:
        ``x`` (2,).

    Raises:
        ValueError: ``a`` is not finite, or ``b`` ≤ 0.

    Cost: constant.

    Source: Rosenbrock, Comput. J. 3 (1960); in the paper's experiments with a = 1, b = 100.
    """

    def __init__(self, a: float = 1.0, b: float = 100.0) -> None:
        check_number("a", a)
        check_number("b", b, above=0)
        super().__init__(self._residual, 2.0, self._jacobian)
        self.a, self.b = a, b

    def _residual(self, x: Tensor) -> Tensor:
        return 2**0.5 * torch.stack((self.a - x[0], self.b**0.5 * (x[1] - x[0] ** 2)))

    def _jacobian(self, x: Tensor) -> Tensor:
        one, root = torch.ones_like(x[0]), self.b**0.5
        rows = torch.stack((-one, 0 * one)), torch.stack((-2 * root * x[0], root * one))
        return 2**0.5 * torch.stack(rows)

    def bend(self, x: Float[Tensor, " 2"], weights: Float[Tensor, " 2"]) -> Float[Tensor, "2 2"]:
        """Return Σ wᵢ ∇²uᵢ: only the second residual bends, along x.

        Args:
            x: The point.
            weights: w.
        """
        return torch.diag(torch.stack((-2 * (2 * self.b) ** 0.5 * weights[1], 0 * weights[1])))


class Chebyshev(PowerResidual):
    """‖u(x)‖^p/p with u₁ = (1 − x₁)/2 and uᵢ = xᵢ − (2xᵢ₋₁² − 1): a valley along a chain of Chebyshev polynomials.

    The only minimum is at (1, …, 1), with value 0.

    Args:
        n: Variables.
        p: As in :class:`PowerResidual`.

    Shape:
        ``x`` (n,).

    Raises:
        ValueError: ``n`` < 2 or ``p`` < 2.

    Cost: as :class:`PowerResidual`.

    Source: the paper's section on experiments; the function is Nesterov's.
    """

    def __init__(self, n: int, p: float = 4.0) -> None:
        check_integer("n", n, at_least=2)
        super().__init__(self._residual, p, self._jacobian)
        self.n = n

    def _residual(self, x: Tensor) -> Tensor:
        return torch.cat((0.5 * (1 - x[:1]), x[1:] - (2 * x[:-1] ** 2 - 1)))

    def _jacobian(self, x: Tensor) -> Tensor:
        first = torch.cat((torch.full_like(x[:1], -0.5), torch.ones_like(x[1:])))
        return torch.diag(first) + torch.diag(-4 * x[:-1], -1)

    def bend(self, x: Float[Tensor, " n"], weights: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
        """Return Σ wᵢ ∇²uᵢ, a diagonal matrix.

        Args:
            x: The point.
            weights: w.
        """
        return torch.diag(torch.cat((-4 * weights[1:], 0 * weights[:1])))


class LogisticRegression(Oracle):
    """f(x) = mean log(1 + exp(−yᵢ⟨aᵢ, x⟩)) + ridge ‖x‖²/2.

    Its approximation is the empirical Fisher matrix, the mean of ∇fᵢ∇fᵢᵀ over the samples' losses, plus the ridge. (The
    Gauss–Newton matrix of this loss is its Hessian.)

    Args:
        A: Features aᵢ, one sample a row; a constant column for an intercept.
        y: Labels, −1 or 1.
        ridge: Weight of the quadratic term.

    Shape:
        ``A`` (m, n), ``y`` (m,).

    Raises:
        ValueError: ``ridge`` < 0, a label is neither −1 nor 1, or A and y do not fit or are not finite.

    Cost: O(m n) for value and gradient, O(m n²) for a Hessian.

    Source: the paper's section on logistic regression.
    """

    def __init__(self, A: Float[Tensor, "m n"], y: Tensor, ridge: float = 0.0) -> None:
        check_number("ridge", ridge, at_least=0)
        _check_rows(A, y, "y")
        if not (y.abs() == 1).all():
            raise ValueError(f"y must hold −1 and 1 only, got {sorted(set(y.tolist()))[:5]}")
        self.A, self.y, self.ridge = A, y.to(A), ridge

    def _wrong(self, x: Tensor) -> Tensor:
        """Return the probabilities of the wrong labels."""
        return (-self.y * (self.A @ x)).sigmoid()

    def value(self, x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """Return f(x)."""
        margins = self.y * (self.A @ x)
        return torch.nn.functional.softplus(-margins).mean() + 0.5 * self.ridge * x.square().sum()

    def gradient(self, x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return ∇f(x)."""
        return -(self.y * self._wrong(x)) @ self.A / len(self.A) + self.ridge * x

    def hessian(self, x: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
        """Return ∇²f(x)."""
        wrong = self._wrong(x)
        return self._with_ridge(wrong * (1 - wrong))

    def approximation(self, x: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
        """Return the mean of the squared gradients of the samples, and the ridge."""
        return self._with_ridge(self._wrong(x).square())

    def _with_ridge(self, weights: Tensor) -> Tensor:
        gram = _weighted_gram(self.A, weights) / len(self.A)
        gram.diagonal().add_(self.ridge)
        return gram


def _weighted_gram(A: Tensor, weights: Tensor) -> Tensor:
    return A.mT @ (weights.unsqueeze(-1) * A)


def _check_rows(A: Tensor, b: Tensor, name: str = "b") -> None:
    if A.dim() != 2 or not A.is_floating_point() or b.shape != A.shape[:1]:
        raise ValueError(
            f"A must be a matrix with as many rows as {name} has entries, got {tuple(A.shape)} and {tuple(b.shape)}"
        )
    if not (A.isfinite().all() and b.isfinite().all()):
        raise ValueError(f"A and {name} must be finite, got NaN or infinite entries")
