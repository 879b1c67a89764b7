"""Subsampled attention in place of ``nn.MultiheadAttention``, with its weights; and which pathways a model takes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from provenn.core.experiment.seeding import derive_seed
from provenn.core.sequences.multihead import is_softmax_attention
from provenn.nn._stochastic_subsampled_attention_layer import SubsampledAttention


def convert_to_ssa(model: nn.Module, sparsity: int = 4, **options: Any) -> nn.Module:
    """Return a copy of a model with subsampled attention wherever it has ``nn.MultiheadAttention`` over itself.

    In evaluation mode the copy computes what the model does; in training its attention is subsampled. Kept: weights
    and biases and whether they are trained, dropout, ``batch_first``, device, type and mode; a module used twice is
    still one. Not kept: hooks, parametrizations and weights shared with other modules, on the replaced ones. Left
    alone: the attention of ``nn.TransformerDecoderLayer`` to the encoder, which has no own source, and subclasses with
    a ``forward`` of their own.

    Args:
        model: A model, or an ``nn.MultiheadAttention`` itself. Left as it is.
        sparsity: As in :class:`SubsampledAttention`.
        **options: As in :class:`SubsampledAttention`.

    Returns:
        The converted copy.

    Raises:
        TypeError: ``model`` is not a module, or an option is unknown.
        ValueError: The model has no ``nn.MultiheadAttention`` to convert, one with ``add_bias_kv``, ``add_zero_attn``,
            ``kdim`` or ``vdim``, or an option is out of bounds.

    Cost: memory of the copy.

    Source: the paper trains existing transformers with subsampled attention in place of theirs (section 4).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    options["sparsity"] = sparsity
    if is_softmax_attention(model):
        return _converted(model, options)
    model = copy.deepcopy(model)
    made: dict[nn.Module, SubsampledAttention] = {}
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):  # named_children would leave out a module's second name
            crossing = isinstance(module, nn.TransformerDecoderLayer) and name == "multihead_attn"
            if is_softmax_attention(child) and not crossing:
                made[child] = made.get(child) or _converted(child, options)
                setattr(module, name, made[child])
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # decided when it was built, for the fused path that is gone
    if not made:
        raise ValueError(f"model must have an nn.MultiheadAttention over itself, got {type(model).__name__} without")
    return model


def _converted(attention: nn.MultiheadAttention, options: dict[str, Any]) -> SubsampledAttention:
    if attention.bias_k is not None or attention.add_zero_attn or attention.in_proj_weight is None:
        raise ValueError("model must not have attention with add_bias_kv, add_zero_attn, kdim or vdim")
    out = attention.out_proj
    with torch.random.fork_rng(devices=[]):
        layer = SubsampledAttention(
            attention.embed_dim,
            attention.num_heads,
            **{"dropout": attention.dropout, **options},
            projection_bias=attention.in_proj_bias is not None,
            batch_first=attention.batch_first,
            device=out.weight.device,
            dtype=out.weight.dtype,
        )
    packed = {"weight": attention.in_proj_weight, "bias": attention.in_proj_bias}
    for name, given in packed.items():
        if given is None:
            continue
        parts = [*given.chunk(3), getattr(out, name)]
        for projection, part in zip((layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj), parts, strict=True):
            target = getattr(projection, name)
            target.data.copy_(part.detach())
            source = getattr(out, name) if projection is layer.out_proj else given
            target.requires_grad_(source.requires_grad)
    return layer.train(attention.training)


def subsampled_layers(model: nn.Module) -> list[SubsampledAttention]:
    """Return a model's layers of subsampled attention, in order.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: It has none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = [module for module in model.modules() if isinstance(module, SubsampledAttention)]
    if not layers:
        raise ValueError(f"model must have a layer of SubsampledAttention, got {type(model).__name__} without")
    return layers


def choose_pathway(layers: list[SubsampledAttention], *keys: int | str) -> None:
    """Give every layer a subset of its own, decided by the keys and the layer's place."""
    for place, layer in enumerate(layers):
        layer.pathway_seed = derive_seed(*keys, place)


@contextmanager
def sampling(model: nn.Module) -> Iterator[list[SubsampledAttention]]:
    """Let a model sample one subset a layer inside the block, in evaluation too; then put its settings back.

    Args:
        model: With layers of subsampled attention.

    Yields:
        Its layers, for their ``pathway_seed`` to be set.
    """
    layers = subsampled_layers(model)
    before = [(layer.eval_samples, layer.pathway_seed) for layer in layers]
    for layer in layers:
        layer.eval_samples = 1
    try:
        yield layers
    finally:
        for layer, (samples, seed) in zip(layers, before, strict=True):
            layer.eval_samples, layer.pathway_seed = samples, seed
