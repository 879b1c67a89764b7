"""What factorised convolutions share: their geometry, their chain of torch's own convolutions, their initialisation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

from provenn.core.experiment.checks import check_choice, check_integer
from provenn.core.experiment.recording import evaluating

Pair = tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def pair(name: str, value: Any, at_least: int) -> Pair:
    """Return an integer twice, or a pair of integers as it is.

    Raises:
        ValueError: An entry is too small, or there are not two.
        TypeError: An entry is not an integer.
    """
    both = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(both) != 2:
        raise ValueError(f"{name} must be an integer or two, got {value!r}")
    for one in both:
        check_integer(name, one, at_least=at_least)
    return int(both[0]), int(both[1])


@dataclass(frozen=True)
class Geometry:
    """Where a kernel reads and writes, along height and width; of a transposed convolution if it has output padding."""

    kernel_size: Pair
    stride: Pair
    padding: Pair | str
    dilation: Pair
    padding_mode: str = "zeros"
    output_padding: Pair | None = None

    @property
    def transposed(self) -> bool:
        """Whether the convolution is a transposed one."""
        return self.output_padding is not None

    def convolution(
        self, channels: Pair, along: str = "yx", groups: int = 1, bias: bool = False, **factory: Any
    ) -> nn.Conv2d | nn.ConvTranspose2d:
        """Return torch's convolution that does this one's work along some axes, and nothing along the others.

        Args:
            channels: Of its inputs and outputs.
            along: ``"y"``, ``"x"`` or both.
            groups: As in ``nn.Conv2d``.
            bias: As in ``nn.Conv2d``.
            **factory: Device and type. The weights are not set.
        """

        def only(values: Any, else_: int) -> Any:
            if isinstance(values, str):
                return values
            return tuple(value if axis in along else else_ for axis, value in zip("yx", values, strict=True))

        common = {
            "kernel_size": only(self.kernel_size, 1),
            "stride": only(self.stride, 1),
            "padding": only(self.padding, 0),
            "dilation": only(self.dilation, 1),
            "groups": groups,
            "bias": bias,
            **factory,
        }
        if self.transposed:
            return skip_init(nn.ConvTranspose2d, *channels, output_padding=only(self.output_padding, 0), **common)
        return skip_init(nn.Conv2d, *channels, padding_mode=self.padding_mode, **common)


def pointwise(channels: Pair, bias: bool = False, **factory: Any) -> nn.Conv2d:
    """Return a 1×1 convolution whose weights are not set.

    Args:
        channels: Of its inputs and outputs.
        bias: As in ``nn.Conv2d``.
        **factory: Device and type.
    """
    return skip_init(nn.Conv2d, *channels, 1, bias=bias, **factory)


class FactorizedConv(nn.Module, ABC):
    """A convolution whose kernel is a product of smaller ones: a chain of torch's convolutions, nothing between them.

    Attributes:
        factors: The chain. Its weights are the factors of the kernel; the last one has the bias.

    Args:
        in_channels: Channels C_in of an input.
        out_channels: Channels C_out of the output.
        rank: Terms or widths of the factorisation.
        geometry: Kernel size, stride and so on.
    """

    transposed: ClassVar[bool] = False

    def __init__(self, in_channels: int, out_channels: int, rank: int | Pair, geometry: Geometry) -> None:
        super().__init__()
        check_integer("in_channels", in_channels, at_least=1)
        check_integer("out_channels", out_channels, at_least=1)
        if geometry.kernel_size == (1, 1):
            raise ValueError("kernel_size must be larger than 1×1, got 1: nothing to factorise, use nn.Conv2d")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.rank, self.geometry = rank, geometry

    def _build(self, bias: bool, device: Any, dtype: Any) -> None:
        # skip_init, unlike the layers, does not know of a default device
        factory = {"device": torch.get_default_device() if device is None else device, "dtype": dtype}
        self.factors = nn.Sequential(OrderedDict(self._chain(bias, factory)))
        self.reset_parameters()

    @abstractmethod
    def _chain(self, bias: bool, factory: dict[str, Any]) -> list[tuple[str, nn.Module]]:
        """Return the named convolutions; the last one has the bias. Their weights need not be set."""

    @property
    @abstractmethod
    def _products(self) -> int:
        """How many products of one weight of each factor an entry of the kernel is the sum of."""

    @abstractmethod
    def _kernel(self) -> Tensor:
        """Return K, (C_out, C_in, k_y, k_x)."""

    @abstractmethod
    def _fit(self, kernel: Tensor, iterations: int) -> None:
        """Set the factors so that K is about a kernel (C_out, C_in, k_y, k_x)."""

    @property
    def bias(self) -> Tensor | None:
        """The bias (C_out), or ``None``."""
        bias: Tensor | None = self.factors[-1].bias  # type: ignore[assignment]
        return bias

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the factors uniformly, all with one variance, so that the kernel has that of He's initialisation.

        Var(K) = 2/(C_in k_y k_x), times the strides in a transposed convolution, where that many fewer entries of the
        kernel meet in an output. The bias is 0.

        Args:
            generator: What draws; ``None``: torch's default one.
        """
        height, width = self.geometry.kernel_size
        variance = 2 / (self.in_channels * height * width)
        if self.transposed:
            variance *= math.prod(self.geometry.stride)
        weights = [factor.weight for factor in self.factors]
        # the variance of a product is the product of the variances; a uniform draw from [-b, b] has b²/3
        bound = math.sqrt(3) * (variance / self._products) ** (0.5 / len(weights))
        for weight in weights:
            weight.uniform_(-bound, bound, generator=generator)
        if self.bias is not None:
            self.bias.zero_()

    def to_dense(self) -> Float[Tensor, "first second height width"]:
        """Return the kernel K as ``nn.Conv2d`` or ``nn.ConvTranspose2d`` would hold it.

        Shape:
            (C_out, C_in, k_y, k_x), of a transposed convolution (C_in, C_out, k_y, k_x). Gradients flow to the factors.
        """
        kernel = self._kernel()
        return kernel.transpose(0, 1) if self.transposed else kernel

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d | nn.ConvTranspose2d, rank: int | Pair = 1, iterations: int = 50, **options: Any
    ) -> Self:
        """Return the layer whose kernel comes close to that of a dense convolution, by alternating least squares.

        Args:
            conv: The convolution; left as it is.
            rank: As in the constructor.
            iterations: Sweeps of the fit.
            **options: Further options of the constructor.

        Raises:
            TypeError: ``conv`` is not the kind of convolution that this layer stands for, or its weights are complex.
            ValueError: Its ``groups`` are not 1, its kernel is 1×1 or not finite, or ``rank`` or ``iterations`` < 1.

        Cost: that of the fit, which for each term and sweep solves a few least-squares problems of the kernel's size.
        """
        check_integer("iterations", iterations, at_least=1)
        cls._check_dense(conv)
        with evaluating(conv):  # in training mode some parametrizations change when they are read
            layer = cls.like(conv, rank, **options)
            kernel = conv.weight.detach()
        if not kernel.is_floating_point():
            raise TypeError(f"conv must have real weights, got {kernel.dtype}")
        if not kernel.isfinite().all():
            raise ValueError("conv must have finite weights, got NaN or infinite ones")
        with torch.no_grad():
            layer._fit(kernel.transpose(0, 1) if cls.transposed else kernel, iterations)
            if layer.bias is not None:
                assert conv.bias is not None  # ``like`` has copied the wish for one
                layer.bias.copy_(conv.bias)
        return layer.train(conv.training)

    @classmethod
    def like(cls, conv: nn.Conv2d | nn.ConvTranspose2d, rank: int | Pair = 1, **options: Any) -> Self:
        """Return the layer with the sizes, geometry, device and type of a dense convolution; its weights are not set.

        Args:
            conv: The convolution.
            rank: As in the constructor.
            **options: Further options of the constructor.

        Raises:
            TypeError: ``conv`` is not the kind of convolution that this layer stands for.
            ValueError: Its ``groups`` are not 1, its kernel is 1×1, or ``rank`` < 1.
        """
        cls._check_dense(conv)
        if isinstance(conv, nn.ConvTranspose2d):
            options["output_padding"] = conv.output_padding
        else:
            options["padding_mode"] = conv.padding_mode
        layer: Self = skip_init(
            cls,
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            rank,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            bias=conv.bias is not None,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **options,
        )
        return layer

    @classmethod
    def _check_dense(cls, conv: Any) -> None:
        wanted = nn.ConvTranspose2d if cls.transposed else nn.Conv2d
        if not isinstance(conv, wanted):
            raise TypeError(f"conv must be an nn.{wanted.__name__}, got {type(conv).__name__}")
        if conv.groups != 1:
            raise ValueError(f"conv must have groups = 1, got {conv.groups}: grouped kernels are not supported")

    def forward(self, x: Float[Tensor, "*batch channels height width"]) -> Float[Tensor, "*batch out rows columns"]:
        """Convolve the input with K.

        Args:
            x: The inputs.

        Returns:
            The outputs, as ``nn.Conv2d`` or ``nn.ConvTranspose2d`` with the kernel :meth:`to_dense` gives them.
        """
        if x.ndim not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"x must be (batch, {self.in_channels}, height, width) or without batch, got shape {tuple(x.shape)}"
            )
        return self._apply_factors(x)

    def _apply_factors(self, x: Tensor) -> Tensor:
        y: Tensor = self.factors(x)
        return y

    def extra_repr(self) -> str:
        """Return what distinguishes this layer when it is printed."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.geometry.kernel_size}, rank={self.rank}"


def forward_geometry(kernel_size: Any, stride: Any, padding: Any, dilation: Any, padding_mode: str) -> Geometry:
    """Check the arguments of a convolution and return its geometry."""
    check_choice("padding_mode", padding_mode, PADDING_MODES)
    if isinstance(padding, str):
        check_choice("padding", padding, ("same", "valid"))
        if padding == "same" and pair("stride", stride, 1) != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got stride {stride!r}")
    else:
        padding = pair("padding", padding, 0)
    return Geometry(
        pair("kernel_size", kernel_size, 1), pair("stride", stride, 1), padding, pair("dilation", dilation, 1),
        padding_mode,
    )  # fmt: skip


def transposed_geometry(kernel_size: Any, stride: Any, padding: Any, output_padding: Any, dilation: Any) -> Geometry:
    """Check the arguments of a transposed convolution and return its geometry."""
    strides, dilations = pair("stride", stride, 1), pair("dilation", dilation, 1)
    added = pair("output_padding", output_padding, 0)
    if any(one >= max(both) for one, *both in zip(added, strides, dilations, strict=True)):
        raise ValueError(f"output_padding must be less than stride or dilation, got {output_padding!r}")
    return Geometry(
        pair("kernel_size", kernel_size, 1), strides, pair("padding", padding, 0), dilations, output_padding=added
    )
