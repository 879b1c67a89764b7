"""Simulated waves that meet an inclusion, as images: what the paper's surrogate networks learn from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.nn._a_priori_compressed_conv_mesh import QuadMesh
from provenn.nn._a_priori_compressed_conv_wave import WaveFE2d

PARAMETERS = ("pulse_x", "pulse_y", "pulse_width", "speed_ratio", "inclusion_x", "inclusion_y", "inclusion_radius")


@dataclass(frozen=True)
class WaveDataset:
    """Waves in the unit square that meet a circular inclusion.

    Args:
        fields: The wave speed: 1, and the speed ratio in the inclusion.
        frames: The displacement at each of ``times``.
        parameters: What tells the simulations apart, in the order of ``parameter_names``.
        times: Times of the frames.
        parameter_names: Names of the parameters' columns.

    Shape:
        ``fields`` (n, 1, resolution, resolution), ``frames`` (n, frames, resolution, resolution), ``parameters``
        (n, 7), ``times`` (frames,). Row i of an image is at y = (i + ½)/resolution, column j at
        x = (j + ½)/resolution.
    """

    fields: Float[Tensor, "n 1 rows columns"]
    frames: Float[Tensor, "n frames rows columns"]
    parameters: Float[Tensor, "n parameters"]
    times: Float[Tensor, " frames"]
    parameter_names: tuple[str, ...] = PARAMETERS


def wave_dataset(
    n: int,
    generator: torch.Generator,
    resolution: int = 64,
    frames: int = 10,
    *,
    interval: float = 0.06,
    boundary: str = "clamped",
    dtype: torch.dtype = torch.float32,
) -> WaveDataset:
    r"""Simulate waves in the unit square that start as a pulse beside a circular inclusion.

    The wave starts at rest as :math:`u = \exp(-|x - p|^2 / 2 w^2)`. Each simulation draws, independently: the speed
    ratio from 0.5 to 2, uniformly in its logarithm; uniformly the inclusion's radius from 0.1 to 0.18, its centre in
    [0.36, 0.64]², the pulse's width w from 0.05 to 0.07, and the gap of 0.05 to 0.2 between the inclusion's edge and
    the pulse's centre p, in a uniform direction; p is moved into [0.18, 0.82]² if it is not there, which leaves it
    outside the inclusion. The mesh has one element a pixel, the speed is constant in each, and :class:`WaveFE2d` steps
    with consistent mass, no further than a wave of speed 1 goes through half an element.

    Args:
        n: Simulations.
        generator: Where all random numbers come from. The first m of n simulations are those of n = m.
        resolution: Pixels, and elements, a side.
        frames: Frames of each simulation, at ``interval``, 2 · ``interval`` …
        interval: Time between frames; at speed 1 a wave crosses the square in time 1.
        boundary: ``"clamped"``, which keeps the energy, ``"absorbing"``, or ``"free"``.
        dtype: Precision of the result; the simulation itself is in float64.

    Shape:
        See :class:`WaveDataset`.

    Returns:
        Speed fields, frames and parameters, on the generator's device.

    Raises:
        ValueError: ``n`` or ``frames`` is below 1, ``resolution`` below 2, ``interval`` not above 0, or ``boundary``
            unknown.
        TypeError: ``generator`` is no ``torch.Generator``, a count no integer, or ``dtype`` no floating-point type.

    Cost: on the CPU, n factorisations of resolution² unknowns, O(resolution³) each, and
    2 · n · frames · interval · resolution steps of O(resolution² · log resolution); once, O(resolution⁴) comparisons
    that find the pixels' elements.

    Source: Boukraichi, Akkari, Casenave, Ryckelynck, arXiv 2304.04964, whose networks learn a finite-element wave;
    the geometry is this package's.
    """
    check_integer("n", n, at_least=1)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    check_integer("resolution", resolution, at_least=2)
    check_integer("frames", frames, at_least=1)
    check_number("interval", interval, above=0)
    check_choice("boundary", boundary, ("clamped", "absorbing", "free"))
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point type, got {dtype!r}")
    mesh = QuadMesh.rectangle(1.0, 1.0, resolution, resolution)
    sampler = mesh.sampler(resolution)
    centres = mesh.nodes[mesh.quads].mean(dim=1)
    parameters = _draw(n, generator)
    substeps = math.ceil(2 * interval * resolution)
    speeds = torch.empty(n, 1, resolution, resolution, dtype=torch.float64, device="cpu")
    images = torch.empty(n, frames, resolution, resolution, dtype=torch.float64, device="cpu")
    for one, row in enumerate(parameters):
        pulse, width, ratio, centre, radius = row[:2], row[2], row[3], row[4:6], row[6]
        c = torch.where((centres - centre).square().sum(1) < radius**2, ratio, 1.0)
        start = torch.exp(-(mesh.nodes - pulse).square().sum(1) / (2 * width**2))
        run = WaveFE2d(mesh, c, boundary, interval / substeps).run(None, frames * substeps, start)
        speeds[one, 0] = c.view(resolution, resolution)
        images[one] = sampler(run.displacement[substeps::substeps])
    times = interval * torch.arange(1, frames + 1, dtype=torch.float64, device="cpu")
    speeds, images, parameters, times = (
        part.to(generator.device, dtype) for part in (speeds, images, parameters, times)
    )
    return WaveDataset(speeds, images, parameters, times)


def _draw(n: int, generator: torch.Generator) -> Tensor:
    """Return rows of :data:`PARAMETERS`, from seven uniform numbers each."""
    uniform = torch.rand(n, 7, generator=generator, device=generator.device, dtype=torch.float64).cpu()
    width, log_ratio, gap, turn = (uniform[:, k] for k in (0, 1, 5, 6))
    centre, radius = 0.36 + 0.28 * uniform[:, 2:4], 0.1 + 0.08 * uniform[:, 4]
    distance, angle = radius + 0.05 + 0.15 * gap, 2 * math.pi * turn
    direction = torch.stack([angle.cos(), angle.sin()], dim=1)
    pulse = (centre + distance[:, None] * direction).clamp(0.18, 0.82)
    columns = (pulse, 0.05 + 0.02 * width[:, None], 4.0 ** (log_ratio[:, None] - 0.5), centre, radius[:, None])
    return torch.cat(columns, dim=1)
