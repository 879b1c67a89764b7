"""The six imbalanced tables of AnyLoss's claim, cut into folds, and the two ways to rebalance them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from provenn import data
from provenn.core.experiment.seeding import derive_seed, generator
from provenn.data.toys import imbalanced_subset, imbalanced_table

Table = tuple[np.ndarray, np.ndarray]
Resample = Callable[[np.ndarray, np.ndarray, np.random.Generator], Table]
POSITIVES_TO_NEGATIVES = 0.2
"""The ratio that rebalancing aims at, as in the authors' comparison."""


def _digits() -> Table:
    bundle = data.load("digits")
    assert isinstance(bundle, data.TableBundle)
    return bundle.x, (bundle.y == 8).astype(np.int64)


def _breast_cancer() -> Table:
    bundle = data.load("breast_cancer")
    assert isinstance(bundle, data.TableBundle)
    malignant = torch.from_numpy(1 - bundle.y)
    benign = int((malignant == 0).sum())
    wanted = {1: round(benign * 0.09 / 0.91)}
    x, y = imbalanced_subset(torch.from_numpy(bundle.x), malignant, wanted, generator("anyloss", "breast cancer"))
    return x.numpy(), y.numpy().astype(np.int64)


def _simulated(positives: float, separation: float) -> Callable[[], Table]:
    def make() -> Table:
        draws = np.random.default_rng(derive_seed("anyloss", f"{positives:g}"))
        x, y = imbalanced_table(draws, positives=positives, separation=separation)
        return x, y

    return make


TABLES: Mapping[str, Callable[[], Table]] = {
    "digits, 8 against rest": _digits,
    "breast cancer, 9 %": _breast_cancer,
    "simulated, 3 %": _simulated(0.03, 1.0),
    "simulated, 5 %": _simulated(0.05, 0.8),
    "simulated, 7 %": _simulated(0.07, 0.65),
    "simulated, 10 %": _simulated(0.10, 0.5),
}


@dataclass(frozen=True)
class Folds:
    """The folds of a table, standardised by their training parts.

    Shape: ``x`` (folds, rows, features) and ``y`` (folds, rows) for training, all folds with the same number of rows;
    ``validation`` and ``test`` a pair of rows and classes for each fold.
    """

    x: Tensor
    y: Tensor
    validation: tuple[tuple[Tensor, Tensor], ...]
    test: tuple[tuple[Tensor, Tensor], ...]


def folds_of(table: Table, count: int, seed: int, resample: Resample | None = None, device: str = "cpu") -> Folds:
    """Cut a table into folds; of what is not tested, a quarter validates and the rest trains.

    Args:
        table: Features and classes.
        count: Number of folds.
        seed: Draws the folds, the validation parts and what ``resample`` draws.
        resample: Rebalances a training part.
        device: Where the tensors go.
    """
    x, y = table
    parts = []
    split = StratifiedKFold(count, shuffle=True, random_state=derive_seed(seed, "folds") % 2**32)
    for index, (kept, tested) in enumerate(split.split(x, y)):
        state = derive_seed(seed, "validation", index) % 2**32
        trained, validated = train_test_split(kept, test_size=0.25, stratify=y[kept], random_state=state)
        mean, scale = x[trained].mean(axis=0), x[trained].std(axis=0)
        z = (x - mean) / np.where(scale > 0, scale, 1.0)
        rows, classes = z[trained], y[trained]
        if resample is not None:
            rows, classes = resample(rows, classes, np.random.default_rng(derive_seed(seed, "resample", index)))
        parts.append(((rows, classes), (z[validated], y[validated]), (z[tested], y[tested])))
    shortest = min(len(classes) for (_, classes), _, _ in parts)
    training = [_trimmed(rows, classes, shortest) for (rows, classes), _, _ in parts]

    def tensors(pair: Table) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(pair[0]).to(device), torch.from_numpy(pair[1]).double().to(device)

    return Folds(
        *tensors((np.stack([rows for rows, _ in training]), np.stack([classes for _, classes in training]))),
        validation=tuple(tensors(held) for _, held, _ in parts),
        test=tuple(tensors(held) for _, _, held in parts),
    )


def _trimmed(x: np.ndarray, y: np.ndarray, size: int) -> Table:
    """Leave out the last negatives, a few, so that all folds are equally long and train as one batch of problems."""
    left_out = np.flatnonzero(y == 0)[len(np.flatnonzero(y == 0)) - (len(y) - size) :]
    keep = np.setdiff1d(np.arange(len(y)), left_out)
    return x[keep], y[keep]


def smote(x: np.ndarray, y: np.ndarray, draws: np.random.Generator, neighbours: int = 5) -> Table:
    """Add positives on the segments between a positive and one of its nearest ones.

    Source: Chawla et al., "SMOTE: synthetic minority over-sampling technique", JAIR 16 (2002).
    """
    positives = x[y == 1]
    wanted = round(POSITIVES_TO_NEGATIVES * int((y == 0).sum())) - len(positives)
    if wanted <= 0:
        return x, y
    near = NearestNeighbors(n_neighbors=min(neighbours, len(positives) - 1)).fit(positives)
    others = near.kneighbors(return_distance=False)  # of the points themselves: none is its own neighbour
    start = draws.integers(len(positives), size=wanted)
    end = others[start, draws.integers(others.shape[1], size=wanted)]
    share = draws.random((wanted, 1))
    made = positives[start] + share * (positives[end] - positives[start])
    return np.concatenate([x, made]), np.concatenate([y, np.ones(wanted, dtype=y.dtype)])


def undersample(x: np.ndarray, y: np.ndarray, draws: np.random.Generator) -> Table:
    """Leave out negatives at random."""
    negatives = np.flatnonzero(y == 0)
    wanted = min(len(negatives), round(int((y == 1).sum()) / POSITIVES_TO_NEGATIVES))
    keep = np.sort(np.concatenate([np.flatnonzero(y == 1), draws.choice(negatives, wanted, replace=False)]))
    return x[keep], y[keep]
