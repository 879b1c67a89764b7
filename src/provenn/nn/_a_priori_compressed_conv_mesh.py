"""Meshes of quadrilaterals in the plane, with named parts of the boundary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number
from provenn.nn._a_priori_compressed_conv_elements import GridSampler


@dataclass(frozen=True, eq=False)
class QuadMesh:
    """A mesh of straight-edged convex quadrilaterals in the plane.

    Args:
        nodes: Positions, in units of length.
        quads: The four nodes of every element, counter-clockwise.
        sides: Names of parts of the boundary, each with its edges as pairs of nodes; together they must hold every edge
            of the boundary once. Default: one side, ``"boundary"``.

    Shape:
        ``nodes`` (nodes, 2), kept in float64; ``quads`` (quads, 4), kept in int64; each side (edges, 2). Everything is
        copied to the CPU.

    Raises:
        ValueError: A node is not finite or in no element; an element is not convex, clockwise or flat, or names a node
            that does not exist; more than two elements share an edge; the sides do not make up the boundary.
        TypeError: The nodes are no floating-point numbers, the elements no integers, or the sides no mapping.

    Cost: O(quads · log quads).

    Source: Hughes, The Finite Element Method (1987), section 3.2.
    """

    nodes: Float[Tensor, "nodes 2"]
    quads: Int[Tensor, "quads 4"]
    sides: Mapping[str, Int[Tensor, "_ 2"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        nodes = _table("nodes", self.nodes, 2, floating=True).to("cpu", torch.float64, copy=True)
        quads = _table("quads", self.quads, 4, floating=False).to("cpu", torch.int64, copy=True)
        _check_elements(nodes.numpy(), quads.numpy())
        edges = _boundary(quads.numpy(), len(nodes))
        sides = {
            name: _table(f"sides[{name!r}]", side, 2, floating=False).to("cpu", torch.int64, copy=True)
            for name, side in _named(self.sides).items()
        } or {"boundary": torch.from_numpy(edges)}
        given = np.sort(np.concatenate([side.numpy() for side in sides.values()]), axis=1)
        if not np.array_equal(_ordered(given), _ordered(np.sort(edges, axis=1))):
            raise ValueError(
                f"sides must hold each of the boundary's {len(edges)} edges once, got {len(given)} edges, "
                "some of them elsewhere or twice"
            )
        for name, value in (("nodes", nodes), ("quads", quads), ("sides", sides)):
            object.__setattr__(self, name, value)

    @classmethod
    def rectangle(
        cls,
        width: float,
        height: float,
        columns: int,
        rows: int,
        hole: Sequence[float] | Callable[[Tensor], Tensor] | None = None,
    ) -> QuadMesh:
        """Divide [0, width] × [0, height] into equal rectangles, and take out those whose centre is in a hole.

        Elements are numbered row by row from the origin, x fastest; so are nodes. The sides are ``"left"``,
        ``"right"``, ``"bottom"`` and ``"top"``, and ``"hole"`` for what is on none of these; those without edges are
        left out.

        Args:
            width: Length in x, in units of length.
            height: Length in y.
            columns: Elements in x.
            rows: Elements in y.
            hole: A circle (x, y, radius), an ellipse (x, y, radius in x, radius in y), or what says of centres
                (elements, 2) which are in the hole.

        Returns:
            The mesh.

        Raises:
            ValueError: A length or count is not above 0, or the hole is malformed or leaves no element.
            TypeError: A length is no number, a count no integer, or the hole neither numbers nor a function.
        """
        check_number("width", width, above=0)
        check_number("height", height, above=0)
        check_integer("columns", columns, at_least=1)
        check_integer("rows", rows, at_least=1)
        x, y = np.linspace(0, width, columns + 1), np.linspace(0, height, rows + 1)
        nodes = np.stack([np.tile(x, rows + 1), np.repeat(y, columns + 1)], axis=1)
        first = (np.arange(rows)[:, None] * (columns + 1) + np.arange(columns)).ravel()
        quads = first[:, None] + np.array([0, 1, columns + 2, columns + 1])
        quads = quads[~_in_hole(hole, nodes[quads].mean(axis=1))]
        if not len(quads):
            raise ValueError(f"hole must leave at least one element, got {hole!r}")
        used, quads = np.unique(quads, return_inverse=True)
        quads = quads.reshape(-1, 4)
        edges = _boundary(quads, len(used))
        row, column = (grid[edges] for grid in np.divmod(used, columns + 1))
        on = {
            "left": (column == 0).all(1),
            "right": (column == columns).all(1),
            "bottom": (row == 0).all(1),
            "top": (row == rows).all(1),
        }
        on["hole"] = ~np.logical_or.reduce(list(on.values()))
        sides = {name: torch.from_numpy(edges[chosen]) for name, chosen in on.items() if chosen.any()}
        return cls(torch.from_numpy(nodes[used]), torch.from_numpy(quads), sides)

    def sampler(self, n: int) -> GridSampler:
        """Prepare sampling at the centres of n × n pixels over the mesh's bounding box.

        Args:
            n: Pixels a side.

        Returns:
            What samples nodal fields, and knows which pixels are on the mesh.
        """
        return GridSampler(self.nodes.numpy(), self.quads.numpy(), n)

    def edges_of(self, side: str) -> tuple[Int[np.ndarray, "edges 2"], Int[np.ndarray, " edges"]]:
        """Return a side's edges as pairs of nodes, and the element that each belongs to."""
        quads, edges = self.quads.numpy(), self.sides[side].numpy()
        known = _keys(_edges(quads), len(self.nodes))
        order = np.argsort(known)
        found = order[np.searchsorted(known, _keys(edges, len(self.nodes)), sorter=order)]
        return edges, found // 4


