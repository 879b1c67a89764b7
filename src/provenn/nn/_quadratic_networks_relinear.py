"""ReLinear's second step, which holds the quadratic part back, and the conversion of models."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils.hooks import RemovableHandle

from provenn.core.experiment.checks import check_choice, check_number
from provenn.nn._quadratic_networks_layers import QuadraticConv2d, QuadraticLayer, QuadraticLinear, quadratic_layers


def relinear_param_groups(
    model: nn.Module, lr: float, lr_g: float, lr_b: float, *, decay_to_linear: bool = False
) -> list[dict[str, Any]]:
    """Sort a model's parameters into an optimizer's groups, with small learning rates for the quadratic parts.

    Schedulers of torch scale the rates of all groups alike.

    Args:
        model: A model with quadratic layers.
        lr: Learning rate of the maps r and of everything that is not quadratic; the paper's is 0.1.
        lr_g: That of the maps g; the paper's are from 1e-5 to 1e-3. At 0 together with ``lr_b`` the model stays an
            ordinary one.
        lr_b: That of the maps b.
        decay_to_linear: Whether the optimizer's weight decay acts on b_g too. It then decays b_g − 1, not b_g.
            Without, b_g is in a group of its own, which has ``weight_decay`` 0.

    Returns:
        Groups for any optimizer with ``lr`` and ``weight_decay``, each with its ``name``: ``"linear"``, ``"g"``,
        ``"g bias"`` and ``"b"``; those that would be empty are left out. Every parameter is in one group, frozen ones
        included.

    Raises:
        TypeError: ``model`` is not a module, or a rate not a number.
        ValueError: ``model`` has no quadratic layer, or a rate is negative.

    Warns:
        UserWarning: ``lr_g`` or ``lr_b`` is above ``lr``, which is not ReLinear.

    Cost: one pass over the parameters' list.

    Source: section IV of https://arxiv.org/abs/2110.06081, shrinking the gradients; the authors' ``qtrainer_10_5``.
    """
    for name, rate in (("lr", lr), ("lr_g", lr_g), ("lr_b", lr_b)):
        check_number(name, rate, at_least=0)
        if rate > lr:
            warnings.warn(f"{name} = {rate} is above lr = {lr}: this is not ReLinear", stacklevel=2)
    layers = quadratic_layers(model, "model")
    gates = [layer.g for layer in layers if layer.g is not None]
    kinds = {id(parameter): "g" for gate in gates for parameter in gate.parameters()}
    if not decay_to_linear:
        kinds |= {id(gate.bias): "g bias" for gate in gates}
    kinds |= {id(parameter): "b" for layer in layers for parameter in layer.b.parameters()}
    held: dict[str, list[nn.Parameter]] = {"linear": [], "g": [], "g bias": [], "b": []}
    for parameter in model.parameters():
        held[kinds.get(id(parameter), "linear")].append(parameter)
    options: dict[str, dict[str, Any]] = {
        "linear": {"lr": lr},
        "g": {"lr": lr_g},
        "g bias": {"lr": lr_g, "weight_decay": 0.0},
        "b": {"lr": lr_b},
    }
    return [{"params": held[name], **options[name], "name": name} for name in held if held[name]]


class ReLinearShrink:
    """Shrinks the quadratic parts after every step of an optimizer.

    ``"l2"``: (W_g, b_g − 1) ← (1 − α_g)(W_g, b_g − 1), and (W_b, c) ← (1 − α_b)(W_b, c). ``"l1"``: soft thresholding by
    α_g and α_b, entry by entry: towards 0, and of b_g towards 1, by at most the threshold. At 0 nothing is done; the
    larger, the closer the model stays to the ordinary one.

    Args:
        model: A model with quadratic layers; those that it has now are shrunk.
        alpha_g: α_g, of the maps g; in [0, 1).
        alpha_b: α_b, of the maps b; in [0, 1).
        norm: ``"l2"`` or ``"l1"``, the norm whose proximal or gradient step this is.

    Raises:
        TypeError: ``model`` is not a module, or a factor not a number.
        ValueError: ``model`` has no quadratic layer, a factor is outside [0, 1), or an unknown ``norm``.

    Cost: one pass over the parameters of g and b a step, in a few foreach calls.

    Source: section IV of https://arxiv.org/abs/2110.06081, shrinking the weights.
    """

    def __init__(self, model: nn.Module, alpha_g: float, alpha_b: float, norm: Literal["l2", "l1"] = "l2") -> None:
        check_number("alpha_g", alpha_g, at_least=0, below=1)
        check_number("alpha_b", alpha_b, at_least=0, below=1)
        check_choice("norm", norm, ("l2", "l1"))
        layers = quadratic_layers(model, "model")
        self.alpha_g, self.alpha_b, self.norm = alpha_g, alpha_b, norm
        self._held = (
            (alpha_g, [p for layer in layers if layer.g is not None for p in layer.g.parameters()]),
            (alpha_b, [p for layer in layers for p in layer.b.parameters()]),
        )

    @torch.no_grad()
    def step(self) -> None:
        """Shrink once."""
        for alpha, parameters in self._held:
            tensors: list[Tensor] = [parameter for parameter in parameters if parameter.requires_grad]
            if alpha == 0 or not tensors:
                continue
            if self.norm == "l2":
                torch._foreach_mul_(tensors, 1 - alpha)
            else:
                near = torch._foreach_clamp_max(torch._foreach_clamp_min(tensors, -alpha), alpha)
                torch._foreach_sub_(tensors, near)

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Shrink after every step of an optimizer from now on.

        Args:
            optimizer: The optimizer.

        Returns:
            What ends it, by its ``remove()``.
        """
        return optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, *_: Any) -> None:
        self.step()


