"""A Mathematical Theory of Deep Convolutional Neural Networks for Feature Extraction.

Wiatowski, Bölcskei, IEEE Transactions on Information Theory 64 (2018). https://arxiv.org/abs/1512.06293

Scattering networks whose layers may each have another frame of filters, another Lipschitz non-linearity and another
pooling. Each layer splits every signal by the filters g_λ of its bank, all but one of which propagate,

    U[λ]f = S^{d/2} P(M(f * g_λ))(S ·),

and the remaining low-pass atom χ of the next bank generates features, Φⁿ(f) = {U[q]f * χ_n} over all paths q of length
n. If max(B, B L² R²) ≤ 1 in every layer, features change by no more than the signal does, shifts matter less the deeper
the layer, and small deformations change little. The module computes the features and the constants of these bounds.

The rooms: ``_semi_discrete_frames_transfers`` (what filters are made of), ``_semi_discrete_frames_banks`` (filters),
``_semi_discrete_frames_layer`` (one layer), ``_semi_discrete_frames_probes`` (measurements beside bounds); here is the
network.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Inexact
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice
from provenn.core.experiment.reports import Report
from provenn.nn._semi_discrete_frames_banks import FilterBank
from provenn.nn._semi_discrete_frames_layer import ScatteringLayer
from provenn.nn._semi_discrete_frames_probes import deform, deformation_probe, energy_probe, translation_probe
from provenn.nn._semi_discrete_frames_transfers import decay, lowpass

__all__ = [
    "FilterBank",
    "GeneralizedScattering",
    "ScatteringLayer",
    "deform",
    "deformation_probe",
    "energy_probe",
    "translation_probe",
]


@dataclass(frozen=True)
class ScatteringConstants(Report):
    """The constants of the theorems, one entry a layer.

    Args:
        lower: A_n, lower frame bounds.
        upper: B_n, upper frame bounds.
        lipschitz: L_n of the non-linearities.
        pooling: R_n of the poolings, as in the theory of functions.
        grid_pooling: R_n on the grid, where sub-sampling alone can raise the energy.
        decay: K_n of the atoms χ_0 … χ_D that generate the outputs.
        admissibility: max(B_n, B_n L_n² R_n²), with the grid's R_n.
        pointwise: Whether all poolings are within the theory; ``"max"`` is not.
        admissible: Whether all are ≤ 1, and so all features together change by no more than the signal.
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    lipschitz: tuple[float, ...]
    pooling: tuple[float, ...]
    grid_pooling: tuple[float, ...]
    decay: tuple[float, ...]
    admissibility: tuple[float, ...]
    pointwise: bool
    admissible: bool


