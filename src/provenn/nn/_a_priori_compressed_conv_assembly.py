"""Finite-element matrices of the wave equation on bilinear quadrilaterals, by Gauss quadrature."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from provenn.nn._a_priori_compressed_conv_elements import CORNERS, shape_functions
from provenn.nn._a_priori_compressed_conv_mesh import QuadMesh

Speed = float | Tensor | Callable[[Tensor], Tensor]
"""A wave speed: a number, one an element, one a node, or a function of positions (points, 2)."""

_GAUSS = CORNERS / math.sqrt(3)
_EDGE_GAUSS = np.array([[0.5 + 0.5 / math.sqrt(3), 0.5 - 0.5 / math.sqrt(3)]] * 2)
_EDGE_GAUSS[1] = _EDGE_GAUSS[1, ::-1]  # weights of an edge's two ends at its two Gauss points


def domain_matrices(mesh: QuadMesh, c: Speed) -> tuple[scipy.sparse.csr_array, scipy.sparse.csr_array]:
    """Return ∫ φφ/c² and ∫ ∇φ·∇φ."""
    quads, corners = mesh.quads.numpy(), mesh.nodes.numpy()[mesh.quads.numpy()]
    values, slopes = shape_functions(_GAUSS)
    J = np.einsum("gia,eid->egad", slopes, corners)
    det = J[..., 0, 0] * J[..., 1, 1] - J[..., 0, 1] * J[..., 1, 0]
    gradients = np.linalg.solve(J, np.broadcast_to(slopes.swapaxes(1, 2), (*J.shape[:3], 4)))
    speed = _speeds(c, mesh, np.arange(len(quads)), quads, values, corners)
    mass = np.einsum("eg,gi,gj->eij", det / speed**2, values, values, optimize=True)
    weighted = gradients * det[..., None, None]
    stiffness = np.matmul(weighted.reshape(len(quads), 8, 4).swapaxes(1, 2), gradients.reshape(len(quads), 8, 4))
    return _assembled(mass, quads, mesh), _assembled(stiffness, quads, mesh)


def boundary_damping(mesh: QuadMesh, c: Speed, sides: list[str]) -> scipy.sparse.csr_array:
    """Return ∫ φφ/c over the sides."""
    pairs = [mesh.edges_of(side) for side in sides] or [(np.zeros((0, 2), dtype=np.int64), np.zeros(0, dtype=np.int64))]
    edges, owners = (np.concatenate(part) for part in zip(*pairs, strict=True))
    ends = mesh.nodes.numpy()[edges]
    length = np.linalg.norm(ends[:, 1] - ends[:, 0], axis=1)
    speed = _speeds(c, mesh, owners, edges, _EDGE_GAUSS, ends)
    damping = np.einsum("eg,gi,gj->eij", length[:, None] / 2 / speed, _EDGE_GAUSS, _EDGE_GAUSS)
    return _assembled(damping, edges, mesh)


def _assembled(local: np.ndarray, places: np.ndarray, mesh: QuadMesh) -> scipy.sparse.csr_array:
    width = places.shape[1]
    rows, columns = np.repeat(places, width, axis=1).ravel(), np.tile(places, (1, width)).ravel()
    matrix = scipy.sparse.csr_array((local.ravel(), (rows, columns)), shape=(len(mesh.nodes),) * 2)
    matrix.sum_duplicates()
    return matrix


def lumped(matrix: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """Return the diagonal matrix of the sums of rows."""
    return scipy.sparse.csr_array(scipy.sparse.diags_array(matrix.sum(axis=1)))


def _speeds(
    c: Speed, mesh: QuadMesh, owners: np.ndarray, places: np.ndarray, values: np.ndarray, corners: np.ndarray
) -> np.ndarray:
    """Return c at the Gauss points (elements or edges, points) whose shape functions are given."""
    if isinstance(c, Tensor) and c.is_complex():
        raise TypeError(f"c must be real, got {c.dtype}")
    if isinstance(c, Tensor) and c.dim() == 0:
        c = c.item()
    if callable(c) and not isinstance(c, Tensor):
        points = np.einsum("gi,eid->egd", values, corners)
        found = c(torch.from_numpy(points.reshape(-1, 2)))
        if not isinstance(found, Tensor) or found.shape != (points.shape[0] * points.shape[1],):
            raise ValueError(f"c must return a number a point, {points.shape[0] * points.shape[1]} here, got {found!r}")
        speed = found.detach().to("cpu", torch.float64).numpy().reshape(points.shape[:2])
    elif isinstance(c, numbers.Real) and not isinstance(c, bool):
        speed = np.full((len(places), len(values)), float(c))
    elif isinstance(c, Tensor) and c.shape in [(len(mesh.quads),), (len(mesh.nodes),)]:
        given = c.detach().to("cpu", torch.float64).numpy()
        # A planar mesh has more nodes than elements, so the length tells which.
        speed = given[places] @ values.T if len(given) == len(mesh.nodes) else given[owners][:, None] + 0 * values[:, 0]
    else:
        shown = tuple(c.shape) if isinstance(c, Tensor) else repr(c)
        raise ValueError(
            f"c must be a number, a function, or of shape ({len(mesh.quads)},) or ({len(mesh.nodes)},), got {shown}"
        )
    if not (np.isfinite(speed).all() and (speed > 0).all()):
        raise ValueError(f"c must be finite and above 0, got values from {speed.min()} to {speed.max()}")
    return speed
