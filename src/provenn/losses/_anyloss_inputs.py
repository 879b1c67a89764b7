"""What a loss of a confusion matrix accepts: scores, classes and weights, brought to one shape and checked."""

from __future__ import annotations

import torch
from torch import Tensor


def aligned(
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bring scores, classes and weights to one shape: (batch,), or (batch, columns).

    Args:
        scores: Scores, (batch,) or (batch, columns).
        target: 0 or 1 in the shape of the scores, or with ``columns`` a class index a sample.
        weight: Weights of the samples, in the shape of the scores or (batch,).
        columns: Whether several columns are accepted.

    Raises:
        ValueError: A shape does not fit; a target is neither 0 nor 1, or not a class; a weight is negative or not
            finite.
        TypeError: ``input`` is not of floating point.
    """
    if not scores.is_floating_point():
        raise TypeError(f"input must be a floating-point tensor, got {scores.dtype}")
    if columns:
        scores, target, weight = _columns(scores, target, weight)
    else:
        scores, target, weight = _one_column(scores, target, weight)
    if target.shape != scores.shape:
        raise ValueError(f"target must fit the input of shape {tuple(scores.shape)}, got {tuple(target.shape)}")
    if weight is not None and weight.shape != scores.shape:
        raise ValueError(f"weight must fit the input of shape {tuple(scores.shape)}, got {tuple(weight.shape)}")
    _check_values(target, weight)
    return scores, target, weight


def _one_column(scores: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if scores.dim() == 2 and scores.shape[1] == 1:
        scores = scores.squeeze(1)
        target = target.squeeze(1) if target.dim() == 2 and target.shape[1] == 1 else target
        weight = weight.squeeze(1) if weight is not None and weight.dim() == 2 and weight.shape[1] == 1 else weight
    if scores.dim() != 1:
        raise ValueError(
            "input must have the shape (batch,) or (batch, 1) without average= (several columns need 'macro' or "
            f"'micro'), got {tuple(scores.shape)}"
        )
    return scores, target, weight


def _columns(scores: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if scores.dim() != 2:
        raise ValueError(f"input must have the shape (batch, classes) with average=, got {tuple(scores.shape)}")
    classes = scores.shape[1]
    if target.dim() == 1:
        if target.is_floating_point():
            raise ValueError(f"target must be class indices or one 0 or 1 a class, got {target.dtype} of one dimension")
        if _fails((target >= 0) & (target < classes)):
            raise ValueError(f"target must hold class indices below {classes}, got {_range(target)}")
        target = torch.nn.functional.one_hot(target.long(), classes)
    if weight is not None and weight.dim() == 1:
        weight = weight[:, None].expand(-1, classes)
    return scores, target, weight


def _check_values(target: Tensor, weight: Tensor | None) -> None:
    if _fails((target == 0) | (target == 1)):
        raise ValueError(f"target must be 0 or 1, got {_range(target)}")
    if weight is not None and _fails((weight >= 0) & weight.isfinite()):
        raise ValueError(f"weight must be finite and ≥ 0, got {_range(weight)}")


def check_probabilities(input: Tensor) -> None:  # noqa: A002 - torch's name
    """Check that scores are probabilities.

    Raises:
        ValueError: One is outside [0, 1] or NaN.
    """
    if _fails((input >= 0) & (input <= 1)):
        raise ValueError(f"input must be probabilities in [0, 1] with from_logits=False, got {_range(input)}")


def _fails(holds: Tensor) -> bool:
    """Return whether a condition fails somewhere. Compiled code does not ask: reading a value would split its graph."""
    return not torch.compiler.is_compiling() and not bool(holds.all())


def _range(values: Tensor) -> str:
    if values.is_floating_point() and bool(values.isnan().any()):
        return "NaN"
    return f"values from {values.min().item():g} to {values.max().item():g}"
