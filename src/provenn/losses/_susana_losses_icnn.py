"""The ICNN score: how well classes cluster, by distances and classes of nearest neighbours; and its loss."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer

Variant = Literal["modified", "original"]
VARIANTS = ("modified", "original")
_UNDER_ROOT = 1e-6
"""Under the root of a distance, so that its gradient is finite where points coincide."""
_FALLBACK = 3
"""Neighbours of the original score where those asked for are not to be had."""


def distances(a: Float[Tensor, "*sets n d"], b: Float[Tensor, "*sets m d"]) -> Float[Tensor, "*sets n m"]:
    """Return √(‖a − b‖² + 10⁻⁶) for all pairs, in at least float32.

    Differences are formed one by one: squares that cancel would lose what tells near neighbours apart.
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    far = torch.cdist(a.to(dtype), b.to(dtype), compute_mode="donot_use_mm_for_euclid_dist")
    return (far.square() + _UNDER_ROOT).sqrt()


def icnn_score(
    x: Float[Tensor, "*sets n d"],
    y: Int[Tensor, "*sets n"],
    ref: Float[Tensor, "*sets m d"] | None = None,
    ref_y: Int[Tensor, "*sets m"] | None = None,
    *,
    k: int = 4,
    ipc: int | None = None,
    variant: Variant = "modified",
    use_omega: bool = False,
) -> Float[Tensor, "*sets"]:
    """Rate how well classes cluster: 1 where every neighbour is of the own class and other classes are far.

    Distances carry gradients; which points are neighbours, and of which class, does not.

    Args:
        x: Embeddings of the anchors; leading dimensions are sets of their own.
        y: Their classes.
        ref: Embeddings whose nearest are the neighbours; ``None``: the anchors themselves, none its own neighbour.
        ref_y: Their classes.
        k: Neighbours that are rated. Of fewer than k + 3 references, those but two; then the share γ of neighbours in
            the own class counts as 1. With ``"original"``: 3 where there are not more than k references.
        ipc: Neighbours among which the nearest of another class is sought, k + 1 or more; ``None``: k + 1.
        variant: ``"modified"``, the score of the losses, or ``"original"``, which defined it.
        use_omega: Whether the original score takes the term of variances in.

    Shape:
        ``x`` (*, n, d), ``y`` (*, n), ``ref`` (*, m, d), ``ref_y`` (*, m); returns (*).

    Returns:
        The score of each set, in [0, 1].

    Raises:
        ValueError: Lengths that differ, ``ref`` without ``ref_y``, fewer than three references, ``k`` < 1, ``ipc``
            outside k + 1 … the references, an unknown ``variant``, or ``use_omega`` with ``"modified"``.
        TypeError: ``k`` or ``ipc`` is no integer.

    Warns:
        UserWarning: ``k`` was reduced.

    Cost: n · m · d for the distances and n · m numbers, and a partial sort.

    Source: arXiv 2305.09062, its section on the ICNN score and loss; constants as in the authors' code.
    """
    check_choice("variant", variant, VARIANTS)
    if use_omega and variant == "modified":
        raise ValueError("use_omega must be False with variant='modified', whose score has no such term")
    check_integer("k", k, at_least=1)
    _check_sets(x, y, ref, ref_y)
    count = (x if ref is None else ref).shape[-2]
    fitted = fitted_neighbours(count, k, variant)
    if fitted != k:
        warnings.warn(f"k = {k} is too many for {count} references: {fitted} are rated", UserWarning, stacklevel=2)
    return score(x, y, ref, ref_y, k, ipc, variant, use_omega)


def fitted_neighbours(references: int, k: int, variant: Variant = "modified") -> int:
    """Return how many neighbours are rated where k are asked for."""
    if variant == "original":
        return _FALLBACK if k >= references else k
    return references - 2 if k + 2 >= references else k


def score(
    x: Tensor,
    y: Tensor,
    ref: Tensor | None,
    ref_y: Tensor | None,
    k: int,
    ipc: int | None,
    variant: Variant = "modified",
    use_omega: bool = False,
) -> Tensor:
    """Return the score, without a word where k is reduced."""
    alone = ref is None
    others = x if ref is None else ref
    other_y = y if ref_y is None else ref_y
    usable = others.shape[-2] - (1 if alone else 0)
    rated = fitted_neighbours(others.shape[-2], k, variant)
    reduced = rated != k or k + 2 == others.shape[-2]
    if not 1 <= rated <= usable:
        raise ValueError(f"ref must hold at least 3 references, and more than k, got {others.shape[-2]}")
    if variant == "original":
        near, same = _neighbours(x, y, others, other_y, rated, alone)
        return _original(near, same, use_omega)
    sought = rated + 1 if ipc is None else ipc
    check_integer("ipc", sought, at_least=rated + 1, at_most=usable)
    near, same = _neighbours(x, y, others, other_y, sought, alone)
    return _modified(near, same, rated, reduced)


def _neighbours(x: Tensor, y: Tensor, ref: Tensor, ref_y: Tensor, count: int, alone: bool) -> tuple[Tensor, Tensor]:
    """Return distances to the nearest references, ascending, and whether they are of the anchor's class."""
    to_all = distances(x, ref)
    order = to_all.detach()
    if alone:
        order = order + torch.diag_embed(torch.full_like(order[..., 0], torch.inf))
    index = order.topk(count, dim=-1, largest=False).indices
    classes = ref_y.unsqueeze(-2).expand(*index.shape[:-1], ref_y.shape[-1]).gather(-1, index)
    return to_all.gather(-1, index), classes == y.unsqueeze(-1)


