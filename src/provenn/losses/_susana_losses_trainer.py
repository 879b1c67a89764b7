"""Episodic training of an encoder, and its accuracy on episodes of new classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import Epoch, predict, run_to_end, train
from provenn.losses._susana_losses_episodes import Episode, EpisodeSampler

Progress = Callable[[Epoch], None]


def conv4(channels_in: int = 3, width: int = 64) -> nn.Sequential:
    """Build the usual small encoder: four blocks of convolution, normalisation, ReLU and pooling; then a mean.

    Args:
        channels_in: Channels of the images.
        width: Channels of every block, and size of an embedding.

    Shape:
        (batch, channels_in, height, width), 16 pixels a side or more → (batch, ``width``).

    Returns:
        The encoder, with torch's initial weights.

    Raises:
        ValueError: A number < 1.

    Source: Snell et al., "Prototypical networks for few-shot learning" (2017); mean over places as in the code of
    arXiv 2305.09062.
    """
    check_integer("channels_in", channels_in, at_least=1)
    check_integer("width", width, at_least=1)
    layers: list[nn.Module] = []
    for before in (channels_in, width, width, width):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ProtoNetTraining(NamedTuple):
    """What ``fit`` returns.

    Attributes:
        history: One epoch a record, those before an interruption included.
        model: The encoder.

    Source: arXiv 2305.09062, its section on training.
    """

    history: list[Epoch]
    model: nn.Module


class EpisodeAccuracy(NamedTuple):
    """Accuracy over test episodes.

    Attributes:
        mean: Share of queries at their nearest prototype.
        half_width: Half of its 95 % interval over episodes.
        episodes: Their number.

    Source: arXiv 2305.09062, its section on evaluation: 1000 episodes, mean and 95 % interval.
    """

    mean: float
    half_width: float
    episodes: int


class ProtoNetTrainer:
    """Train an encoder by an episode's loss, with Adam whose rate falls by steps.

    Args:
        encoder: Maps samples to embeddings; trained in place.
        loss: ``loss(support, support_labels, query, query_labels)``, such as :class:`EpisodeLoss`.
        way: Classes of an episode.
        shot: Support samples of each.
        query: Queries of each.
        epochs: Passes.
        episodes: Episodes of a pass.
        lr: Rate at the start.
        step_size: Epochs between falls of the rate.
        gamma: What the rate is multiplied by.
        optimizer: ``optimizer(parameters, lr=lr)``; default Adam. The authors train ResNets by SGD.
        seed: Of the episodes, and of what the encoder draws.

    Raises:
        ValueError: A number out of range.
        TypeError: A count is no integer.

    Cost: an episode is a forward and a backward pass of way · (shot + query) samples.

    Source: arXiv 2305.09062, its section on training; values of the authors' scripts for one shot.
    """

    def __init__(
        self,
        encoder: nn.Module,
        loss: nn.Module,
        *,
        way: int = 30,
        shot: int = 1,
        query: int = 15,
        epochs: int = 200,
        episodes: int = 100,
        lr: float = 1e-3,
        step_size: int = 20,
        gamma: float = 0.5,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        seed: int = 0,
    ) -> None:
        check_integer("way", way, at_least=2)
        for name, value in (("shot", shot), ("query", query), ("epochs", epochs), ("episodes", episodes)):
            check_integer(name, value, at_least=1)
        check_integer("step_size", step_size, at_least=1)
        check_integer("seed", seed)
        check_number("lr", lr, above=0)
        check_number("gamma", gamma, above=0, at_most=1)
        self.encoder, self.loss = encoder, loss
        self.way, self.shot, self.query, self.epochs, self.episodes = way, shot, query, epochs, episodes
        self.lr, self.step_size, self.gamma, self.seed = lr, step_size, gamma, seed
        self._optimizer = optimizer

    def fit(
        self,
        x: Float[Tensor, "samples ..."],
        labels: Int[Tensor, " samples"],
        *,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> ProtoNetTraining:
        """Train.

        Args:
            x: Samples, on the encoder's device.
            labels: Their classes.
            checkpoint: File that holds everything after every epoch; if it exists, training goes on from it.
            progress: Called after every epoch, once it is saved.

        Returns:
            History and encoder.

        Raises:
            ValueError: Too few classes or samples, lengths that differ, or a checkpoint of another run.
            FloatingPointError: The loss is no finite number any more.
        """
        if labels.shape != x.shape[:1]:
            raise ValueError(f"labels must be one a sample, got {tuple(labels.shape)} for {len(x)}")
        EpisodeSampler(labels, self.way, self.shot, self.query)  # says early what is too few
        optimizer = self._optimizer(self.encoder.parameters(), lr=self.lr)
        falls = torch.optim.lr_scheduler.StepLR(optimizer, self.step_size * self.episodes, self.gamma)
        epochs = train(
            self.encoder,
            optimizer,
            lambda index: self._batches(x, labels, index),
            self._episode_loss,
            epochs=self.epochs,
            scheduler=falls,
            checkpoint=checkpoint,
        )
        return ProtoNetTraining(run_to_end(epochs, checkpoint, progress), self.encoder)

    def _batches(self, x: Tensor, labels: Tensor, epoch: int) -> Iterator[tuple[Tensor]]:
        sampler = EpisodeSampler(labels, self.way, self.shot, self.query, generator(self.seed, "episodes", epoch))
        with seeded(self.seed, "pass", epoch):  # dropout draws from torch's global generator
            for _ in range(self.episodes):
                drawn = sampler.sample()
                yield (x[torch.cat([drawn.support.flatten(), drawn.query.flatten()])],)

    def _episode_loss(self, encoder: nn.Module, samples: Tensor) -> Tensor:
        support, query = encoder(samples).split([self.way * self.shot, self.way * self.query])
        rows = torch.arange(self.way, device=samples.device)
        loss: Tensor = self.loss(support, rows.repeat_interleave(self.shot), query, rows.repeat_interleave(self.query))
        return loss

    def evaluate(
        self,
        x: Float[Tensor, "samples ..."],
        labels: Int[Tensor, " samples"],
        *,
        way: int = 5,
        shot: int | None = None,
        query: int = 15,
        episodes: int = 1000,
        seed: int = 0,
    ) -> EpisodeAccuracy:
        """Classify queries by the nearest prototype, in episodes of other classes.

        Args:
            x: Samples.
            labels: Their classes.
            way: Classes of an episode.
            shot: Support samples of each; ``None``: as in training.
            query: Queries of each.
            episodes: How many.
            seed: Draws them; the same seed, the same episodes.

        Returns:
            Mean accuracy with its interval.

        Raises:
            ValueError: Too few classes or samples, lengths that differ, or ``episodes`` < 2.

        Cost: one pass of the samples, then O(way² · query · d) an episode.
        """
        check_integer("episodes", episodes, at_least=2)
        if labels.shape != x.shape[:1]:
            raise ValueError(f"labels must be one a sample, got {tuple(labels.shape)} for {len(x)}")
        count = self.shot if shot is None else shot
        sampler = EpisodeSampler(labels, way, count, query, generator(seed, "test episodes"))
        drawn = [sampler.sample() for _ in range(episodes)]
        shares = _accuracies(predict(self.encoder, x), drawn)
        return EpisodeAccuracy(shares.mean().item(), 1.96 * shares.std().item() / math.sqrt(episodes), episodes)


def _accuracies(embeddings: Tensor, drawn: list[Episode]) -> Float[Tensor, " episodes"]:
    """Return the share of right queries of every episode, all at once."""
    support, query = (torch.stack(parts) for parts in list(zip(*drawn, strict=True))[:2])
    means = embeddings[support].mean(2)
    queries = embeddings[query]
    squares = (queries.unsqueeze(3) - means[:, None, None]).square().sum(-1)
    right = squares.argmin(-1) == torch.arange(means.shape[1], device=means.device)[:, None]
    return right.double().mean((1, 2))
