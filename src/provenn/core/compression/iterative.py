"""Iterative magnitude pruning: train, prune by a rule, rewind, repeat.

Source: Frankle & Carbin, "The lottery ticket hypothesis", ICLR 2019.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.core.compression.masks import Masks, prunable_weights
from provenn.core.experiment.accounting import model_size, multiply_accumulates
from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.experiment.recording import evaluating
from provenn.core.experiment.reports import Report

Scope = Literal["global", "layer", "neuron"]
SCOPES = ("global", "layer", "neuron")
TrainFunction = Callable[[nn.Module], float | None]


class Rule(Protocol):
    """Says how many of the remaining weights of each group to prune in a round."""

    from_dense: bool
    """Whether weights are ranked by their magnitude in the trained dense model, and not in the latest one."""

    def counts(
        self, weights: Float[Tensor, "groups weights"], mask: Bool[Tensor, "groups weights"]
    ) -> Int[Tensor, " groups"]:
        """Return the number of weights to prune in each group.

        Args:
            weights: The trained weights, zero where pruned; one group a row.
            mask: True where a weight is left.
        """


@dataclass(frozen=True)
class FixedRatio:
    """Prune the same share of the remaining weights in every round, as lottery tickets do.

    Args:
        ratio: The share, in [0, 1].

    Raises:
        ValueError: ``ratio`` is outside [0, 1].
    """

    ratio: float = 0.2
    from_dense: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, at_least=0, at_most=1)

    def counts(
        self, weights: Float[Tensor, "groups weights"], mask: Bool[Tensor, "groups weights"]
    ) -> Int[Tensor, " groups"]:
        """Return ``ratio`` of each group's remaining weights, rounded down.

        Args:
            weights: Not looked at.
            mask: True where a weight is left; one group a row.
        """
        return (mask.sum(dim=1).double() * self.ratio).floor().long()


@dataclass(frozen=True)
class OneShot(FixedRatio):
    """Prune the shares that :class:`FixedRatio` would have reached, but rank all weights once, in the dense model.

    The model of round t is the trained dense model pruned at once to (1 − ratio)ᵗ of its weights, and retrained.

    Args:
        ratio: As in :class:`FixedRatio`.

    Raises:
        ValueError: ``ratio`` is outside [0, 1].
    """

    from_dense: ClassVar[bool] = True


@dataclass(frozen=True)
class Round(Report):
    """One round: what was left while the model trained, what training returned, and what was pruned after it."""

    index: int
    remaining: int
    density: float
    score: float
    pruned: int


@dataclass(frozen=True)
class PruningReport(Report):
    """What a prune loop did.

    ``params`` counts all parameters, ``nonzero`` those that are not zero, ``bytes`` the dense storage of parameters
    and buffers, ``macs`` the multiply–accumulates of one dense call (``None`` without example inputs): unstructured
    zeros save storage and work only in a sparse format. ``rounds`` has one entry a training.
    """

    params: int
    nonzero: int
    bytes: int
    macs: int | None
    rounds: tuple[Round, ...]
    nested: ClassVar[dict[str, type[Report]]] = {"rounds": Round}

    def plot(self) -> Any:
        """Draw the score that training returned against the share of weights left."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot([100 * one.density for one in self.rounds], [one.score for one in self.rounds], "o-")
        axes.set(xscale="log", xlabel="weights left (%)", ylabel="score")
        axes.invert_xaxis()
        return figure


def costs(model: nn.Module, example_inputs: tuple[Any, ...] | None) -> dict[str, Any]:
    """Return what a :class:`PruningReport` says of the final model.

    Args:
        model: The model; its mode is put back.
        example_inputs: Arguments of one call, to count multiply–accumulates by; ``None`` leaves them out.
    """
    size = model_size(model)
    macs = None
    if example_inputs is not None:
        with evaluating(model):  # in training mode the call would move batch norm's averages
            macs = multiply_accumulates(model, *example_inputs)
    return {"params": size.parameters, "nonzero": size.nonzero, "bytes": size.bytes, "macs": macs}


