"""The variances that Virgo gives to weights, from a graph's operators, features and classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.experiment.checks import check_choice, check_integer

Mode = Literal["both", "forward", "backward"]
Combine = Literal["harmonic", "arithmetic"]
Operator = Callable[[Tensor], Tensor]

_NEGLIGIBLE = 1e-7
"""A mean feature this small beside the features' size is what rounding leaves of zero."""


def virgo_variances(
    operators: Sequence[Operator],
    x: Float[Tensor, "nodes features"],
    dims: Sequence[int],
    num_classes: int,
    mode: Mode = "both",
    combine: Combine = "harmonic",
) -> list[float]:
    r"""Return the variance v_l of every layer's weights in h ← ReLU(P_l h W_l), l = 1 … L.

    With the mean feature x̄ of each node, c_l = ‖P_l⋯P_1 x̄‖² and b_k = ‖P_{L−k+1}⋯P_L 1‖²:

    - forward: v_1 = 2/m_0, v_l = (2/m_{l−1}) c_{l−1}/c_l, so that outputs of all layers vary alike;
    - backward: v_L = N/((C − 1) b_1), and the k-th layer from the end (2/m_{L−k+1}) b_{k−1}/b_k, so that gradients do;
    - both: the harmonic mean 2/(1/v^f + 1/v^b), or the arithmetic one.

    Args:
        operators: The aggregation v ↦ P_l v of each layer, first to last, on vectors with one entry a node.
        x: Features of the nodes. For graph-level tasks, those of a batch of training graphs, with block-diagonal
            operators.
        dims: Widths m_0 (input), m_1, …, m_L (output).
        num_classes: C; 2 for link prediction.
        mode: ``"forward"``, ``"backward"``, or ``"both"``.
        combine: The mean that ``"both"`` takes: ``"harmonic"`` or ``"arithmetic"``.

    Shape:
        ``x`` (nodes, features); operators map (nodes,) to (nodes,), in float64.

    Returns:
        v_1 … v_L.

    Raises:
        ValueError: ``operators`` is empty or not one fewer than ``dims``, a width is below 1, ``num_classes`` < 2
            where gradients count, ``mode`` or ``combine`` is unknown, or a graph factor is zero: ``x`` averages to
            zero at every node, or nothing is left of a signal after a layer.

    Warns:
        UserWarning: Hidden widths differ. The paper has one width for all; each layer then counts with its own
            fan-in forward, and its own fan-out backward.

    Cost: 2L products with operators; O(nodes) memory beyond ``x``.

    Source: the paper's Virgo-forward, Virgo-backward and their harmonic mean, as in the published code.
    """
    check_choice("mode", mode, ("both", "forward", "backward"))
    check_choice("combine", combine, ("harmonic", "arithmetic"))
    if len(operators) == 0 or len(dims) != len(operators) + 1:
        raise ValueError(f"operators must be one or more, one fewer than dims ({len(dims)}), got {len(operators)}")
    for place, width in enumerate(dims):
        check_integer(f"dims[{place}]", width, at_least=1)
    if len(set(dims[1:-1])) > 1:
        warnings.warn(f"dims has hidden widths {list(dims[1:-1])}, the paper has equal ones", stacklevel=2)
    if mode == "forward":
        return _forward(operators, x, dims)
    check_integer("num_classes", num_classes, at_least=2)
    backward = _backward(operators, x, dims, num_classes)
    if mode == "backward":
        return backward
    pairs = zip(_forward(operators, x, dims), backward, strict=True)
    if combine == "harmonic":
        return [2 / (1 / one + 1 / other) for one, other in pairs]
    return [(one + other) / 2 for one, other in pairs]


def _forward(operators: Sequence[Operator], x: Tensor, dims: Sequence[int]) -> list[float]:
    mean = x.detach().mean(dim=1, dtype=torch.float64)
    size = torch.linalg.vector_norm(x.detach(), dtype=torch.float64) / max(x.shape[1], 1) ** 0.5
    if mean.norm().item() <= _NEGLIGIBLE * size.item():
        raise ValueError("x averages to zero at every node, so that it has no graph factor; x.abs() has one")
    factors = [2 / dims[0]]
    ratios = _shrinkage(operators, mean)
    return factors + [2 / width * ratio for width, ratio in zip(dims[1:-1], ratios[1:], strict=True)]


def _backward(operators: Sequence[Operator], x: Tensor, dims: Sequence[int], num_classes: int) -> list[float]:
    ones = torch.ones(len(x), dtype=torch.float64, device=x.device)
    ratios = _shrinkage(operators[::-1], ones)
    last = ratios[0] / (num_classes - 1)  # ‖1‖² = N
    rest = [2 / width * ratio for width, ratio in zip(dims[-2:0:-1], ratios[1:], strict=True)]
    return [last, *rest][::-1]


def _shrinkage(operators: Sequence[Operator], signal: Tensor) -> list[float]:
    """Return ‖s‖²/‖P s‖² before and after each operator in turn."""
    ratios = []
    for place, operator in enumerate(operators):
        # Powers of a sum over neighbours leave any number format; directions and ratios do not.
        signal = operator(signal / signal.norm())
        left = signal.square().sum().item()
        if not left > 0:
            raise ValueError(f"operators: nothing is left of x's mean, or of ones, after {place + 1} in a row")
        ratios.append(1 / left)
    return ratios
