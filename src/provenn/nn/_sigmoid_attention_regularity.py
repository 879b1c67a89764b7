"""How much attention stretches its input: the Jacobian's spectral norm against the tokens' radius."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.experiment.reports import Report
from provenn.nn._sigmoid_attention_baselines import BASELINES, unbiased_terms
from provenn.nn._sigmoid_attention_layer import SigmoidAttention
from provenn.nn._sigmoid_attention_replace import replace_attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACTIVATIONS = ("sigmoid", *BASELINES)


@dataclass(frozen=True)
class AttentionRegularity(Report):
    """Spectral norms of the Jacobian of self-attention at random tokens, with one set of weights.

    Args:
        radius: The radii R; tokens are uniform in the ball of that radius.
        norms: For each activation, radius and draw of tokens: the Jacobian's largest singular value.
        bound: For each radius and draw: the paper's bound on sigmoid's; ``None`` where it does not apply.
    """

    radius: tuple[float, ...]
    norms: dict[str, tuple[tuple[float, ...], ...]]
    bound: tuple[tuple[float, ...], ...] | None

    def plot(self) -> Figure:
        """Draw the largest norm over draws against the radius, both logarithmic, and the bound."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.subplots()
        for name, rows in self.norms.items():
            axes.plot(self.radius, [max(row) for row in rows], marker="o", label=name)
        if self.bound is not None:
            axes.plot(self.radius, [max(row) for row in self.bound], linestyle="--", label="bound (sigmoid)")
        axes.set(xscale="log", yscale="log", xlabel="radius of the tokens", ylabel="spectral norm of the Jacobian")
        axes.legend()
        return figure


def attention_regularity(
    module: SigmoidAttention | nn.MultiheadAttention,
    radius_grid: Sequence[float] = (0.5, 1.0, 2.0, 5.0, 10.0),
    *,
    tokens: int = 16,
    draws: int = 4,
    activations: Sequence[str] = ("sigmoid", "softmax"),
    iterations: int = 500,
    tolerance: float = 1e-6,
    generator: torch.Generator | None = None,
) -> AttentionRegularity:
    """Measure the spectral norm of the Jacobian of self-attention X ↦ attn(X, X, X), for sigmoid and softmax alike.

    The weights, norms and positions are the module's; the activation is exchanged. Power iteration on JᵀJ by
    Jacobian-vector products in float64, all draws at once; tokens are the same for every activation, and only scaled
    from radius to radius.

    Args:
        module: The attention. ``nn.MultiheadAttention`` is read as by :func:`replace_attention`.
        radius_grid: Radii R of the balls that tokens are drawn from.
        tokens: Number of tokens n.
        draws: Number of draws of tokens a radius.
        activations: Any of ``"sigmoid"``, ``"softmax"`` and ``"relu"`` (divided by n).
        iterations: Most steps of the power iteration.
        tolerance: Relative change between steps below which it ends.
        generator: Draws tokens and start vectors; ``None`` for a fresh one with seed 0.

    Returns:
        The norms, and for sigmoid the paper's bound on them, valid without QK norm, output norm and biases of the
        three projections:
        ‖W_v‖ (n·max σ + 2·n·max σ′ · ‖W_qᵀ W_k‖/√d · mean ‖x_j‖²) of each head, root of the sum of squares over
        heads, times ‖W_o‖. With rotary positions ‖W_q‖·‖W_k‖ stands for ‖W_qᵀ W_k‖. It grows polynomially in R,
        where softmax's worst case grows exponentially in R².

    Raises:
        TypeError: ``module`` is of another type.
        ValueError: Its keys or values differ from its queries in size, or an argument is out of bounds.

    Cost: one Jacobian-vector and one vector-Jacobian product of the layer a step, activation and radius.

    Source: theorem 3.2 of https://arxiv.org/abs/2409.04431.
    """
    layer = _float64_copy(module)
    check_integer("tokens", tokens, at_least=1)
    check_integer("draws", draws, at_least=1)
    check_integer("iterations", iterations, at_least=1)
    check_number("tolerance", tolerance, at_least=0)
    if not activations or not radius_grid:
        raise ValueError(f"activations and radius_grid must not be empty, got {activations} and {radius_grid}")
    for name in activations:
        check_choice("activations", name, ACTIVATIONS)
    for radius in radius_grid:
        check_number("radius_grid", radius, above=0)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    shape = (draws, tokens, layer.embed_dim)
    unit = _unit_ball(shape, generator).to(layer.q_proj.weight.device)
    start = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device).to(unit.device)
    twins = {name: _with_activation(layer, name) for name in activations}
    norms = {
        name: tuple(
            tuple(spectral_norms(lambda x, twin=twin: _self_attention(twin, x), radius * unit, start, iterations,
                                 tolerance).tolist())
            for radius in radius_grid
        )
        for name, twin in twins.items()
    }  # fmt: skip
    bounded = _has_bound(layer) and "sigmoid" in activations
    bound = tuple(tuple(sigmoid_bound(layer, radius * unit).tolist()) for radius in radius_grid) if bounded else None
    return AttentionRegularity(tuple(float(radius) for radius in radius_grid), norms, bound)


