"""The pressure Poisson equation on a grid of cells: its matrix from cell flags, and divergences on staggered grids."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provenn.core.experiment.checks import check_number
from provenn.core.numerics.sparse import csr_from_entries


class Cell(IntEnum):
    """What a cell of the grid is."""

    FLUID = 0
    """Holds an unknown."""
    DIRICHLET = 1
    """Open: the pressure is zero."""
    NEUMANN = 2
    """Solid: nothing flows through its faces."""


def poisson_matrix(flags: Int[Tensor, "*grid"], spacing: float | Sequence[float] = 1.0) -> Tensor:
    r"""Build the matrix of −∇² on the fluid cells of a grid, by second differences between cell centres.

    A neighbour that is fluid or open adds 1/h² to the diagonal, a fluid one −1/h² beside it, a solid one nothing. What
    lies beyond the grid is open. Rows and columns of cells that are not fluid are zero.

    Args:
        flags: A :class:`~provenn.core.physics.poisson.Cell` a cell: 0 fluid, 1 open (Dirichlet), 2 solid (Neumann).
        spacing: Cell size h, one for all axes or one an axis, in units of length.

    Shape:
        ``flags`` of one to three dimensions, N cells in all. Returns (N, N), CSR, float64; unknowns in C order.

    Returns:
        The matrix, symmetric positive semidefinite; definite on the fluid cells where each region of them touches an
        open one.

    Raises:
        ValueError: A flag is unknown, the grid has no dimension or more than three, or a spacing is not above 0.
        TypeError: ``flags`` are not integers, or ``spacing`` is no number.

    Cost: O(N log N) time, at most 2d + 1 entries a row.

    Source: Kaneda et al., arXiv 2205.10763, section on the model problem; Bridson, Fluid Simulation for Computer
    Graphics (2015), ch. 5.
    """
    if flags.is_floating_point() or flags.is_complex() or flags.dtype == torch.bool:
        raise TypeError(f"flags must be integers, got {flags.dtype}")
    if not 1 <= flags.dim() <= 3 or flags.numel() == 0:
        raise ValueError(f"flags must be a grid of one to three dimensions, got shape {tuple(flags.shape)}")
    known = torch.tensor([int(cell) for cell in Cell], device=flags.device)
    if not torch.isin(flags, known).all():
        raise ValueError(f"flags must be 0, 1 or 2, got {flags[~torch.isin(flags, known)][0].item()}")
    spacings = _spacings(spacing, flags.dim())
    padded = torch.full([side + 2 for side in flags.shape], Cell.DIRICHLET, device=flags.device, dtype=flags.dtype)
    inside = tuple(slice(1, -1) for _ in flags.shape)
    padded[inside] = flags
    number = torch.full_like(padded, -1, dtype=torch.int64)
    number[inside] = torch.arange(flags.numel(), device=flags.device).view(flags.shape)
    fluid = flags == Cell.FLUID
    diagonal = torch.zeros(flags.shape, dtype=torch.float64, device=flags.device)
    rows, columns, values = [], [], []
    for axis, h in enumerate(spacings):
        for shift in (-1, 1):
            beside = tuple(
                slice(1 + shift * (one == axis), padded.shape[one] - 1 + shift * (one == axis))
                for one in range(flags.dim())
            )
            neighbour = padded[beside]
            diagonal += (fluid & (neighbour != Cell.NEUMANN)) / h**2
            linked = fluid & (neighbour == Cell.FLUID)
            rows.append(number[inside][linked])
            columns.append(number[beside][linked])
            values.append(torch.full((len(rows[-1]),), -1 / h**2, dtype=torch.float64, device=flags.device))
    rows.append(number[inside][fluid])
    columns.append(number[inside][fluid])
    values.append(diagonal[fluid])
    return csr_from_entries(torch.cat(rows), torch.cat(columns), torch.cat(values), flags.numel())


def _spacings(spacing: float | Sequence[float], dim: int) -> list[float]:
    spacings = list(spacing) if isinstance(spacing, Sequence) else [spacing] * dim
    if len(spacings) != dim:
        raise ValueError(f"spacing must be one number or {dim}, got {spacing!r}")
    for one in spacings:
        check_number("spacing", one, above=0)
    return [float(one) for one in spacings]


def divergence(
    velocity: Sequence[Float[Tensor, "..."]], flags: Int[Tensor, "*grid"], spacing: float | Sequence[float] = 1.0
) -> Float[Tensor, "*grid"]:
    """Return the divergence of a staggered velocity in the fluid cells; faces of solid cells carry no flow.

    Args:
        velocity: One tensor an axis: the component normal to the faces, with one face more than cells along the axis.
        flags: As in :func:`poisson_matrix`.
        spacing: As in :func:`poisson_matrix`.

    Shape:
        ``velocity[k]`` has the shape of ``flags`` plus one along axis k. Returns the shape of ``flags``, zero where not
        fluid.

    Returns:
        The divergence, per unit of time. The pressure that removes it solves A p = −divergence.

    Raises:
        ValueError: A component has not its shape, or a spacing is not above 0.
    """
    total = torch.zeros(flags.shape, dtype=torch.float64, device=flags.device)
    solid = flags == Cell.NEUMANN
    if len(velocity) != flags.dim():
        raise ValueError(f"velocity must have {flags.dim()} components, got {len(velocity)}")
    for axis, (component, h) in enumerate(zip(velocity, _spacings(spacing, flags.dim()), strict=True)):
        shape = [side + (one == axis) for one, side in enumerate(flags.shape)]
        if list(component.shape) != shape:
            raise ValueError(f"velocity[{axis}] must have shape {tuple(shape)}, got {tuple(component.shape)}")
        closed = torch.zeros(shape, dtype=torch.bool, device=flags.device)
        closed.narrow(axis, 0, shape[axis] - 1).logical_or_(solid)
        closed.narrow(axis, 1, shape[axis] - 1).logical_or_(solid)
        total += torch.where(closed, 0.0, component.double()).diff(dim=axis) / h
    return torch.where(flags == Cell.FLUID, total, 0.0)