@dataclass(frozen=True)
class State:
    """What :meth:`IterativePruner.iterate` yields after each training: the round, the model, and both masks.

    ``model`` is trained and not yet pruned; ``masks`` held while it trained, ``pruned`` are the next round's.
    """

    round: Round
    model: nn.Module
    masks: Masks
    pruned: Masks


@dataclass(frozen=True)
class IterativePruner:
    """Train, prune by a rule, rewind to the initial weights, and retrain, for a number of rounds.

    Args:
        rule: How many weights to prune in a round: :class:`FixedRatio`, :class:`OneShot`, or one of your own.
        scope: What is ranked together: all weights (``"global"``), those of a tensor (``"layer"``), or those of an
            output unit (``"neuron"``: the rows of a weight; in a transposed convolution those are inputs).
        rounds: Prunings; there is one training more.
        rewind: ``"init"`` puts what is left back to its initial value before each training, biases and norm
            parameters included; ``"none"`` goes on from the trained values (fine-tuning).
        stop: Called with the rounds so far after each training; true ends the loop there, unpruned.

    Raises:
        ValueError: ``scope`` or ``rewind`` is unknown, or ``rounds`` < 0.

    Cost: ``rounds + 1`` trainings; a pruning sorts the remaining weights, O(d log d) time and O(d) memory.
    """

    rule: Rule
    scope: Scope = "global"
    rounds: int = 30
    rewind: Literal["init", "none"] = "init"
    stop: Callable[[tuple[Round, ...]], bool] | None = field(default=None)

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, SCOPES)
        check_choice("rewind", self.rewind, ("init", "none"))
        check_integer("rounds", self.rounds, at_least=0)

    def compress(
        self,
        model: nn.Module,
        train_fn: TrainFunction,
        remaining: float | None = None,
        example_inputs: tuple[Any, ...] | None = None,
    ) -> tuple[nn.Module, PruningReport]:
        """Prune a copy of the model.

        Args:
            model: Left as it is; its weights are the ones to rewind to.
            train_fn: Trains the model that it is given, in place, with optimizers of its own making; may return a
                score, which the report keeps.
            remaining: Stop once this share of the prunable weights is left; the last pruning goes exactly there. If
                the rounds end before, the report's last density says how far they got.
            example_inputs: Arguments of one call, to count multiply–accumulates by.

        Returns:
            The trained, pruned model (plain, zeros in place) and the report.

        Raises:
            ValueError: ``remaining`` is outside (0, 1], or the model has nothing to prune.
        """
        rounds: list[Round] = []
        for state in self.iterate(model, train_fn, remaining):
            rounds.append(state.round)
            last = state.model
        return last, PruningReport(**costs(last, example_inputs), rounds=tuple(rounds))

    def iterate(self, model: nn.Module, train_fn: TrainFunction, remaining: float | None = None) -> Iterator[State]:
        """Do what :meth:`compress` does, yielding after each training; the yielded model is the loop's own.

        Args:
            model: As in :meth:`compress`.
            train_fn: As in :meth:`compress`.
            remaining: As in :meth:`compress`.

        Yields:
            The state after each training.

        Raises:
            ValueError: As :meth:`compress`.
        """
        if remaining is not None:
            check_number("remaining", remaining, above=0, at_most=1)
        initial = copy.deepcopy(model.state_dict())
        model = copy.deepcopy(model)
        masks = Masks(model)
        dense: dict[str, Tensor] = {}
        rounds: list[Round] = []
        for index in range(self.rounds + 1):
            if self.rewind == "init":
                model.load_state_dict(initial)
            with masks.held(model):
                score = train_fn(model)
            model.zero_grad(set_to_none=True)  # what one training leaves must not reach the next
            if not dense:
                dense = {name: weight.clone() for name, weight in _weights(model, masks).items()}
            left = masks.remaining
            one = Round(index, left, left / masks.total, math.nan if score is None else float(score), 0)
            ended = index == self.rounds or (self.stop is not None and self.stop((*rounds, one)))
            if remaining is not None:
                ended = ended or left <= self._floor(masks, remaining)
            pruned = masks if ended else self._pruned(model, masks, dense, remaining)
            one = Round(one.index, one.remaining, one.density, one.score, left - pruned.remaining)
            rounds.append(one)
            yield State(one, model, masks, pruned)
            if ended:
                return
            masks = pruned

    @staticmethod
    def _floor(masks: Masks, remaining: float | None) -> int:
        return 0 if remaining is None else math.floor(remaining * masks.total)

    def _pruned(self, model: nn.Module, masks: Masks, dense: Mapping[str, Tensor], remaining: float | None) -> Masks:
        """Return the masks after one pruning."""
        weights = _weights(model, masks)
        ranked = dense if self.rule.from_dense else weights
        groups = _groups(weights, masks, self.scope)
        counts = [
            self.rule.counts(_rows(weights, names, self.scope), _rows(masks, names, self.scope)) for names in groups
        ]
        counts = _limited(counts, masks.remaining - self._floor(masks, remaining))
        after = copy.deepcopy(masks)
        for names, count in zip(groups, counts, strict=True):
            removed = smallest(_rows(ranked, names, self.scope), _rows(masks, names, self.scope), count)
            sizes = [masks[name].numel() for name in names]
            pieces = removed.reshape(-1).split(sizes)
            for name, piece in zip(names, pieces, strict=True):
                after.remove(name, piece.view_as(masks[name]))
        return after


