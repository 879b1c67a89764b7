"""Convolutions in one-way format: each output channel has filters of its own."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from provenn.core.compression.low_rank import canonical_factors
from provenn.core.experiment.checks import check_choice, check_integer
from provenn.nn._a_priori_compressed_conv_base import (
    FactorizedConv,
    Geometry,
    PaddingMode,
    Pair,
    forward_geometry,
    pointwise,
    transposed_geometry,
)

Mode = Literal["channel", "spatial"]
MODES = ("channel", "spatial")


class _OneWay(FactorizedConv):
    """Sums over r of products of one-way filters, of their own for each output channel."""

    rank: int

    def __init__(
        self, channels: Pair, rank: int, geometry: Geometry, mode: Mode, bias: bool, device: Any, dtype: Any
    ) -> None:
        check_integer("rank", rank, at_least=1)
        check_choice("mode", mode, MODES)
        super().__init__(*channels, rank, geometry)
        self.mode = mode
        self._build(bias, device, dtype)

    def _chain(self, bias: bool, factory: dict[str, Any]) -> list[tuple[str, nn.Module]]:
        ins, outs, along = self.in_channels, self.out_channels, self.geometry.convolution
        terms = outs * self.rank
        if self.mode == "channel":
            # the last one adds up the terms of each output channel
            return [
                ("channel", pointwise((ins, terms), **factory)),
                ("vertical", along((terms, terms), "y", groups=terms, **factory)),
                ("horizontal", along((terms, outs), "x", groups=outs, bias=bias, **factory)),
            ]
        return [
            ("vertical", along((ins, ins * terms), "y", groups=ins, **factory)),
            ("horizontal", along((ins * terms, outs), "x", groups=outs, bias=bias, **factory)),
        ]

    @property
    def _products(self) -> int:
        return self.rank

    def _filters(self) -> list[Tensor]:
        """Return the factors by output channel: a (o, r, c), u (o, r, y), v (o, r, x); spatially u, v (o, c, r, ·)."""
        ins, outs, rank = self.in_channels, self.out_channels, self.rank
        weights = [factor.weight for factor in self.factors]
        if self.mode == "channel":
            return [weight.reshape(outs, rank, -1) for weight in weights]
        u = weights[0].reshape(ins, outs, rank, -1).transpose(0, 1)
        v = weights[1].reshape(outs, rank, ins, -1).transpose(1, 2)
        return [u, v]

    def _kernel(self) -> Tensor:
        if self.mode == "channel":
            return torch.einsum("orc,ory,orx->ocyx", *self._filters())
        return torch.einsum("ocry,ocrx->ocyx", *self._filters())

    def _fit(self, kernel: Tensor, iterations: int) -> None:
        if self.mode == "channel":
            found = canonical_factors(kernel, self.rank, iterations)
        else:
            pairs = canonical_factors(kernel.flatten(0, 1), self.rank, iterations)
            found = [factor.unflatten(0, kernel.shape[:2]) for factor in pairs]
        for filters, factor in zip(self._filters(), found, strict=True):
            filters.copy_(factor.mT)

    def _apply_factors(self, x: Tensor) -> Tensor:
        if self.mode == "channel":
            return super()._apply_factors(x)
        # channels come out ordered by input channel, and are added up by output channel
        terms = self.out_channels * self.rank
        y: Tensor = self.factors.vertical(x)
        y = y.unflatten(-3, (self.in_channels, terms)).transpose(-4, -3).flatten(-4, -3)
        out: Tensor = self.factors.horizontal(y)
        return out

    def extra_repr(self) -> str:
        """Return what distinguishes this layer when it is printed."""
        return f"{super().extra_repr()}, mode={self.mode!r}"


class OneWayConv2d(_OneWay):
    """A convolution whose kernel is made of one-way filters, R for each output channel, before any training.

    K[o, c, y, x] = Σ_r a[o, r, c] u[o, r, y] v[o, r, x], and R = 1 is the paper's form. The kernel is never assembled:
    a 1×1 convolution contracts the channels, a depthwise k_y×1 and a grouped 1×k_x one follow, and nothing stands
    between them, so that the layer is a convolution of restricted rank. ``mode="spatial"`` splits only the spatial part
    of the kernel, for each pair of channels: K[o, c, y, x] = Σ_r u[o, c, r, y] v[o, c, r, x].

    Any kernel can be written with R ≥ min(C_in k_y, C_in k_x, k_y k_x) (spatially R ≥ min(k_y, k_x)).

    Args:
        in_channels: Channels C_in of an input.
        out_channels: Channels C_out of the output.
        kernel_size: (k_y, k_x), or one number for both.
        rank: Terms R.
        stride: As in ``nn.Conv2d``.
        padding: As in ``nn.Conv2d``.
        dilation: As in ``nn.Conv2d``.
        bias: Whether there is a bias.
        padding_mode: As in ``nn.Conv2d``.
        mode: What is split: ``"channel"``: channels, height and width; ``"spatial"``: height and width.
        device: Where to put the parameters.
        dtype: Their type.

    Shape:
        x (batch, C_in, height, width), or without batch → as ``nn.Conv2d`` gives.

    Raises:
        ValueError: A size or ``rank`` < 1, a 1×1 kernel, an unknown mode, or ``x`` does not have that shape.
        TypeError: A size is not an integer.

    Cost: C_out R (C_in + k_y + k_x) weights (spatially C_out C_in R (k_y + k_x)) for C_out C_in k_y k_x, and as many
    multiply–accumulates for each output with stride 1. With the stride along x the rows keep their length until the
    last step, so that with strides > 1 the work shrinks less. The outputs of the steps, C_out R channels twice
    (spatially C_out C_in R once), are kept for the backward pass. On a CPU three small convolutions can take longer
    than a dense one.

    Source: https://arxiv.org/abs/2304.04964, which replaces 3-way and 2-way kernels by one-way filters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        rank: int = 1,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        mode: Mode = "channel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = forward_geometry(kernel_size, stride, padding, dilation, padding_mode)
        super().__init__((in_channels, out_channels), rank, geometry, mode, bias, device, dtype)


class OneWayConvTranspose2d(_OneWay):
    """A transposed convolution whose kernel is made of one-way filters, as that of :class:`OneWayConv2d`.

    Args:
        in_channels: Channels C_in of an input.
        out_channels: Channels C_out of the output.
        kernel_size: (k_y, k_x), or one number for both.
        rank: Terms R.
        stride: As in ``nn.ConvTranspose2d``.
        padding: As in ``nn.ConvTranspose2d``.
        output_padding: As in ``nn.ConvTranspose2d``; there is no ``output_size`` in the call.
        dilation: As in ``nn.ConvTranspose2d``.
        bias: Whether there is a bias.
        mode: As in :class:`OneWayConv2d`.
        device: Where to put the parameters.
        dtype: Their type.

    Shape:
        x (batch, C_in, height, width), or without batch → as ``nn.ConvTranspose2d`` gives.

    Raises:
        ValueError: As :class:`OneWayConv2d`, or ``output_padding`` is not less than stride or dilation.
        TypeError: A size is not an integer.

    Cost: the weights of :class:`OneWayConv2d`. Channels are contracted at the size of the input, rows are widened last.

    Source: https://arxiv.org/abs/2304.04964.
    """

    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        rank: int = 1,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        output_padding: int | Pair = 0,
        dilation: int | Pair = 1,
        bias: bool = True,
        mode: Mode = "channel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = transposed_geometry(kernel_size, stride, padding, output_padding, dilation)
        super().__init__((in_channels, out_channels), rank, geometry, mode, bias, device, dtype)
