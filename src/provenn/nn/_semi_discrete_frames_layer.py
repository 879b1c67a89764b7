"""One layer of generalised scattering: filters, a Lipschitz non-linearity, pooling, sub-sampling; and its constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.numerics.frames import analyze
from provenn.nn._semi_discrete_frames_banks import FilterBank

Map = Callable[[Tensor], Tensor]
POOLINGS = ("identity", "average", "max")


def _parts(function: Map) -> Map:
    """Apply a function to real and imaginary part each."""

    def apply(z: Tensor) -> Tensor:
        return torch.complex(function(z.real), function(z.imag)) if z.is_complex() else function(z)

    return apply


def _shifted_logistic(x: Tensor) -> Tensor:
    return torch.sigmoid(x) - 0.5


NONLINEARITIES: dict[str, tuple[Map, float]] = {
    "modulus": (torch.abs, 1.0),
    "relu": (_parts(torch.relu), 2.0),
    "tanh": (_parts(torch.tanh), 2.0),
    "logistic": (_parts(_shifted_logistic), 0.5),
    "identity": (torch.clone, 1.0),
}
"""Non-linearities with their Lipschitz constants on complex signals, as the theory states them."""


class ScatteringLayer(nn.Module):
    """One layer: U[λ]f = S^{d/2} P(M(f * g_λ))(S ·) for every propagating filter g_λ of a bank.

    Args:
        bank: The filters; the output-generating one does not propagate.
        nonlinearity: M: ``"modulus"`` (Lipschitz constant 1), ``"relu"`` or ``"tanh"`` of real and imaginary part (2),
            ``"logistic"``, 1/(1 + e^{−x}) − ½ of both (½), ``"identity"`` (1), or a pair of function and constant.
        pooling: P: ``"identity"``, ``"average"`` over boxes of S points a side, or ``"max"`` over them, which lies
            outside the theory of pointwise maps.
        stride: S, by which each axis is sub-sampled; it divides the grid.

    Shape:
        (…, *grid) → (…, filters − 1, *grid / S), real after modulus, complex in general.

    Returns:
        What propagates.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An unknown option, M(0) ≠ 0, a stride that does not divide the grid; on a call, another grid.

    Cost: one FFT in and Λ out a signal; Λ/S^d times its memory.

    Source: Wiatowski & Bölcskei (2015), equations 8–12 and appendices B and C.
    """

    def __init__(
        self,
        bank: FilterBank,
        nonlinearity: str | tuple[Map, float] = "modulus",
        pooling: str = "identity",
        stride: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(bank, FilterBank):
            raise TypeError(f"bank must be a FilterBank, got {type(bank).__name__}")
        check_choice("pooling", pooling, POOLINGS)
        check_integer("stride", stride, at_least=1)
        if any(n % stride for n in bank.grid):
            raise ValueError(f"stride must divide the grid {bank.grid}, got {stride}")
        if isinstance(nonlinearity, str):
            check_choice("nonlinearity", nonlinearity, tuple(NONLINEARITIES))
            self._known: str | None = nonlinearity
            self._given: Map | None = None
            self.lipschitz = NONLINEARITIES[nonlinearity][1]
        else:
            self._known, self._given = None, nonlinearity[0]
            check_number("nonlinearity's Lipschitz constant", nonlinearity[1], above=0)
            self.lipschitz = float(nonlinearity[1])
            zero = self._given(torch.zeros(1, device="cpu"))
            if bool((zero != 0).any()):
                raise ValueError(f"nonlinearity must satisfy M(0) = 0, got M(0) = {zero.item():g}")
        self.bank, self.pooling, self.stride = bank, pooling, stride

    @property
    def grid(self) -> tuple[int, ...]:
        """The grid of the layer's inputs."""
        return self.bank.grid

    def forward(self, f: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, "*out"]:
        """Return what propagates.

        Args:
            f: Signals.
        """
        filters, out = self.bank(), self.bank.output
        wide = f.to(torch.promote_types(f.dtype, torch.float32))
        filtered = analyze(wide, torch.cat((filters[:out], filters[out + 1 :])))
        transformed = self._given(filtered) if self._given else NONLINEARITIES[str(self._known)][0](filtered)
        pooled = self.pool(transformed)
        return pooled if pooled.is_complex() else pooled.to(f.real.dtype)

    def pool(self, z: Tensor) -> Tensor:
        """Return S^{d/2} P(z)(S ·)."""
        S, d = self.stride, len(self.grid)
        if S == 1:
            return z
        if self.pooling == "identity":
            every = (..., *[slice(None, None, S)] * d)
            return S ** (d / 2) * z[every]
        blocks = z.unflatten(-1, (-1, S))
        if d == 2:
            blocks = blocks.unflatten(-3, (-1, S)).movedim(-3, -2).flatten(-2)
        if self.pooling == "average":
            return S ** (d / 2) * blocks.mean(-1)
        if z.is_complex():
            raise ValueError("pooling max needs a nonlinearity with real values, got complex ones")
        return S ** (d / 2) * blocks.amax(-1)

    def pooling_constants(self) -> tuple[float, float]:
        """Return R in the theory of functions, and R on the grid.

        Taking samples of a function is no map of its energy, and R = 1 in the theory. On a grid the samples S^{d/2}
        f(S n) alone can hold up to S^d times the energy of f; averages over boxes cannot.
        """
        expansion = float(self.stride ** (len(self.grid) / 2))
        return 1.0, 1.0 if self.pooling == "average" else expansion

    def admissibility(self) -> float:
        """Return max(B, B L² R²) on the grid, which must be ≤ 1."""
        _, B = self.bank.frame_bounds()
        return max(B, B * self.lipschitz**2 * self.pooling_constants()[1] ** 2)

    def normalized(self) -> ScatteringLayer:
        """Return the layer with filters divided by √max(B, B L² R²), which makes it admissible."""
        given: Any = self._known if self._given is None else (self._given, self.lipschitz)
        return ScatteringLayer(self.bank.scaled(1 / math.sqrt(self.admissibility())), given, self.pooling, self.stride)
