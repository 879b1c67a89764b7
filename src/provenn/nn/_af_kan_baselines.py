"""Kolmogorov–Arnold layers with other bases: each output is a sum over inputs of learned one-dimensional functions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_choice, check_integer
from provenn.nn import _af_kan_bases as bases

GRID_RANGE = (-1.5, 1.5)
"""Where splines and radial functions lie: layer norm puts nearly all inputs there."""
NORMS = ("layer", "batch", "none")


def data_norm(kind: str, features: int) -> nn.Module:
    """Return a norm of a layer's inputs.

    Args:
        kind: ``"layer"``, ``"batch"`` or ``"none"``.
        features: Width of the inputs.

    Raises:
        ValueError: Another kind.
    """
    check_choice("norm", kind, NORMS)
    return {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d, "none": lambda _: nn.Identity()}[kind](features)


def check_sizes(in_features: int, out_features: int, grid: int, order: int) -> None:
    """Check what all layers take."""
    check_integer("in_features", in_features, at_least=1)
    check_integer("out_features", out_features, at_least=1)
    check_integer("grid", grid, at_least=1)
    check_integer("order", order, at_least=0)


def check_inputs(x: Tensor, features: int) -> None:
    """Check a layer's inputs."""
    if x.ndim != 2 or x.shape[1] != features:
        raise ValueError(f"x must be (batch, {features}), got {tuple(x.shape)}")