def _modified(near: Tensor, same: Tensor, k: int, reduced: bool) -> Tensor:
    other = near.masked_fill(same, torch.inf).amin(-1, keepdim=True)  # the nearest of another class
    ratio = (near / other)[..., :k]
    ratio = ratio / ratio.amax(-1, keepdim=True).clamp_min(1.0)
    same, near = same[..., :k], near[..., :k]
    compact = 1 - _mean_of_means(ratio, same)
    apart = near.masked_fill(same, 0.0)
    largest = apart.amax((-2, -1), keepdim=True)
    some = ~same.all(-1).all(-1)
    spread = _mean_of_means(apart / torch.where(largest > 0, largest, 1.0), ~same)
    spread = torch.where(some, spread, 1.0)
    share = torch.ones_like(spread) if reduced else same.to(near.dtype).mean((-2, -1))
    return ((compact + spread) / 2 + share) / 2


def _mean_of_means(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean over anchors of the mean over their chosen neighbours; anchors without any are left out."""
    counts = chosen.sum(-1)
    means = values.masked_fill(~chosen, 0.0).sum(-1) / counts.clamp_min(1)
    return means.sum(-1) / (counts > 0).sum(-1).clamp_min(1)


def _original(near: Tensor, same: Tensor, use_omega: bool) -> Tensor:
    low, high = near.amin(-1, keepdim=True), near.amax(-1, keepdim=True)
    scaled = (near - low) / (high - low + _UNDER_ROOT)
    own, other = scaled.masked_fill(~same, 0.0), scaled.masked_fill(same, 0.0)
    sums = (other + (1 - scaled).masked_fill(~same, 0.0)).sum(-1)
    compact = _root(sums / (sums.amax(-1, keepdim=True) + _UNDER_ROOT)).mean(-1)
    share = same.to(near.dtype).mean(-1).sqrt().mean(-1)
    if not use_omega:
        return (compact + share) / 2
    variances = own.flatten(-2).var(-1) + other.flatten(-2).var(-1)
    return (compact + share + _root((1 - variances).clamp_min(0))) / 3


def _root(x: Tensor) -> Tensor:
    """Return the square root, with slope 0 where it has none."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def _check_sets(x: Tensor, y: Tensor, ref: Tensor | None, ref_y: Tensor | None) -> None:
    if (ref is None) != (ref_y is None):
        raise ValueError("ref and ref_y must come together, got one of them")
    pairs = [("y", x, y)] if ref is None or ref_y is None else [("y", x, y), ("ref_y", ref, ref_y)]
    for name, points, classes in pairs:
        if classes.shape != points.shape[:-1]:
            raise ValueError(
                f"{name} must have one class an embedding, shape {tuple(points.shape[:-1])}, got {tuple(classes.shape)}"
            )
    if x.shape[-2] == 0:
        raise ValueError("x must hold at least one embedding, got none")
    if ref is not None and ref.shape[:-2] != x.shape[:-2]:
        raise ValueError(f"ref must have the sets of x {tuple(x.shape[:-2])}, got {tuple(ref.shape[:-2])}")


class ICNNLoss(nn.Module):
    """−log of the ICNN score.

    Args:
        k: As in :func:`icnn_score`.
        ipc: As in :func:`icnn_score`.
        variant: As in :func:`icnn_score`.
        use_omega: As in :func:`icnn_score`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the sets.

    Shape:
        As :func:`icnn_score`; a scalar, or (*) with ``"none"``.

    Returns:
        The loss, at least 0.

    Raises:
        ValueError: As in :func:`icnn_score`, or an unknown ``reduction``.
        TypeError: ``k`` or ``ipc`` is no integer.

    Cost: as :func:`icnn_score`.

    Source: arXiv 2305.09062, its section on the ICNN loss.
    """

    def __init__(
        self,
        k: int = 4,
        ipc: int | None = None,
        variant: Variant = "modified",
        use_omega: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_integer("k", k, at_least=1)
        if ipc is not None:
            check_integer("ipc", ipc, at_least=2)
        check_choice("variant", variant, VARIANTS)
        if use_omega and variant == "modified":
            raise ValueError("use_omega must be False with variant='modified', whose score has no such term")
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.k, self.ipc, self.variant, self.use_omega, self.reduction = k, ipc, variant, use_omega, reduction

    def forward(
        self,
        x: Float[Tensor, "*sets n d"],
        y: Int[Tensor, "*sets n"],
        ref: Float[Tensor, "*sets m d"] | None = None,
        ref_y: Int[Tensor, "*sets m"] | None = None,
    ) -> Tensor:
        """Return the loss.

        Args:
            x: Embeddings of the anchors.
            y: Their classes.
            ref: Embeddings of the references; ``None``: the anchors.
            ref_y: Their classes.
        """
        found = icnn_score(x, y, ref, ref_y, k=self.k, ipc=self.ipc, variant=self.variant, use_omega=self.use_omega)
        return reduced(-found.log(), self.reduction)

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        return f"k={self.k}, ipc={self.ipc}, variant={self.variant!r}, reduction={self.reduction!r}"


def reduced(losses: Tensor, reduction: str) -> Tensor:
    """Return losses as they are, or their mean or sum."""
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()
