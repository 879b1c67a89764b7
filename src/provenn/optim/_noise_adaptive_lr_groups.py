"""LANTON's parameter groups: their options checked, their layers sorted by norm, and a model sorted into them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.numerics.norm_oracles import Norm

NORMS = ("spectral", "sign", "rms")


def dense(grad: Tensor) -> Tensor:
    """Return a gradient, if it is not sparse."""
    if grad.layout != torch.strided:
        raise RuntimeError("LANTON does not support sparse gradients; torch.optim.SparseAdam does")
    return grad


def layers_by_norm(params: Iterable[Tensor], norm: Norm | None) -> dict[Norm, list[Tensor]]:
    """Sort the layers that have elements by their norm: the group's, or by the number of dimensions."""
    layers: dict[Norm, list[Tensor]] = {}
    for param in params:
        if param.numel() > 0:
            layers.setdefault(norm or ("spectral" if param.dim() >= 2 else "rms"), []).append(param)
    return layers


def check_group(group: Mapping[str, Any], number: int) -> None:
    """Refuse options that make no sense, by an error that names the group, and the shape where it matters."""
    where = f"of parameter group {number}"
    check_number(f"lr {where}", group["lr"], at_least=0)
    for place, beta in enumerate(group["betas"]):
        check_number(f"betas[{place}] {where}", beta, at_least=0, below=1)
    check_number(f"alpha {where}", group["alpha"], above=0)
    check_integer(f"ns_steps {where}", group["ns_steps"], at_least=1)
    check_number(f"weight_decay {where}", group["weight_decay"], at_least=0)
    check_choice(f"noise_option {where}", group["noise_option"], ("consecutive", "resample"))
    check_choice(f"lmo {where}", group["lmo"], ("newton-schulz", "svd"))
    check_choice(f"embed_scale {where}", group["embed_scale"], ("fan_in", "unit"))
    check_choice(f"norm {where}", group["norm"], (None, *NORMS))
    for param in group["params"]:
        if param.is_complex():
            raise ValueError(f"params {where} must be real, got complex of shape {tuple(param.shape)}")
        if group["norm"] == "spectral" and param.dim() < 2:
            raise ValueError(
                f"norm {where} is 'spectral', which needs two dimensions or more, got a parameter of shape "
                f"{tuple(param.shape)}"
            )


def lanton_param_groups(
    model: nn.Module,
    hidden_lr: float | None = None,
    embed_lr: float | None = None,
    vector_lr: float | None = None,
    head: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Sort a model's parameters into LANTON's groups: hidden matrices, embeddings and head, vectors.

    Args:
        model: Parameters that require a gradient are taken, each once, under its name.
        hidden_lr: Learning rate of the spectral group; ``None`` for the optimizer's own.
        embed_lr: Of the sign group.
        vector_lr: Of the rms group.
        head: The output head, if it is not tied to an embedding: no type tells it from a hidden layer. Its matrix goes
            with the embeddings.

    Shape:
        Tensors of an ``nn.Embedding`` or ``nn.EmbeddingBag`` (and so of a head tied to one), and the head's with two
        dimensions or more: ``norm="sign"``. Others with two dimensions or more: ``"spectral"``. The rest: ``"rms"``.

    Returns:
        Dicts for the optimizer, without the groups that would be empty: hidden, embeddings, vectors.

    Raises:
        ValueError: No parameter requires a gradient, or a rate is negative.

    Source: the paper's choice of norms, arXiv 2510.14009: RMS → RMS operator norm for hidden matrices, ℓ1 → ℓ∞ for
    embedding and head, RMS for vectors.
    """
    rates = {"spectral": hidden_lr, "sign": embed_lr, "rms": vector_lr}
    for name, rate in zip(("hidden_lr", "embed_lr", "vector_lr"), rates.values(), strict=True):
        if rate is not None:
            check_number(name, rate, at_least=0)
    tables = {
        param
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or module is head
        for param in module.parameters(recurse=module is head)
    }
    members: dict[str, list[tuple[str, nn.Parameter]]] = {norm: [] for norm in rates}
    for name, param in model.named_parameters():
        if param.requires_grad:
            norm = "rms" if param.dim() < 2 else "sign" if param in tables else "spectral"
            members[norm].append((name, param))
    groups = [
        {"params": params, "norm": norm} | ({} if rates[norm] is None else {"lr": rates[norm]})
        for norm, params in members.items()
        if params
    ]
    if not groups:
        raise ValueError("model has no parameter that requires a gradient")
    return groups
