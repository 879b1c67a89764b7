"""The matrices A and B of a linear system ẋ = Ax + Bu: dense, and in the structured class that HiPPO belongs to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.sequences.state_space import Measure, generalized_bilinear
from provenn.nn._lssl_tridiagonal import tridiagonal_product, tridiagonal_solve

MEASURES: tuple[Measure, ...] = ("legs", "legt", "lagt")
Name = Literal["lower", "diagonal", "upper", "p", "q", "d", "b"]


def gbt(
    A: Float[Tensor, "... n n"], B: Float[Tensor, "... n"], dt: Float[Tensor, "..."] | float, alpha: float = 0.5
) -> tuple[Float[Tensor, "... n n"], Float[Tensor, "... n"]]:
    """Discretise ẋ = Ax + Bu by the generalised bilinear transform; the paper's name for ``generalized_bilinear``.

    Args:
        A: The system's matrix.
        B: What its one input adds.
        dt: The step Δ > 0.
        alpha: 0 forward Euler, ½ bilinear, 1 backward Euler.

    Shape:
        A (…, N, N), B (…, N), ``dt`` (…); leading dimensions broadcast.

    Returns:
        Ā = (I − αΔA)⁻¹(I + (1 − α)ΔA) and B̄ = Δ(I − αΔA)⁻¹B, of x_t = Ā x_{t−1} + B̄ u_t.

    Raises:
        ValueError: ``alpha`` outside [0, 1], a step ≤ 0, or I − αΔA singular.

    Cost: one solve, O(N³). Differentiable.

    Source: Gu et al., NeurIPS 2021, equation 3.
    """
    moving, entering = generalized_bilinear(A, B, dt, alpha)
    return moving, entering


class Transition(nn.Module, ABC):
    """Base: a system's A (…, N, N) and B (…, N), as parameters or as buffers."""

    d_state: int
    features: int | None
    """One system for each of so many features; ``None`` for one that all share."""

    @abstractmethod
    def discretize(
        self, dt: Float[Tensor, " features"], alpha: float
    ) -> tuple[Float[Tensor, "features n n"], Float[Tensor, "features n"]]:
        """Return Ā and B̄ of every feature in float64."""

    def _hold(self, name: str, value: Tensor, trainable: bool) -> None:
        if trainable:
            self.register_parameter(name, nn.Parameter(value.clone()))
        else:
            self.register_buffer(name, value.clone())


class DenseTransition(Transition):
    """Any A and B, stored as they are.

    Args:
        A: The system's matrix.
        B: What its one input adds.
        trainable: Whether both are parameters; else they are buffers.

    Shape:
        A (N, N) and B (N,), or (features, N, N) and (features, N). Calling it maps ``x`` (…, N) to A x.

    Returns:
        Calling it returns the products.

    Raises:
        ValueError: A is not square, or B does not fit it.

    Cost: O(N²) a product, O(N³) to discretise.

    Source: Gu et al., NeurIPS 2021, section 2.
    """

    def __init__(self, A: Float[Tensor, "..."], B: Float[Tensor, "..."], trainable: bool = False) -> None:
        super().__init__()
        if A.ndim not in (2, 3) or A.shape[-1] != A.shape[-2] or A.shape[-1] == 0:
            raise ValueError(f"A must be (N, N) or (features, N, N), got shape {tuple(A.shape)}")
        if B.shape != A.shape[:-1]:
            raise ValueError(f"B must have the shape {tuple(A.shape[:-1])} of A's rows, got {tuple(B.shape)}")
        self.d_state, self.features = A.shape[-1], A.shape[0] if A.ndim == 3 else None
        self._hold("A", A, trainable)
        self._hold("B", B, trainable)

    def forward(self, x: Float[Tensor, "*lead n"]) -> Float[Tensor, "*lead n"]:
        """Return A x.

        Args:
            x: Vectors, (…, N), with A (features, N, N) (…, features, N).
        """
        return (self.A @ x[..., None])[..., 0]

    def discretize(
        self, dt: Float[Tensor, " features"], alpha: float
    ) -> tuple[Float[Tensor, "features n n"], Float[Tensor, "features n"]]:
        """Return Ā and B̄ of every feature in float64, by :func:`gbt`."""
        A, B = gbt(self.A.double(), self.B.double(), dt.double(), alpha)
        return A, B


