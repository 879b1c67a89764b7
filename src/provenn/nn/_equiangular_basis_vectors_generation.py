"""Finding unit vectors of which any two are nearly orthogonal, by gradient descent on the pairs that are not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from provenn.core.experiment.checks import check_integer, check_number

TOLERANCE = 1e-4
"""By how much the largest cosine may exceed α at the end, as in the authors' code."""
_TILE = 32
"""Rows of one product; slices are whole tiles, so that their size changes no rounding."""
_ORTHOGONAL, _ABOVE_WELCH = 0.002, 1.5
_START = 0
"""Seed of the start without a generator."""


@dataclass(frozen=True)
class EBVReport:
    """How close to orthogonal a set of unit vectors is.

    Args:
        max_cosine: The largest |⟨v_i, v_j⟩| over pairs.
        mean_cosine: Their mean.
        steps: Steps that the search took.
        alpha: The bound that was asked for.
        welch_bound: What no N vectors in d dimensions can be below.
        feasible: Whether the bound was reached, to 1e-4.
    """

    max_cosine: float
    mean_cosine: float
    steps: int
    alpha: float
    welch_bound: float
    feasible: bool


def equiangular_basis(
    num_classes: int,
    dim: int,
    alpha: float | None = None,
    steps: int = 100_000,
    lr: float = 1e-3,
    slice_size: int = 1024,
    generator: torch.Generator | None = None,
    initial: Float[Tensor, "classes dim"] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[Float[Tensor, "classes dim"], EBVReport]:
    """Find N unit vectors in d dimensions with |⟨v_i, v_j⟩| ≤ α for all pairs.

    Gradient descent on Σ_{i≠j} ReLU(|⟨v_i, v_j⟩| − α), the rows scaled back to length 1 before every step; it ends as
    soon as the largest is within 1e-4 of α.

    Args:
        num_classes: N ≥ 2.
        dim: d.
        alpha: α in [0, 1). Without it 0.002 for N ≤ d, the authors' choice, and 1.5 times the Welch bound for N > d
            (the authors' sets for 1000 classes in 100 to 500 dimensions lie 1.1 to 1.4 times above it).
        steps: At most so many steps.
        lr: Step size of the descent.
        slice_size: Rows whose products with all others are held at a time; it changes memory alone, not the result.
        generator: Draws the start; without it the start is the same for the same N and d.
        initial: Vectors to start from instead, the result of an interrupted search for one.
        progress: Called every hundred steps with the step and the largest cosine; what it raises ends the search.

    Shape:
        Result (N, d), in the type of ``initial``, or the default type.

    Returns:
        The best vectors met, and a report, which says whether α was reached: below the Welch bound it cannot be.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument out of range, an ``initial`` of another shape.

    Cost: 4 N² d operations a step and slice_size · N numbers of memory; (1000, 1000, 0.002) takes a few hundred steps.
    Runs on the device of ``initial`` or of the generator, the CPU without either.

    Source: Shen, Sun & Wei (2023), equations 3 and 4, and the authors' generator for step size, stop and defaults.
    """
    check_integer("num_classes", num_classes, at_least=2)
    check_integer("dim", dim, at_least=1)
    start = _start(num_classes, dim, generator, initial)
    return _search(start, 0, _bound(alpha, num_classes, dim), steps, lr, slice_size, progress)


def extended_basis(
    basis: Float[Tensor, "classes dim"], n_new: int, alpha: float | None, steps: int
) -> tuple[Float[Tensor, "more dim"], EBVReport]:
    """Append vectors to a set, which itself is not moved; arguments and results as in :func:`equiangular_basis`."""
    check_integer("n_new", n_new, at_least=1)
    old, dim = basis.shape
    count = old + n_new
    drawn = _start(count, dim, None, None)[old:].to(basis)
    start = torch.cat((basis.detach(), drawn))
    return _search(start, old, _bound(alpha, count, dim), steps, lr=1e-3, slice_size=1024, progress=None)


def welch_bound(num_classes: int, dim: int) -> float:
    """Return the least value that the largest |cosine| of N vectors in d dimensions can have, 0 for N ≤ d."""
    return math.sqrt(max(0, num_classes - dim) / (dim * (num_classes - 1)))


def _bound(alpha: float | None, num_classes: int, dim: int) -> float:
    if alpha is None:
        return _ORTHOGONAL if num_classes <= dim else min(0.999, _ABOVE_WELCH * welch_bound(num_classes, dim))
    check_number("alpha", alpha, at_least=0, below=1)
    return float(alpha)


def _start(num_classes: int, dim: int, generator: torch.Generator | None, initial: Tensor | None) -> Tensor:
    if initial is not None:
        if initial.shape != (num_classes, dim) or not initial.is_floating_point():
            raise ValueError(f"initial must be real numbers ({num_classes}, {dim}), got {tuple(initial.shape)}")
        return initial.detach().clone()
    # The device is named, so that a module built on the meta device still has its vectors.
    if generator is None:
        generator = torch.Generator(device="cpu").manual_seed(_START)
    return torch.randn(num_classes, dim, generator=generator, device=generator.device)


@torch.no_grad()
def _search(
    V: Tensor,
    frozen: int,
    alpha: float,
    steps: int,
    lr: float,
    slice_size: int,
    progress: Callable[[int, float], None] | None,
) -> tuple[Tensor, EBVReport]:
    """Descend with the first rows held; pairs of two held rows count in the report alone."""
    check_integer("steps", steps, at_least=0)
    check_number("lr", lr, above=0)
    check_integer("slice_size", slice_size, at_least=1)
    classes, dim = V.shape
    held = F.normalize(V[:frozen]) if frozen else V[:0]
    V = torch.cat((held, F.normalize(V[frozen:])))
    best, least, step = V, math.inf, 0
    while True:
        gradient, largest = _gradient(V, alpha, slice_size, frozen)
        if largest < least:
            best, least = V, largest
        if largest <= alpha + TOLERANCE or step == steps:
            break
        if progress is not None and step % 100 == 0:
            progress(step, largest)
        V = torch.cat((held, F.normalize(V[frozen:] - lr * gradient[frozen:])))
        step += 1
    top, mean = _cosines(best, slice_size)
    bound = welch_bound(classes, dim)
    return best, EBVReport(top, mean, step, alpha, bound, top <= alpha + TOLERANCE)


def _gradient(V: Tensor, alpha: float, slice_size: int, frozen: int) -> tuple[Tensor, float]:
    """Return the gradient, 2 Σ_j sign⟨v_i, v_j⟩ v_j over the pairs above α, and the largest |cosine| that can move."""
    parts, largest = [], 0.0
    for rows, G in _tiles(V, slice_size):
        size = G.abs()
        pulled = (size > alpha) * G.sign()
        # Every tile is a product of the same shape, whatever the slice.
        parts.append((2 * torch.bmm(pulled, V.expand(len(G), -1, -1))).flatten(0, 1))
        if frozen:
            size = size * ~((rows < frozen)[..., None] & (torch.arange(len(V), device=V.device) < frozen))
        largest = max(largest, size.max().item())
    return torch.cat(parts)[: len(V)], largest


def _tiles(V: Tensor, slice_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield row numbers (tiles, 32) and inner products with all vectors (tiles, 32, N), one slice at a time.

    The diagonal is 0, and rows beyond the last vector are 0.
    """
    count, dim = V.shape
    padded = F.pad(V, (0, 0, 0, -count % _TILE)).view(-1, _TILE, dim)
    numbers = torch.arange(padded.shape[0] * _TILE, device=V.device).view(-1, _TILE)
    many = max(1, slice_size // _TILE)
    for rows, tiles in zip(numbers.split(many), padded.split(many), strict=True):
        G = torch.bmm(tiles, V.T.expand(len(tiles), -1, -1))
        yield rows, G.masked_fill_(rows[..., None] == torch.arange(count, device=V.device), 0)


def _cosines(V: Tensor, slice_size: int) -> tuple[float, float]:
    """Return the largest and the mean |cosine| over pairs."""
    largest, total = 0.0, 0.0
    for _, G in _tiles(V, slice_size):
        size = G.abs()
        largest, total = max(largest, size.max().item()), total + size.sum(dtype=torch.float64).item()
    return largest, total / (len(V) * (len(V) - 1))
