"""What the three NoProp trainers have in common: data in, classes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer
from provenn.core.experiment.recording import evaluating
from provenn.core.experiment.seeding import generator
from provenn.training._noprop_data import (
    ClassEmbeddings,
    LabelledData,
    Progress,
    Settings,
    TrainingResult,
    fit_epochs,
    normal_like,
)


class NoPropTrainer(ABC):
    """Base of the trainers."""

    model: nn.Module
    embeddings: ClassEmbeddings
    num_classes: int
    embed_dim: int

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def fit(
        self,
        data: Any,
        labels: Int[Tensor, " samples"] | None = None,
        *,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> TrainingResult:
        """Train; calls after the first go on from the weights there are.

        Args:
            data: Samples along the first dimension, on the network's device; or, without ``labels``, a loader: any
                iterable of (x, y) batches that can be iterated anew. A loader's shuffling resumes exactly if it draws
                from torch's global generator, as a ``DataLoader`` without one of its own does.
            labels: Classes from 0.
            checkpoint: File that holds everything after every epoch; if it exists, training goes on from it.
            progress: Called after every epoch, once it is saved.

        Returns:
            History and model.

        Raises:
            ValueError: A label outside 0 … m − 1, no samples, or a checkpoint of another run.
            TypeError: ``data`` cannot be passed over again, or labels are no integers.
            FloatingPointError: The loss is no finite number any more.
        """
        held = self._data(data, labels)
        history = fit_epochs(
            self.model, self._loss, lambda epoch: self._epoch(held, epoch), self._settings, checkpoint, progress
        )
        return TrainingResult(history, self.model)

    def predict(
        self,
        x: Float[Tensor, "samples *data"],
        steps: int | None = None,
        generator: torch.Generator | None = None,
        *,
        draws: int = 1,
    ) -> Int[Tensor, " samples"]:
        """Return the most probable class of each sample; the arguments are those of :meth:`predict_proba`."""
        return self.predict_proba(x, steps, generator, draws=draws).argmax(dim=1)

    def predict_proba(
        self,
        x: Float[Tensor, "samples *data"],
        steps: int | None = None,
        generator: torch.Generator | None = None,
        *,
        draws: int = 1,
        batch_size: int = 512,
    ) -> Float[Tensor, "samples classes"]:
        """Return the probability of each class, from noise to class by the blocks or the integrator.

        Args:
            x: Samples.
            steps: Steps of the integrator; in discrete time it is the number of blocks, or ``None``.
            generator: Draws the noise. ``None`` for one that derives from the trainer's seed, anew at each call.
            draws: How many runs from fresh noise are averaged.
            batch_size: Samples at a time; the noise depends on it.

        Shape: (samples, …) → (samples, m).

        Raises:
            ValueError: ``steps``, ``draws`` or ``batch_size`` < 1, or prototypes that no data have given yet.

        Cost: ``draws`` times ``steps`` runs of a block; the data are encoded once a block.
        """
        if steps is not None:
            check_integer("steps", steps, at_least=1)
        check_integer("draws", draws, at_least=1)
        check_integer("batch_size", batch_size, at_least=1)
        self.embeddings.check_started()
        noise = generator if generator is not None else self._generator("predict", x)
        with evaluating(self.model):
            parts = [self._mean_probability(part, steps, noise, draws) for part in x.split(batch_size)]
        return torch.cat(parts)

    def _mean_probability(self, x: Tensor, steps: int | None, noise: torch.Generator, draws: int) -> Tensor:
        encoded = self._encode(x)
        weight = self.embeddings.weight
        total = weight.new_zeros(len(x), self.num_classes)
        for _ in range(draws):
            start = normal_like(weight.new_empty(len(x), self.embed_dim), noise)
            total += self._classify(encoded, start, steps, noise).softmax(dim=1)
        return total / draws

    def _generator(self, name: str, like: Tensor, *keys: int) -> torch.Generator:
        return generator(self._settings.seed, name, *keys, device=like.device)

    def _data(self, data: Any, labels: Tensor | None) -> LabelledData:
        held = LabelledData(data, labels, self.num_classes, self._settings)
        self.embeddings.start(held)
        return held

    def _epoch(self, data: LabelledData, epoch: int) -> Any:
        return data.passes(epoch)

    @abstractmethod
    def _loss(self, model: nn.Module, x: Tensor, y: Tensor, place: Tensor) -> Tensor:
        """Return a batch's loss; its noise derives from its place."""

    @abstractmethod
    def _encode(self, x: Tensor) -> Any:
        """Return what of the data serves every step of a diffusion."""

    @abstractmethod
    def _classify(self, encoded: Any, z: Tensor, steps: int | None, noise: torch.Generator) -> Tensor:
        """Return the logits at the end of a diffusion that starts at z."""


def noised(u: Tensor, alpha_bar: float | Tensor, draws: torch.Generator) -> Tensor:
    """Return z ~ q(z | y) = N(√ᾱ u, (1 − ᾱ) I)."""
    return alpha_bar**0.5 * u + (1 - alpha_bar) ** 0.5 * normal_like(u, draws)


def prior_divergence(u: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the mean of KL(N(√ᾱ u, (1 − ᾱ) I) ‖ N(0, I)) over a batch."""
    dim = u.shape[1]
    return 0.5 * (alpha_bar * u.square().sum(1).mean() - dim * torch.log1p(-alpha_bar) - dim * alpha_bar)
