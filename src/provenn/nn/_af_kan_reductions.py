"""Ways to reduce the basis axis of a Kolmogorov–Arnold layer: (batch, features, basis) → (batch, features)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

Basis = Float[Tensor, "batch features basis"]
Reduced = Float[Tensor, "batch features"]
WINDOW = 2
"""Size and step of local attention's windows."""


class _Tempered(nn.Module):
    """Holds the temperature τ of a softmax, √(features) at first, and never sharper than 1.

    Args:
        features: D.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(math.sqrt(features)))

    def _softmax(self, scores: Tensor, dim: int) -> Tensor:
        return (scores / self.temperature.clamp(min=1.0)).softmax(dim)


class Multistep(nn.Module):
    """One linear map of the basis axis to a number."""

    def __init__(self, features: int, basis: int) -> None:
        super().__init__()
        self.linear = nn.Linear(basis, 1)

    def forward(self, z: Basis) -> Reduced:
        """Return the reduced tensor."""
        y: Tensor = self.linear(z)[..., 0]
        return y


class GlobalAttention(_Tempered):
    """Weights over the *features*, from one score a feature, multiply the sum over the basis."""

    def __init__(self, features: int, basis: int) -> None:
        super().__init__(features)
        self.score = nn.Linear(basis, 1)

    def forward(self, z: Basis) -> Reduced:
        """Return the reduced tensor."""
        return z.sum(2) * self._softmax(self.score(z)[..., 0], 1)


class SpatialAttention(_Tempered):
    """Weights over the basis, from a convolution of each basis function along the features."""

    def __init__(self, features: int, basis: int) -> None:
        super().__init__(features)
        self.conv = nn.Conv1d(basis, basis, 3, padding=1, groups=basis)

    def forward(self, z: Basis) -> Reduced:
        """Return the reduced tensor."""
        weights = self._softmax(self.conv(z.transpose(1, 2)), 1)
        return (z * weights.transpose(1, 2)).sum(2)


class SelfAttention(_Tempered):
    """Features attend to each other by their basis values; the outcome is summed. O(D²)."""

    def __init__(self, features: int, basis: int) -> None:
        super().__init__(features)
        self.query, self.key, self.value = (nn.Linear(basis, basis) for _ in range(3))

    def forward(self, z: Basis) -> Reduced:
        """Return the reduced tensor."""
        weights = self._softmax(self.query(z) @ self.key(z).mT, -1)
        return (weights @ self.value(z)).sum(2)


class MultiheadAttention(nn.Module):
    """Features attend to each other with one head a basis function; the outcome is summed. O(D²)."""

    def __init__(self, features: int, basis: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(basis, basis, batch_first=True)

    def forward(self, z: Basis) -> Reduced:
        """Return the reduced tensor."""
        y: Tensor = self.attention(z, z, z, need_weights=False)[0]
        return y.sum(2)


class LocalAttention(_Tempered):
    """Windows of the basis axis attend to each other; a linear map reduces them."""

    def __init__(self, features: int, basis: int) -> None:
        super().__init__(features)
        if basis < WINDOW:
            raise ValueError(f"method local_attn needs grid + order ≥ {WINDOW}, got {basis}")
        self.query, self.key, self.value = (nn.Linear(WINDOW, WINDOW) for _ in range(3))
        self.linear = nn.Linear(((basis - WINDOW) // WINDOW + 1) * WINDOW, 1)

    def forward(self, z: Basis) -> Reduced:
        """Return the reduced tensor."""
        windows = z.unfold(2, WINDOW, WINDOW)
        weights = self._softmax(self.query(windows) @ self.key(windows).mT, -1)
        y: Tensor = self.linear((weights @ self.value(windows)).flatten(2))[..., 0]
        return y


REDUCTIONS: Mapping[str, Callable[[int, int], nn.Module]] = {
    "global_attn": GlobalAttention,
    "spatial_attn": SpatialAttention,
    "multistep": Multistep,
    "self_attn": SelfAttention,
    "multihead_attn": MultiheadAttention,
    "local_attn": LocalAttention,
}


def _sum(parts: Float[Tensor, "parts ..."]) -> Float[Tensor, "..."]:
    return parts.sum(0)


def _product(parts: Float[Tensor, "parts ..."]) -> Float[Tensor, "..."]:
    return parts.prod(0)


def _sum_product(parts: Float[Tensor, "parts ..."]) -> Float[Tensor, "..."]:
    return parts.sum(0) + parts.prod(0)


def _quadratic(parts: Float[Tensor, "parts ..."]) -> Float[Tensor, "..."]:
    return parts.sum(0) + parts.prod(0) + parts.square().sum(0)


JOINS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": _sum,
    "product": _product,
    "sum_product": _sum_product,
    "quadratic": _quadratic,
}
"""How the outputs of several reductions become one."""