def spectral_norms(
    function: Callable[[Tensor], Tensor],
    x: Float[Tensor, "draws ..."],
    start: Float[Tensor, "draws ..."],
    iterations: int,
    tolerance: float,
) -> Float[Tensor, " draws"]:
    """Return the largest singular value of a function's Jacobian at each of several independent inputs.

    Args:
        function: Maps each draw by itself.
        x: The inputs.
        start: Start vectors of the power iteration.
        iterations: Most steps.
        tolerance: Relative change between steps below which it ends.
    """
    _, pull_back = torch.func.vjp(function, x)
    direction = start / _lengths(start)
    norm = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        _, pushed = torch.func.jvp(function, (x,), (direction,))
        (pulled,) = pull_back(pushed)
        # ‖Jᵀ J u‖ ≤ σ₁² with equality at the limit; its root approaches σ₁ from below.
        lengths = _lengths(pulled)
        previous, norm = norm, lengths.flatten().sqrt()
        direction = pulled / lengths.clamp(min=torch.finfo(x.dtype).tiny)
        if bool(((norm - previous).abs() <= tolerance * norm).all()):
            break
    return norm


def sigmoid_bound(layer: SigmoidAttention, x: Float[Tensor, "draws tokens features"]) -> Float[Tensor, " draws"]:
    """Return the paper's bound on the spectral norm of the Jacobian of sigmoid self-attention at tokens x."""
    with torch.no_grad():
        weights = layer(x, x, x, average_attn_weights=False)[1]
        largest, steepest = weights.amax(dim=(2, 3)), (weights * (1 - weights)).amax(dim=(2, 3))
        heads = (layer.num_heads, layer.head_dim)
        w_q, w_k, w_v = (one.weight.unflatten(0, heads) for one in (layer.q_proj, layer.k_proj, layer.v_proj))
        scale = unbiased_terms(layer, None, False).scale
        norm = torch.linalg.matrix_norm
        coupling = norm(w_q, 2) * norm(w_k, 2) if layer.rope else norm(w_q.mT @ w_k, 2)
        square = x.square().sum(dim=-1).mean(dim=-1, keepdim=True)
        tokens = x.shape[1]
        by_head = norm(w_v, 2) * tokens * (largest + 2 * steepest * scale * coupling * square)
        out = layer.out_proj.weight if layer.gamma is None else layer.gamma[:, None] * layer.out_proj.weight
        return by_head.square().sum(dim=-1).sqrt() * norm(out, 2)


def _has_bound(layer: SigmoidAttention) -> bool:
    normed = not all(isinstance(one, nn.Identity) for one in (layer.q_norm, layer.k_norm, layer.out_norm))
    biases = [one.bias for one in (layer.q_proj, layer.k_proj, layer.v_proj) if one.bias is not None]
    return not normed and not any(bool(bias.any()) for bias in biases)


def _float64_copy(module: object) -> SigmoidAttention:
    if isinstance(module, nn.MultiheadAttention):
        module = replace_attention(module)
    if not isinstance(module, SigmoidAttention):
        raise TypeError(f"module must be SigmoidAttention or nn.MultiheadAttention, got {type(module).__name__}")
    if not module.embed_dim == module.kdim == module.vdim:
        raise ValueError(f"module must have kdim = vdim = embed_dim, got {module.kdim}, {module.vdim}")
    layer = copy.deepcopy(module).double().eval().requires_grad_(False)
    layer.backend, layer.batch_first = "reference", True
    return layer


def _with_activation(layer: SigmoidAttention, name: str) -> SigmoidAttention:
    """Return a twin that shares every parameter and attends by another activation."""
    twin = copy.copy(layer)
    attend = SigmoidAttention.attend if name == "sigmoid" else BASELINES[name].attend
    object.__setattr__(twin, "attend", types.MethodType(attend, twin))
    return twin


def _self_attention(layer: SigmoidAttention, x: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]


def _unit_ball(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Draw tokens uniformly in the unit ball of their features."""
    place = {"generator": generator, "dtype": torch.float64, "device": generator.device}
    direction = nn.functional.normalize(torch.randn(shape, **place), dim=-1)
    return direction * torch.rand(*shape[:2], 1, **place) ** (1 / shape[2])


def _lengths(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1).reshape(-1, *(1,) * (x.ndim - 1))
