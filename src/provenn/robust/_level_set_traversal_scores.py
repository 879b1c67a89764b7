"""What the traversal and its instruments share: checked images, and scores of classes with their slopes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Score = Literal["confidence", "logit"]
Normalize = Callable[[Tensor], Tensor]

_CHUNK = 512
"""Images that a model is shown at once."""


def check_images(name: str, images: Tensor) -> None:
    """Check that images lie in [0, 1].

    Raises:
        ValueError: They do not.
    """
    if images.numel() and not bool(((images >= 0) & (images <= 1)).all()):
        low, high = float(images.min()), float(images.max())
        raise ValueError(
            f"{name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}; a model that wants normalised "
            "images gets them by normalize="
        )


def check_labels(y: Tensor, batch: int) -> None:
    """Check that there is an integer label for each image.

    Raises:
        ValueError: There is not.
    """
    if y.shape != (batch,) or y.is_floating_point():
        raise ValueError(f"y must be {batch} integer labels, got shape {tuple(y.shape)} of {y.dtype}")


def check_pairs(images: Tensor, y: Tensor, others: Tensor) -> None:
    """Check a probe's data: images, a label for each, and other images.

    Raises:
        ValueError: Images leave [0, 1], or the labels are none.
    """
    check_labels(y, len(images))
    check_images("data", images)
    check_images("data", others)


def class_scores(outputs: Tensor, y: Tensor, score: Score) -> Tensor:
    """Return the confidence, or the logit, of each sample's class.

    Raises:
        ValueError: A label is no class of the model's.
    """
    classes = outputs.shape[-1]
    if len(y) and not bool(((y >= 0) & (y < classes)).all()):
        raise ValueError(f"y must be classes 0 … {classes - 1}, got {int(y.min())} … {int(y.max())}")
    scores = outputs.softmax(dim=-1) if score == "confidence" else outputs
    return scores.gather(-1, y[:, None])[:, 0]


def scores_and_slopes(
    model: nn.Module, x: Tensor, y: Tensor, score: Score, normalize: Normalize
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch *image"]]:
    """Return each image's score, and the gradient in the image of its loss: cross-entropy, or minus the logit."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        outputs = model(normalize(x))
        scores = class_scores(outputs, y, score)
        losses = nn.functional.cross_entropy(outputs, y, reduction="sum") if score == "confidence" else -scores.sum()
        (slopes,) = torch.autograd.grad(losses, x)
    return scores.detach(), slopes


def confidences(
    model: nn.Module, images: Float[Tensor, "many *image"], y: Int[Tensor, " many"], normalize: Normalize
) -> Float[Tensor, " many"]:
    """Return the confidence of each image's class, in chunks; the model is in evaluation mode already."""
    pieces = zip(images.split(_CHUNK), y.split(_CHUNK), strict=True)
    return torch.cat([class_scores(model(normalize(some)), of, "confidence") for some, of in pieces])


def unchanged(images: Tensor) -> Tensor:
    """Return the images: the hook of a model that takes them as they are."""
    return images


def project_orthogonal(
    delta: Float[Tensor, "batch *image"], grad: Float[Tensor, "batch *image"]
) -> Float[Tensor, "batch *image"]:
    r"""Take from each image's step what goes along its gradient: :math:`\Delta - g \langle g, \Delta\rangle / \|g\|^2`.

    The product runs over all coordinates of one image. Where the gradient is zero the step stays as it is.

    Args:
        delta: Steps Δ.
        grad: Gradients g.

    Shape:
        Both (batch, ...); returns that shape.

    Returns:
        The steps, orthogonal to the gradients.

    Raises:
        ValueError: ``grad`` has not the shape of ``delta``.

    Cost: a few passes over the batch.

    Source: the paper's algorithm, projection on the tangent space of the level set.
    """
    if delta.shape != grad.shape:
        raise ValueError(f"grad must have the shape {tuple(delta.shape)} of delta, got {tuple(grad.shape)}")
    steps, slopes = delta.flatten(1), grad.flatten(1)
    if slopes.numel() == 0:
        return delta.clone()
    # A confident model's gradients are so small that their squares vanish; only their direction matters.
    largest = slopes.abs().amax(dim=1, keepdim=True)
    unit = nn.functional.normalize(torch.where(largest > 0, slopes / largest, 0.0), dim=1)
    return (steps - unit * (unit * steps).sum(dim=1, keepdim=True)).view_as(delta)
