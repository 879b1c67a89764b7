"""The problems of target surrogates' claim: batches, the loss on all data, and the least there is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

from provenn.claims.claim import Scalar
from provenn.core.experiment.seeding import generator, seeded
from provenn.optim import CartPole, ImitationTrainer, LQRExpert

TargetLoss = Callable[[Tensor], Tensor]

CANCER, DIGITS, IMITATION = "breast cancer", "digits", "cart-pole"
RANKS = {"rank 1": 1, "rank 4": 4, "rank 10": 10}


class Problem(ABC):
    """A model, batches for it, and what is measured."""

    model: nn.Module
    least: float
    batches: int

    @abstractmethod
    def batch(self, step: int) -> tuple[Tensor, TargetLoss]:
        """Return a batch's inputs, and the loss of its targets."""

    @abstractmethod
    def whole(self) -> float:
        """Return the loss that counts."""


class Supervised(Problem):
    """A model of a table, with batches drawn from it with replacement.

    Args:
        model: The model, in double precision.
        x: Inputs.
        y: What the loss compares outputs to.
        loss: ``loss(outputs, y)``, a mean over samples.
        least: The least loss that the model has on all of them.
        batch_size: Samples a batch.
        seed: Draws the batches.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        least: float,
        batch_size: int,
        seed: int,
    ) -> None:
        self.model, self.least, self._x, self._y, self._loss = model, least, x, y, loss
        self.batches = -(-len(x) // batch_size)
        self._size, self._draws = batch_size, generator(seed, "batches")

    def batch(self, step: int) -> tuple[Tensor, TargetLoss]:
        """Draw a batch."""
        picked = torch.randint(len(self._x), (self._size,), generator=self._draws)
        y = self._y[picked]
        return self._x[picked], lambda z: self._loss(z, y)

    @torch.no_grad()
    def whole(self) -> float:
        """Return the mean loss on all data."""
        return float(self._loss(self.model(self._x), self._y))


class Imitation(Problem):
    """A policy that imitates an expert in the states it gets to itself.

    Args:
        episodes: Episodes a round.
        horizon: States an episode.
        seed: Draws the policy's first weights and the first states.
    """

    least, batches = 0.0, 1

    def __init__(self, episodes: int, horizon: int, seed: int) -> None:
        env = CartPole()
        with seeded(seed, "policy"):
            self.model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        unused = torch.optim.SGD(self.model.parameters(), 1.0)
        self._expert, self._seed = LQRExpert(env), seed
        self._few = ImitationTrainer(self.model, self._expert, env, unused, 1, episodes, horizon)
        self._many = ImitationTrainer(self.model, self._expert, env, unused, 1, 32, horizon)

    def batch(self, step: int) -> tuple[Tensor, TargetLoss]:
        """Run the policy."""
        states = self._few.rollout(generator(self._seed, "episodes", step))
        actions = self._expert(states)
        return states, lambda z: _half_square(z, actions)

    @torch.no_grad()
    def whole(self) -> float:
        """Return the loss in the states that the policy gets to from 32 starts, the same at every step and seed."""
        states = self._many.rollout(generator("measured episodes"))
        return float(_half_square(self.model(states), self._expert(states)))


def build(study: str, budget: Mapping[str, Scalar], seed: int) -> Problem:
    """Build a study's problem; the data are the same for every seed, which draws weights and batches."""
    if study == IMITATION:
        return Imitation(int(budget["episodes"]), int(budget["horizon"]), seed)
    if study in RANKS:
        return _factorisation(RANKS[study], int(budget["batch"]), seed)
    x, y = table(study)
    model = nn.Linear(x.shape[1], 1 if study == CANCER else 10).double()
    for one in model.parameters():
        nn.init.zeros_(one)
    loss = _logistic if study == CANCER else nn.functional.cross_entropy
    return Supervised(model, x, y, loss, 0.0, int(budget["batch"]), seed)


def _half_square(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).square().sum() / (2 * len(z))


def _logistic(z: Tensor, y: Tensor) -> Tensor:
    return nn.functional.softplus(-y * z[:, 0]).mean()


@cache
def table(study: str) -> tuple[Tensor, Tensor]:
    """Return standardised inputs and labels; a hyperplane separates them, so that the infimum of the loss is 0."""
    raw = load_breast_cancer() if study == CANCER else load_digits()
    spread = raw.data.std(0)
    x = (raw.data - raw.data.mean(0)) / np.where(spread > 0, spread, 1)
    y = 2.0 * raw.target - 1 if study == CANCER else raw.target
    return torch.from_numpy(x), torch.from_numpy(y)


def _factorisation(rank: int, batch_size: int, seed: int) -> Supervised:
    """W₂W₁x fitted to Ax: the rows of A fall from length about 1 to 1e-10, as in the authors' code."""
    draws = generator("matrix factorisation")
    scale = torch.linspace(1, 1e-10, 10, dtype=torch.float64).unsqueeze(1)
    A = scale * torch.rand(10, 6, generator=draws, dtype=torch.float64)
    x = torch.randn(1000, 6, generator=draws, dtype=torch.float64)
    y = x @ A.mT
    with seeded(seed, "factors"):
        model = nn.Sequential(nn.Linear(6, rank, bias=False), nn.Linear(rank, 10, bias=False)).double()
    return Supervised(model, x, y, _half_square, least_of_rank(y, rank), batch_size, seed)


def least_of_rank(y: Tensor, rank: int) -> float:
    """Return the least loss of a matrix of outputs of that rank: what the other singular values hold.

    The outputs lie in the span of the inputs, which have full rank, so that every such matrix is reached.
    """
    return float(torch.linalg.svdvals(y)[rank:].square().sum() / (2 * len(y)))
