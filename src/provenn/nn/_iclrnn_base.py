"""What the recurrent layers share: checks of their input, its expansion, and the readout."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer

LOST = {
    "tanh": "convexity",
    "sigmoid": "convexity",
    "gelu": "monotonicity and convexity",
    "silu": "monotonicity and convexity",
    "selu": "the Lipschitz constant 1",
    "leaky_relu": "non-negative outputs, which a convex control objective needs",
    "elu": "non-negative outputs, which a convex control objective needs",
    "identity": "non-negative outputs, which a convex control objective needs",
    "softplus": "the fixed point 0 of the zero state",
}
"""What each other activation would take from the layers."""


def check_activation(activation: str) -> None:
    """Check that the activation is ReLU, and say what another would lose.

    Raises:
        ValueError: It is not.
    """
    if activation != "relu":
        lost = LOST.get(activation, "convexity, monotonicity or the Lipschitz constant 1")
        raise ValueError(f"activation must be 'relu', got {activation!r}, which loses {lost}")


def check_features(name: str, x: Tensor, size: int, ndim: int) -> None:
    """Check a tensor's number of dimensions and its last size.

    Raises:
        TypeError: It is no floating-point tensor.
        ValueError: It has another number of dimensions, another last size, or no steps.
    """
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(x.shape)}")
    if x.shape[-1] != size:
        raise ValueError(f"{name} must have a last dimension of {size}, got {x.shape[-1]}")
    if ndim == 3 and x.shape[1] == 0:
        raise ValueError(f"{name} must have at least one step, got shape {tuple(x.shape)}")


def check_sizes(input_size: int, hidden_size: int, num_layers: int, output_size: int | None) -> None:
    """Check the sizes of a stack of layers.

    Raises:
        TypeError: One is no integer.
        ValueError: One is < 1.
    """
    sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
    if output_size is not None:
        sizes["output_size"] = output_size
    for name, size in sizes.items():
        check_integer(name, size, at_least=1)


def expand(x: Float[Tensor, "*rest d"]) -> Float[Tensor, "*rest d2"]:
    """Return [x; −x], in which a non-decreasing map can be any convex map of x."""
    return torch.cat((x, -x), -1)


def readout(hidden_size: int, output_size: int | None) -> nn.Linear | None:
    """Return the linear map to the outputs, if any: Glorot-uniform with bias 0, as the authors' framework draws it."""
    if output_size is None:
        return None
    linear = nn.Linear(hidden_size, output_size)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def relu_recurrence(
    projected: Float[Tensor, "batch time hidden"], recurrent: Float[Tensor, "hidden hidden"]
) -> Float[Tensor, "batch time hidden"]:
    """Run h_t = ReLU(p_t + U h_{t−1}) from h_0 = 0.

    Cost: one product (batch, hidden) by (hidden, hidden) a step, one step after the other.
    """
    first, *rest = projected.unbind(1)
    h = first.relu()
    states = [h]
    for p in rest:
        h = torch.addmm(p, h, recurrent.mT).relu()
        states.append(h)
    return torch.stack(states, 1)