class GeneralizedScattering(nn.Module):
    """Extract features by a cascade of layers, each with its own frame, non-linearity and pooling.

    Args:
        layers: The layers; each has the grid that the one before leaves.
        domain: Of the signals: ``"periodic"``.
        output: Transfer function of the atom χ_D that generates the last features, on the grid that the last layer
            leaves; a Gaussian without it. The others are the banks' own.

    Shape:
        (batch, 1, *grid) → one tensor (batch, paths, *grid_n) for each n = 0 … D.

    Returns:
        Φ⁰(f), …, Φ^D(f); complex where a non-linearity keeps complex values.

    Raises:
        TypeError: A layer is of another type.
        ValueError: No layer, grids that do not follow each other, another domain; on a call, another grid.

    Warns:
        UserWarning: A layer is not admissible; :meth:`normalized` makes it so.

    Cost: the product of the layers' numbers of filters: paths multiply. Time and memory grow with paths times grid.

    Source: Wiatowski & Bölcskei (2015), definitions 3 and 4.
    """

    output: Tensor

    def __init__(
        self,
        layers: Sequence[ScatteringLayer],
        domain: str = "periodic",
        output: Inexact[Tensor, "*grid"] | None = None,
    ) -> None:
        super().__init__()
        check_choice("domain", domain, ("periodic",))
        if len(layers) == 0:
            raise ValueError("layers must be one or more, got none")
        for place, layer in enumerate(layers):
            if not isinstance(layer, ScatteringLayer):
                raise TypeError(f"layers[{place}] must be a ScatteringLayer, got {type(layer).__name__}")
            expected = tuple(n // layers[place - 1].stride for n in layers[place - 1].grid) if place else layer.grid
            if layer.grid != expected:
                raise ValueError(f"layers[{place}] must have the grid {expected} that is left, got {layer.grid}")
        left = tuple(n // layers[-1].stride for n in layers[-1].grid)
        if output is None:
            output = lowpass(left).to(layers[0].bank.parts)
        elif tuple(output.shape) != left:
            raise ValueError(f"output must have the grid {left} that is left, got {tuple(output.shape)}")
        self.domain = domain
        self.layers = nn.ModuleList(layers)
        self.register_buffer("output", output)
        for place, chi in enumerate(self._atoms()):
            taps = torch.fft.ifftn(chi)
            if bool(taps.imag.abs().max() > 1e-5 * taps.abs().max()):
                name = f"layers[{place}]'s output-generating atom" if place < len(layers) else "output"
                raise ValueError(f"{name} must have real taps, got an imaginary part of {taps.imag.abs().max():.3g}")
        for place, layer in enumerate(layers):
            if layer.admissibility() > 1 + 1e-6:
                warnings.warn(
                    f"layers[{place}] is not admissible: max(B, B L² R²) = {layer.admissibility():.4g} > 1",
                    stacklevel=2,
                )

    def forward(self, f: Inexact[Tensor, "batch one *grid"]) -> list[Tensor]:
        """Return the features.

        Args:
            f: Periodic signals.
        """
        grid = self.layers[0].grid
        if f.shape[1] != 1 or tuple(f.shape[2:]) != grid:
            raise ValueError(f"f must be (batch, 1, {', '.join(map(str, grid))}), got {tuple(f.shape)}")
        paths = f.to(torch.promote_types(f.dtype, torch.float32))
        features, atoms = [], self._atoms()
        for layer, chi in zip(self.layers, atoms[:-1], strict=True):
            features.append(_smoothed(paths, chi))
            paths = layer(paths).flatten(1, 2)
        features.append(_smoothed(paths, atoms[-1]))
        return [one if one.is_complex() else one.to(f.real.dtype) for one in features]

    def _atoms(self) -> list[Tensor]:
        output = self.output.to(torch.promote_types(self.output.dtype, torch.float32))
        return [*(layer.bank.transfer()[layer.bank.output] for layer in self.layers), output]

    def total_strides(self) -> list[int]:
        """Return S_1 ⋯ S_n for n = 0 … D."""
        return [math.prod(layer.stride for layer in self.layers[:n]) for n in range(len(self.layers) + 1)]

    def decays(self) -> list[float]:
        """Return K_n = max |χ̂_n(ω)||ω| for n = 0 … D, ω in cycles a sample of the layer's grid."""
        return [decay(chi) for chi in self._atoms()]

    def constants(self) -> ScatteringConstants:
        """Return the constants of the theorems."""
        bounds = [layer.bank.frame_bounds() for layer in self.layers]
        admissibility = tuple(layer.admissibility() for layer in self.layers)
        last = self.output.abs().max().item()
        return ScatteringConstants(
            lower=tuple(lower for lower, _ in bounds),
            upper=tuple(upper for _, upper in bounds),
            lipschitz=tuple(layer.lipschitz for layer in self.layers),
            pooling=tuple(layer.pooling_constants()[0] for layer in self.layers),
            grid_pooling=tuple(layer.pooling_constants()[1] for layer in self.layers),
            decay=tuple(self.decays()),
            admissibility=admissibility,
            pointwise=all(layer.pooling != "max" for layer in self.layers),
            # Scaling to 1 leaves rounding.
            admissible=max(*admissibility, last) <= 1 + 1e-6,
        )

    def normalized(self) -> GeneralizedScattering:
        """Return the network with each layer's filters divided by √max(B, B L² R²): admissible."""
        output = self.output / max(1.0, self.output.abs().max().item())
        return GeneralizedScattering([layer.normalized() for layer in self.layers], self.domain, output)


def _smoothed(f: Tensor, chi: Tensor) -> Tensor:
    """Return f * χ; real for real signals and atoms with χ̂(−ω) = χ̂(ω)*, as low-pass atoms have."""
    dims = tuple(range(-chi.ndim, 0))
    if f.numel() == 0:  # FFTs do not take empty batches
        return f
    if f.is_complex():
        return torch.fft.ifftn(torch.fft.fftn(f, dim=dims) * chi, dim=dims)
    half = chi[..., : chi.shape[-1] // 2 + 1]
    smooth: Tensor = torch.fft.irfftn(torch.fft.rfftn(f, dim=dims) * half, s=chi.shape, dim=dims)
    return smooth
