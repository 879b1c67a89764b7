"""Losses that are nothing but re-scaled gradients: SFace's sigmoid curves, and the other curves of its ablations.

L = −[r_intra] cos θ_y + Σ_{j≠y} [r_inter] cos θ_j, where brackets carry no gradient.

Source: Zhong et al., arXiv 2205.12010, the section on sigmoid-constrained hypersphere loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provenn.core.experiment.checks import check_number
from provenn.losses._sface_heads import SphereHead, at_label

_MARGIN = 1e-7
"""Cosines are clamped this far inside [−1, 1] before arccos."""


class Rescale(Protocol):
    """How strongly an example is pulled to its centre, and pushed from each other one."""

    def intra(self, theta: Tensor) -> Tensor: ...
    def inter(self, theta: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class SigmoidRescale:
    """SFace's curves: r_intra = s σ(k(θ − a)) falls to 0 within angle a, r_inter = s σ(−k(θ − b)) beyond angle b.

    Args:
        s: Height of both curves.
        k: Steepness, in 1/radian.
        a: Angle in radians at which the pull is s/2.
        b: Angle in radians at which the push is s/2.

    Raises:
        ValueError: ``s`` or ``k`` ≤ 0, or an angle outside (0, π).

    Source: arXiv 2205.12010, the equations of the two re-scale functions.
    """

    s: float = 64.0
    k: float = 80.0
    a: float = 0.87
    b: float = 1.2

    def __post_init__(self) -> None:
        check_number("s", self.s, above=0)
        check_number("k", self.k, above=0)
        _check_angles(self.a, self.b)

    def intra(self, theta: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the pull at angles, in radians."""
        return self.s * torch.sigmoid(self.k * (theta - self.a))

    def inter(self, theta: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the push at angles, in radians."""
        return self.s * torch.sigmoid(self.k * (self.b - theta))


def _check_angles(a: float, b: float) -> None:
    check_number("a", a, above=0, below=math.pi)
    check_number("b", b, above=0, below=math.pi)


@dataclass(frozen=True)
class ConstantRescale:
    """Pull and push of strength s at every angle: the loss is s(Σ cos θ_j − cos θ_y).

    Args:
        s: Height of both curves.

    Raises:
        ValueError: ``s`` ≤ 0.

    Source: arXiv 2205.12010, the comparison of re-scale functions.
    """

    s: float = 64.0

    def __post_init__(self) -> None:
        check_number("s", self.s, above=0)

    def intra(self, theta: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the pull at angles, in radians."""
        return torch.full_like(theta, self.s)

    def inter(self, theta: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the push at angles, in radians."""
        return torch.full_like(theta, self.s)


@dataclass(frozen=True)
class LinearRescale:
    """A pull that rises linearly from 0 to s as θ goes from 0 to π/2, and a push that falls from s to 0.

    Args:
        s: Height of both curves.

    Raises:
        ValueError: ``s`` ≤ 0.

    Source: arXiv 2205.12010, the comparison of re-scale functions; the end at π/2 is this package's choice.
    """

    s: float = 64.0

    def __post_init__(self) -> None:
        check_number("s", self.s, above=0)

    def intra(self, theta: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the pull at angles, in radians."""
        return self.s * (theta * (2 / math.pi)).clamp(max=1)

    def inter(self, theta: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the push at angles, in radians."""
        return self.s * (1 - theta * (2 / math.pi)).clamp(min=0)


@dataclass(frozen=True)
class PiecewiseRescale:
    """Hard switches, the limit k → ∞ of :class:`SigmoidRescale`: a pull s where θ > a, a push s where θ < b, else 0.

    Args:
        s: Height of both curves.
        a: Angle in radians above which there is a pull.
        b: Angle in radians below which there is a push.

    Raises:
        ValueError: ``s`` ≤ 0, or an angle outside (0, π).

    Source: arXiv 2205.12010, the comparison of re-scale functions.
    """

    s: float = 64.0
    a: float = 0.87
    b: float = 1.2

    def __post_init__(self) -> None:
        check_number("s", self.s, above=0)
        _check_angles(self.a, self.b)

    def intra(self, theta: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the pull at angles, in radians."""
        return self.s * (theta > self.a).to(theta.dtype)

    def inter(self, theta: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the push at angles, in radians."""
        return self.s * (theta < self.b).to(theta.dtype)


class SphereTerms(NamedTuple):
    """The parts of a loss in a batch.

    Attributes:
        intra: Mean of −r_intra cos θ_y.
        inter: Mean over examples of Σ_j r_inter cos θ_j.
        own_angle: Mean angle to the own centre, in radians.
        other_angle: Mean angle to the other centres, in radians.
    """

    intra: float
    inter: float
    own_angle: float
    other_angle: float


class RescaledLoss(SphereHead):
    r"""A pull to the own centre and pushes from the others, each scaled by a function of its angle.

    .. math::
        L = -[r_\mathrm{intra}(\theta_y)] \cos\theta_y + \sum_{j \ne y} [r_\mathrm{inter}(\theta_j)] \cos\theta_j

    Brackets carry no gradient. The value is not bounded below by 0 and is no measure of progress: watch
    :meth:`terms`.

    Args:
        in_features: Width d of the embeddings.
        num_classes: Number of classes C, at least 2.
        curves: The functions: an object with ``s``, ``intra(theta)`` and ``inter(theta)``, such as
            :class:`SigmoidRescale`, :class:`ConstantRescale`, :class:`LinearRescale`, :class:`PiecewiseRescale`.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"``; classes are summed.

    Attributes:
        weight: The centres, (C, d), trained with the embeddings' network.

    Shape:
        As in :meth:`forward`.

    Raises:
        ValueError: ``in_features`` < 1, ``num_classes`` < 2, or an unknown ``reduction``.
        TypeError: A number is of another type.

    Cost: O(batch C d) time, and O(batch C) memory.

    Source: arXiv 2205.12010, the loss and its re-scale functions.
    """

    def __init__(self, in_features: int, num_classes: int, curves: Rescale, reduction: str = "mean") -> None:
        super().__init__(in_features, num_classes, getattr(curves, "s", 1.0), reduction)
        self.curves = curves
        self._terms: tuple[Tensor, ...] | None = None

    def losses(self, cosine: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the loss of every example, given its cosines.

        Args:
            cosine: cos θ.
            labels: Classes.
        """
        theta = _angle(cosine)
        pull, push = self._rescale(theta, labels)
        intra, inter = -pull * at_label(cosine, labels), (push * cosine).sum(dim=1)
        own = at_label(theta, labels)
        others = (theta.sum(dim=1) - own) / (theta.shape[1] - 1)
        self._terms = tuple(one.detach().mean() for one in (intra, inter, own, others))
        return intra + inter

    def rescale(
        self, cosine: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch classes"]]:
        """Return r_intra, and r_inter with 0 at the own class; both without gradients.

        Args:
            cosine: cos θ.
            labels: Classes.
        """
        return self._rescale(_angle(cosine), labels)

    @torch.no_grad()
    def _rescale(self, theta: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.curves.intra(at_label(theta, labels)), self.curves.inter(theta).scatter(1, labels[:, None], 0)

    def terms(self) -> SphereTerms:
        """Return the parts of the loss in the latest batch.

        Raises:
            ValueError: There was none.
        """
        if self._terms is None:
            raise ValueError("terms are those of the latest batch, and the loss was not called yet")
        return SphereTerms(*(one.item() for one in self._terms))


def _angle(cosine: Tensor) -> Tensor:
    """Return θ, without a gradient; arccos is never asked at ±1 or, after rounding, beyond."""
    return cosine.detach().clamp(-1 + _MARGIN, 1 - _MARGIN).acos()


class SFaceLoss(RescaledLoss):
    r"""Sigmoid-constrained hypersphere loss: pull and push are switched off by a steep sigmoid once the angle is good.

    .. math::
        r_\mathrm{intra}(\theta) = \frac{s}{1 + e^{-k(\theta - a)}}, \qquad
        r_\mathrm{inter}(\theta) = \frac{s}{1 + e^{k(\theta - b)}}

    An example within angle a of its centre is no longer pulled, one farther than b from another centre no longer
    pushed; an example that stays far away, a wrong label say, is pulled by s sin θ and no more.

    Args:
        in_features: Width d of the embeddings.
        num_classes: Number of classes C, at least 2.
        s: Height of both curves.
        k: Steepness of the sigmoids, in 1/radian.
        a: Angle in radians at which the pull is s/2. The paper's: 0.87 on CASIA-WebFace, 0.88 on VGGFace2, 0.90 on
            MS1MV2; 0.80 by default in the authors' code.
        b: Angle in radians at which the push is s/2; 1.20, 1.25, 1.20, and 1.23.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"``; classes are summed.

    Attributes:
        weight: The centres, (C, d), trained with the embeddings' network.

    Shape:
        As in :meth:`forward`.

    Raises:
        ValueError: ``num_classes`` < 2, ``s`` or ``k`` ≤ 0, an angle outside (0, π), or an unknown ``reduction``.
        TypeError: A number is of another type.

    Cost: O(batch C d) time, and O(batch C) memory: two exponentials a cosine more than softmax.

    Source: arXiv 2205.12010. Against the authors' code: cosines are clamped before arccos, which gives NaN there at
    cos θ = 1 in float32.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        s: float = 64.0,
        k: float = 80.0,
        a: float = 0.87,
        b: float = 1.2,
        reduction: str = "mean",
    ) -> None:
        super().__init__(in_features, num_classes, SigmoidRescale(s, k, a, b), reduction)

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        curves = self.curves
        return f"{super().extra_repr()}, k={curves.k:g}, a={curves.a:g}, b={curves.b:g}"
