"""Covariance functions of a weighted distance, between values and partial derivatives."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import scipy.special
import torch
from jaxtyping import Float, Int
from torch import Tensor

from provenn.core.experiment.checks import check_number

_TINY = 1e-30


class _BesselProduct(torch.autograd.Function):
    """F_ν(u) = z^ν K_ν(z) with u = z²; its derivative is −F_{ν−1}(u) / 2, so gradients of any order are calls of it."""

    @staticmethod
    def forward(ctx: Any, u: Any, order: float) -> Any:
        ctx.save_for_backward(u)
        ctx.order = order
        z = u.detach().clamp_min(_TINY).sqrt().cpu().double().numpy()
        values = torch.as_tensor(z**order * scipy.special.kv(order, z)).to(u)
        limit = 2 ** (order - 1) * math.gamma(order) if order > 0 else torch.finfo(u.dtype).max ** 0.25
        return torch.where(values.isfinite(), values, limit) if order <= 0 else values.clamp_max(limit)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (u,) = ctx.saved_tensors
        slope = -0.5 * _bessel_product(u, ctx.order - 1)
        return grads[0] * torch.where(u > _TINY, slope, 0.0), None


def _bessel_product(u: Tensor, order: float) -> Tensor:
    product: Tensor = _BesselProduct.apply(u, order)  # type: ignore[no-untyped-call]
    return product


class PowerExponential:
    """The kernel g(q) = exp(−q) of the weighted squared distance q = Σ α_i (x_i − x'_i)².

    Source: Frazier, arXiv 1807.02811, section 3.1.
    """

    smoothness = math.inf

    def profile(self, q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return g(q)."""
        return (-q).exp()

    def slopes(self, q: Float[Tensor, "*shape"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return g, g' and g''."""
        g = (-q).exp()
        return g, -g, g


class Matern:
    """The Matérn kernel g(q) = 2^{1−ν}/Γ(ν) z^ν K_ν(z) with z = √(2ν q) and q = Σ α_i (x_i − x'_i)².

    ν of 1/2, 3/2 and 5/2 have closed forms; any other goes through the Bessel function, on the CPU.

    Args:
        nu: Smoothness ν; sample paths have ⌈ν⌉ − 1 derivatives.

    Raises:
        ValueError: ``nu`` is not positive, or above 50.

    Source: Frazier, arXiv 1807.02811, section 3.1.
    """

    def __init__(self, nu: float = 2.5) -> None:
        check_number("nu", nu, above=0, at_most=50)
        self.smoothness = nu

    def profile(self, q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return g(q)."""
        if self.smoothness not in (0.5, 1.5, 2.5):
            return self._bessel(q, 0)
        z = (2 * self.smoothness * q.clamp_min(_TINY)).sqrt()
        decay = (-z).exp()
        if self.smoothness == 0.5:
            return decay
        return (1 + z) * decay if self.smoothness == 1.5 else (1 + z + z.square() / 3) * decay

    def slopes(self, q: Float[Tensor, "*shape"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return g, g' and g''; g'' may be very large at 0, where the kernel's mixed derivative does not need it."""
        if self.smoothness not in (1.5, 2.5):
            return self._bessel(q, 0), self._bessel(q, 1), self._bessel(q, 2)
        z = (2 * self.smoothness * q.clamp_min(_TINY)).sqrt()
        decay = (-z).exp()
        if self.smoothness == 1.5:
            return (1 + z) * decay, -1.5 * decay, 2.25 * decay / z
        return (1 + z + z.square() / 3) * decay, -(5 / 6) * (1 + z) * decay, 25 / 12 * decay

    def _bessel(self, q: Tensor, times: int) -> Tensor:
        """Return the derivative of g of some order: each lowers the Bessel function's order by one."""
        nu = self.smoothness
        constant = 2 ** (1 - nu) / math.gamma(nu) * (-nu) ** times
        return constant * _bessel_product(2 * nu * q.clamp_min(_TINY), nu - times)


Kernel = PowerExponential | Matern


class Hyperparameters(NamedTuple):
    """Hyperparameters; leading dimensions are draws.

    Args:
        scale: α₀, the prior variance.
        weights: α_1 … α_d, inverse squares of lengths.
        noise: λ, the noise variance of a new observation.
    """

    scale: Float[Tensor, "*draws"]
    weights: Float[Tensor, "*draws d"]
    noise: Float[Tensor, "*draws"]


def covariance(
    kernel: Kernel,
    hyperparameters: Hyperparameters,
    first: Float[Tensor, "*batch n d"],
    second: Float[Tensor, "*other m d"],
    first_orders: Int[Tensor, " n"] | None = None,
    second_orders: Int[Tensor, " m"] | None = None,
) -> Float[Tensor, "*both n m"]:
    """Return prior covariances of values and partial derivatives.

    Args:
        kernel: The kernel.
        hyperparameters: Its scale and weights; draws come before the batch in the result.
        first: Points.
        second: Points.
        first_orders: 0 for the value at a point, i for ∂f/∂x_i; default all values.
        second_orders: Likewise.

    Raises:
        ValueError: Derivatives are asked of a kernel with ν ≤ 1, whose paths have none.

    Cost: O(n m d) time and memory a draw.
    """
    differences = first.unsqueeze(-2) - second.unsqueeze(-3)
    dims = differences.ndim - 1
    weights = lift(hyperparameters.weights, dims, tail=1)
    scale = lift(hyperparameters.scale, dims, tail=0)
    q = (differences.square() * weights).sum(-1)
    if first_orders is None and second_orders is None:
        return scale * kernel.profile(q)
    if kernel.smoothness <= 1:
        raise ValueError(f"derivatives need a kernel with nu > 1, got {kernel.smoothness}")
    zeros = torch.zeros
    rows = first_orders if first_orders is not None else zeros(first.shape[-2], dtype=torch.long, device=first.device)
    cols = (
        second_orders if second_orders is not None else zeros(second.shape[-2], dtype=torch.long, device=first.device)
    )
    g, slope, bend = kernel.slopes(q)
    steps = 2 * differences * weights
    by_row = steps.gather(-1, (rows - 1).clamp_min(0)[:, None, None].expand(*steps.shape[:-1], 1)).squeeze(-1)
    by_col = steps.gather(-1, (cols - 1).clamp_min(0)[None, :, None].expand(*steps.shape[:-1], 1)).squeeze(-1)
    same = (
        (rows[:, None] == cols)
        * 2
        * lift(hyperparameters.weights[..., (rows - 1).clamp_min(0)], dims - 2, tail=1)[..., :, None]
    )
    mixed = -by_row * by_col * bend - same * slope
    one = torch.where(rows[:, None] > 0, by_row * slope, torch.where(cols > 0, -by_col * slope, g))
    return scale * torch.where((rows[:, None] > 0) & (cols > 0), mixed, one)


def lift(parameter: Tensor, dims: int, tail: int) -> Tensor:
    """Insert dimensions between a parameter's draws and its last ``tail`` ones, to broadcast over ``dims`` more."""
    draws = parameter.shape[: parameter.ndim - tail]
    return parameter.reshape(*draws, *[1] * dims, *parameter.shape[parameter.ndim - tail :])
