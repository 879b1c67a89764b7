"""Graphs of operations as layers that train."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.nn._evonorm_graph import AGGREGATIONS, INPUTS, NormActGraph
from provenn.nn._evonorm_layer import check_images, groups_of, wide


def signed_log(x: Tensor) -> Tensor:
    """Return sign(x) ln |x|, 0 at 0 with slope 0."""
    return x.sign() * torch.where(x == 0, 1, x).abs().log()


def signed_sqrt(x: Tensor) -> Tensor:
    """Return sign(x) √|x|, 0 at 0 with slope 0."""
    return x.sign() * torch.where(x == 0, 1, x).abs().sqrt()


ELEMENTWISE: Mapping[str, Callable[..., Tensor]] = {
    "add": torch.add, "mul": torch.mul, "div": torch.div, "max": torch.maximum,
    "neg": torch.neg, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "exp": torch.exp,
    "log": signed_log, "abs": torch.abs, "square": torch.square, "sqrt": signed_sqrt,
}  # fmt: skip


class NormActLayer(nn.Module):
    """A graph of operations as a layer, with γ, β and, where they are used, v₀ and v₁.

    Aggregations over the batch keep running values, which stand for the batch's in eval mode: of the mean, of the
    mean square, and of the variance with the factor n / (n − 1), n the pixels of the whole batch. Aggregations are
    taken in float32 or wider; the output has the type of the input.

    Args:
        graph: The function.
        num_features: Channels.
        groups: Groups of channels, for aggregations over groups.
        group_size: Channels of a group, in place of ``groups``.
        eps: Added to variances and mean squares under the root.
        momentum: The weight of the newest batch in running values.
        apply_act: Whether to apply the graph; ``False`` leaves γ x + β.
        device: Where the parameters are made.
        dtype: Their type.

    Shape:
        Input and output (batch, num_features, height, width).

    Raises:
        ValueError: A number out of range, groups that do not divide the channels, an input of another shape, or in
            training one sample of 1 × 1 pixel where the graph aggregates over the batch.
        TypeError: ``graph`` is no :class:`NormActGraph`, or a number is of the wrong type.

    Cost: a tensor of the input's size a used node, in time and, for the backward pass, in memory.

    Source: arXiv 2004.02967, on the search space.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    v0: nn.Parameter | None
    v1: nn.Parameter | None

    def __init__(
        self,
        graph: NormActGraph,
        num_features: int,
        groups: int = 32,
        group_size: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
        apply_act: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(graph, NormActGraph):
            raise TypeError(f"graph must be a NormActGraph, got {graph!r}")
        check_integer("num_features", num_features, at_least=1)
        check_number("eps", eps, at_least=0)
        check_number("momentum", momentum, at_least=0, at_most=1)
        self.graph, self.num_features, self.eps, self.momentum = graph, num_features, eps, momentum
        self.apply_act = apply_act
        used = graph.used if apply_act else frozenset[int]()
        self.steps = [
            (place, *node) for place, node in enumerate(graph.nodes, len(INPUTS)) if place in used
        ]  # fmt: skip
        grouped = any(op.endswith("_whcg") for _, op, _ in self.steps)
        self.groups = groups_of(num_features, groups, group_size) if grouped else 1
        place = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(num_features, **place))
        self.bias = nn.Parameter(torch.zeros(num_features, **place))
        v0 = nn.Parameter(torch.zeros(num_features, **place)) if INPUTS.index("v0") in used else None
        v1 = nn.Parameter(torch.ones(num_features, **place)) if INPUTS.index("v1") in used else None
        self.register_parameter("v0", v0)
        self.register_parameter("v1", v1)
        for index, op, _ in self.steps:
            if op.endswith("_bwh"):
                start = torch.zeros if op.startswith("mean") else torch.ones
                self.register_buffer(_running(index), start(num_features, **place))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Compute γ times the graph's output plus β.

        Args:
            x: Feature maps.

        Returns:
            Feature maps of the same shape and type.
        """
        check_images(x, self.num_features)
        if self.steps and x.shape[0] > 0:
            found = {0: x, 1: x.new_zeros(1, 1, 1, 1)}
            for index, vector in ((2, self.v0), (3, self.v1)):
                if vector is not None:
                    found[index] = _per_channel(vector, x)
            for place, op, inputs in self.steps:
                taken = [found[index] for index in inputs]
                found[place] = (
                    self._aggregated(place, op, taken[0], x) if op in AGGREGATIONS else ELEMENTWISE[op](*taken)
                )
            x = found[self.steps[-1][0]].expand_as(x)
        return x * _per_channel(self.weight, x) + _per_channel(self.bias, x)

    def _aggregated(self, place: int, op: str, of: Tensor, x: Tensor) -> Tensor:
        moment, axes = op.split("_")
        if axes == "bwh":
            value = self._over_batch(place, moment, of, x)
        elif axes == "whcg" and of.shape[1] > 1:
            split = wide(of).unflatten(1, (self.groups, -1))
            value = _moment(moment, split, (2, 3, 4)).expand(-1, -1, split.shape[2], -1, -1).flatten(1, 2)
        else:  # where all channels are equal, a group's are too
            value = _moment(moment, wide(of), (1, 2, 3) if axes == "whc" else (2, 3))
        return (value if moment == "mean" else (value + self.eps).sqrt()).to(x.dtype)

    def _over_batch(self, place: int, moment: str, of: Tensor, x: Tensor) -> Tensor:
        running: Tensor = getattr(self, _running(place))
        if not self.training:
            return wide(running).view(1, -1, 1, 1)
        count = x.numel() // self.num_features
        if count == 1:
            raise ValueError(f"x must have more than one value a channel in training, got shape {tuple(x.shape)}")
        value = _moment(moment, wide(of), (0, 2, 3))
        with torch.no_grad():
            newest = value.expand(1, self.num_features, 1, 1).flatten()
            factor = count / (count - 1) if moment == "std" else 1.0
            running.lerp_((newest * factor).to(running.dtype), self.momentum)
        return value

    def extra_repr(self) -> str:
        """Describe the layer in a line."""
        return f"{self.num_features}, {self.graph.to_formula() if self.apply_act else 'x · γ + β'}"


def _moment(moment: str, x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return mean, mean square or biased variance. Of what was broadcast it is that of what it is broadcast to."""
    if moment == "std":
        return x.var(dims, correction=0, keepdim=True)
    return (x if moment == "mean" else x.square()).mean(dims, keepdim=True)


def _running(place: int) -> str:
    return f"running_{place}"


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(1, -1, 1, 1)
