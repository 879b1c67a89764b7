"""Batches in which every class has its share.

Source: Han, Moniz, Chawla, "AnyLoss", KDD 2024, arXiv 2405.14745: the counts of a batch stand for those of the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils.data import Sampler

from provenn.core.experiment.checks import check_integer
from provenn.data.toys import stratified_permutation


class StratifiedBatchSampler(Sampler[list[int]]):
    """Cut the data into random batches that hold the classes in proportion, for ``DataLoader(batch_sampler=...)``.

    Of two classes a batch holds their shares to within one sample; of more, to within a few. A class whose share of a
    batch is a sample or more is in every batch, where there are two. Batches differ in size by one at most, so that no
    small one is left at the end.

    Args:
        labels: The class of every sample.
        batch_size: Samples a batch, at most.
        generator: Draws the order, on the CPU. Without one, each epoch is seeded from torch's global generator.

    Shape:
        labels (samples,).

    Raises:
        ValueError: ``labels`` is empty or not one-dimensional, or ``batch_size`` < 1.
        TypeError: ``batch_size`` is not an integer.

    Cost: an epoch sorts the samples once, O(n log n).

    Source: the sampler that the losses of a batch's confusion matrix need; the paper shuffles without strata.
    """

    def __init__(
        self,
        labels: Shaped[Tensor, " samples"] | Sequence[int],
        batch_size: int,
        generator: torch.Generator | None = None,
    ) -> None:
        check_integer("batch_size", batch_size, at_least=1)
        labels = torch.as_tensor(labels).cpu()
        if labels.dim() != 1 or len(labels) == 0:
            raise ValueError(f"labels must be one class a sample, got shape {tuple(labels.shape)}")
        self.labels = labels.unique(return_inverse=True)[1]
        self.batch_size = batch_size
        self.generator = generator

    def __len__(self) -> int:
        """Return the number of batches an epoch."""
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Draw an epoch's batches.

        Yields:
            The samples of one batch, by index.
        """
        generator = self.generator
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        order = stratified_permutation(self.labels, generator)
        for batch in torch.tensor_split(order, len(self)):
            yield batch.tolist()
