"""Pruning Deep Neural Networks from a Sparsity Perspective.

Diao, Wang, Zhang, Yang, Ding, Tarokh, ICLR 2023. https://arxiv.org/abs/2302.05601

The PQ Index says how unequal the magnitudes of a weight vector are, and from it follows a bound on how many of them are
worth keeping. Sparsity-informed adaptive pruning (SAP) prunes by that bound in every round of lottery-ticket pruning:

    I(w) = 1 − d^{1/q − 1/p} ‖w‖_p / ‖w‖_q,    r ≥ d (1 + η)^{−q/(q−p)} (1 − I)^{pq/(q−p)}
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.compress._sap_pruning_index import check_exponents, gini_index, pq_index, retain_bound
from provenn.compress._sap_pruning_monitor import SparsityMonitor, SparsityReport
from provenn.core.compression.iterative import (
    FixedRatio,
    IterativePruner,
    OneShot,
    PruningReport,
    Round,
    Scope,
    State,
    TrainFunction,
    costs,
)
from provenn.core.experiment.checks import check_choice, check_number
from provenn.core.experiment.reports import Report

__all__ = [
    "SAP",
    "FixedRatio",
    "IterativePruner",
    "OneShot",
    "SAPPruner",
    "SparsityMonitor",
    "gini_index",
    "pq_index",
    "retain_bound",
]


@dataclass(frozen=True)
class SAP:
    r"""Prune, of each group's d remaining weights, :math:`\lfloor d \min(\gamma (1 - r/d), \beta) \rfloor`.

    r is the bound of :func:`retain_bound` at the group's PQ Index.

    Args:
        p: The smaller exponent of the index.
        q: The larger exponent.
        eta: η, the share of Σ|w|ᵖ that may be lost; more η, more pruning.
        gamma: γ, scales the share that is pruned.
        beta: β, the most that a round may prune; it keeps small groups from being emptied.

    Raises:
        ValueError: Not 0 < p < q, ``eta`` < 0, ``gamma`` < 0, or ``beta`` outside (0, 1].

    Cost: one PQ Index a group.

    Source: Algorithm 1 of the paper.
    """

    p: float = 0.5
    q: float = 1.0
    eta: float = 0.0
    gamma: float = 1.0
    beta: float = 0.9
    from_dense: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_exponents(self.p, self.q)
        check_number("eta", self.eta, at_least=0)
        check_number("gamma", self.gamma, at_least=0)
        check_number("beta", self.beta, above=0, at_most=1)

    def counts(
        self, weights: Float[Tensor, "groups weights"], mask: Bool[Tensor, "groups weights"]
    ) -> Int[Tensor, " groups"]:
        """Return the number of weights to prune in each group.

        Args:
            weights: The trained weights, a row a group.
            mask: True where a weight is left.

        Shape:
            ``weights`` and ``mask`` (groups, weights); returns (groups,).
        """
        left = mask.sum(dim=1)
        # One group is summed chunk by chunk; rows are reduced side by side.
        if len(weights) == 1:
            index = pq_index(weights, self.p, self.q, mask)[None]
        else:
            index = pq_index(weights, self.p, self.q, mask, dim=1)
        retained = retain_bound(index, left, self.p, self.q, self.eta).double()
        share = (self.gamma * (1 - retained / left.clamp(min=1))).clamp(0, self.beta)
        # The same guard against rounding as in the bound: 100 · 0.29 must not become 28.
        return torch.floor(left * share * (1 + 1e-12)).long()


@dataclass(frozen=True)
class SAPReport(PruningReport):
    """A prune loop's report with the course of the sparsity index."""

    sparsity: SparsityReport
    nested: ClassVar[dict[str, type[Report]]] = {"rounds": Round, "sparsity": SparsityReport}


@dataclass(frozen=True)
class SAPPruner:
    """Lottery-ticket pruning that picks each round's amount from the PQ Index, so that nobody picks a ratio.

    Args:
        p: The smaller exponent of the index.
        q: The larger exponent.
        eta: η, the share of Σ|w|ᵖ that may be lost.
        gamma: γ, scales the share that is pruned.
        beta: β, the most that a round may prune.
        scope: What shares an index and a threshold: all weights of more than one dimension (``"global"``), those of a
            tensor (``"layer"``), or those of an output unit (``"neuron"``).
        rounds: Prunings; there is one training more.
        rewind: ``"init"`` retrains from the initial weights, as the paper does; ``"none"`` goes on from the trained
            ones.
        stop: ``"limit"`` ends the loop where the smoothed index has turned upwards, at the compression limit;
            ``None`` runs all rounds.

    Raises:
        ValueError: Not 0 < p < q; ``eta`` or ``gamma`` < 0; ``beta`` outside (0, 1]; an unknown ``scope``, ``rewind``
            or ``stop``; or ``rounds`` < 0.

    Cost: ``rounds + 1`` trainings. A pruning is O(d log d) time, for the sort, and O(d) memory; the index itself is
    one pass.

    Source: Algorithm 1 of the paper; defaults as in the authors' code (p ½, q 1, η 0, γ 1, β 0.9, 30 rounds).
    """

    p: float = 0.5
    q: float = 1.0
    eta: float = 0.0
    gamma: float = 1.0
    beta: float = 0.9
    scope: Scope = "global"
    rounds: int = 30
    rewind: Literal["init", "none"] = "init"
    stop: Literal["limit"] | None = None

    def __post_init__(self) -> None:
        check_choice("stop", self.stop, (None, "limit"))
        self._pruner()

    def _pruner(self) -> IterativePruner:
        rule = SAP(self.p, self.q, self.eta, self.gamma, self.beta)
        return IterativePruner(rule, self.scope, self.rounds, self.rewind)

    def compress(
        self,
        model: nn.Module,
        train_fn: TrainFunction,
        remaining: float | None = None,
        example_inputs: tuple[Any, ...] | None = None,
    ) -> tuple[nn.Module, SAPReport]:
        """Prune a copy of the model.

        Args:
            model: Left as it is; its weights are the ones to rewind to.
            train_fn: Trains the model that it is given, in place, with optimizers of its own making; may return an
                accuracy, which the report keeps.
            remaining: Stop once this share of the prunable weights is left; the last pruning goes exactly there. If
                the rounds end before, the report's last density says how far they got.
            example_inputs: Arguments of one call, to count multiply–accumulates by.

        Returns:
            The trained, pruned model (plain, zeros in place) and the report: counts, rounds, and the sparsity index.

        Raises:
            ValueError: ``remaining`` is outside (0, 1], or the model has no weight of more than one dimension.
        """
        monitor = SparsityMonitor(self.p, self.q)
        rounds: list[Round] = []
        for state in self.iterate(model, train_fn, remaining):
            rounds.append(state.round)
            watch(monitor, state)
            last = state.model
            if self.stop == "limit" and monitor.report().stop_round not in (None, state.round.index):
                break
        return last, SAPReport(**costs(last, example_inputs), rounds=tuple(rounds), sparsity=monitor.report())

    def iterate(self, model: nn.Module, train_fn: TrainFunction, remaining: float | None = None) -> Iterator[State]:
        """Run the loop, yielding after each training, to watch it or to leave it."""
        yield from self._pruner().iterate(model, train_fn, remaining)


def watch(monitor: SparsityMonitor, state: State) -> None:
    """Observe a round's trained model, and what pruning will leave of it."""
    monitor.observe(state.model, state.masks, state.round.score, "retrained")
    pruned = copy.deepcopy(state.model)
    state.pruned.apply(pruned)
    monitor.observe(pruned, state.pruned, stage="pruned")
