"""Fitting a map to two samples: a fitting loss plus the Monge gap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import Epoch, predict, run_to_end, train
from provenn.losses._monge_gap_costs import check_clouds

Schedule = Callable[[int], float]
Discrepancy = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[Epoch], None]


class MapTraining(NamedTuple):
    """What ``fit`` returns.

    Attributes:
        history: One record every ``log_every`` steps, with the mean loss over them; those before an interruption
            included.
        model: The map, the estimator's own.
    """

    history: list[Epoch]
    model: nn.Module


class MongeMapEstimator:
    """Fit a network as a transport map: min_θ Δ(T_θ♯μ, ν) + λ M_ρ(T_θ), by Adam on minibatches of both samples.

    Args:
        map: T, points (n, d) to points (n, d); trained in place.
        fitting_loss: Δ, a function of images and of target points, such as :class:`SinkhornDivergence`.
        gap: M, a function of reference points and their images, such as :class:`MongeGap`; ``None``: Δ alone.
        gap_weight: λ, or a function of the step from 0 on; at 0 the gap is not computed.
        lr: Adam's rate.
        steps: Minibatches.
        batch: Points of either sample in a minibatch, drawn without replacement; all where there are fewer.
        reference: Samples of ρ, on the map's device, whose support must cover the source; ``None``: the source.
        log_every: Steps a record of the history, and between savings of the checkpoint.
        seed: Of the minibatches, and of dropout.

    Attributes:
        model: T.

    Raises:
        ValueError: A number out of range, or a reference that is no cloud of points.
        TypeError: ``map`` is no module, a loss cannot be called, or a count or ``seed`` is no integer.

    Cost: a pass of T forward and back a step (two with a reference), and the losses of a minibatch.

    Source: arXiv 2302.04953, equation 9 and section 6.
    """

    def __init__(
        self,
        map: nn.Module,  # noqa: A002 - the field's name
        fitting_loss: Discrepancy,
        gap: Discrepancy | None,
        gap_weight: float | Schedule = 1.0,
        lr: float = 1e-3,
        steps: int = 5000,
        batch: int = 512,
        reference: Float[Tensor, "k d"] | None = None,
        *,
        log_every: int = 100,
        seed: int = 0,
    ) -> None:
        if not isinstance(map, nn.Module):
            raise TypeError(f"map must be a module, got {type(map).__name__}")
        for name, loss in (("fitting_loss", fitting_loss), ("gap", gap)):
            if not callable(loss) and not (name == "gap" and loss is None):
                raise TypeError(f"{name} must be a function, got {loss!r}")
        if not callable(gap_weight):
            check_number("gap_weight", gap_weight, at_least=0)
        check_number("lr", lr, above=0)
        check_integer("steps", steps, at_least=1)
        check_integer("batch", batch, at_least=2)
        check_integer("log_every", log_every, at_least=1)
        check_integer("seed", seed)
        if reference is not None:
            check_clouds(reference, reference, ("reference", "reference"))
        self.model, self.fitting_loss, self.gap, self.gap_weight = map, fitting_loss, gap, gap_weight
        self.lr, self.steps, self.batch, self.reference = lr, steps, batch, reference
        self.log_every, self.seed = log_every, seed

    def fit(
        self,
        source: Float[Tensor, "n d"],
        target: Float[Tensor, "m d"],
        *,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> MapTraining:
        """Train.

        Args:
            source: Samples of μ, on the map's device.
            target: Samples of ν, there too.
            checkpoint: File that holds everything after every record; if it exists, training goes on from it.
            progress: Called after every record, once it is saved.

        Returns:
            History and map.

        Raises:
            ValueError: Samples of different spaces, fewer than two, or a checkpoint of another run; a schedule's weight
                below 0.
            TypeError: The samples are no floating-point numbers.
            FloatingPointError: The loss is no finite number any more.
        """
        check_clouds(source, target, ("source", "target"))
        for name, sample in (("source", source), ("target", target)):
            if len(sample) < 2:
                raise ValueError(f"{name} must have at least two points, got {len(sample)}")
        if self.reference is not None:
            check_clouds(source, self.reference, ("source", "reference"))
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr)
        records = train(
            self.model,
            optimizer,
            lambda index: self._batches(source, target, index),
            self._loss,
            epochs=-(-self.steps // self.log_every),
            checkpoint=checkpoint,
        )
        return MapTraining(run_to_end(records, checkpoint, progress), self.model)

    def transform(self, x: Float[Tensor, "n d"], batch_size: int = 4096) -> Float[Tensor, "n d"]:
        """Return the images of points, in evaluation mode and without gradients.

        Args:
            x: Points.
            batch_size: Points a call.

        Raises:
            ValueError: ``batch_size`` < 1.
        """
        return predict(self.model, x, batch_size)

    def _batches(self, source: Tensor, target: Tensor, index: int) -> Iterator[tuple[Tensor, ...]]:
        first = index * self.log_every
        with seeded(self.seed, "steps", first):  # dropout draws from torch's global generator
            for step in range(first, min(first + self.log_every, self.steps)):
                draws = generator(self.seed, "minibatch", step)
                weight = source.new_tensor(self._weight(step))
                points = self.reference if self.reference is not None else source[:0]
                yield *(_some(one, self.batch, draws) for one in (source, target, points)), weight

    def _weight(self, step: int) -> float:
        if self.gap is None:
            return 0.0
        weight = self.gap_weight(step) if callable(self.gap_weight) else self.gap_weight
        check_number("gap_weight", weight, at_least=0)
        return weight

    def _loss(self, model: nn.Module, x: Tensor, y: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
        images = model(x)
        loss = self.fitting_loss(images, y)
        if self.gap is None or not weight > 0:
            return loss
        pair = (x, images) if self.reference is None else (reference, model(reference))
        return loss + weight * self.gap(*pair)


def _some(points: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """Return that many of the points, in random order; all of them if there are no more."""
    return points[torch.randperm(len(points), generator=draws, device=draws.device)[:count].to(points.device)]
