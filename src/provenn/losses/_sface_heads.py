"""What every head on the unit sphere has: class centres, cosines to them, checks of its input, reductions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.numerics.precision import full_precision


class SphereHead(nn.Module, ABC):
    """Base of the heads: a loss of the cosines between embeddings and class centres.

    Args:
        in_features: Width d of the embeddings.
        num_classes: Number of classes C, at least 2.
        s: Scale of the cosines, the radius of the sphere.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"``.

    Attributes:
        weight: The centres, (C, d); drawn from a normal distribution of deviation 2 √(2/C).

    Raises:
        ValueError: ``in_features`` < 1, ``num_classes`` < 2, ``s`` ≤ 0, or an unknown ``reduction``.
    """

    def __init__(self, in_features: int, num_classes: int, s: float, reduction: str) -> None:
        check_integer("in_features", in_features, at_least=1)
        check_integer("num_classes", num_classes, at_least=2)
        check_number("s", s, above=0)
        check_choice("reduction", reduction, ("none", "mean", "sum"))
        super().__init__()
        self.in_features, self.num_classes = in_features, num_classes
        self.s, self.reduction = s, reduction
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.normal_(self.weight, std=2 * math.sqrt(2 / num_classes))  # Xavier on fan-out, with gain 2

    def forward(
        self, embeddings: Float[Tensor, "batch features"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, "*batch"]:
        """Return the loss of a batch.

        Args:
            embeddings: Of any length but 0; only their directions count.
            labels: Classes, 0 … C − 1.

        Shape:
            ``embeddings`` (batch, d), ``labels`` (batch,); output (), or (batch,) with ``reduction="none"``.

        Returns:
            The loss, in the precision of ``embeddings``, at least float32.

        Raises:
            ValueError: A shape does not fit, a label is out of range, or an embedding is zero; the row is named.
                Values are not looked at in compiled code.
            TypeError: ``embeddings`` are not of floating point, or ``labels`` no integers.
        """
        self._check(embeddings, labels)
        losses = self.losses(self.cosine(embeddings), labels.long())
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def cosine(self, embeddings: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Return cos θ of every embedding to every centre; in float32 at least, also under autocast.

        Args:
            embeddings: As in :meth:`forward`.
        """
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        with full_precision(embeddings.device):
            return F.normalize(embeddings.to(dtype)) @ F.normalize(self.weight.to(dtype)).T

    def logits(self, embeddings: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        """Return s cos θ, without margins: the largest names the class.

        Args:
            embeddings: As in :meth:`forward`.
        """
        return self.s * self.cosine(embeddings)

    @abstractmethod
    def losses(self, cosine: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the loss of every example, given its cosines.

        Args:
            cosine: cos θ.
            labels: Classes.
        """

    def rescale(
        self, cosine: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch classes"]]:
        """Return r_intra = −∂L/∂cos θ_y and r_inter = ∂L/∂cos θ_j: the head as a gradient re-scaler.

        Args:
            cosine: cos θ.
            labels: Classes.

        Returns:
            r_intra, and r_inter with 0 at the own class; both without gradients.
        """
        with torch.enable_grad():
            free = cosine.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.losses(free, labels).sum(), free)
        return -at_label(slope, labels), slope.scatter(1, labels[:, None], 0)

    def _check(self, embeddings: Tensor, labels: Tensor) -> None:
        if not embeddings.is_floating_point():
            raise TypeError(f"embeddings must be of floating point, got {embeddings.dtype}")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if embeddings.dim() != 2 or embeddings.shape[1] != self.in_features or len(embeddings) == 0:
            raise ValueError(f"embeddings must be (batch ≥ 1, {self.in_features}), got {tuple(embeddings.shape)}")
        if labels.shape != embeddings.shape[:1]:
            raise ValueError(f"labels must be ({len(embeddings)},), got {tuple(labels.shape)}")
        if torch.compiler.is_compiling():  # reading values would split the graph
            return
        outside = (labels < 0) | (labels >= self.num_classes)
        zero = (embeddings == 0).all(dim=1)
        if bool((outside | zero).any()):
            if bool(outside.any()):
                row = int(outside.nonzero()[0])
                raise ValueError(f"labels must be in 0 … {self.num_classes - 1}, got {int(labels[row])} in row {row}")
            raise ValueError(f"embeddings must have a direction, got zero in row {int(zero.nonzero()[0])}")

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        return f"in_features={self.in_features}, num_classes={self.num_classes}, s={self.s:g}"


def at_label(values: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Return of every row the entry at its label.

    Args:
        values: Rows.
        labels: Columns, one a row.
    """
    return values.gather(1, labels[:, None])[:, 0]
