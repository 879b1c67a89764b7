"""Products and solves with tridiagonal matrices, at O(n) for each right-hand side."""

from __future__ import annotations

from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor


def tridiagonal_product(
    lower: Float[Tensor, "*#lead less"],
    diagonal: Float[Tensor, "*#lead n"],
    upper: Float[Tensor, "*#lead less"],
    x: Float[Tensor, "*#lead n"],
) -> Float[Tensor, "*lead n"]:
    """Return T x for the tridiagonal matrix T.

    Args:
        lower: The band below the diagonal.
        diagonal: The diagonal.
        upper: The band above it.
        x: The vectors.

    Shape:
        Bands (…, n − 1) and (…, n), ``x`` (…, n); leading dimensions broadcast.

    Returns:
        The products.

    Cost: 5n operations a vector.
    """
    below = lower * x[..., :-1]
    above = upper * x[..., 1:]
    return diagonal * x + torch.nn.functional.pad(below, (1, 0)) + torch.nn.functional.pad(above, (0, 1))


def tridiagonal_solve(
    lower: Float[Tensor, "*#lead less"],
    diagonal: Float[Tensor, "*#lead n"],
    upper: Float[Tensor, "*#lead less"],
    right: Float[Tensor, "*#lead n"],
) -> Float[Tensor, "*lead n"]:
    """Solve T x = r by elimination without pivoting, for many right-hand sides at once.

    Args:
        lower: The band below the diagonal.
        diagonal: The diagonal.
        upper: The band above it.
        right: r.

    Shape:
        As in :func:`tridiagonal_product`.

    Returns:
        x.

    Raises:
        ValueError: A pivot is 0: T, or one of its leading blocks, is singular.

    Cost: O(n) operations a right-hand side, in 2n steps that all right-hand sides and batches take together. Keeps the
    bands and x for the backward pass, which is a solve with Tᵀ; differentiable any number of times.

    Source: Gu et al., NeurIPS 2021, section 4.2 and appendix E.
    """
    solved: Tensor = _Solve.apply(lower, diagonal, upper, right)  # type: ignore[no-untyped-call]
    return solved


@no_type_check  # a signature check inside would break the graph that torch.compile traces
class _Solve(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(lower: Tensor, diagonal: Tensor, upper: Tensor, right: Tensor) -> Tensor:
        return _eliminate(lower, diagonal, upper, right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        lower, diagonal, upper, ctx.right_shape = *inputs[:3], inputs[3].shape
        ctx.save_for_backward(lower, diagonal, upper, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lower, diagonal, upper, x = ctx.saved_tensors
        dual = _Solve.apply(upper, diagonal, lower, grad)  # Tᵀ has the bands exchanged
        return (
            -(dual[..., 1:] * x[..., :-1]).sum_to_size(lower.shape),
            -(dual * x).sum_to_size(diagonal.shape),
            -(dual[..., :-1] * x[..., 1:]).sum_to_size(upper.shape),
            dual.sum_to_size(ctx.right_shape),
        )


@no_type_check
def _eliminate(lower: Tensor, diagonal: Tensor, upper: Tensor, right: Tensor) -> Tensor:
    below, above = lower.movedim(-1, 0).unbind(0), upper.movedim(-1, 0).unbind(0)
    entries, values = diagonal.movedim(-1, 0).unbind(0), right.movedim(-1, 0).contiguous().unbind(0)
    pivots, reduced = [entries[0]], [values[0]]
    for under, over, entry, value in zip(below, above, entries[1:], values[1:], strict=True):
        factor = under / pivots[-1]
        pivots.append(entry - factor * over)
        reduced.append(value - factor * reduced[-1])
    if not torch.compiler.is_compiling() and not bool(torch.stack([(one != 0).all() for one in pivots]).all()):
        raise ValueError(
            f"diagonal: elimination needs pivots that are not 0, got {[float(one.min()) for one in pivots]}"
        )
    x = [reduced[-1] / pivots[-1]]
    for over, pivot, value in zip(reversed(above), reversed(pivots[:-1]), reversed(reduced[:-1]), strict=True):
        x.append((value - over * x[-1]) / pivot)
    return torch.stack(x[::-1]).movedim(0, -1)
