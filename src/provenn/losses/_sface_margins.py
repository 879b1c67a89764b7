"""The heads that SFace is compared with: cross entropy of scaled cosines, with a margin at the own class.

Sources: NormFace, arXiv 1704.06369; CosFace, arXiv 1801.09414; ArcFace, arXiv 1801.07698; SphereFace, arXiv 1704.08063.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from provenn.core.experiment.checks import check_integer, check_number
from provenn.losses._sface_heads import SphereHead, at_label


class NormFaceLoss(SphereHead):
    r"""Cross entropy of s cos θ: softmax on the sphere, without a margin.

    As a gradient re-scaler: r_intra = s(1 − p_y), r_inter = s p_j.

    Args:
        in_features: Width d of the embeddings.
        num_classes: Number of classes C, at least 2.
        s: Scale of the cosines.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"``.

    Attributes:
        weight: The centres, (C, d).

    Shape:
        As in :meth:`forward`.

    Raises:
        ValueError: ``num_classes`` < 2, ``s`` ≤ 0, or an unknown ``reduction``.
        TypeError: A number is of another type.

    Cost: O(batch C d) time, and O(batch C) memory.

    Source: Wang et al., "NormFace", arXiv 1704.06369.
    """

    def __init__(self, in_features: int, num_classes: int, s: float = 64.0, reduction: str = "mean") -> None:
        super().__init__(in_features, num_classes, s, reduction)

    def losses(self, cosine: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the loss of every example, given its cosines.

        Args:
            cosine: cos θ.
            labels: Classes.
        """
        own = self.own(at_label(cosine, labels))
        return F.cross_entropy(self.s * cosine.scatter(1, labels[:, None], own[:, None]), labels, reduction="none")

    def own(self, cosine: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return what stands for cos θ_y in the loss.

        Args:
            cosine: cos θ_y.
        """
        return cosine


class CosFaceLoss(NormFaceLoss):
    r"""Cross entropy of s cos θ_j, with s(cos θ_y − m) at the own class.

    Args:
        in_features: Width d of the embeddings.
        num_classes: Number of classes C, at least 2.
        s: Scale of the cosines.
        m: Margin of the cosine, ≥ 0.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"``.

    Attributes:
        weight: The centres, (C, d).

    Shape:
        As in :meth:`forward`.

    Raises:
        ValueError: ``num_classes`` < 2, ``s`` ≤ 0, ``m`` < 0, or an unknown ``reduction``.
        TypeError: A number is of another type.

    Cost: O(batch C d) time, and O(batch C) memory.

    Source: Wang et al., "CosFace", arXiv 1801.09414.
    """

    def __init__(
        self, in_features: int, num_classes: int, s: float = 64.0, m: float = 0.35, reduction: str = "mean"
    ) -> None:
        super().__init__(in_features, num_classes, s, reduction)
        check_number("m", m, at_least=0)
        self.m = m

    def own(self, cosine: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return cos θ_y − m.

        Args:
            cosine: cos θ_y.
        """
        return cosine - self.m

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        return f"{super().extra_repr()}, m={self.m:g}"


class ArcFaceLoss(NormFaceLoss):
    r"""Cross entropy of s cos θ_j, with s cos(θ_y + m) at the own class.

    Where θ_y + m ≥ π the cosine would rise again; there s(cos θ_y − m sin m) stands in, as in the authors' code.

    Args:
        in_features: Width d of the embeddings.
        num_classes: Number of classes C, at least 2.
        s: Scale of the cosines.
        m: Margin of the angle, in radians, in [0, π).
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"``.

    Attributes:
        weight: The centres, (C, d).

    Shape:
        As in :meth:`forward`.

    Raises:
        ValueError: ``num_classes`` < 2, ``s`` ≤ 0, ``m`` outside [0, π), or an unknown ``reduction``.
        TypeError: A number is of another type.

    Cost: O(batch C d) time, and O(batch C) memory.

    Source: Deng et al., "ArcFace", arXiv 1801.07698.
    """

    def __init__(
        self, in_features: int, num_classes: int, s: float = 64.0, m: float = 0.5, reduction: str = "mean"
    ) -> None:
        super().__init__(in_features, num_classes, s, reduction)
        check_number("m", m, at_least=0, below=math.pi)
        self.m = m

    def own(self, cosine: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return cos(θ_y + m), or what stands in for it.

        Args:
            cosine: cos θ_y.
        """
        # Below the floor the root's slope would be infinite, and rounding would make it NaN.
        sine = (1 - cosine.square()).clamp(min=torch.finfo(cosine.dtype).tiny).sqrt()
        turned = cosine * math.cos(self.m) - sine * math.sin(self.m)
        return torch.where(cosine > math.cos(math.pi - self.m), turned, cosine - self.m * math.sin(self.m))

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        return f"{super().extra_repr()}, m={self.m:g}"


class SphereFaceLoss(NormFaceLoss):
    r"""Cross entropy of s cos θ_j, with s(λ cos θ_y + ψ(θ_y))/(1 + λ) at the own class.

    ψ(θ) = (−1)^n cos(mθ) − 2n for θ in [nπ/m, (n+1)π/m] falls on all of [0, π]. λ falls as training goes on:
    after t calls in training mode it is max(λ_min, λ_0/(1 + 0.12 t)).

    Args:
        in_features: Width d of the embeddings.
        num_classes: Number of classes C, at least 2.
        s: Scale of the cosines.
        m: Factor of the angle, a whole number ≥ 1.
        lambda_start: λ_0, at least ``lambda_min``.
        lambda_min: λ_min ≥ 0.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"``.

    Attributes:
        weight: The centres, (C, d).
        calls: t, a buffer.

    Shape:
        As in :meth:`forward`.

    Raises:
        ValueError: ``num_classes`` < 2, ``s`` ≤ 0, ``m`` < 1, ``lambda_min`` < 0, ``lambda_start`` < ``lambda_min``, or
            an unknown ``reduction``.
        TypeError: A number is of another type.

    Cost: O(batch C d) time, and O(batch C) memory.

    Source: Liu et al., "SphereFace", arXiv 1704.08063, with λ as its authors anneal it; embeddings have the length s
    here, where theirs keep their own.
    """

    calls: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        s: float = 64.0,
        m: int = 4,
        lambda_start: float = 1000.0,
        lambda_min: float = 5.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(in_features, num_classes, s, reduction)
        check_integer("m", m, at_least=1)
        check_number("lambda_min", lambda_min, at_least=0)
        check_number("lambda_start", lambda_start, at_least=lambda_min)
        self.m, self.lambda_start, self.lambda_min = m, lambda_start, lambda_min
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(
        self, embeddings: Float[Tensor, "batch features"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, "*batch"]:
        """Return the loss of a batch; in training mode the call counts. The arguments are those of every head.

        Args:
            embeddings: Of any length but 0; only their directions count.
            labels: Classes, 0 … C − 1.

        Shape:
            ``embeddings`` (batch, d), ``labels`` (batch,); output (), or (batch,) with ``reduction="none"``.

        Returns:
            The loss.

        Raises:
            ValueError: A shape does not fit, a label is out of range, or an embedding is zero.
            TypeError: ``embeddings`` are not of floating point, or ``labels`` no integers.
        """
        if self.training:
            self.calls += 1
        return super().forward(embeddings, labels)

    def own(self, cosine: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return (λ cos θ_y + ψ(θ_y))/(1 + λ).

        Args:
            cosine: cos θ_y.
        """
        edge = 1 - torch.finfo(cosine.dtype).eps
        theta = cosine.clamp(-edge, edge).acos()
        turn = (theta.detach() * (self.m / math.pi)).floor()
        psi = (1 - 2 * turn.remainder(2)) * (self.m * theta).cos() - 2 * turn
        weight = (self.lambda_start / (1 + 0.12 * self.calls.to(cosine.dtype))).clamp(min=self.lambda_min)
        return (weight * cosine + psi) / (1 + weight)

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        return f"{super().extra_repr()}, m={self.m}, lambda_min={self.lambda_min:g}"
