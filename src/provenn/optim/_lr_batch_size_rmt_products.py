"""Curvature products over a data set and its batches, and the variance of a batch's curvature."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from provenn.core.experiment.checks import check_choice
from provenn.core.experiment.recording import evaluating
from provenn.core.numerics.curvature import Batch, CurvatureOperator
from provenn.core.numerics.krylov import Operator
from provenn.optim._lr_batch_size_rmt_rules import effective_batch_size

LossFn = Callable[[Tensor, Tensor], Tensor]
CurvatureMatrix = Literal["hessian", "ggn"]

_CHUNK = 2048
"""Samples that go through the model at once."""

_KINDS: dict[str, Literal["hessian", "gauss-newton"]] = {"hessian": "hessian", "ggn": "gauss-newton"}


class Curvature:
    """The curvature of the mean loss over samples of a data set, as products with vectors.

    Args:
        model: The network. Evaluation mode is the caller's to set, by :func:`measuring`.
        loss_fn: ``loss_fn(outputs, targets)`` → the mean, or one value a sample.
        dataset: Pairs of input and target.
        matrix: ``"hessian"`` or ``"ggn"``.

    Raises:
        ValueError: ``matrix`` is unknown, ``loss_fn`` sums over samples, or the data set has fewer than 2 samples.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, dataset: Dataset, matrix: CurvatureMatrix) -> None:
        check_choice("matrix", matrix, _KINDS)
        _refuse_named_sum(loss_fn)
        self.samples = len(dataset)  # type: ignore[arg-type]
        if self.samples < 2:
            raise ValueError(f"dataset must hold at least 2 samples, got {self.samples}")
        self.model, self.loss_fn, self.dataset, self.matrix = model, loss_fn, dataset, matrix

    def vector(self) -> Float[Tensor, " parameters"]:
        """Return zeros in the shape, type and place of the trainable parameters laid end to end."""
        parameters = [one.detach().flatten() for one in self.model.parameters() if one.requires_grad]
        if not parameters:
            raise ValueError("model must have trainable parameters, got none")
        return torch.zeros_like(torch.cat(parameters))

    def batches(self, picked: Int[Tensor, " samples"]) -> list[Batch]:
        """Return the picked samples on the model's device, cut into pieces."""
        device = next(self.model.parameters()).device
        return [tuple(one.to(device) for one in _samples(self.dataset, some)) for some in picked.split(_CHUNK)]  # type: ignore[misc]

    def operator(self, batches: list[Batch]) -> CurvatureOperator:
        """Return v ↦ M v for the mean loss over batches."""
        return CurvatureOperator(self.model, self._loss, batches, _KINDS[self.matrix])

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # Forward over reverse through torch's averaging squared error fails where targets have no slope at all; a slope
        # of zeros makes no difference.
        if targets.is_floating_point():
            targets = targets + 0 * outputs.flatten()[0]
        return self.loss_fn(outputs, targets)

    def check_loss(self, batches: list[Batch]) -> None:
        """Refuse a loss that grows with the number of samples, or is not finite.

        Raises:
            ValueError: It does or is.
        """
        for place, (x, y) in enumerate(batches):
            outputs = self.model(x)
            value = self.loss_fn(outputs, y).mean().item()
            if not math.isfinite(value):
                raise ValueError(f"loss_fn must be finite on the data, got {value}")
            if place == 0:
                twice = self.loss_fn(torch.cat([outputs, outputs]), torch.cat([y, y])).mean().item()
                if abs(twice - value) > 0.01 * abs(value):
                    raise ValueError(
                        f"loss_fn must average over samples, or rates are off by the batch size; the same samples "
                        f"twice changed it from {value:.6g} to {twice:.6g}"
                    )


def _refuse_named_sum(loss_fn: LossFn) -> None:
    given = (
        loss_fn.keywords
        if isinstance(loss_fn, functools.partial)
        else vars(loss_fn)
        if isinstance(loss_fn, nn.Module)
        else {}
    )
    if given.get("reduction") == "sum":
        raise ValueError("loss_fn must average over samples, or rates are off by the batch size; got reduction='sum'")


def _samples(dataset: Dataset, picked: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(dataset, TensorDataset):
        x, y = (one[picked.to(one.device)] for one in dataset.tensors)
    else:
        x, y = default_collate([dataset[place] for place in picked.tolist()])
    return x, y


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode and without gradients inside the block; warn if dropout was at work."""
    if any(isinstance(one, nn.modules.dropout._DropoutNd) and one.training and one.p > 0 for one in model.modules()):
        warnings.warn("the model has dropout in training mode; curvature is measured in eval mode", stacklevel=4)
    with evaluating(model):
        yield


def noise_variance(
    full: Operator,
    parts: Iterable[Operator],
    like: Float[Tensor, " dim"],
    batch: int,
    n: int | None = None,
    generator: torch.Generator | None = None,
    direction: Float[Tensor, " dim"] | None = None,
) -> float:
    """Estimate σ² = 𝔟·E‖H_B − H‖²_F/P², the variance of an entry of one sample's curvature.

    Each batch gets one vector v of independent signs, for which E‖(H_B − H)v‖² = ‖H_B − H‖²_F (Hutchinson).

    Args:
        full: v ↦ H v for all data.
        parts: v ↦ H_B v, one for each batch, drawn independently.
        like: A vector of the operators' size, type and device.
        batch: B, samples of each part; below N.
        n: N; ``None``: infinitely many.
        generator: Draws the signs; ``None``: torch's global generator.
        direction: A unit vector u to measure along, 𝔟·E‖(H_B − H)u‖²/P: the same σ² where the noise is spread evenly
            over all entries, and what moves u's eigenvalue where it is not. ``None``: the mean over all directions.

    Shape:
        ``like`` and ``direction`` (P,).

    Returns:
        σ², without bias.

    Raises:
        ValueError: There are no parts, ``batch`` is not in [1, N − 1], or a product is not finite.

    Cost: a product with H and one with H_B for every part.

    Source: arXiv 2006.09092, noise model; Hutchinson, Commun. Statist. 19 (1990).
    """
    effective = effective_batch_size(batch, n)
    if math.isinf(effective):
        raise ValueError(f"batch must be below the {n} samples of the data, which have no noise, got {batch}")
    device = like.device if generator is None else generator.device
    squares = []
    for part in parts:
        if direction is None:
            v = torch.randint(2, like.shape, generator=generator, device=device).to(like) * 2 - 1
        else:
            v = direction * math.sqrt(len(like))  # as long as a vector of signs
        squares.append((part(v) - full(v)).double().square().sum())
    if not squares:
        raise ValueError("parts must name at least one batch, got none")
    value = effective * torch.stack(squares).mean().item() / len(like) ** 2
    if not math.isfinite(value):
        raise ValueError(f"parts: the curvature of a batch is not finite, σ² = {value}")
    return value
