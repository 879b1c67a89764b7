"""Incomplete Cholesky factors without fill-in, computed by sweeps over all entries at once."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from provenn.core.numerics.krylov import NotPositiveDefiniteError
from provenn.core.numerics.sparse import as_csr, csr_from_entries, entries


class IncompleteCholesky:
    r"""IC(0): the lower triangular L with the pattern of A's lower triangle and (L Lᵀ)_ij = A_ij on that pattern.

    The recurrence of the factors is iterated for all entries at once; an entry is final one sweep after those that it
    depends on, so the sweeps end, and end at the factors of the usual elimination. Rows of zeros (cells without an
    unknown) get L_ii = 1; a pivot that vanishes, as where A is singular, is replaced by A_ii.

    Args:
        A: Symmetric, dense or sparse, (n, n).

    Raises:
        ValueError: A is not square.
        TypeError: A is no floating-point tensor.
        NotPositiveDefiniteError: A pivot is negative: A is not positive definite, or far from an M-matrix.

    Attributes:
        factor: L, CSR.
        sweeps: How many sweeps the factorisation took.

    Cost: a sweep is O(n m²) for m entries a row; at most as many sweeps as the longest chain of dependencies (about
    the sum of the sides of a grid), usually fewer, since entries stop changing once they are right to rounding.
    :meth:`solve` is two triangular solves: SuperLU's on the CPU, cuSPARSE's on CUDA.

    Source: Meijerink & van der Vorst, Math. Comp. 31 (1977); sweeps as in Chow & Patel, SIAM J. Sci. Comput. 37 (2015).
    """

    def __init__(self, A: Tensor) -> None:
        A = as_csr("A", A).double()
        size = A.shape[0]
        rows, columns, values = entries(A)
        diagonal = values.new_zeros(size).index_add(0, rows[rows == columns], values[rows == columns])
        below = columns < rows
        rows, columns, values = rows[below], columns[below], values[below]
        empty = diagonal == 0
        pivots, lower = torch.where(empty, 1.0, diagonal), values
        target, left, right = _products(rows, columns, size)
        # L D Lᵀ with L_ij D_j in ``lower``: free of square roots, so that a pivot that passes through 0 on its way
        # does no harm.
        self.sweeps = 0
        while True:
            shares = lower[left] * lower[right] / pivots[columns[left]]
            new_lower = values.index_add(0, target, shares, alpha=-1)
            raw = diagonal.index_add(0, rows, lower**2 / pivots[columns], alpha=-1)
            new_pivots = torch.where(raw.abs() <= 1e-12 * diagonal.abs(), diagonal, raw)
            new_pivots = torch.where(empty, 1.0, new_pivots)
            settled = torch.equal(new_lower, lower) and torch.equal(new_pivots, pivots)
            lower, pivots = new_lower, new_pivots
            self.sweeps += 1
            if settled or self.sweeps > 2 * size + 2:
                break
        if not (pivots > 0).all():
            row = int((~(pivots > 0)).nonzero()[0].item())
            raise NotPositiveDefiniteError(
                f"A has no incomplete Cholesky factors without fill-in: pivot {pivots[row].item():.3g} in row {row}", 0
            )
        roots = pivots.sqrt()
        every = torch.arange(size, device=A.device)
        self.factor = csr_from_entries(
            torch.cat([rows, every]), torch.cat([columns, every]), torch.cat([lower / roots[columns], roots]), size
        )
        self._on_cpu = _superlu(self.factor) if A.device.type == "cpu" else None

    def solve(self, r: Tensor) -> Tensor:
        """Return (L Lᵀ)⁻¹ r.

        Args:
            r: A vector, float64.
        """
        if self._on_cpu is not None:
            inner = self._on_cpu.solve(r.numpy())
            return torch.from_numpy(self._on_cpu.solve(inner, "T"))
        inner = torch.triangular_solve(r[:, None], self.factor, upper=False).solution
        return torch.triangular_solve(inner, self.factor, upper=False, transpose=True).solution[:, 0]


def _products(rows: Tensor, columns: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the triples of entries (i, j), (i, k), (j, k), all in the pattern with k < j < i, as places in it."""
    starts = torch.zeros(size + 1, dtype=torch.int64, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=size).cumsum(0)
    lengths = starts.diff()[columns]  # for each entry (i, j): how many (j, k) there are
    target = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), lengths)
    offsets = torch.arange(len(target), device=rows.device) - torch.repeat_interleave(
        lengths.cumsum(0) - lengths, lengths
    )
    right = starts[columns[target]] + offsets
    keys = rows * size + columns  # ascending, since entries come by row
    wanted = rows[target] * size + columns[right]
    left = torch.searchsorted(keys, wanted).clamp(max=max(len(keys) - 1, 0))
    found = keys[left] == wanted
    return target[found], left[found], right[found]


def _superlu(factor: Tensor) -> scipy.sparse.linalg.SuperLU:
    """Return SuperLU's copy of a triangular matrix, which has nothing left to eliminate: its solves are compiled."""
    parts = (factor.values().numpy(), factor.col_indices().numpy(), factor.crow_indices().numpy())
    matrix = scipy.sparse.csr_matrix(parts, shape=tuple(factor.shape), dtype=np.float64).tocsc()
    return scipy.sparse.linalg.splu(
        matrix, permc_spec="NATURAL", diag_pivot_thresh=0.0, options={"SymmetricMode": True, "Equil": False}
    )
