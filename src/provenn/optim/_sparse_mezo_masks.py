"""Which weights a sparse step perturbs: thresholds of magnitude, masks by them, and random ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from provenn.core.experiment.checks import check_number
from provenn.core.experiment.parameters import flat_view
from provenn.core.experiment.seeding import generator
from provenn.core.numerics.zeroth_order import Mask

SELECTIONS = ("smallest", "random", "largest")


@dataclass(frozen=True)
class Choice:
    """How one tensor's entries are chosen.

    Args:
        threshold: h. Smallest: |θ| ≤ h is in; largest: |θ| ≥ h. ``None``: every entry is in.
        share: The share that is in at the start; for random masks the probability of being in.
        ties: Entries that are in beyond the count asked for, since they equal the threshold.
    """

    threshold: float | None = None
    share: float = 1.0
    ties: int = 0


@dataclass(frozen=True)
class MaskShare:
    """What a mask lets through of one parameter.

    Args:
        name: The parameter's name in the model, or its place among the parameters.
        numel: Its entries.
        threshold: The magnitude that decides; ``None``: none does.
        at_start: Share of entries in the mask at construction.
        now: The same for the weights as they are.
        ties: Entries in the mask at the start beyond the count asked for, which equal the threshold.

    Source: arXiv 2402.15751.
    """

    name: str
    numel: int
    threshold: float | None
    at_start: float
    now: float
    ties: int


def magnitude_thresholds(params: Iterable[Tensor], sparsity: float) -> list[float]:
    """Return each tensor's threshold h, below or at which the kept share 1 − sparsity of its magnitudes lies.

    Args:
        params: The tensors; each gets a threshold of its own.
        sparsity: Share of entries above the threshold.

    Returns:
        One number a tensor: of its magnitudes in ascending order, the one at place (1 − sparsity) · numel, rounded;
        infinity where that is the last, −1 where it is none. Entries equal to it are all within.

    Shape:
        Tensors of any shape.

    Raises:
        ValueError: ``sparsity`` is outside [0, 1), or a tensor has entries that are not finite.

    Cost: a selection a tensor, linear in its entries; memory of one tensor's copy at a time.

    Source: arXiv 2402.15751, section on the sparse mask.
    """
    check_number("sparsity", sparsity, at_least=0, below=1)
    found = [choose(one, sparsity, "smallest", f"params[{index}]") for index, one in enumerate(params)]
    return [math.inf if one.threshold is None else one.threshold for one in found]


def choose(tensor: Tensor, sparsity: float, select: str, name: str) -> Choice:
    """Return how a tensor's entries are chosen, from its values.

    Args:
        tensor: The weights.
        sparsity: Share that is out.
        select: Which are in.
        name: What to call the tensor in an error.

    Raises:
        ValueError: An entry is not finite.
    """
    if tensor.is_meta:
        return Choice()  # there are no values to choose by
    if not tensor.isfinite().all():
        raise ValueError(f"params must be finite where thresholds are taken, but {name} has NaN or infinite entries")
    wanted = round((1 - sparsity) * tensor.numel())
    if sparsity == 0 or wanted == tensor.numel():
        return Choice()
    if select == "random":
        return Choice(share=1 - sparsity)
    if wanted == 0:
        return Choice(-1.0 if select == "smallest" else math.inf, 0.0)
    sizes = tensor.detach().flatten().abs()
    place = wanted if select == "smallest" else tensor.numel() - wanted + 1
    threshold = float(sizes.to(torch.promote_types(sizes.dtype, torch.float32)).kthvalue(place).values)
    kept = int(within(sizes, threshold, select).sum())
    return Choice(threshold, kept / tensor.numel(), kept - wanted)


def within(weights: Tensor, threshold: float, select: str) -> Tensor:
    """Return which weights the threshold lets through.

    Args:
        weights: Any.
        threshold: h.
        select: ``"smallest"`` or ``"largest"``.
    """
    # Two comparisons need two bytes an entry, magnitudes four or eight.
    if select == "smallest":
        return (weights <= threshold).logical_and_(weights >= -threshold)
    return (weights >= threshold).logical_or_(weights <= -threshold)


def stored_masks(tensors: Sequence[Tensor], choices: Sequence[Choice], select: str) -> list[Tensor | None]:
    """Return the masks of weights as they are, flat and boolean, a byte an entry; ``None`` where no magnitude decides.

    Args:
        tensors: The weights.
        choices: One a tensor.
        select: Which entries are in.
    """
    return [
        None if choice.threshold is None else within(flat_view(tensor), choice.threshold, select)
        for tensor, choice in zip(tensors, choices, strict=True)
    ]


def mask_of(
    tensors: Sequence[Tensor],
    choices: Sequence[Choice],
    select: str,
    seed: int,
    stored: Sequence[Tensor | None] | None = None,
) -> Mask:
    """Return the mask of a direction over tensors.

    Args:
        tensors: What the direction is over.
        choices: One a tensor.
        select: Which entries are in.
        seed: Of random masks, the same at every draw.
        stored: Masks that were stored; ``None`` compares the weights as they stand at each draw.
    """
    views = [flat_view(tensor) for tensor in tensors]

    def mask(index: int, piece: slice) -> Tensor | None:
        choice, like = choices[index], views[index][piece]
        if choice.threshold is not None:
            kept = None if stored is None else stored[index]
            return within(like, choice.threshold, select) if kept is None else kept[piece]
        if choice.share == 1:
            return None
        draws = generator(seed, index, piece.start, device=like.device)
        return torch.empty_like(like).bernoulli_(choice.share, generator=draws)

    return mask