def _table(name: str, value: Tensor, width: int, *, floating: bool) -> Tensor:
    fits = isinstance(value, Tensor) and (value.is_floating_point() if floating else _is_integer(value))
    if not fits:
        kind = "floating-point numbers" if floating else "integers"
        raise TypeError(f"{name} must be a tensor of {kind}, got {getattr(value, 'dtype', value)!r}")
    if value.dim() != 2 or value.shape[1] != width or not len(value):
        raise ValueError(f"{name} must be of shape (at least one, {width}), got {tuple(value.shape)}")
    return value.detach()


def _named(sides: Any) -> Mapping[str, Tensor]:
    if not isinstance(sides, Mapping):
        raise TypeError(f"sides must be a mapping from names to edges, got {sides!r}")
    return sides


def _is_integer(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _check_elements(nodes: np.ndarray, quads: np.ndarray) -> None:
    if not np.isfinite(nodes).all():
        raise ValueError(f"nodes must be finite, node {np.flatnonzero(~np.isfinite(nodes).all(1))[0]} is not")
    outside = (quads < 0) | (quads >= len(nodes))
    if outside.any():
        at = int(np.flatnonzero(outside.any(1))[0])
        raise ValueError(f"quads must name nodes 0 to {len(nodes) - 1}, element {at} is {quads[at].tolist()}")
    unused = np.setdiff1d(np.arange(len(nodes)), quads)
    if len(unused):
        raise ValueError(f"nodes must each be in an element, node {unused[0]} is in none")
    corners = nodes[quads]
    ahead, back = np.roll(corners, -1, 1) - corners, np.roll(corners, 1, 1) - corners
    # The Jacobian of a bilinear map is positive inside if it is at the corners.
    jacobian = ahead[..., 0] * back[..., 1] - ahead[..., 1] * back[..., 0]
    size = np.square(ahead).sum(-1).max(1, keepdims=True)
    bad = np.flatnonzero((jacobian <= 1e-12 * size).any(1))
    if len(bad):
        raise ValueError(
            f"quads must be convex and counter-clockwise, element {bad[0]} with corners "
            f"{corners[bad[0]].tolist()} is not"
        )


def _edges(quads: np.ndarray) -> np.ndarray:
    """Return the four edges of every element, in its own direction; edge k is of element k // 4."""
    return np.stack([quads, np.roll(quads, -1, axis=1)], axis=-1).reshape(-1, 2)


def _keys(edges: np.ndarray, nodes: int) -> np.ndarray:
    return edges.min(1) * nodes + edges.max(1)


def _ordered(edges: np.ndarray) -> np.ndarray:
    return edges[np.lexsort(edges.T)]


def _boundary(quads: np.ndarray, nodes: int) -> np.ndarray:
    """Return the edges that belong to one element only."""
    edges = _edges(quads)
    _, first, count = np.unique(_keys(edges, nodes), return_index=True, return_counts=True)
    if count.max() > 2:
        raise ValueError(
            f"quads must share an edge by two at most, edge {edges[first[count.argmax()]].tolist()} is of {count.max()}"
        )
    return edges[np.sort(first[count == 1])]


def _in_hole(hole: Sequence[float] | Callable[[Tensor], Tensor] | None, centres: np.ndarray) -> np.ndarray:
    if hole is None:
        return np.zeros(len(centres), dtype=bool)
    if callable(hole):
        inside = torch.as_tensor(hole(torch.from_numpy(centres)))
        if inside.dtype != torch.bool or inside.shape != (len(centres),):
            raise ValueError(
                f"hole must say true or false of each of {len(centres)} centres, got {inside.dtype} of shape "
                f"{tuple(inside.shape)}"
            )
        return inside.cpu().numpy()
    if not isinstance(hole, Iterable):
        raise TypeError(f"hole must be (x, y, radius), an ellipse or a function, got {hole!r}")
    numbers = list(hole)
    if len(numbers) not in (3, 4):
        raise ValueError(f"hole must be (x, y, radius) or (x, y, radius in x, radius in y), got {hole!r}")
    for value in numbers[:2]:
        check_number("hole's centre", value)
    for value in numbers[2:]:
        check_number("hole's radius", value, above=0)
    offset = (centres - numbers[:2]) / (numbers[2:] if len(numbers) == 4 else numbers[2])
    return np.square(offset).sum(1) < 1
