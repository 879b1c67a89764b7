"""The forward-forward algorithm: layers that tell samples with their labels from samples with wrong ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.recording import evaluating
from provenn.core.experiment.seeding import generator
from provenn.training._noprop_data import LabelledData, Progress, Settings, TrainingResult, fit_epochs


class ForwardForwardTrainer:
    """Train each layer to be active on samples shown with their label, and quiet on ones with a wrong label.

    A layer's goodness g is the mean of its squared outputs. Layer by layer, on inputs of unit mean square that pass no
    gradient back, the loss is softplus(θ − g) on right and softplus(g − θ) on wrong labels. The class of a sample is
    the label with the most goodness, summed over the layers after the first.

    Args:
        layers: Modules that follow each other, each with its own nonlinearity, trained in place. The first takes a
            sample's entries and, behind them, ``num_classes`` entries for the label.
        num_classes: m.
        threshold: θ.
        label_scale: The value that marks the label.
        seed: Of the data's order and the wrong labels.
        epochs: Passes over the data.
        batch_size: Samples a batch, of tensors; a loader makes its own.
        lr: AdamW's learning rate.
        weight_decay: AdamW's weight decay.

    Attributes:
        model: The layers.
        num_classes: m.

    Raises:
        ValueError: No layers, or a number out of range.

    Cost: an epoch runs each layer twice forward and back; a prediction runs the layers m times.

    Source: Hinton, "The forward-forward algorithm", arXiv 2212.13345, section 3.3. There the label overwrites pixels
    at the border; here it is appended, so that it suits any data. The mean of squares stands for their sum, so that θ
    suits any width. With one layer, that one's goodness counts.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module] | nn.Sequential | nn.ModuleList,
        num_classes: int,
        *,
        threshold: float = 2.0,
        label_scale: float = 1.0,
        seed: int = 0,
        epochs: int = 100,
        batch_size: int = 128,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        self._settings = Settings(epochs, batch_size, lr, weight_decay, seed)
        self.model = nn.ModuleList(layers)
        if len(self.model) == 0:
            raise ValueError("layers must hold at least one layer, got none")
        check_integer("num_classes", num_classes, at_least=2)
        check_number("threshold", threshold, above=0)
        check_number("label_scale", label_scale, above=0)
        self.num_classes, self.threshold, self.label_scale = num_classes, threshold, label_scale

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
            ValueError: A label outside 0 … m − 1, no samples, or a checkpoint of another run.
            TypeError: ``data`` cannot be passed over again, or labels are no integers.
        """
        held = LabelledData(data, labels, self.num_classes, self._settings)
        history = fit_epochs(self.model, self._loss, held.passes, self._settings, checkpoint, progress)
        return TrainingResult(history, self.model)

    def predict(self, x: Float[Tensor, "samples *data"], batch_size: int = 512) -> Int[Tensor, " samples"]:
        """Return the label of each sample that the layers find best.

        Args:
            x: Samples.
            batch_size: Samples at a time.
        """
        check_integer("batch_size", batch_size, at_least=1)
        with evaluating(self.model):
            return torch.cat([self.goodness(part).argmax(dim=1) for part in x.split(batch_size)])

    def goodness(self, x: Float[Tensor, "batch *data"]) -> Float[Tensor, "batch classes"]:
        """Return the goodness of each label, summed over the layers after the first."""
        repeated = x.repeat_interleave(self.num_classes, dim=0)
        every = torch.arange(self.num_classes, device=x.device).repeat(len(x))
        found = [outputs.flatten(1).square().mean(1) for outputs in self._layers(self._labelled(repeated, every))]
        return sum(found[1:] or found).view(len(x), self.num_classes)

    def _labelled(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x.flatten(1), self.label_scale * F.one_hot(y, self.num_classes).to(x.dtype)], dim=1)

    def _layers(self, x: Tensor) -> Iterator[Tensor]:
        """Yield each layer's outputs; no gradient goes from one to the one before."""
        for layer in self.model:
            outputs = layer(x)
            yield outputs
            scale = outputs.flatten(1).square().mean(1).add(1e-8).rsqrt()
            x = (outputs * scale.view(-1, *[1] * (outputs.ndim - 1))).detach()

    def loss(
        self, x: Float[Tensor, "batch *data"], y: Int[Tensor, " batch"], draws: torch.Generator
    ) -> Float[Tensor, ""]:
        """Return a batch's loss, summed over the layers.

        Args:
            x: Samples.
            y: Their classes.
            draws: Draws the wrong labels, uniformly.
        """
        shift = torch.randint(1, self.num_classes, y.shape, generator=draws, device=draws.device).to(y.device)
        both = torch.cat([self._labelled(x, y), self._labelled(x, (y + shift) % self.num_classes)])
        sign = torch.ones(len(both), dtype=x.dtype, device=x.device)
        sign[: len(x)] = -1
        losses = [
            F.softplus(sign * (outputs.flatten(1).square().mean(1) - self.threshold)).mean()
            for outputs in self._layers(both)
        ]
        return torch.stack(losses).sum()

    def _loss(self, model: nn.Module, x: Tensor, y: Tensor, place: Tensor) -> Tensor:
        return self.loss(x, y, generator(self._settings.seed, "wrong labels", *place.tolist(), device=x.device))
