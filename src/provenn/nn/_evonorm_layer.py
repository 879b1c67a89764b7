"""The EvoNorm layers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number

KINDS = ("B0", "B1", "B2", "S0", "S1", "S2")


def wide(x: Tensor) -> Tensor:
    """Return a tensor in float32 or wider: statistics of half precision lose their digits in the sum of squares."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_images(x: Tensor, channels: int) -> None:
    """Refuse what is not a batch of feature maps with that many channels."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x must have shape (batch, {channels}, height, width), got {tuple(x.shape)}")


def groups_of(num_features: int, groups: int, group_size: int | None) -> int:
    """Return the number of groups of channels, which must divide the channels."""
    if group_size is not None:
        check_integer("group_size", group_size, at_least=1)
        if num_features % group_size:
            raise ValueError(f"group_size must divide num_features = {num_features}, got {group_size}")
        return num_features // group_size
    check_integer("groups", groups, at_least=1)
    if num_features % groups:
        raise ValueError(f"groups must divide num_features = {num_features}, got {groups}")
    return groups


class EvoNorm2d(nn.Module):
    r"""A layer that normalises and activates at once: no activation belongs behind it.

    With the biased variance s² and the mean square μ(x²) over the axes named, each under a root with ε added::

        B0  x / max(√s²_{b,w,h}, v₁ x + √s²_{w,h})         S0  x σ(v₁ x) / √s²_{w,h,c/g}
        B1  x / max(√s²_{b,w,h}, (x + 1) √μ_{w,h}(x²))     S1  x σ(x) / √s²_{w,h,c/g}
        B2  x / max(√s²_{b,w,h}, √μ_{w,h}(x²) − x)         S2  x σ(x) / √μ_{w,h,c/g}(x²)

    each times γ plus β. In training the B kinds keep a running variance, which in eval mode stands for the batch's;
    the statistics of a sample are always its own. Nothing is centred, so there is no running mean. Statistics, and
    divisors of the B kinds, are taken in float32 or wider, also under autocast; the output has the input's type.

    Args:
        num_features: C, the channels.
        kind: Which of the six layers.
        groups: g, the groups of channels of the S kinds.
        group_size: C/g, in place of ``groups``.
        eps: ε; 1e-3 for the variants that are called B0a, S0a, … elsewhere.
        momentum: The weight of the newest batch in the running variance.
        apply_act: Whether to normalise and activate; ``False`` leaves γ x + β, for the end of a residual branch.
        zero_init: Whether γ starts at 0, so that a residual branch starts as nothing.
        device: Where the parameters are made.
        dtype: Their type.

    Attributes:
        weight: γ, starts at 1.
        bias: β, starts at 0.
        v: v₁ of B0 and S0, starts at 1; ``None`` for the others.
        running_var: Running variance of the B kinds, with the factor n / (n − 1); starts at 1, ``None`` for others.

    Shape:
        Input and output (batch, num_features, height, width).

    Raises:
        ValueError: A number out of range, an unknown kind, groups that do not divide the channels, an input of another
            shape, or one whose variance is 0 by its shape: for B kinds in training one sample of 1 × 1 pixel, for S0
            and S1 groups of one channel of 1 × 1 pixel.
        TypeError: A number of the wrong type.

    Cost: O(input) time; three to five tensors of the input's size are kept for the backward pass, BatchNorm + ReLU
    keep one or two.

    Source: Liu et al., "Evolving Normalization-Activation Layers", arXiv 2004.02967: the tables of B and of S layers.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    v: nn.Parameter | None
    running_var: Tensor | None

    def __init__(
        self,
        num_features: int,
        kind: str = "B0",
        groups: int = 32,
        group_size: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        apply_act: bool = True,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("num_features", num_features, at_least=1)
        check_choice("kind", kind, KINDS)
        check_number("eps", eps, at_least=0)
        check_number("momentum", momentum, at_least=0, at_most=1)
        self.num_features, self.kind, self.eps, self.momentum = num_features, kind, eps, momentum
        self.apply_act, self.zero_init = apply_act, zero_init
        self.groups = groups_of(num_features, groups, group_size) if kind[0] == "S" and apply_act else None
        place = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_features, **place))
        self.bias = nn.Parameter(torch.empty(num_features, **place))
        gated = apply_act and kind in ("B0", "S0")
        self.register_parameter("v", nn.Parameter(torch.empty(num_features, **place)) if gated else None)
        batched = apply_act and kind[0] == "B"
        self.register_buffer("running_var", torch.empty(num_features, **place) if batched else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set γ, β, v₁ and the running variance to where they start."""
        nn.init.constant_(self.weight, 0.0 if self.zero_init else 1.0)
        nn.init.zeros_(self.bias)
        for one in (self.v, self.running_var):
            if one is not None:
                nn.init.ones_(one)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Normalise and activate.

        Args:
            x: Feature maps.

        Returns:
            Feature maps of the same shape and type.
        """
        check_images(x, self.num_features)
        if self.apply_act and x.shape[0] > 0:
            x = self._batched(x) if self.kind[0] == "B" else self._grouped(x)
        return x * _per_channel(self.weight, x) + _per_channel(self.bias, x)

    def _batched(self, x: Tensor) -> Tensor:
        precise = wide(x)  # for the whole divisor: products overflow in half precision, and rms − x cancels
        shared = (self._variance(precise) + self.eps).sqrt().view(1, -1, 1, 1)
        if self.kind == "B0":
            assert self.v is not None
            spread = (precise.var((2, 3), correction=0, keepdim=True) + self.eps).sqrt()
            own = _per_channel(self.v, precise) * precise + spread
        else:
            size = (precise.square().mean((2, 3), keepdim=True) + self.eps).sqrt()
            own = (precise + 1) * size if self.kind == "B1" else size - precise
        return (precise / torch.maximum(shared, own)).to(x.dtype)

    def _variance(self, x: Tensor) -> Tensor:
        """Return the batch's variance, and let the running one follow it; in eval mode return the running one."""
        assert self.running_var is not None
        if not self.training:
            return wide(self.running_var)
        count = x.numel() // self.num_features
        if count == 1:
            raise ValueError(f"x must have more than one value a channel in training, got shape {tuple(x.shape)}")
        variance = x.var((0, 2, 3), correction=0)
        with torch.no_grad():
            newest = (variance * (count / (count - 1))).to(self.running_var.dtype)
            self.running_var.lerp_(newest, self.momentum)
        return variance

    def _grouped(self, x: Tensor) -> Tensor:
        grouped = wide(x).unflatten(1, (self.groups, -1))
        if self.kind == "S2":
            scale = grouped.square().mean((2, 3, 4), keepdim=True)
        else:
            if grouped[0, 0].numel() == 1:
                raise ValueError(f"x must have more than one value a group, got shape {tuple(x.shape)}")
            scale = grouped.var((2, 3, 4), correction=0, keepdim=True)
        gate = x if self.v is None else _per_channel(self.v, x) * x
        active = (x * gate.sigmoid()).unflatten(1, (self.groups, -1))
        return (active / (scale + self.eps).sqrt().to(x.dtype)).flatten(1, 2)

    def extra_repr(self) -> str:
        """Describe the layer in a line."""
        kept = [f"{self.num_features}", self.kind, f"eps={self.eps}"]
        kept += [f"groups={self.groups}"] if self.groups is not None else []
        return ", ".join(kept + ([] if self.apply_act else ["apply_act=False"]))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(1, -1, 1, 1)
