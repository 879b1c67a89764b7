"""Few-shot episodes: drawing them, and the losses of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.losses._susana_losses_icnn import score
from provenn.losses._susana_losses_triplet import ProtoTripletLoss, check_labels

TERMS = ("cross", "support", "query", "prototypes", "full", "triplet")


class Episode(NamedTuple):
    """An episode: places of its samples in the data, a row a class; row c is class c of the episode.

    Attributes:
        support: (way, shot).
        query: (way, query).
        classes: The labels in the data that the rows stand for, (way,).

    Source: Vinyals et al., "Matching networks for one shot learning" (2016).
    """

    support: Int[Tensor, "way shot"]
    query: Int[Tensor, "way query"]
    classes: Int[Tensor, " way"]


class EpisodeSampler:
    """Draws episodes: classes without replacement, and from each class samples for support and query, none twice.

    Args:
        labels: Classes of the data.
        way: Classes of an episode.
        shot: Support samples of each.
        query: Query samples of each.
        generator: Draws; ``None``: torch's global generator.

    Shape:
        ``labels`` (samples,).

    Raises:
        ValueError: ``way`` < 2, ``shot`` or ``query`` < 1, or fewer than ``way`` classes with ``shot`` + ``query``
            samples.
        TypeError: A count is no integer.

    Cost: O(way · samples of a class) a draw.

    Source: Vinyals et al., "Matching networks for one shot learning" (2016), for episodes. The authors' code draws
    queries apart from the support, so that an image can be both; here it cannot.
    """

    def __init__(
        self,
        labels: Int[Tensor, " samples"],
        way: int,
        shot: int,
        query: int,
        generator: torch.Generator | None = None,
    ) -> None:
        check_integer("way", way, at_least=2)
        check_integer("shot", shot, at_least=1)
        check_integer("query", query, at_least=1)
        self.way, self.shot, self.query, self._generator = way, shot, query, generator
        everyone = [(int(label), (labels == label).nonzero().squeeze(1)) for label in labels.unique()]
        self._classes = [(label, places) for label, places in everyone if len(places) >= shot + query]
        if len(self._classes) < way:
            raise ValueError(
                f"labels must have {way} classes of {shot + query} samples or more, got {len(self._classes)} of "
                f"{len(everyone)}"
            )
        self._device = labels.device

    def sample(self) -> Episode:
        """Draw an episode."""
        chosen = self._order(len(self._classes))[: self.way].tolist()
        labels, places = zip(*(self._classes[one] for one in chosen), strict=True)
        drawn = torch.stack(
            [of_class[self._order(len(of_class)).to(of_class.device)][: self.shot + self.query] for of_class in places]
        )
        return Episode(drawn[:, : self.shot], drawn[:, self.shot :], torch.tensor(labels, device=self._device))

    def _order(self, count: int) -> Tensor:
        device = "cpu" if self._generator is None else self._generator.device
        return torch.randperm(count, generator=self._generator, device=device)

    def __iter__(self) -> Iterator[Episode]:
        """Draw episodes without end."""
        while True:
            yield self.sample()


def class_means(x: Float[Tensor, "n d"], labels: Int[Tensor, " n"], way: int) -> Float[Tensor, "way d"]:
    """Return the prototypes: the mean embedding of each class.

    Raises:
        ValueError: A class is empty.
    """
    member = nn.functional.one_hot(labels.long(), way).to(x.dtype)
    counts = member.sum(0)
    if not torch.compiler.is_compiling() and not bool((counts > 0).all()):
        raise ValueError(
            f"support_labels must name every class, got none of {(counts == 0).nonzero().flatten().tolist()}"
        )
    return (member.T @ x) / counts.unsqueeze(1)


class EpisodeLoss(nn.Module):
    """The loss of an episode: a mean of the chosen terms.

    ``"cross"``: cross-entropy of −d² / temperature from queries to prototypes, that of a prototypical network;
    ``"support"``, ``"query"``, ``"prototypes"``, ``"full"``: −log of the ICNN score of the support with itself, of the
    queries against the support, of the queries against the prototypes, and of all together, where the nearest of
    another class is sought among as many as a class has; ``"triplet"``: the proto-triplet loss.

    Args:
        terms: Which of them.
        weights: One for each term; ``None``: equal.
        temperature: Of the cross-entropy, > 0.
        k: Neighbours of the ICNN score.
        margin: Of the triplet loss.

    Shape:
        ``support`` (n, d), ``support_labels`` (n,), ``query`` (m, d), ``query_labels`` (m,), classes 0 … way − 1.

    Returns:
        Σ wᵢℓᵢ / Σ wᵢ, so that a further term shrinks the share of the others.

    Raises:
        ValueError: No term or an unknown one, weights of another number or not above 0, ``temperature``, ``margin`` or
            ``k`` out of range; in the forward pass fewer than two classes, a class without support, labels out of
            range, or too few references for a score.
        TypeError: An argument is of another type.

    Cost: O((n + m)² d) with ``"full"``, else O(m (n + way) d).

    Source: arXiv 2305.09062, its section on training; terms and their mean as in the authors' code.
    """

    def __init__(
        self,
        terms: Sequence[str] = ("cross", "support", "query", "triplet"),
        weights: Sequence[float] | None = None,
        temperature: float = 1.0,
        k: int = 4,
        margin: float = 0.5,
    ) -> None:
        super().__init__()
        unknown = [term for term in terms if term not in TERMS]
        if unknown or not terms or len(set(terms)) != len(terms):
            raise ValueError(f"terms must be some of {', '.join(TERMS)}, each once, got {tuple(terms)}")
        if weights is not None and len(weights) != len(terms):
            raise ValueError(f"weights must be one a term, got {len(weights)} for {len(terms)}")
        for weight in weights or ():
            check_number("weights", weight, above=0)
        check_number("temperature", temperature, above=0)
        check_integer("k", k, at_least=1)
        self.terms = tuple(terms)
        self.weights = (1.0,) * len(self.terms) if weights is None else tuple(weights)
        self.temperature, self.k = temperature, k
        self.triplet = ProtoTripletLoss(margin)

    def forward(
        self,
        support: Float[Tensor, "n d"],
        support_labels: Int[Tensor, " n"],
        query: Float[Tensor, "m d"],
        query_labels: Int[Tensor, " m"],
    ) -> Float[Tensor, ""]:
        """Return the loss.

        Args:
            support: Embeddings of the support.
            support_labels: Their classes.
            query: Embeddings of the queries.
            query_labels: Their classes.
        """
        if support_labels.numel() == 0:
            raise ValueError("support must hold at least one embedding, got none")
        way = int(support_labels.max()) + 1
        if way < 2:
            raise ValueError(f"support_labels must be of two classes at least, got {way}")
        check_labels("support_labels", support_labels, len(support), way)
        check_labels("query_labels", query_labels, len(query), way)
        means = class_means(support, support_labels, way)
        found = [self._term(term, support, support_labels, query, query_labels, means) for term in self.terms]
        total: Tensor = sum((w * one for w, one in zip(self.weights, found, strict=True)), support.new_zeros(()))
        return total / sum(self.weights)

    def _term(self, term: str, support: Tensor, ys: Tensor, query: Tensor, yq: Tensor, means: Tensor) -> Tensor:
        if term == "cross":
            squares = (query.unsqueeze(1) - means).square().sum(-1)
            return nn.functional.cross_entropy(-squares / self.temperature, yq)
        if term == "triplet":
            loss: Tensor = self.triplet(query, yq, means)
            return loss
        if term == "support":
            rated = score(support, ys, None, None, self.k, None)
        elif term == "query":
            rated = score(query, yq, support, ys, self.k, None)
        elif term == "prototypes":
            rated = score(query, yq, means, torch.arange(len(means), device=yq.device), self.k, None)
        else:
            x, y = torch.cat([support, query]), torch.cat([ys, yq])
            a_class = len(x) // len(means)
            rated = score(x, y, None, None, self.k, min(max(a_class, self.k + 1), len(x) - 1))
        return -rated.log()

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        return f"terms={self.terms}, weights={self.weights}, temperature={self.temperature}"