def _weights(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Return the prunable weights where their masks are: training may have moved the model to another device."""
    return {name: weight.detach().to(masks[name].device) for name, weight in prunable_weights(model).items()}


def _groups(weights: Mapping[str, Tensor], masks: Masks, scope: Scope) -> list[list[str]]:
    return [list(weights)] if scope == "global" else [[name] for name in weights]


def _rows(tensors: Mapping[str, Tensor], names: list[str], scope: Scope) -> Tensor:
    """Lay tensors out as (groups, weights): one group, or one a row of the only tensor."""
    if scope == "neuron":
        return tensors[names[0]].flatten(1)
    return torch.cat([tensors[name].reshape(-1) for name in names])[None]


def _limited(counts: list[Tensor], allowed: int) -> list[Tensor]:
    """Scale counts down in proportion, if together they prune more than is allowed, so that they prune just that."""
    flat = torch.cat(counts)
    excess = int(flat.sum()) - allowed
    if excess <= 0:
        return counts
    scaled = flat.double() * (allowed / int(flat.sum()))
    kept = scaled.floor().long()
    rest = torch.argsort(scaled - kept, descending=True, stable=True)[: allowed - int(kept.sum())]
    kept[rest] += 1
    return list(kept.split([len(count) for count in counts]))


def smallest(
    weights: Float[Tensor, "groups weights"], mask: Bool[Tensor, "groups weights"], count: Int[Tensor, " groups"]
) -> Bool[Tensor, "groups weights"]:
    """Mark the ``count`` smallest magnitudes among each group's remaining weights; ties go to the earlier weight.

    Args:
        weights: One group a row.
        mask: True where a weight remains.
        count: How many to mark in each group; beyond its remaining weights, all of them.

    Returns:
        True where a weight is marked.

    Cost: one stable sort of each group.
    """
    magnitudes = weights.abs().masked_fill(~mask, math.inf)
    order = torch.argsort(magnitudes, dim=1, stable=True)
    chosen = torch.arange(weights.shape[1], device=weights.device) < count[:, None]
    return torch.zeros_like(mask).scatter(1, order, chosen) & mask
