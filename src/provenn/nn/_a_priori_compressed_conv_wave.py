"""The scalar wave equation in the plane by bilinear finite elements, stepped by Newmark's method.

Sparse algebra is SciPy's, in float64 on the CPU; tensors go in and come out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.nn._a_priori_compressed_conv_assembly import Speed, boundary_damping, domain_matrices, lumped
from provenn.nn._a_priori_compressed_conv_history import Step, WaveResult, collect, dot
from provenn.nn._a_priori_compressed_conv_mesh import QuadMesh

BOUNDARIES = ("clamped", "absorbing", "free")

Load = Tensor | Callable[[Tensor, float], Tensor] | None


class WaveFE2d:
    r"""Solve the wave equation u_tt = c² Δu + f on a mesh of bilinear quadrilaterals.

    The weak form, with 2 × 2 Gauss points an element, holds across jumps of c too:

    .. math:: \int \frac{v\,\ddot u}{c^2} + \int_{\text{absorbing}} \frac{v\,\dot u}{c} + \int \nabla v \cdot \nabla u
        = \int \frac{v\,f}{c^2}, \qquad M \ddot u + C \dot u + K u = F

    Newmark's method with β = ¼, γ = ½ is stable at any step and keeps the energy ½ u̇ᵀMu̇ + ½ uᵀKu. With the step
    d = uⁿ⁺¹ − uⁿ it is the trapezoidal rule, F̄ being the mean load of the two ends:

    .. math:: \left(\tfrac{4}{\Delta t^2} M + \tfrac{2}{\Delta t} C + K\right) d
        = 2 \bar F + \tfrac{4}{\Delta t} M \dot u^n - 2 K u^n, \qquad
        \dot u^{n+1} = \tfrac{2}{\Delta t} d - \dot u^n

    Args:
        mesh: The mesh.
        c: The wave speed, above 0, in units of length a time: a number; one an element (constant in it); one a node
            (bilinear between them); or a function of positions (points, 2), called at the Gauss points of elements and
            absorbing edges.
        boundary: What holds at the boundary: ``"clamped"`` (u = 0), ``"absorbing"`` (first order, u_t + c ∂u/∂n = 0)
            or ``"free"`` (∂u/∂n = 0). One word holds for every side but ``"hole"``; a mapping gives words by the
            names of sides. Sides without a word are free.
        dt: The time step.
        mass: ``"consistent"``, or ``"lumped"``: the rows of M and C summed onto their diagonals.
        method: ``"newmark"``, or ``"explicit"``: central differences with lumped mass, stable for
            dt < 2/ω, ω² the largest eigenvalue of M⁻¹K.

    Attributes:
        M, C, K: Mass, damping and stiffness between all nodes, clamped ones too: CSR arrays of SciPy.
        free: The nodes that are not clamped.

    Shape:
        ``c`` a number, (quads,), (nodes,), or a function.

    Raises:
        ValueError: An argument is out of bounds or of the wrong shape, a side is unknown, nothing is free to move,
            the explicit method has no lumped mass, its dt is at or above the limit (named), or ``dt`` or ``c`` is so
            extreme that the equations cannot be solved in float64.
        TypeError: ``mesh`` is no :class:`QuadMesh`, ``dt`` no number, or ``c`` complex.

    Cost: one sparse factorisation, O(nodes^1.5) time and O(nodes · log nodes) memory (the explicit method: the largest
    eigenvalue instead).

    Source: Boukraichi, Akkari, Casenave, Ryckelynck, arXiv 2304.04964 (the simulator that is learned); Newmark (1959);
    Hughes, The Finite Element Method (1987), chapters 7 and 9; Engquist and Majda (1977), first-order absorption.
    """

    def __init__(
        self,
        mesh: QuadMesh,
        c: Speed,
        boundary: str | Mapping[str, str],
        dt: float,
        *,
        mass: Literal["consistent", "lumped"] = "consistent",
        method: Literal["newmark", "explicit"] = "newmark",
    ) -> None:
        if not isinstance(mesh, QuadMesh):
            raise TypeError(f"mesh must be a QuadMesh, got {mesh!r}")
        check_number("dt", dt, above=0)
        check_choice("mass", mass, ("consistent", "lumped"))
        check_choice("method", method, ("newmark", "explicit"))
        if method == "explicit" and mass != "lumped":
            raise ValueError(f"mass must be 'lumped' for the explicit method, got {mass!r}")
        kinds = _kinds(boundary, mesh)
        self.mesh, self.dt, self.method = mesh, float(dt), method
        self._load_matrix, self.K = domain_matrices(mesh, c)
        self.C = boundary_damping(mesh, c, [side for side, kind in kinds.items() if kind == "absorbing"])
        self.M = self._load_matrix
        if mass == "lumped":
            self.M, self.C = lumped(self.M), lumped(self.C)
        clamped = [mesh.sides[side].flatten() for side, kind in kinds.items() if kind == "clamped"]
        is_free = torch.ones(len(mesh.nodes), dtype=torch.bool, device="cpu")
        if clamped:
            is_free[torch.cat(clamped)] = False
        if not is_free.any():
            raise ValueError(f"boundary must leave a node free to move, got {boundary!r}")
        self.free = is_free.nonzero().flatten()
        inside = self.free.numpy()
        self._M, self._C, self._K = (A[inside][:, inside] for A in (self.M, self.C, self.K))
        if method == "explicit":
            self._check_stability()
        else:
            self._factor = self._factorised()

    def run(self, f: Load, steps: int, initial: Tensor | None = None, velocity: Tensor | None = None) -> WaveResult:
        """Step from time 0; several loads or starts run as one batch.

        Clamped nodes stay at 0, whatever is given there.

        Args:
            f: The load at the nodes, bilinear between them: tensors of values at every time, a function of positions
                and time, or ``None``.
            steps: Steps to take.
            initial: Displacement at time 0; default 0.
            velocity: Velocity at time 0; default 0.

        Shape:
            ``f`` (steps + 1, nodes) or (batch, steps + 1, nodes), or a function of positions (nodes, 2) and the time
            that returns (nodes,) or (batch, nodes); ``initial`` and ``velocity`` (nodes,) or (batch, nodes). What has
            no batch dimension holds for the whole batch.

        Returns:
            Snapshots and the certificate.

        Raises:
            ValueError: ``steps`` is below 1; or a tensor, or what ``f`` returns, is not of that shape, not finite, or
                of another batch than the others.
            TypeError: ``steps`` is no integer, ``f`` neither tensor, function nor ``None``, or a tensor is complex.

        Cost: two triangular solves (the explicit method: none) and a few sparse products a step and batch entry. Every
        state is kept, 8 · batch · (steps + 1) · nodes bytes, twice while the result is made.
        """
        check_integer("steps", steps, at_least=1)
        times = self.dt * torch.arange(steps + 1, dtype=torch.float64, device="cpu")
        load, batches = self._load(f, times)
        starts = []
        for name, value in (("initial", initial), ("velocity", velocity)):
            start = torch.zeros(len(self.mesh.nodes), device="cpu") if value is None else value
            starts.append(_nodal(name, start, len(self.mesh.nodes)))
            batches[name] = starts[-1].shape[1] if value is not None and value.dim() == 2 else None
        batch = _common(batches)
        u, v = (np.repeat(start, (batch or 1) // start.shape[1], axis=1)[self.free.numpy()] for start in starts)
        march = self._explicit if self.method == "explicit" else self._newmark
        return collect(list(march(u, v, load, steps)), times, self.free, self.mesh, batch)

    def _newmark(self, u: np.ndarray, v: np.ndarray, load: Callable[[int], np.ndarray], steps: int) -> Iterator[Step]:
        dt, Ku, Mv, F = self.dt, self._K @ u, self._M @ v, load(0)
        yield Step.first(u, dot(v, Mv) / 2 + dot(u, Ku) / 2)
        for n in range(steps):
            F_next = load(n + 1)
            F, mean = F_next, (F + F_next) / 2
            d = self._factor.solve(2 * mean + 4 / dt * Mv - 2 * Ku)
            u, v = u + d, 2 / dt * d - v
            Ku_old, Mv_old, Ku, Mv = Ku, Mv, self._K @ u, self._M @ v
            Cv = self._C @ d / dt
            yield Step.of(
                u,
                dot(v, Mv) / 2 + dot(u, Ku) / 2,
                d,
                ((Mv - Mv_old) / dt, Cv, (Ku + Ku_old) / 2, mean),
            )

    def _explicit(self, u: np.ndarray, v: np.ndarray, load: Callable[[int], np.ndarray], steps: int) -> Iterator[Step]:
        dt, m, c = self.dt, self._M.diagonal()[:, None], self._C.diagonal()[:, None]
        Ku, F = self._K @ u, load(0)
        # The velocities stand between the times; the first makes the mean of its neighbours the one given.
        v = v - dt / 2 * (F - c * v - Ku) / m
        yield Step.first(u, dot(v, m * v) / 2 + dot(u - dt * v, Ku) / 2)
        for n in range(steps):
            v_old, v = v, ((m / dt - c / 2) * v + F - Ku) / (m / dt + c / 2)
            u = u + dt * v
            mean = (v + v_old) / 2
            forces = (m * (v - v_old) / dt, c * mean, Ku, F)
            energy = dot(v, m * v) / 2 + dot(u, Ku) / 2
            Ku, F = self._K @ u, load(n + 1)
            yield Step.of(u, energy, dt * mean, forces)

    def _load(self, f: Load, times: Tensor) -> tuple[Callable[[int], np.ndarray], dict[str, int | None]]:
        """Return what gives the nodal forces (free nodes, batch) at a step, and the load's batch."""
        nodes = len(self.mesh.nodes)
        lift = self._load_matrix[self.free.numpy()]
        if f is None:
            nothing = np.zeros((len(self.free), 1))
            return lambda step: nothing, {}
        if isinstance(f, Tensor):
            if f.dim() not in (2, 3) or f.shape[-2:] != (len(times), nodes):
                raise ValueError(
                    f"f must be of shape ({len(times)}, {nodes}) or (batch, {len(times)}, {nodes}), "
                    f"got {tuple(f.shape)}"
                )
            batch = len(f) if f.dim() == 3 else None
            return lambda step: lift @ _nodal("f", f[..., step, :], nodes), {"f": batch}
        if not callable(f):
            raise TypeError(f"f must be a tensor, a function of positions and time, or None, got {f!r}")
        first = f(self.mesh.nodes.clone(), 0.0)
        _nodal("f", first, nodes)

        def force(step: int) -> np.ndarray:
            value = f(self.mesh.nodes.clone(), times[step].item()) if step else first
            if not isinstance(value, Tensor) or value.shape != first.shape:
                raise ValueError(f"f must always return the shape {tuple(first.shape)}, got {value!r} at step {step}")
            forces: np.ndarray = lift @ _nodal("f", value, nodes)
            return forces

        return force, {"f": len(first) if first.dim() == 2 else None}

    def _factorised(self) -> Any:
        try:
            A = 4 / self.dt**2 * self._M + 2 / self.dt * self._C + self._K
            # Symmetric positive definite: no pivots off the diagonal, and a fill-in ordering for symmetric matrices.
            return scipy.sparse.linalg.splu(
                A.tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
            )
        except (ArithmeticError, RuntimeError) as error:
            raise ValueError(
                f"dt and c must leave the matrix of a step regular in float64, got dt {self.dt!r}: {error}"
            ) from error

    def _check_stability(self) -> None:
        roots = scipy.sparse.diags_array(1 / np.sqrt(self._M.diagonal()))
        A = (roots @ self._K @ roots).tocsr()
        if A.shape[0] <= 32:
            largest = np.linalg.eigvalsh(A.toarray())[-1]
        else:
            start = np.random.default_rng(0).standard_normal(A.shape[0])
            largest = scipy.sparse.linalg.eigsh(A, k=1, which="LA", v0=start, return_eigenvectors=False)[0]
        limit = 2 / math.sqrt(largest) if largest > 0 else math.inf
        if self.dt >= limit:
            raise ValueError(f"dt must be below the explicit method's stability limit {limit:.6g}, got {self.dt!r}")


