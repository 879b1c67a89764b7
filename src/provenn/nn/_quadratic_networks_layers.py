"""Quadratic layers, and the initialisation that makes them linear ones."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize, skip_init

from provenn.core.experiment.checks import check_choice, check_integer
from provenn.core.numerics.precision import full_precision

Base = Literal["kaiming", "default", "keep"]
BASES = ("kaiming", "default", "keep")


class QuadraticLayer(nn.Module, ABC):
    """Three maps of one shape, r, g and b: (r(x) + b_r)(g(x) + b_g) + b(x ⊙ x) + c.

    ``g.bias`` holds b_g − 1. Whatever pulls parameters to 0 (weight decay, shrinking) so pulls the layer to the linear
    one, and a b_g that has hardly moved from 1 keeps its digits.

    The product of the maps r and g with x is not fused: a product with the stacked weights sums in another order, so
    that a converted layer would not equal the linear one bit by bit.

    Args:
        r: The linear map. It is taken over as it is, with its hooks and parametrizations.
        compact: Whether to leave out g: r(x) + b_r + b(x ⊙ x) + c.
    """

    r: nn.Linear | nn.Conv2d

    def __init__(self, r: nn.Linear | nn.Conv2d, compact: bool) -> None:
        super().__init__()
        if not isinstance(compact, bool):
            raise TypeError(f"compact must be True or False, got {compact!r}")
        self.r = r
        self.register_module("g", None if compact else _like(r, bias=True))
        self.b = _like(r, bias=r.bias is not None)
        self._make_linear()

    @classmethod
    def around(cls, r: Any, compact: bool) -> Self:
        """Build the layer that equals a linear map, out of that map; frozen if it is frozen, and in its mode.

        Args:
            r: The map.
            compact: Whether to leave out g.
        """
        layer = cls.__new__(cls)
        QuadraticLayer.__init__(layer, r, compact)
        trained = any(parameter.requires_grad for parameter in r.parameters())
        for part in (layer.g, layer.b):
            if part is not None:
                part.requires_grad_(trained)
        return layer.train(r.training)

    @property
    def compact(self) -> bool:
        """Whether the layer has no map g."""
        return self.g is None

    def reset_parameters(self) -> None:
        """Draw r anew and set g and b to nothing, as :func:`relinear_init_` does."""
        relinear_init_(self)

    @torch.no_grad()
    def _make_linear(self) -> None:
        for part in (self.g, self.b):
            if part is not None:
                for parameter in part.parameters():
                    parameter.zero_()

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*out"]:
        """Return q(x).

        Args:
            x: The inputs, as the linear layer takes them.

        Returns:
            The outputs, shaped as the linear layer's; in the parameters' type.
        """
        self._check(x)
        r = self.r(x)
        kept = self.b.weight.dtype
        wide = torch.promote_types(kept, torch.float32)
        # In float16 squares overflow from 256 on: squares, products and their sum are formed in float32.
        with full_precision(x.device):
            power = self._power(x, wide)
        if self.g is None:
            return (r + power).to(kept)
        gate = self._map(self.g, x, self.g.weight, self.g.bias + 1)
        q = r.to(wide) * gate.to(wide)
        return q.add_(power).to(kept)  # not addcmul, whose gradient multiplies once more

    def _power(self, x: Tensor, wide: torch.dtype) -> Tensor:
        bias = None if self.b.bias is None else self.b.bias.to(wide)
        return self._map(self.b, x.to(wide).square(), self.b.weight.to(wide), bias)

    def _check(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"x must be floating-point, got {x.dtype}")

    @abstractmethod
    def _map(self, part: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what a map of this kind makes of x, with a weight and a bias in place of its own."""


