"""AF-KAN: Activation Function-Based Kolmogorov-Arnold Networks for Efficient Representation Learning.

Ta, Tran, 2025. https://arxiv.org/abs/2503.06112

Every input passes G = g + k basis functions made of pairs of shifted activations; attention reduces them to one number
an input, so that the linear map behind needs no more weights than that of a perceptron:

    z = f(φ(x − low), φ(high − x)) ∈ R^{D×G},  scaled to [0, 1];   y = W φ(norm(reduce(z)))

The rooms: ``_af_kan_bases`` (basis functions), ``_af_kan_reductions`` (attention over them), ``_af_kan_baselines`` (the
layers with a full basis); here are the layer, the network, and widths for equal numbers of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_choice, check_integer
from provenn.nn._af_kan_baselines import (
    BSplineKANLayer,
    ChebyKANLayer,
    FourierKANLayer,
    RBFKANLayer,
    ReLUKANLayer,
    WavKANLayer,
    check_inputs,
    check_sizes,
    data_norm,
)
from provenn.nn._af_kan_bases import ACTIVATIONS, COMBINATIONS, activation_pairs, interval_ends
from provenn.nn._af_kan_reductions import JOINS, REDUCTIONS

__all__ = [
    "AFKAN",
    "AFKANLayer",
    "BSplineKANLayer",
    "ChebyKANLayer",
    "FourierKANLayer",
    "RBFKANLayer",
    "ReLUKANLayer",
    "WavKANLayer",
    "match_parameters",
]

Scope = Literal["sample", "batch"]


class AFKANLayer(nn.Module):
    """A Kolmogorov–Arnold layer with about the weights of a linear one.

    Args:
        in_features: Inputs D.
        out_features: Outputs.
        grid: g, intervals between 0 and 1.
        order: k; there are G = g + k basis functions, each k + 1 intervals long.
        activation: φ, of the pairs and before the linear map: ``"silu"``, ``"relu"``, ``"gelu"``, ``"elu"``,
            ``"selu"``, ``"softplus"``, ``"sigmoid"``, ``"leaky_relu"`` or ``"tanh"``.
        func: f of u = φ(x − low) and v = φ(high − x): ``"quad1"`` (uv)², ``"quad2"`` uv + u² + v², ``"sum"`` u + v,
            ``"prod"`` uv, ``"sum_prod"`` u + v + uv, ``"cubic1"`` (u + v)(u² + v²), ``"cubic2"`` (uv)³.
        func_norm: Whether basis values are brought to [0, 1] by their least and greatest.
        norm_scope: Over which values: those of each ``"sample"``, or of the whole ``"batch"`` as in the authors' code,
            where a sample's output then depends on the others in its batch, in eval mode too.
        method: How the basis axis is reduced: ``"global_attn"``, ``"spatial_attn"``, ``"multistep"``, ``"self_attn"``,
            ``"multihead_attn"`` or ``"local_attn"``; or several of them, whose outputs are joined.
        norm: Of the reduced values: ``"layer"``, ``"batch"`` or ``"none"``.
        join: How several methods' outputs are joined: ``"sum"``, ``"product"``, ``"sum_product"`` or ``"quadratic"``
            (sum, product and squares).

    Shape:
        (batch, D) → (batch, out_features).

    Returns:
        The outputs.

    Raises:
        TypeError: A size is of the wrong type.
        ValueError: A size out of range, an unknown option; on a call, inputs of another shape.

    Cost: D·out + 2G + 2D parameters and the reduction's, G + 2 for global attention; (batch)·D·G numbers of memory, and
    O(D²) for ``"self_attn"`` and ``"multihead_attn"``. All parameters are used: those of other methods are not made.

    Source: Ta & Tran (2025), section 3, and the authors' layer for the start, the least temperature 1, and the softmax
    of global attention over features. Dividing by the norm before scaling to [0, 1], as there, changes nothing.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: int = 3,
        order: int = 3,
        activation: str = "silu",
        func: str = "quad1",
        func_norm: bool = True,
        norm_scope: Scope = "sample",
        method: str | Sequence[str] = "global_attn",
        norm: str = "layer",
        join: str = "sum",
    ) -> None:
        super().__init__()
        check_sizes(in_features, out_features, grid, order)
        check_choice("activation", activation, tuple(ACTIVATIONS))
        check_choice("func", func, tuple(COMBINATIONS))
        check_choice("norm_scope", norm_scope, ("sample", "batch"))
        check_choice("join", join, tuple(JOINS))
        methods = (method,) if isinstance(method, str) else tuple(method)
        if not methods:
            raise ValueError("method must name one way or more, got none")
        for one in methods:
            check_choice("method", one, tuple(REDUCTIONS))
        self.in_features, self.activation, self.func = in_features, activation, func
        self.func_norm, self.norm_scope, self.join = func_norm, norm_scope, join
        low, high = interval_ends(grid, order)
        self.low, self.high = nn.Parameter(low), nn.Parameter(high)
        self.reductions = nn.ModuleList(REDUCTIONS[one](in_features, grid + order) for one in methods)
        self.norm = data_norm(norm, in_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch out"]:
        """Return the outputs.

        Args:
            x: Inputs.
        """
        check_inputs(x, self.in_features)
        z = self.basis(x)
        phi = ACTIVATIONS[self.activation]
        outputs = [F.linear(phi(self.norm(reduce(z))), self.weight) for reduce in self.reductions]
        return outputs[0] if len(outputs) == 1 else JOINS[self.join](torch.stack(outputs))

    def basis(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features basis"]:
        """Return the basis functions' values, scaled if they are to be.

        Args:
            x: Inputs.
        """
        z = activation_pairs(x, self.low, self.high, self.activation, self.func)
        if not self.func_norm or z.numel() == 0:
            return z
        over = (1, 2) if self.norm_scope == "sample" else (0, 1, 2)
        least = z.amin(over, keepdim=True)
        # Equal values have no spread: they become 0.
        return (z - least) / (z.amax(over, keepdim=True) - least).clamp(min=torch.finfo(z.dtype).eps)


class AFKAN(nn.Sequential):
    """A network of :class:`AFKANLayer`.

    Args:
        widths: Widths, input and output included; at least two.
        **options: As for the layer.

    Shape:
        (batch, widths[0]) → (batch, widths[-1]).

    Returns:
        The outputs.

    Raises:
        TypeError: A size is of the wrong type.
        ValueError: Fewer than two ``widths``, and as for the layer.

    Cost: the layers'.

    Source: Ta & Tran (2025), section 3.
    """

    def __init__(self, widths: Sequence[int], **options: Any) -> None:
        if len(widths) < 2:
            raise ValueError(f"widths must name input and output, got {list(widths)}")
        super().__init__(*(AFKANLayer(wide, narrow, **options) for wide, narrow in pairwise(widths)))


def match_parameters(
    kind: Callable[[int, int], nn.Module], budget: int, in_features: int = 784, out_features: int = 10
) -> int:
    """Return the hidden width at which a network of two layers has as many parameters as possible within a budget.

    Args:
        kind: ``kind(inputs, outputs)`` makes a layer: a layer's class, or a function that makes one.
        budget: Parameters of both layers together.
        in_features: Inputs of the network.
        out_features: Its outputs.

    Returns:
        The width, at least 1.

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: A number out of range, or the budget is too small for width 1.

    Cost: some 2 log₂(width) networks, built without storage.

    Source: the comparison at equal parameters of Ta & Tran (2025), section 4.
    """
    for name, value in (("budget", budget), ("in_features", in_features), ("out_features", out_features)):
        check_integer(name, value, at_least=1)
    if _count(kind, in_features, 1, out_features) > budget:
        least = _count(kind, in_features, 1, out_features)
        raise ValueError(f"budget must be at least {least}, what width 1 takes, got {budget}")
    low, high = 1, 2
    while _count(kind, in_features, high, out_features) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _count(kind, in_features, middle, out_features) <= budget else (low, middle)
    return low


def _count(kind: Callable[[int, int], nn.Module], inputs: int, hidden: int, outputs: int) -> int:
    with torch.device("meta"):
        layers = kind(inputs, hidden), kind(hidden, outputs)
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters())