class StructuredTransition(Transition):
    r"""A HiPPO system in the trainable class whose products and solves cost O(N).

    .. math:: A = -P (D + T^{-1}) Q, \qquad B = P b

    with diagonal P, D, Q and tridiagonal T; the system is stored with the sign of ẋ = −(−A)x + Bu, so that all of it is
    positive for LegS. Its start values are those of the measure, exactly: LegS and LagT have a lower bidiagonal T (1 on
    the diagonal, −1 below), whose inverse sums; LegT has −½ below, ½ above, and ½ at the diagonal's two ends.

    Args:
        measure: ``"legs"``, ``"legt"`` or ``"lagt"``, as in :func:`hippo`.
        d_state: N.
        features: One system for each of so many features; ``None`` for one system that all share.
        trainable: Whether T, D, P, Q and b are parameters; else they are buffers.
        dtype: Of these; without it the default type.

    Shape:
        Calling it maps x (…, N) to A x; with ``features``, x is (…, features, N).

    Raises:
        ValueError: An unknown measure, or a size < 1.

    Cost: a product or a solve is one tridiagonal solve, O(N) a vector, in 2N steps that all vectors take together;
    elimination does not pivot. Everything is computed in float64.

    Source: Gu et al., NeurIPS 2021, theorem 2 and appendix E; start values as in the authors' ``transition`` module.
    """

    def __init__(
        self,
        measure: Measure,
        d_state: int,
        *,
        features: int | None = None,
        trainable: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("measure", measure, MEASURES)
        check_integer("d_state", d_state, at_least=1)
        if features is not None:
            check_integer("features", features, at_least=1)
        self.d_state, self.features = d_state, features
        for name, value in _start(measure, d_state).items():
            one = value.to(dtype or torch.get_default_dtype())
            self._hold(name, one if features is None else one.repeat(features, 1), trainable)

    def forward(self, x: Float[Tensor, "*lead n"]) -> Float[Tensor, "*lead n"]:
        """Return A x."""
        return self.matvec(x)

    def matvec(self, x: Float[Tensor, "*lead n"]) -> Float[Tensor, "*lead n"]:
        """Return A x.

        Args:
            x: Vectors, (…, N), with ``features`` (…, features, N).

        Returns:
            The products.

        Raises:
            ValueError: T has a pivot of 0, or ``x`` has another size.

        Cost: O(N) a vector.
        """
        self._check(x)
        weighted = self.q.double() * x.double()
        inverse = tridiagonal_solve(*self._bands(), weighted)
        return (-self.p.double() * (self.d.double() * weighted + inverse)).to(x.dtype)

    def solve(self, x: Float[Tensor, "*lead n"], delta: Float[Tensor, "..."] | float) -> Float[Tensor, "*lead n"]:
        """Return (I − δA)⁻¹ x.

        With y = T⁻¹Qz the equation (I + δP(D + T⁻¹)Q)z = x becomes ((I + δPDQ)Q⁻¹T + δP) y = x, which is tridiagonal,
        and z = Q⁻¹Ty. Nothing is divided by I + δPDQ, which may vanish where the system itself is regular.

        Args:
            x: Vectors, (…, N), with ``features`` (…, features, N).
            delta: δ, (…) without the last dimension of x.

        Returns:
            The solutions z.

        Raises:
            ValueError: I − δA is singular, or ``x`` has another size.

        Cost: O(N) a vector.
        """
        self._check(x)
        p, q, d = self.p.double(), self.q.double(), self.d.double()
        step = torch.as_tensor(delta, dtype=torch.float64, device=x.device)[..., None]
        scale = (1 + step * p * d * q) / q
        lower, diagonal, upper = self._bands()
        mixed = (scale[..., 1:] * lower, scale * diagonal + step * p, scale[..., :-1] * upper)
        try:
            y = tridiagonal_solve(*mixed, x.double())
        except ValueError as error:
            raise ValueError(f"I − αΔA must be invertible, got a singular matrix with αΔ = {delta}") from error
        return (tridiagonal_product(lower, diagonal, upper, y) / q).to(x.dtype)

    def advance(
        self, x: Float[Tensor, "*lead n"], u: Float[Tensor, "*lead"], dt: Float[Tensor, "..."] | float, alpha: float
    ) -> Float[Tensor, "*lead n"]:
        """Return Ā x + B̄ u, one step of the recurrence, without Ā.

        Args:
            x: The state, (…, N), with ``features`` (…, features, N).
            u: The input, (…).
            dt: Δ, broadcasting against ``u``.
            alpha: As in :func:`gbt`.

        Returns:
            The next state.

        Raises:
            ValueError: I − αΔA is singular, or ``alpha`` outside [0, 1].

        Cost: O(N) a state.
        """
        check_number("alpha", alpha, at_least=0, at_most=1)
        step = torch.as_tensor(dt, dtype=torch.float64, device=x.device)
        state = x.double()
        moved = state + (1 - alpha) * step[..., None] * self.matvec(state)
        entered = (step * u.double())[..., None] * (self.p * self.b).double()
        return self.solve(moved + entered, alpha * step).to(x.dtype)

    def discretize(
        self, dt: Float[Tensor, " features"], alpha: float
    ) -> tuple[Float[Tensor, "features n n"], Float[Tensor, "features n"]]:
        """Return Ā and B̄ of every feature in float64, column by column at O(N) each, so O(N²) in all."""
        N = self.d_state
        step = dt.double()
        eye = torch.eye(N, dtype=torch.float64, device=step.device)[:, None].expand(N, len(step), N)
        moved = eye + (1 - alpha) * step[:, None] * self.matvec(eye)
        entered = (step[:, None] * self._input()).expand(1, len(step), N)
        solved = self.solve(torch.cat((moved, entered)), alpha * step)
        return solved[:-1].movedim(0, -1), solved[-1]

    def dense(self) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """Return A (…, N, N) and B (…, N) as dense float64 tensors."""
        N = self.d_state
        eye = torch.eye(N, dtype=torch.float64, device=self.p.device)
        lead = self.p.shape[:-1]
        columns = self.matvec(eye.reshape(N, *(1 for _ in lead), N).expand(N, *lead, N))
        return columns.movedim(0, -1), self._input()

    def _check(self, x: Tensor) -> None:
        if x.shape[-self.p.ndim :] != self.p.shape:
            raise ValueError(f"x must end in the dimensions {tuple(self.p.shape)}, got shape {tuple(x.shape)}")

    def _bands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.lower.double(), self.diagonal.double(), self.upper.double()

    def _input(self) -> Tensor:
        return self.p.double() * self.b.double()


def _start(measure: Measure, N: int) -> dict[Name, Tensor]:
    n = torch.arange(N, dtype=torch.float64)
    zeros, ones = torch.zeros(N, dtype=torch.float64), torch.ones(N, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    if measure == "legt":
        ends = zeros.clone()
        ends[0] += 0.5
        ends[-1] += 0.5
        half = 0.5 * ones[1:]
        return {"lower": -half, "diagonal": ends, "upper": half, "p": root, "q": root, "d": zeros, "b": ones}
    bands: dict[Name, Tensor] = {"lower": -ones[1:], "diagonal": ones, "upper": zeros[1:], "b": ones}
    if measure == "lagt":
        return {**bands, "p": ones, "q": ones, "d": -0.5 * ones}
    return {**bands, "p": root, "q": root, "d": -n / (2 * n + 1)}
