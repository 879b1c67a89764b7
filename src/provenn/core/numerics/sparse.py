"""Sparse symmetric matrices as torch CSR tensors, and their product with gradients."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def csr(
    row_starts: Int[Tensor, " rows_plus_1"],
    columns: Int[Tensor, " entries"],
    values: Float[Tensor, " entries"],
    shape: Sequence[int],
) -> Tensor:
    """Build a CSR tensor without torch's notices that CSR is in beta and unchecked.

    Args:
        row_starts: Where each row's entries start; the last is their number.
        columns: Column of each entry, ascending within a row.
        values: Their values.
        shape: Rows and columns.

    Cost: O(1); the tensors are shared.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
        return torch.sparse_csr_tensor(
            row_starts, columns, values, tuple(shape), device=values.device, check_invariants=False
        )


def csr_from_entries(rows: Tensor, columns: Tensor, values: Tensor, size: int) -> Tensor:
    """Build a square CSR tensor from entries in any order, each position given once.

    Args:
        rows: Row of each entry.
        columns: Column of each entry.
        values: Their values.
        size: Rows and columns of the matrix.

    Cost: O(entries log entries), a sort.
    """
    order = torch.argsort(rows * size + columns)
    starts = torch.zeros(size + 1, dtype=torch.int64, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=size).cumsum(0)
    return csr(starts, columns[order], values[order], (size, size))


def entries(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, columns and values of a CSR tensor's entries, by row."""
    starts = A.crow_indices()
    rows = torch.repeat_interleave(torch.arange(len(starts) - 1, device=A.device), starts.diff())
    return rows, A.col_indices(), A.values()


def as_csr(name: str, A: Tensor) -> Tensor:
    """Return a square matrix, dense or sparse, as a CSR tensor.

    Args:
        name: The argument's name, for errors.
        A: The matrix.

    Raises:
        TypeError: It is no floating-point tensor.
        ValueError: It is not square, or has entries that are not finite.
    """
    if not isinstance(A, Tensor) or not A.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(A, 'dtype', type(A).__name__)}")
    if A.dim() != 2 or A.shape[0] != A.shape[1] or A.shape[0] == 0:
        raise ValueError(f"{name} must be a square matrix, got shape {tuple(A.shape)}")
    if A.layout != torch.sparse_csr:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
            A = A.detach().to_sparse_csr()
    if not A.values().isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    return A.detach()


def check_symmetric(name: str, A: Tensor, seed: int = 0) -> None:
    """Check by two random vectors that uᵀA v = vᵀA u.

    Args:
        name: The argument's name, for the error.
        A: A square CSR tensor.
        seed: Draws the vectors, from a generator of its own.

    Raises:
        ValueError: The two differ by more than rounding explains.

    Cost: two products with A.
    """
    draws = torch.Generator().manual_seed(seed)
    u, v = torch.randn(2, A.shape[0], dtype=torch.float64, generator=draws, device="cpu").to(A.device, A.dtype)
    Au, Av = A @ u, A @ v
    apart = (u.dot(Av) - v.dot(Au)).abs().item()
    scale = (u.norm() * Av.norm() + v.norm() * Au.norm()).item()
    if apart > 100 * torch.finfo(A.dtype).eps * scale:
        raise ValueError(f"{name} must be symmetric, but uᵀ{name}v and vᵀ{name}u differ by {apart:.3g}")


class _SymmetricProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, x: Tensor) -> Tensor:
        ctx.A = A
        return A @ x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, symmetric_product(ctx.A, gradient.contiguous())


def symmetric_product(A: Tensor, x: Float[Tensor, "n columns"]) -> Float[Tensor, "n columns"]:
    """Multiply by a constant symmetric CSR matrix; the gradient by ``x`` is a product with the same matrix.

    Args:
        A: Symmetric, CSR. It gets no gradient.
        x: One vector a column.

    Cost: O(entries · columns), forward and backward alike; no transpose is formed.
    """
    product: Tensor = _SymmetricProduct.apply(A, x)  # type: ignore[no-untyped-call]
    return product
