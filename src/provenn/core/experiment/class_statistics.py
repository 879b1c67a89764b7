"""Class means and within-class scatter of features that arrive in batches, in one pass and bounded memory."""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from provenn.core.experiment.checks import check_integer


class ClassStatistics:
    """Counts, means and pooled within-class scatter of classes, updated batch by batch.

    Batches are merged by their means and centred scatters, and not by sums of squares, so a scatter far smaller than
    the means keeps its digits. Everything is kept in float64.

    Args:
        classes: Number of classes K.
        features: Number of features d.
        device: Where the sums live.

    Attributes:
        counts: Samples of each class, (K,).
        means: Class means, (K, d).
        scatter: Σ (h − mean of its class)(…)ᵀ over all samples, (d, d).

    Raises:
        ValueError: ``classes`` or ``features`` is below 1.

    Cost: O(K d + d²) memory, whatever the number of samples; O(B d²) time for a batch of B.

    Source: Chan, Golub & LeVeque, "Algorithms for computing the sample variance", Am. Stat. 37 (1983).
    """

    def __init__(self, classes: int, features: int, device: torch.device | str = "cpu") -> None:
        check_integer("classes", classes, at_least=1)
        check_integer("features", features, at_least=1)
        self.counts = torch.zeros(classes, dtype=torch.float64, device=device)
        self.means = torch.zeros(classes, features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(features, features, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, features: Float[Tensor, "batch features"], labels: Integer[Tensor, " batch"]) -> None:
        """Take in a batch.

        Args:
            features: One sample a row.
            labels: Their classes.

        Raises:
            ValueError: A label is not in 0 … K − 1, or the shapes do not fit.
        """
        if features.shape != (len(labels), self.means.shape[1]):
            raise ValueError(
                f"features must have the shape {(len(labels), self.means.shape[1])} (labels, features), "
                f"got {tuple(features.shape)}"
            )
        if len(labels) == 0:
            return
        if labels.min() < 0 or labels.max() >= len(self.counts):
            raise ValueError(
                f"labels must be in 0 … {len(self.counts) - 1}, got {labels.min().item()} … {labels.max().item()}"
            )
        labels = labels.long()  # indexing takes 8-bit integers for a mask
        samples = features.detach().double()
        counts = torch.bincount(labels, minlength=len(self.counts)).double()
        means = torch.zeros_like(self.means).index_add_(0, labels, samples) / counts.clamp(min=1)[:, None]
        centred = samples - means[labels]
        total = self.counts + counts
        shift = means - self.means
        weight = self.counts * counts / total.clamp(min=1)
        self.scatter += centred.T @ centred + (shift * weight[:, None]).T @ shift
        self.means += shift * (counts / total.clamp(min=1))[:, None]
        self.counts = total

    @property
    def mean(self) -> Float[Tensor, " features"]:
        """The mean of all samples; NaN before the first."""
        return (self.counts @ self.means) / self.counts.sum()