def quadratize(model: nn.Module, layers: Iterable[str] | None = None, compact: bool = False) -> nn.Module:
    """Return a copy of a model with quadratic layers in the place of linear ones, which computes the same.

    The linear layer, as it is, becomes the map r of the quadratic one; the others start at nothing. For finite inputs
    the outputs equal the model's bit by bit. A layer that is used in several places, or shares its weight, still does;
    hooks stay on the linear map; frozen layers become frozen ones. Code that reads a converted layer's ``weight``
    itself finds none: convert no such layer. (Transformer encoders do so in their fused inference path, which is
    switched off where it applies.)

    Args:
        model: A model, or a layer itself. Left as it is.
        layers: Names of layers as in ``named_modules``; a name of a part with layers inside stands for all of them.
            ``None``: every linear layer and convolution. Other parts of the model keep their type.
        compact: Whether the new layers are compact ones.

    Returns:
        The converted copy.

    Raises:
        TypeError: ``model`` is not a module, or a chosen layer, which the message names, has no quadratic counterpart:
            a grouped, transposed, one- or three-dimensional convolution, a bilinear or lazy layer, a subclass.
        ValueError: A name that the model does not have, or nothing to convert.

    Cost: memory of the copy, and of the new maps, twice (compactly once) the size of the converted layers.

    Source: section IV of https://arxiv.org/abs/2110.06081: "a conventional network" is where ReLinear begins.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(layers, str):
        raise TypeError(f"layers must be a collection of names, got the string {layers!r}")
    chosen = copy.deepcopy(model)
    made: dict[nn.Module, nn.Module] = {}
    for name, layer in _chosen(chosen, layers):
        if layer not in made:
            made[layer] = _converted(name, layer, compact)
    if chosen in made:
        return made[chosen]
    for module in list(chosen.modules()):
        if any(part in made for part in module.modules()):
            _leave_fused_path(module)
        for name, child in list(module._modules.items()):  # named_children would leave out a module's second name
            if child in made:
                setattr(module, name, made[child])
    return chosen


def _chosen(model: nn.Module, layers: Iterable[str] | None) -> list[tuple[str, nn.Module]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    quadratic = [f"{name}." if name else "" for name, part in modules.items() if isinstance(part, QuadraticLayer)]
    linear = {
        name: part
        for name, part in modules.items()
        if isinstance(part, (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd))
        and not any(name.startswith(inside) for inside in quadratic)
    }
    if layers is None:
        found = linear
    else:
        found = {}
        for name in layers:
            if name not in modules:
                raise ValueError(f"layers must name parts of the model, got {name!r}, which it does not have")
            inside = {one: part for one, part in linear.items() if one == name or _is_inside(one, name)}
            if not inside:
                raise TypeError(f"layers: {name!r} is a {type(modules[name]).__name__} with no linear layer to convert")
            found |= inside
    if not found:
        raise ValueError(f"layers: nothing to convert in {type(model).__name__}")
    return list(found.items())


def _is_inside(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _converted(name: str, layer: nn.Module, compact: bool) -> nn.Module:
    kind = type_before_parametrizations(layer)
    if kind is nn.Linear:
        return QuadraticLinear.around(layer, compact)
    if kind is nn.Conv2d and layer.groups == 1:
        return QuadraticConv2d.around(layer, compact)
    grouped = f" with groups={layer.groups}" if kind is nn.Conv2d else ""
    raise TypeError(f"layers: {name!r} is a {kind.__name__}{grouped}, which has no quadratic counterpart")


def _leave_fused_path(module: nn.Module) -> None:
    """Switch off the fused inference path of a transformer encoder, which reads weights and skips the layers."""
    if isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0
