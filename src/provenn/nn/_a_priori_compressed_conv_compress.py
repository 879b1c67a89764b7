"""Swaps the convolutions of an untrained network for factorised ones, made of torch's own modules."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from provenn.core.compression.iterative import costs
from provenn.core.experiment.accounting import median_seconds
from provenn.core.experiment.checks import check_choice, check_integer
from provenn.core.experiment.recording import evaluating
from provenn.core.experiment.reports import Report
from provenn.nn._a_priori_compressed_conv_base import FactorizedConv
from provenn.nn._a_priori_compressed_conv_one_way import OneWayConv2d, OneWayConvTranspose2d
from provenn.nn._a_priori_compressed_conv_shared import (
    CPConv2d,
    CPConvTranspose2d,
    Tucker2Conv2d,
    Tucker2ConvTranspose2d,
)

Form = Literal["one-way", "cp", "tucker"]
LAYERS: dict[str, tuple[type[FactorizedConv], type[FactorizedConv]]] = {
    "one-way": (OneWayConv2d, OneWayConvTranspose2d),
    "cp": (CPConv2d, CPConvTranspose2d),
    "tucker": (Tucker2Conv2d, Tucker2ConvTranspose2d),
}
"""The layers of each form, plain and transposed."""


@dataclass(frozen=True)
class LayerChange(Report):
    """What became of one convolution: weights and biases before and after, the rank used, and why if it was left."""

    name: str
    dense_params: int
    params: int
    rank: int | tuple[int, int] | None
    note: str


@dataclass(frozen=True)
class ModelCosts(Report):
    """Parameters, bytes of parameters and buffers, multiply–accumulates and seconds of one call (or ``None``)."""

    params: int
    bytes: int
    macs: int | None
    latency: float | None


@dataclass(frozen=True)
class CompressionReport(ModelCosts):
    """The costs of a compressed model, those of the dense one, and what became of each convolution."""

    dense: ModelCosts
    layers: tuple[LayerChange, ...]
    nested: ClassVar[dict[str, type[Report]]] = {"dense": ModelCosts, "layers": LayerChange}

    def plot(self) -> Any:
        """Draw the parameters of each convolution before and after."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 0.8 + 0.4 * len(self.layers)), layout="constrained")
        axes = figure.subplots()
        places = range(len(self.layers))
        axes.barh(places, [one.dense_params for one in self.layers], color="lightgray", label="dense")
        axes.barh(places, [one.params for one in self.layers], height=0.4, label="factorised")
        axes.set(xlabel="parameters", xscale="log", yticks=list(places), yticklabels=[one.name for one in self.layers])
        axes.invert_yaxis()
        axes.legend()
        return figure