class BasisLayer(nn.Module, ABC):
    """A Kolmogorov–Arnold layer y = W vec(basis(norm(x))) + b, with a base term W₀ silu(norm(x)) if asked for.

    Args:
        in_features: D.
        out_features: Outputs.
        grid: g.
        order: k.
        norm: ``"layer"``, ``"batch"`` or ``"none"``, of the inputs.
        functions: Basis functions an input.
        base: Whether there is a base term.
        bias: Whether there is a bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: int,
        order: int,
        norm: str,
        *,
        functions: int,
        base: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(in_features, out_features, grid, order)
        self.in_features, self.grid, self.order = in_features, grid, order
        self.norm = data_norm(norm, in_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features * functions))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.base = nn.Linear(in_features, out_features, bias=False) if base else None
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch out"]:
        """Return the outputs.

        Args:
            x: Inputs.
        """
        check_inputs(x, self.in_features)
        x = self.norm(x)
        y = F.linear(self.basis(x).flatten(1), self._weight(), self.bias)
        return y if self.base is None else y + self.base(F.silu(x))

    def _weight(self) -> Tensor:
        return self.weight

    @abstractmethod
    def basis(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features functions"]:
        """Return every basis function at every (normalised) input.

        Args:
            x: Inputs, after the norm.
        """


class ReLUKANLayer(BasisLayer):
    """Basis functions are squares of products of two shifted ReLUs, with trained ends for every input.

    r² (ReLU(x − low) · ReLU(high − x))² with r = 4g²/(k + 1)², so that each has its peak, 1, in its middle.

    Args:
        in_features: Inputs D.
        out_features: Outputs.
        grid: g, intervals between 0 and 1.
        order: k; a function spans k + 1 intervals.
        norm: ``"layer"``, ``"batch"`` or ``"none"``, of the inputs.

    Shape:
        (batch, D) → (batch, out_features).

    Returns:
        The outputs.

    Raises:
        TypeError: A size is of the wrong type.
        ValueError: A size out of range, another norm; on a call, inputs of another shape.

    Cost: (g + k) D (out + 2) parameters and (g + k) D (batch) numbers of memory, as all layers with a full basis.

    Source: Qiu, Zhu, Gong & Lin, "ReLU-KAN", 2024. https://arxiv.org/abs/2406.02075
    """

    def __init__(self, in_features: int, out_features: int, grid: int = 3, order: int = 3, norm: str = "layer") -> None:
        check_sizes(in_features, out_features, grid, order)
        super().__init__(in_features, out_features, grid, order, norm, functions=grid + order, bias=True)
        low, high = bases.interval_ends(grid, order)
        self.low, self.high = (nn.Parameter(one.repeat(in_features, 1)) for one in (low, high))

    def basis(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features functions"]:
        """Return every basis function at every (normalised) input.

        Args:
            x: Inputs, after the norm.
        """
        r = 4 * self.grid**2 / (self.order + 1) ** 2
        return r**2 * bases.activation_pairs(x, self.low, self.high, "relu", "quad1")


class BSplineKANLayer(BasisLayer):
    """B-splines on fixed knots over [−1.5, 1.5], scaled for each edge, beside a base term: the efficient form of KAN.

    Args:
        in_features: Inputs D.
        out_features: Outputs.
        grid: g, intervals.
        order: k, degree of the splines.
        norm: ``"layer"``, ``"batch"`` or ``"none"``, of the inputs.

    Shape:
        (batch, D) → (batch, out_features).

    Returns:
        The outputs.

    Raises:
        TypeError: A size is of the wrong type.
        ValueError: A size out of range, another norm; on a call, inputs of another shape.

    Cost: (g + k + 2) D · out parameters; k rounds over (g + 2k) D (batch) numbers.

    Source: Liu et al., "KAN", ICLR 2025; its efficient rearrangement and start (scaled noise) by Blealtan.
    """

    knots: Tensor

    def __init__(self, in_features: int, out_features: int, grid: int = 3, order: int = 3, norm: str = "layer") -> None:
        check_sizes(in_features, out_features, grid, order)
        super().__init__(in_features, out_features, grid, order, norm, functions=grid + order, base=True)
        low, high = GRID_RANGE
        self.register_buffer("knots", torch.arange(-order, grid + order + 1) * ((high - low) / grid) + low)
        # Near a constant c all coefficients equal c: small coefficients are small functions.
        nn.init.uniform_(self.weight, -0.05 / grid, 0.05 / grid)
        self.scale = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.scale, a=math.sqrt(5))

    def _weight(self) -> Tensor:
        return (self.weight.unflatten(1, (self.in_features, -1)) * self.scale[..., None]).flatten(1)

    def basis(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features functions"]:
        """Return every basis function at every (normalised) input.

        Args:
            x: Inputs, after the norm.
        """
        return bases.bspline_basis(x, self.knots, self.order)


class RBFKANLayer(BasisLayer):
    """Gaussians on a fixed grid over [−1.5, 1.5] beside a base term: the fast form of KAN.

    Args:
        in_features: Inputs D.
        out_features: Outputs.
        grid: g.
        order: k; there are g + k Gaussians.
        norm: ``"layer"``, ``"batch"`` or ``"none"``, of the inputs.

    Shape:
        (batch, D) → (batch, out_features).

    Returns:
        The outputs.

    Raises:
        TypeError: A size is of the wrong type.
        ValueError: A size out of range, fewer than two Gaussians, another norm; on a call, inputs of another shape.

    Cost: (g + k + 1) D · out parameters.

    Source: Li, "Kolmogorov–Arnold networks are radial basis function networks", 2024.
    """

    centres: Tensor

    def __init__(self, in_features: int, out_features: int, grid: int = 3, order: int = 3, norm: str = "layer") -> None:
        check_sizes(in_features, out_features, grid, order)
        if grid + order < 2:
            raise ValueError(f"grid + order must be at least 2, got {grid + order}")
        super().__init__(in_features, out_features, grid, order, norm, functions=grid + order, base=True)
        low, high = GRID_RANGE
        self.register_buffer("centres", torch.linspace(low, high, grid + order))
        self.width = (high - low) / (grid + order - 1)

    def basis(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features functions"]:
        """Return every basis function at every (normalised) input.

        Args:
            x: Inputs, after the norm.
        """
        return bases.radial_basis(x, self.centres, self.width)


class ChebyKANLayer(BasisLayer):
    """Chebyshev polynomials of tanh(x) up to degree g + k.

    Args:
        in_features: Inputs D.
        out_features: Outputs.
        grid: g.
        order: k.
        norm: ``"layer"``, ``"batch"`` or ``"none"``, of the inputs.

    Shape:
        (batch, D) → (batch, out_features).

    Returns:
        The outputs.

    Raises:
        TypeError: A size is of the wrong type.
        ValueError: A size out of range, another norm; on a call, inputs of another shape.

    Cost: (g + k + 1) D · out parameters.

    Source: Sidharth & Gokul, "Chebyshev polynomial-based Kolmogorov–Arnold networks", 2024.
    """

    def __init__(self, in_features: int, out_features: int, grid: int = 3, order: int = 3, norm: str = "layer") -> None:
        check_sizes(in_features, out_features, grid, order)
        functions = grid + order + 1
        super().__init__(in_features, out_features, grid, order, norm, functions=functions)
        nn.init.normal_(self.weight, std=1 / (in_features * functions))

    def basis(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features functions"]:
        """Return every basis function at every (normalised) input.

        Args:
            x: Inputs, after the norm.
        """
        return bases.chebyshev_basis(x.tanh(), self.grid + self.order)


class FourierKANLayer(BasisLayer):
    """Cosines and sines of the first g + k multiples of x, and a bias.

    Args:
        in_features: Inputs D.
        out_features: Outputs.
        grid: g.
        order: k.
        norm: ``"layer"``, ``"batch"`` or ``"none"``, of the inputs.

    Shape:
        (batch, D) → (batch, out_features).

    Returns:
        The outputs; with ``norm="none"`` of period 2π in every input.

    Raises:
        TypeError: A size is of the wrong type.
        ValueError: A size out of range, another norm; on a call, inputs of another shape.

    Cost: 2 (g + k) D · out parameters.

    Source: Xu et al., "FourierKAN-GCF", 2024, after GistNoesis' layer and start.
    """

    def __init__(self, in_features: int, out_features: int, grid: int = 3, order: int = 3, norm: str = "layer") -> None:
        check_sizes(in_features, out_features, grid, order)
        super().__init__(in_features, out_features, grid, order, norm, functions=2 * (grid + order), bias=True)
        nn.init.normal_(self.weight, std=1 / math.sqrt(in_features * (grid + order)))

    def basis(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features functions"]:
        """Return every basis function at every (normalised) input.

        Args:
            x: Inputs, after the norm.
        """
        return bases.fourier_basis(x, self.grid + self.order)


class WavKANLayer(nn.Module):
    """Each edge is one wavelet −u exp(−u²/2) of its own scale and place, and the outputs pass a batch norm.

    Args:
        in_features: Inputs D.
        out_features: Outputs.
        grid: Not used; taken so that all layers are made alike.
        order: Not used.
        norm: ``"layer"``, ``"batch"`` or ``"none"``, of the inputs.

    Shape:
        (batch, D) → (batch, out_features).

    Returns:
        The outputs.

    Raises:
        TypeError: A size is of the wrong type.
        ValueError: A size out of range, another norm; on a call, inputs of another shape.

    Cost: 3 D · out + 2 out parameters, and D · out (batch) numbers of memory.

    Source: Bozorgasl & Chen, "Wav-KAN", 2024. https://arxiv.org/abs/2405.12832
    """

    def __init__(self, in_features: int, out_features: int, grid: int = 3, order: int = 3, norm: str = "layer") -> None:
        super().__init__()
        check_sizes(in_features, out_features, grid, order)
        self.in_features = in_features
        self.norm = data_norm(norm, in_features)
        self.scale = nn.Parameter(torch.ones(out_features, in_features))
        self.place = nn.Parameter(torch.zeros(out_features, in_features))
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.output_norm = nn.BatchNorm1d(out_features)

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch out"]:
        """Return the outputs.

        Args:
            x: Inputs.
        """
        check_inputs(x, self.in_features)
        u = (self.norm(x)[:, None] - self.place) / self.scale
        y: Tensor = self.output_norm((-u * torch.exp(-0.5 * u.square()) * self.weight).sum(2))
        return y
