"""Convolutions in canonical and Tucker format: all output channels share the factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from provenn.core.compression.low_rank import canonical_factors, tucker_factors
from provenn.core.experiment.checks import check_integer
from provenn.nn._a_priori_compressed_conv_base import (
    FactorizedConv,
    Geometry,
    PaddingMode,
    Pair,
    forward_geometry,
    pair,
    pointwise,
    transposed_geometry,
)


class _Plain(FactorizedConv):
    """What makes a format a plain convolution: the arguments of ``nn.Conv2d``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        rank: int | Pair = 1,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = forward_geometry(kernel_size, stride, padding, dilation, padding_mode)
        super().__init__((in_channels, out_channels), rank, geometry, bias, device, dtype)


class _Transposed(FactorizedConv):
    """What makes a format a transposed convolution: the arguments of ``nn.ConvTranspose2d``."""

    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        rank: int | Pair = 1,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        output_padding: int | Pair = 0,
        dilation: int | Pair = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = transposed_geometry(kernel_size, stride, padding, output_padding, dilation)
        super().__init__((in_channels, out_channels), rank, geometry, bias, device, dtype)


class _CP(FactorizedConv):
    """Sums over r of products of one-way filters that all output channels share."""

    rank: int

    def __init__(self, channels: Pair, rank: int, geometry: Geometry, bias: bool, device: Any, dtype: Any) -> None:
        check_integer("rank", rank, at_least=1)
        super().__init__(*channels, rank, geometry)
        self._build(bias, device, dtype)

    def _chain(self, bias: bool, factory: dict[str, Any]) -> list[tuple[str, nn.Module]]:
        rank, along = self.rank, self.geometry.convolution
        return [
            ("channel", pointwise((self.in_channels, rank), **factory)),
            ("vertical", along((rank, rank), "y", groups=rank, **factory)),
            ("horizontal", along((rank, rank), "x", groups=rank, **factory)),
            ("output", pointwise((rank, self.out_channels), bias=bias, **factory)),
        ]

    @property
    def _products(self) -> int:
        return self.rank

    def _filters(self) -> list[Tensor]:
        """Return a (c, r), u (y, r), v (x, r) and d (o, r)."""
        a, u, v, d = (factor.weight.flatten(1) for factor in self.factors)
        return [a.mT, u.mT, v.mT, d]

    def _kernel(self) -> Tensor:
        return torch.einsum("cr,yr,xr,or->ocyx", *self._filters())

    def _fit(self, kernel: Tensor, iterations: int) -> None:
        found = canonical_factors(kernel.permute(1, 2, 3, 0)[None], self.rank, iterations)
        for filters, (factor,) in zip(self._filters(), found, strict=True):
            filters.copy_(factor)


class CPConv2d(_Plain, _CP):
    """A convolution in canonical polyadic (CP) format, whose one-way filters all output channels share.

    K[o, c, y, x] = Σ_r d[o, r] a[r, c] u[r, y] v[r, x]: a 1×1 convolution to R channels, a depthwise k_y×1 and a
    depthwise 1×k_x one, and a 1×1 convolution to C_out channels.

    Args:
        in_channels: Channels C_in of an input.
        out_channels: Channels C_out of the output.
        kernel_size: (k_y, k_x), or one number for both.
        rank: Terms R of the whole kernel: more than in :class:`OneWayConv2d`, where each output channel has its own.
        stride: As in ``nn.Conv2d``.
        padding: As in ``nn.Conv2d``.
        dilation: As in ``nn.Conv2d``.
        bias: Whether there is a bias.
        padding_mode: As in ``nn.Conv2d``.
        device: Where to put the parameters.
        dtype: Their type.

    Shape:
        x (batch, C_in, height, width), or without batch → as ``nn.Conv2d`` gives.

    Raises:
        ValueError: A size or ``rank`` < 1, a 1×1 kernel, or ``x`` does not have that shape.
        TypeError: A size is not an integer.

    Cost: R (C_in + k_y + k_x + C_out) weights, and as many multiply–accumulates for each output with stride 1.

    Source: Lebedev et al., https://arxiv.org/abs/1412.6553; here the factors are trained from the start.
    """


class CPConvTranspose2d(_Transposed, _CP):
    """A transposed convolution in canonical polyadic (CP) format, as :class:`CPConv2d`.

    Args:
        in_channels: Channels C_in of an input.
        out_channels: Channels C_out of the output.
        kernel_size: (k_y, k_x), or one number for both.
        rank: Terms R of the whole kernel.
        stride: As in ``nn.ConvTranspose2d``.
        padding: As in ``nn.ConvTranspose2d``.
        output_padding: As in ``nn.ConvTranspose2d``; there is no ``output_size`` in the call.
        dilation: As in ``nn.ConvTranspose2d``.
        bias: Whether there is a bias.
        device: Where to put the parameters.
        dtype: Their type.

    Shape:
        x (batch, C_in, height, width), or without batch → as ``nn.ConvTranspose2d`` gives.

    Raises:
        ValueError: As :class:`CPConv2d`, or ``output_padding`` is not less than stride or dilation.
        TypeError: A size is not an integer.

    Cost: the weights of :class:`CPConv2d`.

    Source: as :class:`CPConv2d`.
    """


