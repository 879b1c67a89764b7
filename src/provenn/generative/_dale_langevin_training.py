"""Training of score networks: under multiplicative noise, and under additive noise as the baseline to compare with."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.recording import evaluating
from provenn.core.experiment.seeding import generator as generator_of
from provenn.core.experiment.training import Epoch, minibatches, run_to_end, train
from provenn.generative._dale_langevin_losses import MultiplicativeScoreLoss, Weighting
from provenn.generative._dale_langevin_process import GeometricBrownianSDE, expand


@dataclass(frozen=True)
class ScoreTraining:
    """What a training left.

    Args:
        model: The trained network: the one that the trainer was given.
        average: A copy whose weights are the exponential moving average; sample from this one.
        history: One record an epoch, those before an interruption included.
    """

    model: nn.Module
    average: nn.Module
    history: tuple[Epoch, ...]


class _ScoreTrainer(ABC):
    """Adam on a denoising loss, with an average of the weights; subclasses say how data are noised."""

    average: nn.Module

    def __init__(
        self,
        model: nn.Module,
        ema: float = 0.999,
        lr: float = 1e-3,
        batch_size: int = 128,
        epochs: int = 100,
        seed: int = 0,
    ) -> None:
        check_number("ema", ema, at_least=0, below=1)
        check_number("lr", lr, above=0)
        check_integer("batch_size", batch_size, at_least=1)
        check_integer("epochs", epochs, at_least=0)
        self.model, self.ema, self.lr = model, ema, lr
        self.batch_size, self.epochs, self.seed = batch_size, epochs, seed

    def fit(
        self,
        data: Float[Tensor, "samples *shape"],
        checkpoint: str | Path | None = None,
        progress: Callable[[Epoch], None] | None = None,
    ) -> ScoreTraining:
        """Train on data.

        Args:
            data: The samples.
            checkpoint: File that holds the state after every epoch; if it exists, training goes on from there, with the
                same number of epochs in all.
            progress: Called after every epoch; what it raises ends the training.

        Returns:
            The network, its average and the history.

        Raises:
            ValueError: The data do not fit the process, or the checkpoint does not fit this run.
        """
        history = run_to_end(self.epochs_on(data, checkpoint), checkpoint, progress)
        return ScoreTraining(self.model, self.average, tuple(history))

    def epochs_on(self, data: Float[Tensor, "samples *shape"], checkpoint: str | Path | None = None) -> Iterator[Epoch]:
        """Train as :meth:`fit`, as a loop of the caller's own; ``average`` holds the averaged network.

        Args:
            data: As in :meth:`fit`.
            checkpoint: As in :meth:`fit`.

        Yields:
            One record after every epoch.

        Raises:
            ValueError: As :meth:`fit`.
        """
        average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.ema), use_buffers=True)
        self.average = average.module
        return self._epochs(data, average, checkpoint)

    def _epochs(self, data: Tensor, average: AveragedModel, checkpoint: str | Path | None) -> Iterator[Epoch]:
        if data.dim() < 2 or len(data) == 0:
            raise ValueError(f"data must be (samples ≥ 1, features, ...), got shape {tuple(data.shape)}")
        if not data.isfinite().all():
            raise ValueError("data must be finite, got NaN or infinite values")
        self._check(data)
        weight = next(self.model.parameters())
        data = data.to(weight)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr)
        both = nn.ModuleDict({"model": self.model, "average": average})

        def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
            draws = generator_of(self.seed, "noise", epoch)
            for (x,) in minibatches((data,), self.batch_size, generator_of(self.seed, "order", epoch)):
                shares = torch.rand(len(x), generator=draws, device=draws.device, dtype=torch.float64)
                noise = torch.randn(x.shape, generator=draws, device=draws.device, dtype=torch.float64)
                yield x, shares.to(weight), noise.to(weight)

        def update(batch: tuple[Tensor, ...]) -> Tensor:
            optimizer.zero_grad()
            loss = self._loss(*batch)
            loss.backward()
            optimizer.step()
            average.update_parameters(self.model)
            return loss

        yield from train(both, optimizer, batches, self._loss, epochs=self.epochs, update=update, checkpoint=checkpoint)

    @abstractmethod
    def _check(self, data: Tensor) -> None:
        """Raise an error, or warn, where data do not fit the noise."""

    @abstractmethod
    def _loss(self, x: Tensor, shares: Tensor, noise: Tensor) -> Tensor:
        """Return the mean loss of a batch at times that are shares of the way to the end."""


class MultiplicativeDiffusionTrainer(_ScoreTrainer):
    """Train a network to s(log x_t, t) = x_t ∘ ∇log p_t(x_t) by denoising multiplicative noise.

    Training on log-data with additive noise reaches the same marginals where μ and σ match; what differs is what the
    network predicts (a score of x, that of log x less 1) and how one samples.

    Args:
        model: ``model(log_x, t)`` → the shape of log_x, for a batch and a time for each sample; trained in place.
        sde: The noising process.
        ema: Decay of the average of the weights.
        weighting: As in :class:`MultiplicativeScoreLoss`.
        t_min: Smallest time that is trained at.
        lr: Adam's learning rate.
        batch_size: Samples a step.
        epochs: Passes over the data.
        seed: Order, times and noise derive from it.

    Raises:
        ValueError: An argument is out of bounds; in :meth:`fit`, data are not above 0.

    Warns:
        UserWarning: In :meth:`fit`, V(T) is below the squared range of the data's logarithm: the process does not
            forget where it began, and sampling starts from the wrong law.

    Cost: one forward and backward pass a batch; a copy of the weights beside Adam's two.

    Source: arXiv 2510.02730, training.
    """

    def __init__(
        self,
        model: nn.Module,
        sde: GeometricBrownianSDE,
        ema: float = 0.999,
        weighting: Weighting = "variance",
        t_min: float = 1e-3,
        lr: float = 1e-3,
        batch_size: int = 128,
        epochs: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(model, ema, lr, batch_size, epochs, seed)
        self.sde, self.t_min = sde, t_min
        self.loss = MultiplicativeScoreLoss(sde, weighting, t_min=t_min)

    def _check(self, data: Tensor) -> None:
        check_positive(data)
        span = (data.max().log() - data.min().log()).item()
        reach = self.sde.moments(torch.tensor(self.sde.T, dtype=torch.float64)).variance.item()
        if reach < span**2:
            warnings.warn(
                f"V(T) = {reach:.3g} is below the squared range {span**2:.3g} of the data's logarithm: the prior does "
                "not match; raise sigma or T",
                stacklevel=5,
            )

    def _loss(self, x: Tensor, shares: Tensor, noise: Tensor) -> Tensor:
        t = self.t_min + (self.sde.T - self.t_min) * shares
        x_t = self.sde.marginal(x, t, noise)
        loss: Tensor = self.loss(self.model(x_t.log(), t), noise, t)
        return loss


class AdditiveScoreBaseline(_ScoreTrainer):
    r"""Denoising score matching with additive noise whose variance explodes: the baseline, with the same network.

    .. math:: x_t = x_0 + \sigma_t Z, \quad \sigma_t = \sigma_{min} (\sigma_{max} / \sigma_{min})^t, \quad
        E \, \lVert \sigma_t s(x_t, t) + Z \rVert^2

    Args:
        model: ``model(x, t)`` → the shape of x; trained in place.
        sigma: Smallest and largest noise.
        ema: Decay of the average of the weights.
        lr: Adam's learning rate.
        batch_size: Samples a step.
        epochs: Passes over the data.
        seed: Order, times and noise derive from it.

    Raises:
        ValueError: An argument is out of bounds, or ``sigma`` does not rise.

    Cost: as :class:`MultiplicativeDiffusionTrainer`.

    Source: Song et al., arXiv 2011.13456, the variance-exploding SDE, its loss and its reverse-diffusion predictor.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma: tuple[float, float] = (0.01, 5.0),
        ema: float = 0.999,
        lr: float = 1e-3,
        batch_size: int = 128,
        epochs: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(model, ema, lr, batch_size, epochs, seed)
        check_number("sigma[0]", sigma[0], above=0)
        check_number("sigma[1]", sigma[1], above=sigma[0])
        self.sigma = sigma

    def noise_level(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return σ at times in [0, 1]."""
        low, high = self.sigma
        return low * torch.exp(math.log(high / low) * t)

    def _check(self, data: Tensor) -> None:
        pass

    def _loss(self, x: Tensor, shares: Tensor, noise: Tensor) -> Tensor:
        level = expand(self.noise_level(shares), x)
        score = self.model(x + level * noise, shares)
        return (level * score + noise).square().flatten(1).sum(1).mean()

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        steps: int = 200,
        center: Tensor | float = 0.0,
        denoise: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw samples by the reverse-diffusion predictor.

        Args:
            model: The trained network, or its average.
            shape: (samples, *shape of one).
            steps: Steps.
            center: Mean that the noise starts around.
            denoise: Whether the last step takes the posterior mean.
            generator: Draws; ``None``: torch's global generator.

        Raises:
            ValueError: ``steps`` < 1.
        """
        check_integer("steps", steps, at_least=1)
        weight = next(model.parameters())
        draw = _drawer(shape, weight, generator)
        levels = self.noise_level(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).to(weight)
        times = torch.linspace(1, 0, steps + 1).to(weight)
        x = center + levels[0] * draw()
        with evaluating(model):
            for index in range(steps):
                drop = levels[index].square() - levels[index + 1].square()
                x = x + drop * model(x, times[index].expand(shape[0])) + drop.sqrt() * draw()
            if denoise:
                x = x + levels[-1].square() * model(x, times[-1].expand(shape[0]))
        return x


def _drawer(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Callable[[], Tensor]:
    where = like.device if generator is None else generator.device
    return lambda: torch.randn(shape, dtype=like.dtype, device=where, generator=generator).to(like.device)


def check_positive(data: Tensor) -> None:
    """Check that data have a logarithm.

    Raises:
        ValueError: A value is not above 0.
    """
    if not (data > 0).all():
        raise ValueError(f"data must be above 0, got {data.min().item():.4g}; shift them with PositiveTransform")
