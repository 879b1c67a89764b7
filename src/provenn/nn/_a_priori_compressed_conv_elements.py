"""Bilinear quadrilaterals: shape functions, where a point is in its element, and sampling on a grid of pixels."""

from __future__ import annotations

import math

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

    Cost: O(n² · quads) comparisons once, then O(n²) a field.
    """

    def __init__(self, nodes: np.ndarray, quads: np.ndarray, n: int) -> None:
        check_integer("n", n, at_least=1)
        low, high = nodes.min(0), nodes.max(0)
        ticks = low + (np.arange(n)[:, None] + 0.5) / n * (high - low)
        points = np.stack([np.tile(ticks[:, 0], n), np.repeat(ticks[:, 1], n)], axis=1)
        quad, at = _locate(nodes[quads], points)
        on = quad >= 0
        weights, _ = shape_functions(at[on])
        columns = quads[quad[on]]
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
