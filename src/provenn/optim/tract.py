"""TrAct: Making First-layer Pre-Activations Trainable.

Petersen, Borgelt, Ermon, NeurIPS 2024. https://arxiv.org/abs/2410.23970

A first layer z = x Wᵀ whose weights take the step that best realises a gradient step on its outputs z:

    min_ΔW ‖z − b g − x (W + ΔW)ᵀ‖² + λ b ‖ΔW‖²,   b rows x, upstream gradient g

so that W's gradient gᵀx becomes gᵀx (xᵀx / b + λ I)⁻¹. Bright images no longer dominate what the layer learns.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from provenn.core.experiment.checks import check_number
from provenn.core.experiment.recording import evaluating
from provenn.optim._tract_gradient import Conv2dFunction, LinearFunction, tract_weight_grad

__all__ = ["TrActConv2d", "TrActLinear", "apply_tract_first_layer", "tract", "tract_weight_grad"]

_Layer = TypeVar("_Layer", bound=nn.Module)


class TrActLinear(nn.Linear):
    """A linear layer whose weights step so that its outputs follow their gradient.

    Forward, parameters, initial weights and ``state_dict`` are those of :class:`torch.nn.Linear`; so are the gradients
    of bias and inputs. Meant for the first layer, such as a patch embedding. All rows of a batch, over all leading
    dimensions, count in the Gram matrix; under data parallelism each process uses its own.

    Args:
        in_features: Size of the inputs.
        out_features: Size of the outputs.
        bias: Whether there is one.
        lambda_: λ > 0; inputs are taken to be standardised.
        device: As in torch.
        dtype: As in torch.

    Shape:
        (..., in_features) → (..., out_features).

    Returns:
        The outputs of the plain layer.

    Raises:
        ValueError: ``lambda_`` ≤ 0.
        TypeError: ``lambda_`` is no number.
        RuntimeError: The gradient is differentiated once more.

    Cost: that of the plain layer, and in the backward pass min(rows, in_features)² · max(rows, in_features) for the
    Gram matrix and a cubic of the smaller for its solution.

    Source: the paper's section 3; λ = 0.1 for all its experiments.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        lambda_: float = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_number("lambda_", lambda_, above=0)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.lambda_ = lambda_

    def forward(self, input: Float[Tensor, "*rows in_features"]) -> Float[Tensor, "*rows out_features"]:  # noqa: A002
        """Return the outputs of the plain layer.

        Args:
            input: Rows along the last dimension.
        """
        output: Tensor = LinearFunction.apply(input, self.weight, self.bias, self.lambda_)
        return output

    def plain(self) -> nn.Linear:
        """Return a :class:`torch.nn.Linear` with the same parameters."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return _share(layer, self)

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        return f"{super().extra_repr()}, lambda_={self.lambda_}"


class TrActConv2d(nn.Conv2d):
    """A convolution whose weights step so that its outputs follow their gradient.

    What :class:`TrActLinear` is to the patches of the images: a row is a patch, and b counts patches, not images. With
    groups, each has a Gram matrix of its own.

    Args:
        in_channels: Channels of the images.
        out_channels: Channels of the outputs.
        kernel_size: As in torch.
        stride: As in torch.
        padding: Zeros around the images, a number or two.
        dilation: As in torch.
        groups: As in torch.
        bias: Whether there is one.
        lambda_: λ > 0.
        padding_mode: ``"zeros"``.
        device: As in torch.
        dtype: As in torch.

    Shape:
        (batch, in_channels, height, width) → (batch, out_channels, height', width').

    Returns:
        The outputs of the plain layer.

    Raises:
        ValueError: ``lambda_`` ≤ 0, or ``padding_mode`` is another.
        TypeError: ``padding`` is a string, or ``lambda_`` no number.
        RuntimeError: The gradient is differentiated once more.

    Cost: that of the plain layer, and in the backward pass patches · n² for the Gram matrix of n = in_channels /
    groups · kernel entries and n³ / 3 for its solution; patches are unfolded 64 MiB at a time (in float32).

    Source: the paper's section 3, on convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        lambda_: float = 0.1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_number("lambda_", lambda_, above=0)
        _check_padding(padding, padding_mode)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self.lambda_ = lambda_

    def forward(
        self,
        input: Float[Tensor, "batch in_channels height width"],  # noqa: A002 - torch's name
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Return the outputs of the plain layer.

        Args:
            input: Images.
        """
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        output: Tensor = Conv2dFunction.apply(input, self.weight, self.bias, *geometry, self.lambda_)
        return output

    def plain(self) -> nn.Conv2d:
        """Return a :class:`torch.nn.Conv2d` with the same parameters."""
        return _share(nn.Conv2d(**_geometry(self), device="meta"), self)

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        return f"{super().extra_repr()}, lambda_={self.lambda_}"


def _check_padding(padding: Any, mode: str) -> None:
    if isinstance(padding, str):
        raise TypeError(f"padding must be a number or two of them, got {padding!r}")
    if mode != "zeros":
        raise ValueError(f"padding_mode must be 'zeros', got {mode!r}")


def _geometry(layer: nn.Conv2d) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return {**{name: getattr(layer, name) for name in names}, "bias": layer.bias is not None}


def _share(made: _Layer, layer: nn.Module) -> _Layer:
    made.weight, made.bias = layer.weight, layer.bias
    return made.train(layer.training)


def tract(layer: nn.Linear | nn.Conv2d, lambda_: float = 0.1) -> TrActLinear | TrActConv2d:
    """Return a layer that trains by TrAct and shares the given one's parameters.

    Args:
        layer: A linear layer or a convolution of images; ``.plain()`` of the result converts back.
        lambda_: λ > 0.

    Returns:
        The layer, in the mode of the given one.

    Raises:
        TypeError: ``layer`` is neither, a subclass with a forward of its own for one; or its ``padding`` is a string.
        ValueError: ``lambda_`` ≤ 0, or its ``padding_mode`` is not zeros.

    Cost: none; nothing is copied.

    Source: the authors' wrapper of the same name.
    """
    if type(layer) in (TrActLinear, TrActConv2d):
        layer = layer.plain()
    if type(layer) is nn.Linear:
        linear_made = TrActLinear(layer.in_features, layer.out_features, layer.bias is not None, lambda_, "meta")
        return _share(linear_made, layer)
    if type(layer) is not nn.Conv2d:
        raise TypeError(f"layer must be a torch.nn.Linear or torch.nn.Conv2d, got {type(layer).__name__}")
    _check_padding(layer.padding, layer.padding_mode)
    return _share(TrActConv2d(**_geometry(layer), lambda_=lambda_, device="meta"), layer)


def apply_tract_first_layer(model: nn.Module, *inputs: Any, lambda_: float = 0.1) -> nn.Module:
    """Replace the first layer with parameters that a forward pass meets, in place.

    Args:
        model: A network; its first layer must be linear or a convolution of images.
        inputs: Arguments of one forward pass, run in evaluation mode without gradients, for a model that
            :mod:`torch.fx` cannot trace; without any, it is traced.
        lambda_: λ > 0.

    Returns:
        The model; where the model itself is the layer, the layer that replaces it.

    Raises:
        TypeError: The first layer of ``model`` is another (an embedding, for one), or it cannot be traced.
        ValueError: ``model`` has no layer with parameters, or ``lambda_`` ≤ 0.

    Cost: one trace, or one forward pass.

    Source: the paper applies it to the first layer alone.
    """
    check_number("lambda_", lambda_, above=0)
    if isinstance(model, nn.Linear | nn.Conv2d):
        return tract(model, lambda_)
    first = _first_run(model, inputs) if inputs else _first_traced(model)
    if first is None:
        raise ValueError(f"model must have a layer with parameters, got {type(model).__name__} without one")
    if not isinstance(first, nn.Linear | nn.Conv2d):
        raise TypeError(f"model's first layer must be linear or a convolution of images, got {type(first).__name__}")
    replacement = tract(first, lambda_)
    for parent in list(model.modules()):  # a layer may be used under several names
        for name, child in parent._modules.items():
            if child is first:
                setattr(parent, name, replacement)
    return model


def _first_traced(model: nn.Module) -> nn.Module | None:
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        raise TypeError(f"model cannot be traced ({error}): give the inputs of one forward pass too") from error
    called = (model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module")
    return next((layer for layer in called if _has_own_parameters(layer)), None)


def _first_run(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module | None:
    met: list[nn.Module] = []
    own = [layer for layer in model.modules() if _has_own_parameters(layer) and not any(layer.children())]
    hooks = [layer.register_forward_pre_hook(lambda layer, _: met.append(layer)) for layer in own]
    try:
        with evaluating(model):
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return next(iter(met), None)


def _has_own_parameters(layer: nn.Module) -> bool:
    return next(layer.parameters(recurse=False), None) is not None
