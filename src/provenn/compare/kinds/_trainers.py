"""How trainers of the catalogue that make their own layers are built to a perceptron's sizes, and plain training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from provenn.core.experiment.training import predict, train

Build = Callable[..., Any]
"""``build(part, sizes, **settings)`` makes a trainer for a perceptron of these sizes."""


class Backpropagation:
    """Trains a classifier end to end by Adam on cross-entropy: what the others are compared with.

    Args:
        model: The network.
        epochs: Passes over the data.
        lr: Learning rate.
    """

    def __init__(self, model: nn.Module, epochs: int, lr: float = 1e-3) -> None:
        self.model, self.epochs, self.lr = model, epochs, lr

    def fit(self, loader: Iterable[tuple[Tensor, Tensor]], progress: Callable[[Any], None]) -> None:
        """Train on a loader, which is iterated once an epoch."""
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr)

        def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.cross_entropy(model(x), y)

        for epoch in train(self.model, optimizer, lambda _: loader, loss, epochs=self.epochs):
            progress(epoch)

    def predict(self, x: Tensor) -> Tensor:
        """Return the classes of samples."""
        return predict(self.model, x).argmax(dim=1)


def sizes_of(model: nn.Module) -> list[int]:
    """Return the widths of a perceptron: its input, hidden layers and classes.

    Raises:
        ValueError: The linear layers do not follow each other, so it is no perceptron.
    """
    linear = [one for one in model.modules() if isinstance(one, nn.Linear)]
    if not linear or any(a.out_features != b.in_features for a, b in pairwise(linear)):
        raise ValueError(f"the task's network must be a perceptron to be rebuilt for this part, got {model}")
    return [linear[0].in_features, *(one.out_features for one in linear)]


def _encoder(sizes: Sequence[int]) -> dict[str, Any]:
    """Return what a block takes, with the perceptron's first layer for the data and its last width for the rest."""
    return {
        "features": nn.Sequential(nn.Flatten(), nn.Linear(sizes[0], sizes[1]), nn.ReLU()),
        "feature_dim": sizes[1],
        "embed_dim": sizes[-1],
        "num_classes": sizes[-1],
        "hidden": sizes[-2],
    }


def _noprop_dt(part: Any, sizes: Sequence[int], **settings: Any) -> Any:
    from provenn.training import DenoisingBlock

    return part(lambda: DenoisingBlock(**_encoder(sizes)), **settings)


def _noprop_ct(part: Any, sizes: Sequence[int], **settings: Any) -> Any:
    from provenn.training import DenoisingBlock

    return part(DenoisingBlock(**_encoder(sizes), batch_norm=False, time_dim=sizes[-2]), **settings)


def _noprop_fm(part: Any, sizes: Sequence[int], **settings: Any) -> Any:
    from provenn.training import VelocityBlock

    return part(VelocityBlock(**_encoder(sizes), batch_norm=False, time_dim=sizes[-2]), **settings)


def _forward_forward(part: Any, sizes: Sequence[int], **settings: Any) -> Any:
    widths = [sizes[0] + sizes[-1], *sizes[1:-1]]
    layers = [nn.Sequential(nn.Linear(wide, narrow), nn.ReLU()) for wide, narrow in pairwise(widths)]
    return part(layers, sizes[-1], **settings)


def _target_propagation(part: Any, sizes: Sequence[int], **settings: Any) -> Any:
    layers: list[nn.Module] = [nn.Sequential(nn.Flatten(), nn.Linear(sizes[0], sizes[1]), nn.Tanh())]
    layers += [nn.Sequential(nn.Linear(wide, narrow), nn.Tanh()) for wide, narrow in pairwise(sizes[1:-1])]
    inverses = [nn.Sequential(nn.Linear(narrow, wide), nn.Tanh()) for wide, narrow in pairwise(sizes[1:-1])]
    return part([*layers, nn.Linear(sizes[-2], sizes[-1])], inverses, **settings)


BUILD: Mapping[str, Build] = {
    "NoPropDT": _noprop_dt,
    "NoPropCT": _noprop_ct,
    "NoPropFM": _noprop_fm,
    "ForwardForwardTrainer": _forward_forward,
    "DifferenceTargetPropagation": _target_propagation,
}
"""For trainers that make layers of their own kind; one that takes the task's network as ``model`` needs no entry."""
