"""Difference target propagation: each layer learns towards a target that approximate inverses carry down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_number
from provenn.core.experiment.seeding import generator
from provenn.core.experiment.training import predict
from provenn.training._noprop_data import (
    LabelledData,
    Progress,
    Settings,
    TrainingResult,
    fit_epochs,
    normal_like,
)


class DifferenceTargetPropagation:
    """Train layers h_i = f_i(h_{i−1}) towards targets, ĥ_{i−1} = h_{i−1} + g_i(ĥ_i) − g_i(h_i).

    The last layer's outputs are logits and descend their cross entropy. The target of the layer below it is a step of
    gradient descent on that loss; those further down come by the inverses g_i. A layer descends ‖f_i(h_{i−1}) − ĥ_i‖²,
    an inverse ‖g_i(f_i(h_{i−1} + ε)) − (h_{i−1} + ε)‖²; no gradient crosses a layer.

    Args:
        layers: f_1 … f_L, each with its own nonlinearity, trained in place; the last one's outputs are logits.
        inverses: g_2 … g_{L−1}: the first maps the second layer's outputs back to the first's.
        target_step: Length of the gradient step that makes the highest target, per sample.
        noise: Standard deviation of ε.
        seed: Of the data's order and of ε.
        epochs: Passes over the data.
        batch_size: Samples a batch, of tensors; a loader makes its own.
        lr: AdamW's learning rate.
        weight_decay: AdamW's weight decay.

    Attributes:
        model: Layers and inverses.

    Raises:
        ValueError: Fewer than two layers, inverses that are not L − 2, or a number out of range.

    Cost: an epoch runs each layer and inverse three times forward and once back.

    Source: Lee, Zhang, Fischer and Bengio, "Difference target propagation", arXiv 1412.7525, algorithm 1. Layers and
    inverses learn in the same step; squared errors are summed over units.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module] | nn.Sequential | nn.ModuleList,
        inverses: Sequence[nn.Module] | nn.Sequential | nn.ModuleList,
        *,
        target_step: float = 1.0,
        noise: float = 0.1,
        seed: int = 0,
        epochs: int = 100,
        batch_size: int = 128,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        self._settings = Settings(epochs, batch_size, lr, weight_decay, seed)
        check_number("target_step", target_step, above=0)
        check_number("noise", noise, at_least=0)
        self.layers, self.inverses = nn.Sequential(*layers), nn.ModuleList(inverses)
        if len(self.layers) < 2:
            raise ValueError(f"layers must hold at least two layers, got {len(self.layers)}")
        if len(self.inverses) != len(self.layers) - 2:
            raise ValueError(
                f"inverses must be {len(self.layers) - 2}, one of each layer but the first and the last, "
                f"got {len(self.inverses)}"
            )
        self.target_step, self.noise = target_step, noise
        self.model = nn.ModuleDict({"layers": self.layers, "inverses": self.inverses})

    def fit(
        self,
        data: Any,
        labels: Int[Tensor, " samples"] | None = None,
        *,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> TrainingResult:
        """Train; the arguments are those of :meth:`NoPropDT.fit`.

        Raises:
            ValueError: A negative label, no samples, or a checkpoint of another run.
            IndexError: A label beyond the last layer's outputs.
            TypeError: ``data`` cannot be passed over again, or labels are no integers.
        """
        held = LabelledData(data, labels, torch.iinfo(torch.int64).max, self._settings)
        history = fit_epochs(self.model, self._loss, held.passes, self._settings, checkpoint, progress)
        return TrainingResult(history, self.model)

    def predict(self, x: Float[Tensor, "samples *data"], batch_size: int = 512) -> Int[Tensor, " samples"]:
        """Return the class of each sample.

        Args:
            x: Samples.
            batch_size: Samples at a time.
        """
        return predict(self.layers, x, batch_size).argmax(dim=1)

    def targets(self, x: Float[Tensor, "batch *data"], y: Int[Tensor, " batch"]) -> tuple[list[Tensor], list[Tensor]]:
        """Return h_1 … h_{L−1} and their targets, without gradients.

        Args:
            x: Samples.
            y: Their classes.
        """
        hidden = []
        with torch.no_grad():
            for layer in self.layers[:-1]:
                x = layer(x)
                hidden.append(x)
        top = hidden[-1].detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(self.layers[-1](top), y, reduction="sum")  # a step per sample
        (slope,) = torch.autograd.grad(loss, top)
        found = [hidden[-1] - self.target_step * slope]
        with torch.no_grad():
            for inverse, below, here in zip(
                reversed(self.inverses), reversed(hidden[:-1]), reversed(hidden[1:]), strict=True
            ):
                found.append(below + inverse(found[-1]) - inverse(here))
        return hidden, found[::-1]

    def _loss(self, model: nn.Module, x: Tensor, y: Tensor, place: Tensor) -> Tensor:
        return self.loss(x, y, generator(self._settings.seed, "noise", *place.tolist(), device=x.device))

    def loss(
        self, x: Float[Tensor, "batch *data"], y: Int[Tensor, " batch"], draws: torch.Generator
    ) -> Float[Tensor, ""]:
        """Return a batch's loss, summed over layers and inverses.

        Args:
            x: Samples.
            y: Their classes.
            draws: Draws ε.
        """
        hidden, targets = self.targets(x, y)
        inputs = [x, *hidden]
        losses = [F.cross_entropy(self.layers[-1](hidden[-1]), y)]
        for layer, before, target in zip(self.layers, inputs, targets, strict=False):
            losses.append(_squared(layer(before), target))
        for layer, inverse, before in zip(self.layers[1:-1], self.inverses, hidden, strict=False):
            shaken = before + self.noise * normal_like(before, draws)
            with torch.no_grad():
                outputs = layer(shaken)
            losses.append(_squared(inverse(outputs), shaken))
        return torch.stack(losses).sum()


def _squared(found: Tensor, wanted: Tensor) -> Tensor:
    return (found - wanted).square().flatten(1).sum(1).mean()
