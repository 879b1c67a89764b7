"""Sigmoid attention in place of ``nn.MultiheadAttention``, with its weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from provenn.core.sequences.multihead import is_softmax_attention
from provenn.nn._sigmoid_attention_layer import SigmoidAttention


def replace_attention(
    model: nn.Module,
    bias: float | str = "-log_n",
    qk_norm: bool = False,
    layer_scale: float | None = None,
    out_norm: bool = False,
    **options: Any,
) -> nn.Module:
    """Return a copy of a model with sigmoid attention wherever it has ``nn.MultiheadAttention``.

    Kept: the weights and biases of the four projections and whether they are trained, dropout, ``batch_first``,
    ``kdim`` and ``vdim``, device, type and mode; a module used twice is still one. Not kept: the function (weights
    that softmax normalised are not close to sigmoid's; train or fine-tune), and hooks, parametrizations and weights
    shared with other modules, on the replaced ones. Subclasses with a ``forward`` of their own stay as they are.
    Transformer encoders of torch no longer take their fused inference path.

    Args:
        model: A model, or an ``nn.MultiheadAttention`` itself. Left as it is.
        bias: As in :class:`SigmoidAttention`.
        qk_norm: As in :class:`SigmoidAttention`.
        layer_scale: As in :class:`SigmoidAttention`.
        out_norm: As in :class:`SigmoidAttention`.
        **options: ``alibi``, ``rope``, ``max_length``, ``temperature`` and ``backend`` of :class:`SigmoidAttention`.

    Returns:
        The converted copy.

    Raises:
        TypeError: ``model`` is not a module, or an option is unknown.
        ValueError: The model has no ``nn.MultiheadAttention``, or one with ``add_bias_kv`` or ``add_zero_attn``.

    Cost: memory of the copy.

    Source: section 5 of https://arxiv.org/abs/2409.04431, where sigmoid attention takes softmax's place.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    options |= {"bias": bias, "qk_norm": qk_norm, "layer_scale": layer_scale, "out_norm": out_norm}
    if is_softmax_attention(model):
        return _converted(model, options)
    model = copy.deepcopy(model)
    made: dict[nn.Module, SigmoidAttention] = {}
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):  # named_children would leave out a module's second name
            if is_softmax_attention(child):
                made[child] = made.get(child) or _converted(child, options)
                setattr(module, name, made[child])
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # decided when it was built, for the fused path that is gone
    if not made:
        raise ValueError(f"model must have at least one nn.MultiheadAttention, got {type(model).__name__} without")
    return model


def _converted(attention: nn.MultiheadAttention, options: dict[str, Any]) -> SigmoidAttention:
    if attention.bias_k is not None or attention.add_zero_attn:
        raise ValueError("model must not have attention with add_bias_kv or add_zero_attn, which have no counterpart")
    out = attention.out_proj
    with torch.random.fork_rng(devices=[]), torch.device(out.weight.device):
        layer = SigmoidAttention(
            attention.embed_dim,
            attention.num_heads,
            dropout=attention.dropout,
            projection_bias=attention.in_proj_bias is not None,
            kdim=attention.kdim,
            vdim=attention.vdim,
            batch_first=attention.batch_first,
            device=out.weight.device,
            dtype=out.weight.dtype,
            **options,
        )
    if attention.in_proj_weight is not None:
        weights, trained = attention.in_proj_weight.chunk(3), [attention.in_proj_weight.requires_grad] * 3
    else:
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        trained = [weight.requires_grad for weight in weights]
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    with torch.no_grad():
        for projection, weight, is_trained in zip(projections, weights, trained, strict=True):
            projection.weight.copy_(weight)
            projection.weight.requires_grad_(is_trained)
        layer.out_proj.weight.copy_(out.weight)
        layer.out_proj.weight.requires_grad_(out.weight.requires_grad)
        if attention.in_proj_bias is not None:
            for projection, part in zip(projections, attention.in_proj_bias.chunk(3), strict=True):
                projection.bias.copy_(part)
                projection.bias.requires_grad_(attention.in_proj_bias.requires_grad)
            layer.out_proj.bias.copy_(out.bias)
            layer.out_proj.bias.requires_grad_(out.bias.requires_grad)
    return layer.train(attention.training)
