"""The proto-triplet loss: a query nearer to its class's prototype than to any other, by a margin."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_number
from provenn.losses._susana_losses_icnn import distances, reduced


class ProtoTripletLoss(nn.Module):
    r"""Triplet loss of queries, the prototype of their class, and the nearest prototype of another.

    .. math::
        \ell(q) = \max\Big(0,\ d(q, c_y) - \min_{k \ne y} d(q, c_k) + m\Big), \qquad
        d(a, b) = \sqrt{\|a - b\|^2 + 10^{-6}}

    Args:
        margin: m > 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the queries.

    Shape:
        ``queries`` (queries, d), ``query_labels`` (queries,), ``prototypes`` (way, d); a scalar, or (queries,) with
        ``"none"``.

    Returns:
        The loss, at least 0.

    Raises:
        ValueError: ``margin`` ≤ 0, an unknown ``reduction``; in the forward pass fewer than two prototypes, lengths
            that differ, no query, or a label outside the prototypes.
        TypeError: ``margin`` is no number, or the labels are no integers.

    Cost: queries · way · d, and queries · way numbers.

    Source: arXiv 2305.09062, its section on the proto-triplet loss; margin and distance as in the authors' code.
    """

    def __init__(self, margin: float = 0.5, reduction: str = "mean") -> None:
        super().__init__()
        check_number("margin", margin, above=0)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.margin, self.reduction = margin, reduction

    def forward(
        self,
        queries: Float[Tensor, "queries d"],
        query_labels: Int[Tensor, " queries"],
        prototypes: Float[Tensor, "way d"],
    ) -> Tensor:
        """Return the loss.

        Args:
            queries: Embeddings.
            query_labels: The prototype of each query's class.
            prototypes: One embedding a class.
        """
        way = len(prototypes)
        if way < 2:
            raise ValueError(f"prototypes must be of two classes at least, got {way}")
        check_labels("query_labels", query_labels, len(queries), way)
        to_all = distances(queries, prototypes)
        own = torch.nn.functional.one_hot(query_labels.long(), way).bool()
        nearest = to_all.masked_fill(own, torch.inf).amin(1)
        return reduced((to_all[own] - nearest + self.margin).clamp_min(0), self.reduction)

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        return f"margin={self.margin}, reduction={self.reduction!r}"


def check_labels(name: str, labels: Tensor, count: int, way: int) -> None:
    """Check that there is a label in 0 … way − 1 for each of some embeddings, and at least one.

    Raises:
        ValueError: There is not.
        TypeError: Labels are no integers.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    if labels.shape != (count,) or count == 0:
        raise ValueError(f"{name} must be one an embedding and at least 1, got {tuple(labels.shape)} for {count}")
    if torch.compiler.is_compiling():
        return
    if not bool(((labels >= 0) & (labels < way)).all()):
        raise ValueError(f"{name} must be in 0 … {way - 1}, got {int(labels.min())} … {int(labels.max())}")
