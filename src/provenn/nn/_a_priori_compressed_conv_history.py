"""What a simulated wave leaves: snapshots, and a certificate that its states add up to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from provenn.nn._a_priori_compressed_conv_mesh import QuadMesh


@dataclass(frozen=True)
class WaveCertificate:
    """What can be checked of a run of :class:`WaveFE2d` from its displacements alone.

    Args:
        energy: The discrete energy that the method conserves. Newmark: ½ u̇ᵀMu̇ + ½ uᵀKu at each time. Explicit: the
            same with u̇ over the step before, and uᵀKu between that step's two ends.
        work: Work done by the load since the start.
        dissipation: Energy lost through absorbing sides since the start.
        energy_drift: Largest |E_n − E_0 − work + dissipation| over steps and batch, relative to the largest of the
            three. Zero but for rounding.
        residual: Largest residual of the equation of motion over steps and batch, in the Euclidean norm, relative to
            the largest sum of the norms of its terms. Zero but for rounding.

    Shape:
        ``energy``, ``work`` and ``dissipation`` (*batch, steps + 1), in units of u² (the density is 1/c²).
    """

    energy: Float[Tensor, "*batch times"]
    work: Float[Tensor, "*batch times"]
    dissipation: Float[Tensor, "*batch times"]
    energy_drift: float
    residual: float


@dataclass(frozen=True)
class WaveResult:
    """A simulated wave.

    Args:
        times: Times of the snapshots, from 0.
        displacement: The nodal displacement u at each time.
        certificate: Energy balance and residual.
        mesh: The mesh.

    Shape:
        ``times`` (steps + 1,); ``displacement`` (*batch, steps + 1, nodes), where ``batch`` is one dimension or none.
        All float64 on the CPU.
    """

    times: Float[Tensor, " times"]
    displacement: Float[Tensor, "*batch times nodes"]
    certificate: WaveCertificate
    mesh: QuadMesh

    def on_grid(self, n: int) -> Float[Tensor, "*batch times n n"]:
        """Return the snapshots at the centres of n × n pixels over the mesh's bounding box, rows upward in y.

        Pixels beside the mesh are 0; ``mesh.sampler(n).mask`` tells which. For several runs on a large mesh make one
        sampler, since each call here searches every element for every pixel anew.
        """
        return self.mesh.sampler(n)(self.displacement)


@dataclass(frozen=True)
class Step:
    """One step of a batch: state at its end, and what the certificate sums or compares, a number a batch entry."""

    u: np.ndarray
    energy: np.ndarray
    work: np.ndarray
    dissipation: np.ndarray
    residual: np.ndarray
    forces: np.ndarray

    @classmethod
    def first(cls, u: np.ndarray, energy: np.ndarray) -> Step:
        """Take the state at the start."""
        nothing = np.zeros(u.shape[1])
        return cls(u, energy, nothing, nothing, nothing, nothing)

    @classmethod
    def of(cls, u: np.ndarray, energy: np.ndarray, d: np.ndarray, forces: tuple[np.ndarray, ...]) -> Step:
        """Take inertia, damping, stiffness and load along a displacement d."""
        inertia, damping, stiffness, load = np.broadcast_arrays(*forces)
        norms = sum(np.linalg.norm(force, axis=0) for force in (inertia, damping, stiffness, load))
        residual = np.linalg.norm(inertia + damping + stiffness - load, axis=0)
        return cls(u, energy, dot(d, load), dot(d, damping), residual, norms)


def collect(history: list[Step], times: Tensor, free: Tensor, mesh: QuadMesh, batch: int | None) -> WaveResult:
    """Return what a run's states make, ``free`` being the nodes that they hold; without ``batch``, its only entry."""
    displacement = torch.zeros(history[0].u.shape[1], len(times), len(mesh.nodes), dtype=torch.float64, device="cpu")
    displacement[:, :, free] = torch.from_numpy(np.stack([step.u for step in history])).permute(2, 0, 1)
    energy = np.stack([step.energy for step in history])
    work = np.cumsum([step.work for step in history], axis=0)
    dissipation = np.cumsum([step.dissipation for step in history], axis=0)
    defect = np.abs(energy - energy[0] - work + dissipation).max(0)
    scale = np.maximum(np.maximum(energy, np.abs(work)), dissipation).max(0)
    residual = np.max([step.residual for step in history], axis=0)
    forces = np.max([step.forces for step in history], axis=0)
    entry = 0 if batch is None else slice(None)
    certificate = WaveCertificate(
        torch.from_numpy(energy.T.copy())[entry],
        torch.from_numpy(work.T.copy())[entry],
        torch.from_numpy(dissipation.T.copy())[entry],
        _ratio(defect, scale),
        _ratio(residual, forces),
    )
    return WaveResult(times, displacement[entry], certificate, mesh)


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the products of columns."""
    products: np.ndarray = np.einsum("ib,ib->b", a, b)
    return products


def _ratio(part: np.ndarray, whole: np.ndarray) -> float:
    """Return the largest ratio in the batch, 0 where nothing moves."""
    return float(np.divide(part, whole, out=np.zeros_like(part), where=whole > 0).max(initial=0.0))
