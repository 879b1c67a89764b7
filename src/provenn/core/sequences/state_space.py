"""Linear state-space systems ẋ = Ax + Bu: HiPPO matrices, discretisations, and the Krylov matrix of a kernel."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number

Measure = Literal["legs", "legt", "lagt"]

_MEASURES = ("legs", "legt", "lagt")


def hippo(
    measure: Measure, order: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """Return A and B of the system ẋ = Ax + Bu that keeps the coefficients of its past input in orthogonal polynomials.

    Args:
        measure: ``"legs"``, scaled Legendre: all of the past alike (its exact system is ẋ = (Ax + Bu)/t); ``"legt"``,
            translated Legendre: a window of length 1; ``"lagt"``, translated Laguerre: the past fading as e^{−s}.
        order: N, the number of coefficients.
        dtype: Of the result; without it the default type.
        device: Of the result.

    Shape:
        A (N, N), B (N,).

    Returns:
        A, lower triangular for ``"legs"`` and ``"lagt"``, with eigenvalues of negative real part, and B.

    Raises:
        ValueError: ``order`` < 1 or an unknown measure.

    Cost: O(N²).

    Source: Gu, Dao, Ermon, Rudra & Ré, "HiPPO: Recurrent memory with optimal polynomial projections", NeurIPS 2020,
    theorems 1 and 2 and appendix D; LagT in the scaling of the LSSL paper.
    """
    check_integer("order", order, at_least=1)
    if measure not in _MEASURES:
        raise ValueError(f"measure must be one of {', '.join(_MEASURES)}, got {measure!r}")
    n = torch.arange(order, dtype=torch.float64, device=device)
    ones = torch.ones(order, order, dtype=torch.float64, device=device)
    root = (2 * n + 1).sqrt()
    if measure == "legs":
        A = -torch.outer(root, root).tril(-1) - torch.diag(n + 1)
        B = root
    elif measure == "legt":
        # (−1)^{n−k} above the diagonal and 1 below it.
        signs = ones.tril() + ((-1.0) ** (n[:, None] - n)).triu(1)
        A = -torch.outer(root, root) * signs
        B = root
    else:
        A = 0.5 * torch.diag(torch.ones_like(n)) - ones.tril()
        B = torch.ones_like(n)
    dtype = dtype or torch.get_default_dtype()
    return A.to(dtype), B.to(dtype)


def generalized_bilinear(
    A: Float[Tensor, "... n n"], B: Float[Tensor, "... n"], dt: Float[Tensor, "..."] | float, alpha: float = 0.5
) -> tuple[Float[Tensor, "... n n"], Float[Tensor, "... n"]]:
    """Discretise ẋ = Ax + Bu by the generalised bilinear transform.

    Args:
        A: The system's matrix.
        B: What its one input adds.
        dt: The step Δ > 0.
        alpha: 0 forward Euler, ½ bilinear (order 2, and stable where the system is), 1 backward Euler.

    Shape:
        A (…, N, N), B (…, N), ``dt`` (…); leading dimensions broadcast.

    Returns:
        Ā = (I − αΔA)⁻¹(I + (1 − α)ΔA) and B̄ = Δ(I − αΔA)⁻¹B, of x_t = Ā x_{t−1} + B̄ u_t.

    Raises:
        ValueError: ``alpha`` outside [0, 1], a step ≤ 0, or I − αΔA singular.

    Cost: one solve, O(N³). Differentiable.

    Source: Gu et al., NeurIPS 2021, equation 3.
    """
    check_number("alpha", alpha, at_least=0, at_most=1)
    step = torch.as_tensor(dt, dtype=A.dtype, device=A.device)
    if not torch.compiler.is_compiling() and not bool((step > 0).all()):
        raise ValueError(f"dt must be > 0, got {step.min().item()}")
    step = step[..., None, None]
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    moving, entering = eye + (1 - alpha) * step * A, step * B[..., None]
    lead = torch.broadcast_shapes(moving.shape[:-2], entering.shape[:-2])
    right = torch.cat([part.expand(*lead, *part.shape[-2:]) for part in (moving, entering)], -1)
    solved, info = torch.linalg.solve_ex(eye - alpha * step * A, right)
    if not torch.compiler.is_compiling() and bool((info != 0).any()):
        raise ValueError(f"I − αΔA must be invertible, got a singular matrix with alpha={alpha}")
    return solved[..., :-1], solved[..., -1]


def repeated_squares(A: Float[Tensor, "*lead n n"], length: int) -> tuple[Tensor, ...]:
    """Return A, A², A⁴, …: every power A^{2^i} with 2^i < L, and A itself.

    Args:
        A: The matrix.
        length: L, the number of powers I, A, …, A^{L−1} that products of these make up.

    Shape:
        A (…, N, N), and each of the powers too.

    Returns:
        ⌈log₂ L⌉ powers, one at least.

    Raises:
        ValueError: ``length`` < 1.

    Cost: O(N³ log L). Rounding grows with the powers: for HiPPO matrices of N ≥ 64 and L ≥ 1000 use float64.
    Differentiable.
    """
    check_integer("length", length, at_least=1)
    squares = [A]
    while 1 << len(squares) < length:
        squares.append(squares[-1] @ squares[-1])
    return tuple(squares)


def krylov(
    length: int,
    A: Float[Tensor, "... n n"],
    b: Float[Tensor, "... n"],
    squares: tuple[Tensor, ...] | None = None,
) -> Float[Tensor, "... n length"]:
    """Return the Krylov matrix (b, Ab, A²b, …), by doubling: each product with a power A^{2^i} doubles its columns.

    Args:
        length: L, the number of columns.
        A: The matrix.
        b: The first column.
        squares: :func:`repeated_squares` of A, for this length or a greater one, where they are at hand.

    Shape:
        A (…, N, N), b (…, N), leading dimensions broadcasting. The result (…, N, L).

    Returns:
        The columns; the kernel of a state-space system is C times it.

    Raises:
        ValueError: ``length`` < 1, or too few ``squares``.

    Cost: that of :func:`repeated_squares`, and O(N² L) for the columns. Differentiable.

    Source: Gu et al., NeurIPS 2021, appendix C.
    """
    check_integer("length", length, at_least=1)
    if squares is None:
        squares = repeated_squares(A, length)
    elif 1 << len(squares) < length:
        raise ValueError(f"squares must reach a length of {length}, got {len(squares)} of them")
    columns = b[..., None]
    if b.shape != A.shape[:-1]:
        columns = columns.expand(*torch.broadcast_shapes(A.shape[:-2], b.shape[:-1]), -1, 1)
    for power in squares:
        if (have := columns.shape[-1]) >= length:
            break
        columns = torch.cat((columns, power @ columns[..., : length - have]), -1)
    return columns