class _Tucker2(FactorizedConv):
    """A dense kernel between bases of the input and the output channels."""

    rank: Pair

    def __init__(
        self, channels: Pair, rank: int | Pair, geometry: Geometry, bias: bool, device: Any, dtype: Any
    ) -> None:
        ranks = pair("rank", rank, at_least=1)
        for name, one, size in zip(("in_channels", "out_channels"), ranks, channels, strict=True):
            if one > size:
                raise ValueError(f"rank must not exceed {name} = {size}, got {rank!r}")
        super().__init__(*channels, ranks, geometry)
        self._build(bias, device, dtype)

    def _chain(self, bias: bool, factory: dict[str, Any]) -> list[tuple[str, nn.Module]]:
        return [
            ("channel", pointwise((self.in_channels, self.rank[0]), **factory)),
            ("core", self.geometry.convolution(self.rank, **factory)),
            ("output", pointwise((self.rank[1], self.out_channels), bias=bias, **factory)),
        ]

    @property
    def _products(self) -> int:
        return self.rank[0] * self.rank[1]

    def _filters(self) -> list[Tensor]:
        """Return a (q, c), the core g (p, q, y, x), and d (o, p)."""
        a, g, d = (factor.weight for factor in self.factors)
        return [a.flatten(1), g.transpose(0, 1) if self.transposed else g, d.flatten(1)]

    def _kernel(self) -> Tensor:
        return torch.einsum("qc,pqyx,op->ocyx", *self._filters())

    def _fit(self, kernel: Tensor, iterations: int) -> None:
        out, core, inner = tucker_factors(kernel, (self.rank[1], self.rank[0]), iterations)
        for filters, factor in zip(self._filters(), (inner.mT, core, out), strict=True):
            filters.copy_(factor)


class Tucker2Conv2d(_Plain, _Tucker2):
    """A convolution in Tucker-2 format: a smaller dense one between two 1×1 convolutions.

    K[o, c, y, x] = Σ_pq d[o, p] g[p, q, y, x] a[q, c].

    Args:
        in_channels: Channels C_in of an input.
        out_channels: Channels C_out of the output.
        kernel_size: (k_y, k_x), or one number for both.
        rank: (R_in, R_out), the channels before and after the smaller convolution, or one number for both.
        stride: As in ``nn.Conv2d``.
        padding: As in ``nn.Conv2d``.
        dilation: As in ``nn.Conv2d``.
        bias: Whether there is a bias.
        padding_mode: As in ``nn.Conv2d``.
        device: Where to put the parameters.
        dtype: Their type.

    Shape:
        x (batch, C_in, height, width), or without batch → as ``nn.Conv2d`` gives.

    Raises:
        ValueError: A size < 1, a 1×1 kernel, a rank < 1 or above its number of channels, or ``x`` does not have that
            shape.
        TypeError: A size is not an integer.

    Cost: R_in C_in + R_in R_out k_y k_x + R_out C_out weights; with stride 1 as many multiply–accumulates for each
    output.

    Source: Kim et al., https://arxiv.org/abs/1511.06530; here the factors are trained from the start.
    """


class Tucker2ConvTranspose2d(_Transposed, _Tucker2):
    """A transposed convolution in Tucker-2 format, as :class:`Tucker2Conv2d`.

    Args:
        in_channels: Channels C_in of an input.
        out_channels: Channels C_out of the output.
        kernel_size: (k_y, k_x), or one number for both.
        rank: (R_in, R_out), or one number for both.
        stride: As in ``nn.ConvTranspose2d``.
        padding: As in ``nn.ConvTranspose2d``.
        output_padding: As in ``nn.ConvTranspose2d``; there is no ``output_size`` in the call.
        dilation: As in ``nn.ConvTranspose2d``.
        bias: Whether there is a bias.
        device: Where to put the parameters.
        dtype: Their type.

    Shape:
        x (batch, C_in, height, width), or without batch → as ``nn.ConvTranspose2d`` gives.

    Raises:
        ValueError: As :class:`Tucker2Conv2d`, or ``output_padding`` is not less than stride or dilation.
        TypeError: A size is not an integer.

    Cost: the weights of :class:`Tucker2Conv2d`.

    Source: as :class:`Tucker2Conv2d`.
    """
