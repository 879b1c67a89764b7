"""Ensembles of the sub-models that subsets make, and what their losses say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer
from provenn.core.experiment.recording import evaluating
from provenn.core.experiment.reports import Report
from provenn.nn._stochastic_subsampled_attention_convert import choose_pathway, sampling, subsampled_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SubEnsemble(nn.Module):
    """Average the predictions of m sub-models, each the same weights with subsets of its own.

    Args:
        model: A model with layers of :class:`SubsampledAttention` that returns scores of classes in its last
            dimension. Shared, not copied; it keeps its own way of evaluating.
        m: Sub-models.
        average: ``"prob"``: of probabilities, returned as their logarithm, a drop-in for scores;
            ``"logit"``: of the scores.
        seed: Decides the sub-models: the same in every call. ``None``: drawn anew from torch's global generator.

    Shape:
        Inputs of the model → (..., classes), as the model's output.

    Returns:
        Calling it returns logarithms of the averaged probabilities, or averaged scores. Since −log is convex, the
        log-loss of averaged probabilities is at most the mean log-loss of the sub-models, on every batch.

    Raises:
        TypeError: ``model`` is not a module, ``m`` no integer.
        ValueError: ``m`` < 1, an unknown ``average``, or a model without subsampled attention.

    Cost: m forward passes with 1/s of dense attention each.

    Source: section 3 of the paper (ensembles of sampled sub-models at inference).
    """

    def __init__(
        self, model: nn.Module, m: int = 8, average: Literal["prob", "logit"] = "prob", *, seed: int | None = 0
    ) -> None:
        super().__init__()
        subsampled_layers(model)
        check_integer("m", m, at_least=1)
        check_choice("average", average, ("prob", "logit"))
        self.model, self.m, self.average, self.seed = model, m, average, seed

    def passes(self, *inputs: Any) -> Float[Tensor, "m ... classes"]:
        """Return the scores of every sub-model.

        Args:
            *inputs: Of the model.

        Returns:
            Scores, one sub-model a row.
        """
        outputs = []
        with sampling(self.model) as layers:
            for one in range(self.m):
                if self.seed is not None:
                    choose_pathway(layers, self.seed, "pathway", one)
                outputs.append(self.model(*inputs))
        return torch.stack(outputs)

    def forward(self, *inputs: Any) -> Float[Tensor, "... classes"]:
        """Average the sub-models.

        Args:
            *inputs: Of the model.

        Returns:
            As the class says.
        """
        return _averaged(self.passes(*inputs), self.average)


def _averaged(scores: Tensor, average: str) -> Tensor:
    if average == "logit":
        return scores.mean(dim=0)
    return scores.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(scores))


@dataclass(frozen=True)
class PathwayReport(Report):
    """Sub-models beside the dense model and their ensembles.

    Args:
        dense_loss: Mean cross-entropy of the dense evaluation, nats.
        dense_accuracy: Its share of right predictions.
        losses: Of every sub-model.
        accuracies: Of every sub-model.
        ensemble_losses: Of the ensemble of the first 1, 2, …, m sub-models, by averaged probabilities.
        ensemble_accuracies: Likewise.
        error_correlation: Mean correlation of two sub-models' errors (0 or 1 a prediction), over pairs of sub-models
            that both are right and wrong at times; NaN without such a pair.
    """

    dense_loss: float
    dense_accuracy: float
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    ensemble_losses: tuple[float, ...]
    ensemble_accuracies: tuple[float, ...]
    error_correlation: float

    def plot(self) -> Figure:
        """Return the losses of sub-models, of growing ensembles, and of the dense model."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axes = figure.subplots()
        members = range(1, len(self.losses) + 1)
        axes.plot(members, self.losses, ".", label="sub-models")
        axes.plot(members, self.ensemble_losses, "o-", label="ensembles of the first m")
        axes.axhline(self.dense_loss, color="black", linestyle="--", label="dense")
        axes.set(xlabel="m", ylabel="loss, nats")
        axes.legend()
        return figure


def pathway_probe(model: nn.Module, data: tuple[Tensor, Tensor], m: int = 16, *, seed: int = 0) -> PathwayReport:
    """Evaluate a model densely, along m fixed pathways, and by their ensembles.

    Args:
        model: A classifier with layers of :class:`SubsampledAttention`, scores in its last dimension; a language
            model with one prediction a token is one. Left as it is.
        data: Inputs, and the classes of all its predictions.
        m: Pathways.
        seed: Decides them.

    Shape:
        Inputs (batch, ...), classes: those of the scores without the last dimension, integers.

    Returns:
        The report.

    Raises:
        TypeError: ``model`` is not a module, ``m`` no integer.
        ValueError: A model without subsampled attention, ``m`` < 1, or ``data`` whose classes do not fit the scores.

    Cost: m + 1 forward passes, memory of m times the scores.

    Source: sections 2 and 5 of the paper (information pathways as sub-models, their self-ensemble).
    """
    ensemble = SubEnsemble(model, m, seed=seed)
    inputs, targets = data
    layers = subsampled_layers(model)
    kept = [layer.eval_samples for layer in layers]
    with evaluating(model):
        try:
            for layer in layers:
                layer.eval_samples = 0
            dense = model(inputs)
        finally:
            for layer, samples in zip(layers, kept, strict=True):
                layer.eval_samples = samples
        if dense.shape[:-1] != targets.shape:
            raise ValueError(
                f"data must have a class for each of {tuple(dense.shape[:-1])}, got {tuple(targets.shape)}"
            )
        scores = ensemble.passes(inputs)
        grown = [_averaged(scores[:size], "prob") for size in range(1, m + 1)]
        losses, right = zip(*(_judged(one, targets) for one in (dense, *scores, *grown)), strict=True)
    shares = [one.double().mean().item() for one in right]
    return PathwayReport(
        losses[0],
        shares[0],
        losses[1 : m + 1],
        tuple(shares[1 : m + 1]),
        losses[m + 1 :],
        tuple(shares[m + 1 :]),
        _correlation(torch.stack(right[1 : m + 1])),
    )


def _judged(scores: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    loss = nn.functional.cross_entropy(scores.flatten(0, -2).double(), targets.flatten())
    return loss.item(), (scores.argmax(dim=-1) == targets).flatten()


def _correlation(right: Tensor) -> float:
    errors = (~right).double()
    centred = errors - errors.mean(dim=1, keepdim=True)
    centred = centred[centred.norm(dim=1) > 0]
    if len(centred) < 2:
        return math.nan
    unit = centred / centred.norm(dim=1, keepdim=True)
    count = len(unit)
    total = unit.sum(dim=0).square().sum().item()  # of all pairs, each one twice, and every one with itself
    return (total - count) / (count * (count - 1))
