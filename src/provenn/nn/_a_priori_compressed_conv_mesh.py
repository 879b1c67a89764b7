"""Meshes of bilinear quadrilaterals: geometry, boundary, and sampling of nodal fields on a grid of pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number

CORNERS = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
"""The reference square's corners, counter-clockwise."""


def shape_functions(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the four bilinear shape functions (..., 4) and their derivatives (..., 4, 2) at reference points."""
    x, y = at[..., None, 0] * CORNERS[:, 0], at[..., None, 1] * CORNERS[:, 1]
    values = (1 + x) * (1 + y) / 4
    slopes = np.stack([CORNERS[:, 0] * (1 + y), CORNERS[:, 1] * (1 + x)], axis=-1) / 4
    return values, slopes


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
        TypeError: The nodes are no floating-point numbers, or the elements no integers.

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
            for name, side in self.sides.items()
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
        ``"right"``, ``"bottom"`` and ``"top"``, and ``"hole"`` if there is one.

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
            TypeError: A length is no number, a count no integer.
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
        return GridSampler(self, n)

    def edges_of(self, side: str) -> tuple[Int[np.ndarray, "edges 2"], Int[np.ndarray, " edges"]]:
        """Return a side's edges as pairs of nodes, and the element that each belongs to."""
        quads, edges = self.quads.numpy(), self.sides[side].numpy()
        known = _keys(_edges(quads), len(self.nodes))
        order = np.argsort(known)
        found = order[np.searchsorted(known, _keys(edges, len(self.nodes)), sorter=order)]
        return edges, found // 4


class GridSampler:
    """Bilinear values of nodal fields at the centres of n × n pixels over a mesh's bounding box.

    Args:
        mesh: The mesh.
        n: Pixels a side.

    Attributes:
        mask: Which pixel centres are on the mesh, (n, n); row i is the i-th from the bottom, column j the j-th from
            the left.

    Raises:
        ValueError: ``n`` is below 1; called on values that are not one a node.
        TypeError: ``n`` is no integer.

    Cost: O(n² · quads) comparisons once, then O(n²) a field.
    """

    def __init__(self, mesh: QuadMesh, n: int) -> None:
        check_integer("n", n, at_least=1)
        nodes = mesh.nodes.numpy()
        low, high = nodes.min(0), nodes.max(0)
        ticks = low + (np.arange(n)[:, None] + 0.5) / n * (high - low)
        points = np.stack([np.tile(ticks[:, 0], n), np.repeat(ticks[:, 1], n)], axis=1)
        quad, at = _locate(nodes[mesh.quads.numpy()], points)
        on = quad >= 0
        weights, _ = shape_functions(at[on])
        columns = mesh.quads.numpy()[quad[on]]
        rows = np.repeat(np.flatnonzero(on), 4)
        self._matrix = scipy.sparse.csr_array(
            (weights.ravel(), (rows, columns.ravel())), shape=(len(points), len(nodes))
        )
        self._n = n
        self.mask: Bool[Tensor, "n n"] = torch.from_numpy(on.reshape(n, n))

    def __call__(self, values: Float[Tensor, "*batch nodes"]) -> Float[Tensor, "*batch n n"]:
        """Sample nodal fields; pixels beside the mesh, in a hole say, are 0.

        Args:
            values: A number a node.

        Returns:
            A number a pixel, in the values' precision and on their device.
        """
        if values.dim() < 1 or values.shape[-1] != self._matrix.shape[1]:
            raise ValueError(f"values must be {self._matrix.shape[1]} a field, got shape {tuple(values.shape)}")
        flat = values.detach().to("cpu", torch.float64).reshape(-1, values.shape[-1]).numpy()
        images = torch.from_numpy(np.ascontiguousarray((self._matrix @ flat.T).T))
        return images.view(*values.shape[:-1], self._n, self._n).to(values)


def _table(name: str, value: Tensor, width: int, *, floating: bool) -> Tensor:
    fits = isinstance(value, Tensor) and (value.is_floating_point() if floating else _is_integer(value))
    if not fits:
        kind = "floating-point numbers" if floating else "integers"
        raise TypeError(f"{name} must be a tensor of {kind}, got {getattr(value, 'dtype', value)!r}")
    if value.dim() != 2 or value.shape[1] != width or not len(value):
        raise ValueError(f"{name} must be of shape (at least one, {width}), got {tuple(value.shape)}")
    return value.detach()


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
    numbers = list(hole)
    if len(numbers) not in (3, 4):
        raise ValueError(f"hole must be (x, y, radius) or (x, y, radius in x, radius in y), got {hole!r}")
    for value in numbers[:2]:
        check_number("hole's centre", value)
    for value in numbers[2:]:
        check_number("hole's radius", value, above=0)
    offset = (centres - numbers[:2]) / (numbers[2:] if len(numbers) == 4 else numbers[2])
    return np.square(offset).sum(1) < 1


def _locate(corners: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for every point the first element that holds it, or −1, and where it is in the reference square."""
    quad = np.full(len(points), -1)
    at = np.zeros_like(points)
    low, high = corners.min(1), corners.max(1)
    slack = 1e-9 * (high - low).max()
    chunk = max(1, math.floor(2**22 / len(corners)))
    for start in range(0, len(points), chunk):
        part = points[start : start + chunk, None]
        near, element = np.nonzero(((part >= low - slack) & (part <= high + slack)).all(-1))
        place = _reference(corners[element], part[near, 0])
        held = np.flatnonzero((np.abs(place) <= 1 + 1e-9).all(1))
        found, first = np.unique(near[held], return_index=True)
        quad[start + found] = element[held[first]]
        at[start + found] = place[held[first]]
    return quad, at


def _reference(corners: np.ndarray, points: np.ndarray, iterations: int = 20) -> np.ndarray:
    """Invert the bilinear map by Newton's method; exact after one step in a parallelogram."""
    place = np.zeros_like(points)
    for _ in range(iterations):
        values, slopes = shape_functions(place)
        miss = points - np.einsum("pi,pid->pd", values, corners)
        J = np.einsum("pia,pid->pda", slopes, corners)
        det = J[:, 0, 0] * J[:, 1, 1] - J[:, 0, 1] * J[:, 1, 0]
        det = np.where(det == 0, 1.0, det)  # a point far outside a distorted element: it is dropped afterwards
        step = np.stack(
            [J[:, 1, 1] * miss[:, 0] - J[:, 0, 1] * miss[:, 1], J[:, 0, 0] * miss[:, 1] - J[:, 1, 0] * miss[:, 0]], 1
        )
        step /= det[:, None]
        place = np.clip(place + step, -4, 4)
        if np.abs(step).max(initial=0.0) < 1e-14:
            break
    return place
