"""One-dimensional basis functions of Kolmogorov–Arnold layers, evaluated at every entry of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]
Combination = Callable[[Tensor, Tensor], Tensor]

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
}


def _quad1(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).square()


def _quad2(u: Tensor, v: Tensor) -> Tensor:
    return u * v + u.square() + v.square()


def _sum(u: Tensor, v: Tensor) -> Tensor:
    return u + v


def _prod(u: Tensor, v: Tensor) -> Tensor:
    return u * v


def _sum_prod(u: Tensor, v: Tensor) -> Tensor:
    return u + v + u * v


def _cubic1(u: Tensor, v: Tensor) -> Tensor:
    return (u + v) * (u.square() + v.square())


def _cubic2(u: Tensor, v: Tensor) -> Tensor:
    return (u * v) ** 3


COMBINATIONS: Mapping[str, Combination] = {
    "quad1": _quad1,
    "quad2": _quad2,
    "sum": _sum,
    "prod": _prod,
    "sum_prod": _sum_prod,
    "cubic1": _cubic1,
    "cubic2": _cubic2,
}
"""Of u = φ(x − low) and v = φ(high − x); all are symmetric in u and v."""


def interval_ends(grid: int, order: int) -> tuple[Float[Tensor, " basis"], Float[Tensor, " basis"]]:
    """Return where the basis functions begin and end: low_i = (i − k)/g, high_i = low_i + (k + 1)/g, i < g + k.

    Args:
        grid: g, intervals between 0 and 1.
        order: k.
    """
    low = torch.arange(-order, grid) / grid
    return low, low + (order + 1) / grid


def activation_pairs(
    x: Float[Tensor, "batch features"],
    low: Float[Tensor, "... basis"],
    high: Float[Tensor, "... basis"],
    activation: str,
    func: str,
) -> Float[Tensor, "batch features basis"]:
    """Combine pairs of shifted activations, f(φ(x − low), φ(high − x)).

    Args:
        x: Inputs.
        low: Where functions begin, for all features or each.
        high: Where they end.
        activation: φ.
        func: f.
    """
    phi = ACTIVATIONS[activation]
    wide = x[..., None]
    return COMBINATIONS[func](phi(wide - low), phi(high - wide))


def bspline_basis(
    x: Float[Tensor, "batch features"], knots: Float[Tensor, " knots"], order: int
) -> Float[Tensor, "batch features basis"]:
    """Evaluate the B-splines of an order on equidistant or other increasing knots.

    Args:
        x: Inputs; outside the knots all splines are 0.
        knots: n + order + 1 of them for n splines.
        order: Degree k of the pieces.

    Source: de Boor, A Practical Guide to Splines (1978), chapter IX.
    """
    wide = x[..., None]
    bases = ((wide >= knots[:-1]) & (wide < knots[1:])).to(x.dtype)
    for k in range(1, order + 1):
        rising = (wide - knots[: -k - 1]) / (knots[k:-1] - knots[: -k - 1])
        falling = (knots[k + 1 :] - wide) / (knots[k + 1 :] - knots[1:-k])
        bases = rising * bases[..., :-1] + falling * bases[..., 1:]
    return bases


def radial_basis(
    x: Float[Tensor, "batch features"], centres: Float[Tensor, " basis"], width: float
) -> Float[Tensor, "batch features basis"]:
    """Evaluate exp(−((x − c)/w)²).

    Args:
        x: Inputs.
        centres: c.
        width: w.
    """
    return torch.exp(-(((x[..., None] - centres) / width) ** 2))


def chebyshev_basis(x: Float[Tensor, "batch features"], degree: int) -> Float[Tensor, "batch features basis"]:
    """Evaluate T_0 … T_n by T_n = 2x T_{n−1} − T_{n−2}, which unlike cos(n arccos x) has a finite derivative at ±1.

    Args:
        x: Inputs in [−1, 1].
        degree: n.
    """
    found = [torch.ones_like(x), x]
    for _ in range(2, degree + 1):
        found.append(2 * x * found[-1] - found[-2])
    return torch.stack(found[: degree + 1], -1)


def fourier_basis(x: Float[Tensor, "batch features"], frequencies: int) -> Float[Tensor, "batch features basis"]:
    """Evaluate cos x, cos 2x, … and sin x, sin 2x, …

    Args:
        x: Inputs.
        frequencies: How many of each.
    """
    k = torch.arange(1, frequencies + 1, dtype=x.dtype, device=x.device)
    angles = x[..., None] * k
    return torch.cat((angles.cos(), angles.sin()), -1)
