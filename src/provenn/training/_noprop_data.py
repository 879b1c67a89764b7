"""What the trainers share: batches by seed, the training itself, class embeddings and their start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import Epoch, minibatches, run_to_end, train

Embedding = Literal["onehot", "learned", "prototype"]
Progress = Callable[[Epoch], None]
Batches = Callable[[int], Iterable[tuple[Tensor, ...]]]


class TrainingResult(NamedTuple):
    """What ``fit`` returns.

    Attributes:
        history: One :class:`~provenn.core.experiment.training.Epoch` an epoch, those before an interruption included.
        model: What was trained; the trainer's own ``model``.
    """

    history: list[Epoch]
    model: nn.Module


@dataclass(frozen=True)
class Settings:
    """How to train: passes over the data, their batches, AdamW's options, and the seed of all randomness."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int

    def __post_init__(self) -> None:
        check_integer("epochs", self.epochs, at_least=1)
        check_integer("batch_size", self.batch_size, at_least=1)
        check_number("lr", self.lr, above=0)
        check_number("weight_decay", self.weight_decay, at_least=0)
        check_integer("seed", self.seed)


class LabelledData:
    """Samples with labels, as two tensors or as a loader, passed over in an order that the pass's keys decide.

    Args:
        data: Samples along the first dimension; or, without ``labels``, an iterable of (x, y) batches that can be
            iterated anew, such as a ``DataLoader``.
        labels: Classes from 0.
        num_classes: m.
        settings: Batch size (of tensors) and seed.

    Raises:
        ValueError: A label outside 0 … m − 1, no samples, or lengths that differ.
        TypeError: ``data`` is an iterator, which ends after one pass, or labels are not integers.
    """

    def __init__(self, data: Any, labels: Tensor | None, num_classes: int, settings: Settings) -> None:
        self.num_classes, self.settings = num_classes, settings
        if labels is None:
            if isinstance(data, Tensor) or not isinstance(data, Iterable) or iter(data) is data:
                raise TypeError(f"data must be a tensor with labels, or a loader of (x, y) batches that can be "
                                f"iterated anew, got {type(data).__name__} and no labels")  # fmt: skip
            self.loader, self.tensors = data, None
        else:
            if len(data) != len(labels) or len(labels) == 0:
                raise ValueError(f"labels must be as many as samples and at least 1, got {len(labels)}, {len(data)}")
            self._check(labels)
            self.loader, self.tensors = None, (data, labels)

    def _check(self, labels: Tensor) -> None:
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim != 1:
            raise TypeError(f"labels must be integers, one a sample, got {labels.dtype}, shape {tuple(labels.shape)}")
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"labels must be within 0 … {self.num_classes - 1}, got {labels.min().item()} … {labels.max().item()}"
            )

    def passes(self, *keys: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield x, y and the batch's place (the keys, then its number) of one pass.

        While a pass is under way torch's global generators are seeded by its keys: for dropout, and for what a loader
        draws. A last batch of a single sample is left out, since batch normalisation cannot train on it.
        """
        with seeded(self.settings.seed, "pass", *keys):
            for step, (x, y) in enumerate(self._batches(keys)):
                yield x, y, torch.tensor([*keys, step])

    def _batches(self, keys: tuple[int, ...]) -> Iterator[Any]:
        if self.tensors is None:
            for x, y in self.loader:
                self._check(y)
                yield x, y
            return
        order = generator(self.settings.seed, "order", *keys)
        for batch in minibatches(self.tensors, self.settings.batch_size, order):
            if len(batch[0]) > 1 or len(self.tensors[0]) == 1:
                yield batch

    def everything(self) -> tuple[Tensor, Tensor]:
        """Return all samples and labels."""
        if self.tensors is not None:
            return self.tensors
        with seeded(self.settings.seed, "everything"):
            batches = list(self._batches(()))
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def fit_epochs(
    model: nn.Module,
    loss: Callable[..., Tensor],
    batches: Batches,
    settings: Settings,
    checkpoint: str | Path | None,
    progress: Progress | None,
) -> list[Epoch]:
    """Train a model's parameters by AdamW, and report after every epoch; return the history."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, foreach=True)
    epochs = train(model, optimizer, batches, loss, epochs=settings.epochs, checkpoint=checkpoint)
    return run_to_end(epochs, checkpoint, progress)


class ClassEmbeddings(nn.Module):
    """W_E: one-hot and fixed, or learned from an orthogonal start, or learned from an image of each class."""

    def __init__(self, kind: Embedding, num_classes: int, embed_dim: int, like: Tensor) -> None:
        super().__init__()
        check_choice("embedding", kind, ("onehot", "learned", "prototype"))
        if kind == "onehot" and embed_dim != num_classes:
            raise ValueError(f"embed_dim must be {num_classes} with embedding='onehot', got {embed_dim}")
        self.kind = kind
        weight = torch.eye(num_classes, embed_dim, dtype=like.dtype, device=like.device)
        if kind == "onehot":
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(nn.init.orthogonal_(weight.clone()))
        self.register_buffer("started", torch.tensor(kind != "prototype", device=like.device))

    def start(self, data: LabelledData) -> None:
        """Choose the prototypes, once."""
        if self.started:
            return
        x, y = data.everything()
        if x[0].numel() != self.weight.shape[1]:
            raise ValueError(f"embed_dim must be the size of a sample, {x[0].numel()}, with embedding='prototype', "
                             f"got {self.weight.shape[1]}")  # fmt: skip
        with torch.no_grad():
            self.weight.copy_(prototypes(x, y, len(self.weight)))
        self.started.fill_(True)

    def check_started(self) -> None:
        """Raise an error if there are no embeddings yet."""
        if not self.started:
            raise ValueError("embedding='prototype' takes its images from data: call fit first")


def prototypes(
    x: Float[Tensor, "samples *data"], y: Int[Tensor, " samples"], num_classes: int
) -> Float[Tensor, "classes features"]:
    """Return of each class the sample with the smallest median distance to the class's others.

    Args:
        x: Samples.
        y: Their classes.
        num_classes: m.

    Shape: (samples, …), (samples) → (m, entries of a sample).

    Raises:
        ValueError: A class has no sample.

    Cost: O(Σ n_c² entries) time, and O(512 n_c) memory beside the data for a class of n_c samples.

    Source: NoProp, section 4.1, on class embeddings.
    """
    chosen = []
    for label in range(num_classes):
        members = x[y == label].flatten(1)
        if len(members) == 0:
            raise ValueError(f"y must hold every class for embedding='prototype', got no sample of class {label}")
        chosen.append(members[_medoid(members)])
    return torch.stack(chosen)


def _medoid(members: Tensor) -> Tensor:
    if len(members) == 1:
        return torch.zeros((), dtype=torch.long, device=members.device)
    medians = []
    for start in range(0, len(members), 512):
        rows = torch.cdist(members[start : start + 512], members)
        rows.diagonal(start).fill_(-1)  # sorts its own place to the front, to be dropped
        others = rows.sort(dim=1).values[:, 1:]
        count = others.shape[1]
        medians.append((others[:, (count - 1) // 2] + others[:, count // 2]) / 2)
    return torch.cat(medians).argmin()


def normal_like(like: Tensor, draws: torch.Generator) -> Tensor:
    """Return standard normal noise of a tensor's shape, drawn where the generator draws."""
    return torch.randn(like.shape, generator=draws, dtype=like.dtype, device=draws.device).to(like.device)
