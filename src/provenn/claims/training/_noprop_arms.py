"""The arms of NoProp's claim: how each trains, predicts, and how much autograd keeps for one of its updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from provenn import data
from provenn.claims.claim import Trial
from provenn.core.experiment import accounting
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import Epoch, minibatches, predict, train
from provenn.training import (
    DenoisingBlock,
    DifferenceTargetPropagation,
    ForwardForwardTrainer,
    NoPropCT,
    NoPropDT,
    NoPropFM,
    VelocityBlock,
)

TIME_DIM = 64


@dataclass(frozen=True)
class Digits:
    """Standardised images (N, 1, H, W) and their classes; under tuning the test part is held out of training."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def digits_of(trial: Trial) -> Digits:
    """Load the trial's images, drawn by its seed; while tuning, the last fifth of those to train on is tested."""
    train_part, test_part = _images(trial)
    budget = trial.budget
    (x, y), (x_test, y_test) = (
        _chosen(*part, int(budget[name]), generator(trial.seed, name))
        for name, part in (("train", train_part), ("test", test_part))
    )
    if trial.tuning:
        kept = len(x) * 4 // 5
        x, y, x_test, y_test = x[:kept], y[:kept], x[kept:], y[kept:]
    mean, std = x.mean(), x.std()
    pooled = [F.avg_pool2d((one - mean) / std, int(budget["pooled"])) for one in (x, x_test)]
    return Digits(*(one.to(trial.device) for one in (pooled[0], y, pooled[1], y_test)))


def _images(trial: Trial) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    if trial.budget["data"] == "mnist":
        bundle = data.load("mnist")
        return (bundle.x_train, bundle.y_train), (bundle.x_test, bundle.y_test)
    table = data.load("digits")
    x = table.x.reshape(-1, 8, 8)
    return (x[:1200], table.y[:1200]), (x[1200:], table.y[1200:])


def _chosen(x: np.ndarray, y: np.ndarray, count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    rows = torch.randperm(len(x), generator=draws)[:count].numpy()
    return torch.from_numpy(x[rows]).float()[:, None], torch.from_numpy(y[rows]).long()


class Arm(ABC):
    """One way to train."""

    def __init__(self, trial: Trial, digits: Digits, lr: float) -> None:
        self.trial, self.digits, self.lr = trial, digits, lr
        self.seed = trial.seed

    @abstractmethod
    def train(self, epochs: int, batch_size: int) -> Iterator[Epoch]:
        """Train, and yield after each epoch."""

    @abstractmethod
    def predict(self, x: Tensor, draw: int) -> Tensor:
        """Return the classes, from the noise of the given draw."""

    @abstractmethod
    def _update_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of one update."""

    def saved_bytes(self, batch_size: int) -> int:
        """Count the bytes that autograd keeps for one update."""
        x, y = self.digits.x[:batch_size], self.digits.y[:batch_size]
        return accounting.saved_bytes(lambda: self._update_loss(x, y))

    def _block(self, cls: Any, embed_dim: int, time_dim: int | None = None) -> Any:
        """Return a small network; without normalisation where it takes a time, as in the paper."""
        width, hidden = (int(self.trial.budget[name]) for name in ("width", "hidden"))
        block = cls.for_images(
            tuple(self.digits.x.shape[1:]),
            embed_dim,
            10,
            channels=(width, 2 * width),
            hidden=hidden,
            dropout=0.0,
            batch_norm=time_dim is None,
            time_dim=time_dim,
        )
        return block.to(self.trial.device)


class TrainerArm(Arm):
    """An arm whose trainer does everything; its epochs are yielded when all have run."""

    def __init__(self, trial: Trial, digits: Digits, lr: float) -> None:
        super().__init__(trial, digits, lr)
        self.trainer: Any = None

    @abstractmethod
    def _make(self, options: Mapping[str, Any]) -> Any:
        """Return the trainer."""

    def train(self, epochs: int, batch_size: int) -> Iterator[Epoch]:
        with seeded(self.seed, "weights"):
            self.trainer = self._make({"epochs": epochs, "batch_size": batch_size, "lr": self.lr, "seed": self.seed})
        yield from self.trainer.fit(self.digits.x, self.digits.y).history

    def predict(self, x: Tensor, draw: int) -> Tensor:
        classes: Tensor = self.trainer.predict(x, generator=generator(self.seed, "draw", draw, device=x.device))
        return classes


class DiscreteTime(TrainerArm):
    """NoProp-DT with one-hot embeddings."""

    embedding, embed_dim = "onehot", 10

    def _make(self, options: Mapping[str, Any]) -> NoPropDT:
        blocks = int(self.trial.budget["num_blocks"])
        return NoPropDT(
            lambda: self._block(DenoisingBlock, self.embed_dim), blocks, embedding=self.embedding, **options
        )

    def _update_loss(self, x: Tensor, y: Tensor) -> Tensor:
        draws, weight = generator(self.seed, "bytes", device=x.device), self.trainer.embeddings.weight
        loss: Tensor = self.trainer.block_loss(1, x, y, weight, draws) + self.trainer.head_loss(y, weight, draws)
        return loss


class DiscreteTimeLearned(DiscreteTime):
    """NoProp-DT with learned embeddings of 20 entries."""

    embedding, embed_dim = "learned", 20


class ContinuousTime(TrainerArm):
    """NoProp-CT, integrated by 40 steps of Heun's method."""

    def _make(self, options: Mapping[str, Any]) -> Any:
        return NoPropCT(self._block(DenoisingBlock, 10, TIME_DIM), **options)

    def _update_loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.trainer.loss(x, y, generator(self.seed, "bytes", device=x.device))
        return loss


class FlowMatching(ContinuousTime):
    """NoProp-FM."""

    def _make(self, options: Mapping[str, Any]) -> Any:
        return NoPropFM(self._block(VelocityBlock, 10, TIME_DIM), **options)


class BackPropagation(DiscreteTime):
    """The network of NoProp-DT, end to end, from one fixed draw of z_0 and without noise in the blocks."""

    def train(self, epochs: int, batch_size: int) -> Iterator[Epoch]:
        self.trainer = self._make({"seed": self.seed})  # for the same network with the same start
        self.network: nn.Module = self.trainer.model
        device = self.digits.x.device
        self.start = torch.randn(1, 10, generator=generator(self.seed, "fixed noise")).to(device)
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.lr, weight_decay=1e-3)
        pair = (self.digits.x, self.digits.y)

        def batches(epoch: int) -> Any:
            return minibatches(pair, batch_size, generator(self.seed, "order", epoch))

        yield from train(self.network, optimizer, batches, self._loss, epochs=epochs)

    def _loss(self, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(network(x, self.start.expand(len(x), -1)), y)

    def predict(self, x: Tensor, draw: int) -> Tensor:
        return predict(_FromFixedNoise(self.network, self.start), x).argmax(dim=1)

    def _update_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self._loss(self.network, x, y)


class _FromFixedNoise(nn.Module):
    def __init__(self, network: nn.Module, start: Tensor) -> None:
        super().__init__()
        self.network, self.start = network, start

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x, self.start.expand(len(x), -1))
        return logits