class QuadraticLinear(QuadraticLayer):
    """A layer of quadratic neurons in the place of ``nn.Linear``.

    q(x) = (W_r x + b_r) ⊙ (W_g x + b_g) + W_b (x ⊙ x) + c, or compactly W_r x + b_r + W_b (x ⊙ x) + c. It starts as a
    linear layer, by :func:`relinear_init_`. The maps are the attributes ``r``, ``g`` (its bias holds b_g − 1) and
    ``b`` (its bias is c); all biases can be set freely.

    Args:
        in_features: Features n of an input.
        out_features: Neurons m.
        compact: Whether to leave out g and with it the products of different features.
        bias: Whether there are b_r and c; b_g is always there.
        device: Where to put the parameters.
        dtype: Their type. In float16 and bfloat16 the squares are mapped, and all is added, in float32.

    Shape:
        x (..., n) → (..., m).

    Raises:
        TypeError: ``x`` is not floating-point.
        ValueError: A size < 1, or ``x`` does not have n features.

    Cost: three products with m × n matrices (compactly two), where ``nn.Linear`` has one; 3m(n + 1) parameters
    (compactly 2m(n + 1)). Under autocast the one with the squares runs in float32, and so is the output.

    Source: equation 1 of https://arxiv.org/abs/2110.06081; the compact form as in the authors' code.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        compact: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_integer("in_features", in_features, at_least=1)
        check_integer("out_features", out_features, at_least=1)
        super().__init__(nn.Linear(in_features, out_features, bias, device, dtype), compact)
        self.reset_parameters()

    @property
    def in_features(self) -> int:
        """Features of an input."""
        return int(self.b.in_features)

    @property
    def out_features(self) -> int:
        """Neurons."""
        return int(self.b.out_features)

    def _check(self, x: Tensor) -> None:
        super()._check(x)
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} features, got shape {tuple(x.shape)}")

    def _map(self, part: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, weight, bias)

    def extra_repr(self) -> str:
        """Return what distinguishes this layer when it is printed."""
        return f"{self.in_features}, {self.out_features}, compact={self.compact}"


class QuadraticConv2d(QuadraticLayer):
    """A convolution by quadratic neurons in the place of ``nn.Conv2d``.

    q(x) = conv_r(x) ⊙ conv_g(x) + conv_b(x ⊙ x), compactly conv_r(x) + conv_b(x ⊙ x); all three with the same stride,
    padding and dilation. Otherwise as :class:`QuadraticLinear`.

    Args:
        in_channels: Channels of an input.
        out_channels: Channels of the output.
        kernel_size: As in ``nn.Conv2d``.
        stride: As in ``nn.Conv2d``.
        padding: As in ``nn.Conv2d``.
        dilation: As in ``nn.Conv2d``.
        compact: Whether to leave out g.
        bias: Whether there are b_r and c; b_g is always there.
        padding_mode: As in ``nn.Conv2d``.
        device: Where to put the parameters.
        dtype: Their type.

    Shape:
        x (batch, in_channels, height, width), or without batch → as ``nn.Conv2d`` gives.

    Raises:
        TypeError: ``x`` is not floating-point.
        ValueError: A size < 1, or ``x`` does not have that shape.

    Cost: three convolutions (compactly two) where ``nn.Conv2d`` has one.

    Source: section V of https://arxiv.org/abs/2110.06081, as in the authors' ``qresnet`` and ``qresnet_smaller``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        compact: bool = False,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_integer("in_channels", in_channels, at_least=1)
        check_integer("out_channels", out_channels, at_least=1)
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, 1, bias, padding_mode, device, dtype
        )
        super().__init__(conv, compact)
        self.reset_parameters()

    @property
    def in_channels(self) -> int:
        """Channels of an input."""
        return int(self.b.in_channels)

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return int(self.b.out_channels)

    def _check(self, x: Tensor) -> None:
        super()._check(x)
        if x.ndim not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"x must be (batch, {self.in_channels}, height, width) or without batch, got shape {tuple(x.shape)}"
            )

    def _map(self, part: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = part._conv_forward(x, weight, bias)  # knows the padding modes, and takes a weight of another type
        return y

    def extra_repr(self) -> str:
        """Return what distinguishes this layer when it is printed."""
        return f"{self.in_channels}, {self.out_channels}, compact={self.compact}"


def quadratic_layers(model: nn.Module, name: str) -> list[QuadraticLayer]:
    """Return a model's quadratic layers, itself included, each once.

    Args:
        model: The model.
        name: The argument's name, for the errors.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: It has none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")
    found = [layer for layer in model.modules() if isinstance(layer, QuadraticLayer)]
    if not found:
        raise ValueError(f"{name} must have at least one quadratic layer, got {type(model).__name__} without")
    return found


@torch.no_grad()
def relinear_init_(module: nn.Module, base: Base = "kaiming", *, generator: torch.Generator | None = None) -> nn.Module:
    """Initialise quadratic layers as linear ones: W_g = 0, b_g = 1, W_b = 0, c = 0.

    Args:
        module: A quadratic layer, or a model; all its quadratic layers are initialised in place, and nothing else.
        base: How to draw W_r and b_r. ``"kaiming"``: W_r ~ N(0, 2/fan_in), b_r ~ U(−1/√fan_in, 1/√fan_in), as in the
            authors' code. ``"default"``: as ``nn.Linear`` and ``nn.Conv2d`` do, W_r ~ U(−1/√fan_in, 1/√fan_in) too.
            ``"keep"``: leave them as they are.
        generator: Draws them; ``None`` for torch's global one.

    Returns:
        The module.

    Raises:
        TypeError: ``module`` is not a module, or r is parametrized and ``base`` is not ``"keep"``.
        ValueError: It has no quadratic layer, or an unknown ``base``.

    Cost: one pass over the parameters.

    Source: section IV of https://arxiv.org/abs/2110.06081, ReLinear's first step.
    """
    check_choice("base", base, BASES)
    for layer in quadratic_layers(module, "module"):
        layer._make_linear()
        if base == "keep":
            continue
        if parametrize.is_parametrized(layer.r):
            raise TypeError("module must not have parametrized weights unless base is 'keep', which leaves them")
        weight = layer.r.weight
        if base == "kaiming":
            nn.init.kaiming_normal_(weight, generator=generator)
        else:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        if layer.r.bias is not None:
            bound = 1 / math.sqrt(weight[0].numel())
            nn.init.uniform_(layer.r.bias, -bound, bound, generator=generator)
    return module


def _like(r: nn.Linear | nn.Conv2d, bias: bool) -> nn.Linear | nn.Conv2d:
    """Build a map of the same shape, without drawing its weights."""
    place: dict[str, Any] = {"bias": bias, "device": r.weight.device, "dtype": r.weight.dtype}
    if isinstance(r, nn.Linear):
        linear: nn.Linear = skip_init(nn.Linear, r.in_features, r.out_features, **place)
        return linear
    shape = {"kernel_size": r.kernel_size, "stride": r.stride, "padding": r.padding, "dilation": r.dilation}
    conv: nn.Conv2d = skip_init(nn.Conv2d, r.in_channels, r.out_channels, **shape, padding_mode=r.padding_mode, **place)
    return conv
