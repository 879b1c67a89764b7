"""Bilinear quadrilaterals: shape functions, where a point is in its element, and sampling on a grid of pixels."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from provenn.core.experiment.checks import check_integer

CORNERS = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
"""The reference square's corners, counter-clockwise."""


def shape_functions(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the four bilinear shape functions (..., 4) and their derivatives (..., 4, 2) at reference points."""
    x, y = at[..., None, 0] * CORNERS[:, 0], at[..., None, 1] * CORNERS[:, 1]
    values = (1 + x) * (1 + y) / 4
    slopes = np.stack([CORNERS[:, 0] * (1 + y), CORNERS[:, 1] * (1 + x)], axis=-1) / 4
    return values, slopes


class GridSampler:
    """Bilinear values of nodal fields at the centres of n × n pixels over a mesh's bounding box.

    Args:
        nodes: Positions of the mesh's nodes, (nodes, 2).
        quads: The nodes of its elements, (quads, 4).
        n: Pixels a side.

    Attributes:
        mask: Which pixel centres are on the mesh, (n, n); row i is the i-th from the bottom, column j the j-th from
            the left.

    Raises:
        ValueError: ``n`` is below 1; called on values that are not one a node.
        TypeError: ``n`` is no integer.

    Cost: O(n² + quads) time and memory once, in a mesh without slivers; then O(n²) a field.
    """

    def __init__(self, nodes: np.ndarray, quads: np.ndarray, n: int) -> None:
        check_integer("n", n, at_least=1)
        low, high = nodes.min(0), nodes.max(0)
        ticks = low + (np.arange(n)[:, None] + 0.5) / n * (high - low)
        quad, at = _locate(nodes[quads], ticks)
        on = quad >= 0
        weights, _ = shape_functions(at[on])
        columns = quads[quad[on]]
        rows = np.repeat(np.flatnonzero(on), 4)
        self._matrix = scipy.sparse.csr_array((weights.ravel(), (rows, columns.ravel())), shape=(n * n, len(nodes)))
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


def _locate(corners: np.ndarray, ticks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for every point of a grid the first element that holds it, or −1, and where it is in the reference square.

    The grid's coordinates are rising, a column of ``ticks`` an axis; its points are in rows from the bottom.
    """
    points = np.stack([np.tile(ticks[:, 0], len(ticks)), np.repeat(ticks[:, 1], len(ticks))], axis=1)
    quad, at = np.full(len(points), -1), np.zeros_like(points)
    near, element = _boxed(corners, ticks)
    place = _reference(corners[element], points[near])
    held = np.flatnonzero((np.abs(place) <= 1 + 1e-9).all(1))
    found, first = np.unique(near[held], return_index=True)
    quad[found], at[found] = element[held[first]], place[held[first]]
    return quad, at


def _boxed(corners: np.ndarray, ticks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of a point and an element in whose bounding box it is, by rising elements."""
    low, high = corners.min(1), corners.max(1)
    slack = 1e-9 * (high - low).max()
    start = np.stack([np.searchsorted(ticks[:, axis], low[:, axis] - slack) for axis in (0, 1)], axis=1)
    stop = np.stack([np.searchsorted(ticks[:, axis], high[:, axis] + slack, "right") for axis in (0, 1)], axis=1)
    count = (stop - start).prod(1)
    element = np.repeat(np.arange(len(corners)), count)
    within = np.arange(len(element)) - np.repeat(np.cumsum(count) - count, count)
    row, column = np.divmod(within, (stop - start)[element, 0])
    return (start[element, 1] + row) * len(ticks) + start[element, 0] + column, element


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