class ForwardForward(TrainerArm):
    """Forward-forward with fully connected layers."""

    def _widths(self, inputs: int) -> list[int]:
        """Return T hidden layers, each as wide as the hidden layers of all T blocks together."""
        blocks, hidden = (int(self.trial.budget[name]) for name in ("num_blocks", "hidden"))
        return [inputs, *[blocks * hidden] * blocks]

    def _make(self, options: Mapping[str, Any]) -> Any:
        widths = self._widths(self.digits.x[0].numel() + 10)
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
        return ForwardForwardTrainer(nn.Sequential(*layers).to(self.digits.x.device), 10, **options)

    def predict(self, x: Tensor, draw: int) -> Tensor:
        classes: Tensor = self.trainer.predict(x)
        return classes

    def _update_loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.trainer.loss(x, y, generator(self.seed, "bytes", device=x.device))
        return loss


class TargetPropagation(ForwardForward):
    """Difference target propagation with fully connected layers."""

    def _make(self, options: Mapping[str, Any]) -> Any:
        widths = self._widths(self.digits.x[0].numel())
        layers: list[nn.Module] = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(widths)]
        layers[0] = nn.Sequential(nn.Flatten(), layers[0])
        inverses = [nn.Sequential(nn.Linear(b, a), nn.Tanh()) for a, b in pairwise(widths[1:])]
        trainer = DifferenceTargetPropagation([*layers, nn.Linear(widths[-1], 10)], inverses, **options)
        trainer.model.to(self.digits.x.device)
        return trainer


ARMS: dict[str, Callable[[Trial, Digits, float], Arm]] = {
    "NoProp-DT, one-hot": DiscreteTime,
    "NoProp-DT, learned": DiscreteTimeLearned,
    "NoProp-CT": ContinuousTime,
    "NoProp-FM": FlowMatching,
    "back-propagation": BackPropagation,
    "forward-forward": ForwardForward,
    "difference target propagation": TargetPropagation,
}