def compress_before_training(
    model: nn.Module,
    rank: int = 1,
    example_inputs: tuple[Any, ...] | None = None,
    layers: Iterable[str] | None = None,
    form: Form = "one-way",
    generator: torch.Generator | None = None,
) -> tuple[nn.Module, CompressionReport]:
    """Return a copy of an untrained network with factorised convolutions, freshly drawn, in the place of dense ones.

    Each ``nn.Conv2d`` and ``nn.ConvTranspose2d`` whose kernel is larger than 1×1 becomes the chain ``factors`` of an
    :class:`OneWayConv2d`, :class:`CPConv2d` or :class:`Tucker2Conv2d`, or of their transposed forms: an
    ``nn.Sequential`` of torch's own layers, so that the result is trained, stored and loaded without this library.
    One-way stems with a single input channel are split in height and width only. The weights are new; to come close
    to those of a trained network, which is another method, use ``from_dense`` of the layers. A chain has no ``weight``
    and its call no ``output_size``: where the network's own code asks for them, leave that layer out by ``layers``.

    What cannot shrink is left as it is, and the report says why: kernels of 1×1, grouped convolutions, convolutions of
    one or three dimensions, subclasses (such as parametrized ones), those with hooks or shared weights, and those
    whose factors would have no fewer weights.

    Args:
        model: The network. Left as it is.
        rank: As in the layers; for ``"tucker"`` at most the channels of a layer are used.
        example_inputs: Arguments of one call, by which multiply–accumulates are counted and the time is taken.
        layers: Names of convolutions, or of parts with convolutions inside; ``None``: all.
        form: ``"one-way"``, ``"cp"`` or ``"tucker"``.
        generator: What draws the weights, on their device; ``None``: torch's default one.

    Shape:
        The result takes and gives what ``model`` does.

    Returns:
        The smaller network, and the report: params, bytes, macs and latency (in seconds; the last two ``None`` without
        ``example_inputs``) of it and of the dense one, and each convolution's fate.

    Raises:
        TypeError: ``model`` is not a module, ``layers`` is a single string, or ``example_inputs`` a single tensor.
        ValueError: ``rank`` < 1, an unknown ``form``, a lazy layer that still waits for its sizes, or a name in
            ``layers`` that the model does not have, that has no convolution, or that is a grouped convolution
            (``groups`` other than 1).

    Cost: memory of a copy; with example inputs some 25 calls of both networks.

    Source: https://arxiv.org/abs/2304.04964: compressed "a priori", that is before training.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_integer("rank", rank, at_least=1)
    check_choice("form", form, tuple(LAYERS))
    if isinstance(example_inputs, torch.Tensor):
        raise TypeError("example_inputs must be a tuple of a call's arguments, got a tensor")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"model must have all its parameters, {name!r} waits for a first call")
    smaller = copy.deepcopy(model)
    shared = Counter(id(p) for part in smaller.modules() for p in part._parameters.values() if p is not None)
    made: dict[nn.Module, nn.Module] = {}
    changes = []
    for name, conv in _chosen(smaller, layers).items():
        note = _reason_to_leave(conv, shared)
        chain = None if note else _factorised(conv, rank, form, generator)
        size = sum(p.numel() for p in conv.parameters())
        if chain is None or isinstance(chain, str):
            changes.append(LayerChange(name, size, size, None, note or str(chain)))
        else:
            layer, made[conv] = chain, chain.factors
            changes.append(LayerChange(name, size, sum(p.numel() for p in layer.parameters()), layer.rank, ""))
    smaller = made.get(smaller, smaller)
    for part in list(smaller.modules()):
        for name, child in list(part._modules.items()):  # named_children would leave out a module's second name
            if child in made:
                setattr(part, name, made[child])
    found, dense = _costs(smaller, example_inputs), _costs(model, example_inputs)
    return smaller, CompressionReport(**vars(found), dense=dense, layers=tuple(changes))


def _chosen(model: nn.Module, layers: Iterable[str] | None) -> dict[str, nn.Module]:
    """Return the convolutions wanted, each once under its first name; any of its names asks for it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    convs = {name: part for name, part in modules.items() if isinstance(part, nn.modules.conv._ConvNd)}
    first: dict[nn.Module, str] = {}
    for name, part in convs.items():
        first.setdefault(part, name)
    if layers is None:
        return {name: part for part, name in first.items()}
    if isinstance(layers, str):
        raise TypeError(f"layers must be a collection of names, got the string {layers!r}")
    found: set[nn.Module] = set()
    for name in layers:
        if name not in modules:
            raise ValueError(f"layers must name parts of the model, got {name!r}, which it does not have")
        inside = {one: part for one, part in convs.items() if one == name or one.startswith(f"{name}." if name else "")}
        if not inside:
            raise ValueError(f"layers: {name!r} is a {type(modules[name]).__name__} without a convolution")
        groups = getattr(inside.get(name), "groups", 1)
        if groups != 1:
            raise ValueError(f"layers: {name!r} has groups = {groups}; only groups = 1 is supported")
        found.update(inside.values())
    return {name: part for part, name in first.items() if part in found}


def _reason_to_leave(conv: nn.Module, shared: Counter[int]) -> str:
    if not isinstance(conv, nn.Conv2d | nn.ConvTranspose2d):
        return f"a {type(conv).__name__}: only two-dimensional convolutions are factorised"
    if type(conv) not in (nn.Conv2d, nn.ConvTranspose2d):
        return f"a {type(conv).__name__}: subclasses are left alone"
    if conv.kernel_size == (1, 1):
        return "kernel 1×1: nothing to compress"
    if conv.groups != 1:
        return f"groups = {conv.groups}: only groups = 1 is supported"
    if any(shared[id(parameter)] > 1 for parameter in conv.parameters()):
        return "it shares its weights with another layer"
    if conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks:
        return "it has hooks, which would be lost"
    return ""


def _factorised(conv: Any, rank: int, form: str, generator: torch.Generator | None) -> FactorizedConv | str:
    """Return the layer, or why there is none."""
    kind = LAYERS[form][isinstance(conv, nn.ConvTranspose2d)]
    options: dict[str, Any] = {"mode": "spatial"} if form == "one-way" and conv.in_channels == 1 else {}
    ranks: Any = (min(rank, conv.in_channels), min(rank, conv.out_channels)) if form == "tucker" else rank
    layer = kind.like(conv, ranks, **options)
    count = sum(factor.weight.numel() for factor in layer.factors)
    if count >= conv.weight.numel():
        return f"at rank {rank} the factors would have {count} weights, the kernel has {conv.weight.numel()}"
    layer.reset_parameters(generator)
    layer.train(conv.training).requires_grad_(conv.weight.requires_grad)
    if layer.bias is not None:
        layer.bias.requires_grad_(conv.bias.requires_grad)
    return layer


def _costs(model: nn.Module, example_inputs: tuple[Any, ...] | None) -> ModelCosts:
    counted = costs(model, example_inputs)
    latency = None
    if example_inputs is not None:
        with evaluating(model), torch.no_grad():
            latency = median_seconds(lambda: model(*example_inputs))
    return ModelCosts(counted["params"], counted["bytes"], counted["macs"], latency)