def _nodal(name: str, value: Any, nodes: int) -> np.ndarray:
    """Return values at the nodes as (nodes, batch)."""
    if not isinstance(value, Tensor) or value.dim() not in (1, 2) or value.shape[-1] != nodes:
        shape = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} must be a number a node, ({nodes},) or (batch, {nodes}), got {shape}")
    if value.is_complex():
        raise TypeError(f"{name} must be real, got {value.dtype}")
    if not value.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    columns: np.ndarray = value.detach().to("cpu", torch.float64).reshape(-1, nodes).numpy().T
    return columns


def _common(batches: Mapping[str, int | None]) -> int | None:
    sizes = {name: size for name, size in batches.items() if size is not None}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        names = ", ".join(sizes)
        raise ValueError(f"{names} must have the same batch of at least one, got {', '.join(map(str, sizes.values()))}")
    return next(iter(sizes.values()), None)


def _kinds(boundary: str | Mapping[str, str], mesh: QuadMesh) -> dict[str, str]:
    """Return the condition on every side that has one."""
    if isinstance(boundary, Mapping):
        for side, kind in boundary.items():
            check_choice("boundary's sides", side, mesh.sides)
            check_choice(f"boundary[{side!r}]", kind, BOUNDARIES)
        return dict(boundary)
    check_choice("boundary", boundary, BOUNDARIES)
    return {side: boundary for side in mesh.sides if side != "hole"}
