"""The static algorithm of M-FAC: the inverse of a damped empirical Fisher matrix from a fixed set of gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number


@dataclass(frozen=True)
class _Blocks:
    """Equal blocks of consecutive columns: V in pages of rows, each (blocks, rows, size), and the d of every row."""

    start: int
    stop: int
    pages: list[Tensor]
    denominators: Tensor

    @property
    def count(self) -> int:
        return len(self.denominators)


class StaticInverseFisher:
    r"""The inverse of :math:`F = \lambda I + \frac1m \sum_i g_i g_i^\top`, held as m vectors.

    Woodbury's identity adds one gradient at a time, with :math:`F_0 = \lambda I`:

    .. math::
        v_i = F_{i-1}^{-1} g_i = \frac{g_i}{\lambda} - \sum_{j<i} v_j \frac{v_j^\top g_i}{d_j}, \quad
        d_i = m + g_i^\top v_i, \quad F_i^{-1} = F_{i-1}^{-1} - \frac{v_i v_i^\top}{d_i}

    Only V, the rows :math:`v_i`, and d are kept. The sum over j runs as matrix products: the first half of the rows is
    finished, its part is taken from the second half at once, and each half is treated likewise.

    Args:
        grads: G, a gradient a row; left as it is. bfloat16 and float16 are raised to float32.
        damping: λ. It stands outside the mean over gradients.
        block_size: Cut the columns into blocks of this size and invert each diagonal block of F on its own; the last
            block is smaller where the size does not divide d. ``None`` or -1 inverts F as a whole.
        pages: V is kept in main memory in so many pieces of m / ``pages`` rows, which visit ``device`` one by one. 1
            keeps V on ``device``.
        device: Where products are formed. ``None``: where ``grads`` is.

    Shape:
        ``grads`` (m, d).

    The recursion takes differences of numbers near 1/λ. In a block of fewer columns than gradients, rounding grows with
    the condition number ‖F‖/λ: in float32 keep that below about 1e6, or give float64.

    Raises:
        ValueError: ``grads`` is not two-dimensional, is empty, has a row that is not finite, or is so large against λ
            that the recursion overflows; ``damping`` ≤ 0;
            ``block_size`` is neither -1 nor ≥ 1; or ``pages`` does not divide m.
        TypeError: ``grads`` is not real floating-point, or an option is no number.

    Cost: O(d m²) to build, or O(d m² (1 + 1/pages)) bytes moved; then m·d + b·m + d numbers are held, b the number of
    blocks. Building holds ``grads`` beside them; with pages, ``device`` holds three pages.

    Source: section on the static algorithm of the paper; blocks and pages as in the authors' code.
    """

    def __init__(
        self,
        grads: Float[Tensor, "m d"],
        damping: float = 1e-5,
        block_size: int | None = None,
        pages: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        _check_grads(grads)
        check_number("damping", damping, above=0)
        check_block_size(block_size)
        check_integer("pages", pages, at_least=1)
        self.num_grads, self.dim = grads.shape
        if self.num_grads % pages:
            raise ValueError(f"pages must divide the {self.num_grads} gradients, got {pages}")
        self.damping = damping
        self.pages = pages
        self.device = grads.device if device is None else torch.device(device)
        self.dtype = torch.promote_types(grads.dtype, torch.float32)
        self.block_size = self.dim if block_size in (None, -1) else min(int(block_size or 0), self.dim)
        even = self.dim - self.dim % self.block_size
        bounds = [(0, even, self.block_size), (even, self.dim, self.dim - even)]
        with torch.no_grad():
            self._parts = [self._build(grads, *bound) for bound in bounds if bound[1] > bound[0]]
            # [F⁻¹]ᵢᵢ ≥ 1 / Fᵢᵢ for every positive definite F: what rounding takes off below that is put back.
            second_moments = torch.linalg.vector_norm(grads, dim=0, dtype=self.dtype).square().to(self.device)
            self._least = 1 / (damping + second_moments / self.num_grads)

    def _build(self, grads: Tensor, start: int, stop: int, size: int) -> _Blocks:
        m = self.num_grads
        rows = m // self.pages
        blocks = (stop - start) // size
        home = torch.device("cpu") if self.pages > 1 else self.device
        denominators = torch.empty(blocks, m, dtype=self.dtype, device=self.device)
        done: list[Tensor] = []
        for first in range(0, m, rows):
            page = grads[first : first + rows, start:stop].to(self.device, self.dtype)
            gradients = page.view(rows, blocks, size).transpose(0, 1)
            vectors = (gradients / self.damping).contiguous()
            for index, earlier in enumerate(done):
                of = denominators[:, index * rows : (index + 1) * rows]
                _subtract(gradients, vectors, earlier.to(self.device), of)
            _eliminate(gradients, vectors, denominators[:, first : first + rows], m)
            done.append(vectors.to(home))
        if not denominators.isfinite().all():
            raise ValueError(
                f"grads must not exceed what {self.dtype} can hold against the damping {self.damping:g}, got products "
                "that overflow: give them in float64, or raise the damping"
            )
        return _Blocks(start, stop, done, denominators)

    def _pages(self, part: _Blocks) -> list[tuple[Tensor, Tensor]]:
        """Return a part's pages with the denominators of their rows."""
        return list(zip(part.pages, part.denominators.split(self.num_grads // self.pages, dim=1), strict=True))

    @torch.no_grad()
    def mul(self, x: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Return F⁻¹x = x/λ − Σᵢ vᵢ (vᵢᵀx) / dᵢ.

        Args:
            x: Any vector.

        Shape:
            ``x`` (d,); returns (d,).

        Raises:
            ValueError: ``x`` has another shape.

        Cost: O(m d).
        """
        if x.shape != (self.dim,):
            raise ValueError(f"x must have shape ({self.dim},), got {tuple(x.shape)}")
        x = x.to(self.device, self.dtype)
        product = x / self.damping
        for part in self._parts:
            piece = x[part.start : part.stop].view(part.count, -1, 1)
            out = product[part.start : part.stop].view(part.count, 1, -1)
            for page, denominators in self._pages(part):
                vectors = page.to(self.device)
                weights = (vectors @ piece).squeeze(2) / denominators
                out.sub_(weights[:, None] @ vectors)
        return product

    @torch.no_grad()
    def diag(self) -> Float[Tensor, " d"]:
        """Return the diagonal of F⁻¹, 1/λ − Σᵢ vᵢ² / dᵢ, and at least 1 / Fᵢᵢ, below which only rounding can take it.

        Returns:
            A new vector, greater than 0.

        Shape:
            Returns (d,).

        Cost: O(m d) time, and memory of a few rows.
        """
        diagonal = torch.full((self.dim,), 1 / self.damping, dtype=self.dtype, device=self.device)
        for part in self._parts:
            out = diagonal[part.start : part.stop].view(part.count, -1)
            for page, denominators in self._pages(part):
                vectors = page.to(self.device)
                for row in range(vectors.shape[1]):  # the square of all rows at once would take another m·d numbers
                    out.addcdiv_(vectors[:, row].square(), denominators[:, row, None], value=-1)
        return torch.maximum(diagonal, self._least)

    @torch.no_grad()
    def row(self, i: int) -> Float[Tensor, " d"]:
        """Return row ``i`` of F⁻¹, which is also its column; 0 outside the block of ``i``.

        Args:
            i: From 0 to d − 1.

        Shape:
            Returns (d,).

        Raises:
            ValueError: ``i`` is out of bounds.

        Cost: O(m) an entry of the block.
        """
        part, block, place = self._locate("i", i)
        row = torch.zeros(self.dim, dtype=self.dtype, device=self.device)
        size = (part.stop - part.start) // part.count
        first = part.start + block * size
        out = row[first : first + size]
        out[place] = 1 / self.damping
        for page, denominators in self._pages(part):
            vectors = page[block].to(self.device)
            out.sub_((vectors[:, place] / denominators[block]) @ vectors)
        out[place] = torch.maximum(out[place], self._least[i])
        return row

    @torch.no_grad()
    def element(self, i: int, j: int) -> float:
        """Return one entry of F⁻¹.

        Args:
            i: Row, from 0 to d − 1.
            j: Column, likewise.

        Raises:
            ValueError: ``i`` or ``j`` is out of bounds.

        Cost: O(m).
        """
        (part, block, place), (other, beside, across) = self._locate("i", i), self._locate("j", j)
        if part is not other or block != beside:
            return 0.0
        value = 1 / self.damping if i == j else 0.0
        for page, denominators in self._pages(part):
            columns = page[block][:, [place, across]].to(self.device)
            value -= float((columns.prod(dim=1) / denominators[block]).sum())
        return max(value, float(self._least[i])) if i == j else value

    def _locate(self, name: str, index: int) -> tuple[_Blocks, int, int]:
        """Return the part that holds a column, its block there, and its place in the block."""
        check_integer(name, index, at_least=0, at_most=self.dim - 1)
        part = next(one for one in self._parts if index < one.stop)
        block, place = divmod(index - part.start, (part.stop - part.start) // part.count)
        return part, block, place


def _eliminate(gradients: Tensor, vectors: Tensor, denominators: Tensor, m: int) -> None:
    """Finish the rows of ``vectors``, from which all rows before have been taken, and their denominators, in place."""
    rows = gradients.shape[1]
    if rows == 1:
        # gᵀF⁻¹g ≥ 0, but a difference of large numbers may round below.
        denominators[:, 0] = (m + (gradients * vectors).sum(dim=(1, 2))).clamp_(min=m)
        return
    half = rows // 2
    _eliminate(gradients[:, :half], vectors[:, :half], denominators[:, :half], m)
    _subtract(gradients[:, half:], vectors[:, half:], vectors[:, :half], denominators[:, :half])
    _eliminate(gradients[:, half:], vectors[:, half:], denominators[:, half:], m)


def _subtract(gradients: Tensor, vectors: Tensor, earlier: Tensor, denominators: Tensor) -> None:
    """Take Σⱼ vⱼ (vⱼᵀgᵢ) / dⱼ over earlier rows j from all rows i of ``vectors``, in place."""
    # Where blocks are smaller than m, the weights of all at once would take more room than the vectors.
    at_once = max(1, vectors.numel() // (vectors.shape[1] * earlier.shape[1]))
    pieces = (tensor.split(at_once) for tensor in (gradients, vectors, earlier, denominators))
    for of, left, taken, divisors in zip(*pieces, strict=True):
        left.baddbmm_((of @ taken.transpose(1, 2)) / divisors[:, None], taken, alpha=-1)


def _check_grads(grads: Tensor) -> None:
    if not grads.is_floating_point():
        raise TypeError(f"grads must be real floating-point, got {grads.dtype}")
    if grads.dim() != 2 or 0 in grads.shape:
        raise ValueError(f"grads must be a matrix with a gradient a row, got shape {tuple(grads.shape)}")
    finite = grads.isfinite().all(dim=1)
    if not finite.all():
        raise ValueError(
            f"grads must be finite, got a value that is not in row {int(finite.logical_not().nonzero()[0])}"
        )


def check_block_size(block_size: int | None) -> None:
    """Check that a block size is ``None``, -1 or a positive integer."""
    if block_size is None:
        return
    check_integer("block_size", block_size, at_least=-1)
    if block_size == 0:
        raise ValueError("block_size must be -1 for one block or at least 1, got 0")
