"""Controlled damage to a training set: wrong labels, people who belong to no class, and bad images."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from provenn.core.experiment.checks import check_integer, check_number


def flip_labels(
    labels: Int[Tensor, " samples"], share: float, num_classes: int, generator: torch.Generator | None = None
) -> tuple[Int[Tensor, " samples"], Bool[Tensor, " samples"]]:
    """Replace a share of the labels by other classes, each as likely as the next: symmetric noise.

    Args:
        labels: Classes, 0 … C − 1.
        share: How many of them, in [0, 1]; exactly that share, rounded.
        num_classes: C, at least 2.
        generator: Draws who and what; ``None`` for torch's global one.

    Shape:
        ``labels`` (N,); outputs (N,).

    Returns:
        The labels, and which of them are wrong now.

    Raises:
        ValueError: ``share`` outside [0, 1], ``num_classes`` < 2, or a label out of range.
        TypeError: ``labels`` are no integers.

    Cost: O(N) time and memory.

    Source: arXiv 2205.12010, the experiments on label noise.
    """
    check_number("share", share, at_least=0, at_most=1)
    check_integer("num_classes", num_classes, at_least=2)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if len(labels) and not bool(((labels >= 0) & (labels < num_classes)).all()):
        raise ValueError(f"labels must be in 0 … {num_classes - 1}, got {int(labels.min())} … {int(labels.max())}")
    wrong = _chosen(len(labels), share, generator, labels.device)
    step = torch.randint(1, num_classes, labels.shape, generator=generator, device=_place(generator, labels.device))
    return torch.where(wrong, (labels + step.to(labels)) % num_classes, labels), wrong


def class_outliers(
    images: Float[Tensor, "samples *image"],
    outliers: Float[Tensor, "others *image"],
    share: float,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "samples *image"], Bool[Tensor, " samples"]]:
    """Replace a share of the images by images of no training class; their labels stay, and are wrong.

    Args:
        images: Training images.
        outliers: Images of other people, as many as are replaced or more.
        share: How many are replaced, in [0, 1]; exactly that share, rounded.
        generator: Draws who and by whom; ``None`` for torch's global one.

    Shape:
        ``images`` (N, …), ``outliers`` (M, …); outputs (N, …) and (N,).

    Returns:
        The images, and which of them are outliers now.

    Raises:
        ValueError: ``share`` outside [0, 1], too few ``outliers``, or images of another shape.

    Cost: O(N) images of time and memory.

    Source: arXiv 2205.12010, the experiments on label noise.
    """
    check_number("share", share, at_least=0, at_most=1)
    if outliers.shape[1:] != images.shape[1:]:
        raise ValueError(f"outliers must be {tuple(images.shape[1:])} each, got {tuple(outliers.shape[1:])}")
    replaced = _chosen(len(images), share, generator, images.device)
    count = int(replaced.sum())
    if len(outliers) < count:
        raise ValueError(f"outliers must be {count} or more, got {len(outliers)}")
    order = torch.randperm(len(outliers), generator=generator, device=_place(generator, images.device))[:count]
    changed = images.clone()
    changed[replaced] = outliers[order.to(outliers.device)].to(images)
    return changed, replaced


def blur_images(
    images: Float[Tensor, "samples channels height width"], sigma: float
) -> Float[Tensor, "samples channels height width"]:
    """Blur images by a Gaussian.

    Args:
        images: Images, larger than 3 ``sigma`` pixels each way.
        sigma: Its standard deviation, in pixels.

    Shape:
        ``images`` (N, channels, H, W); output the same.

    Returns:
        The images; borders are continued by reflection.

    Raises:
        ValueError: ``sigma`` ≤ 0, or ``images`` of another shape or too small.

    Cost: O(pixels · sigma) time.

    Source: low-quality images, arXiv 2205.12010, introduction.
    """
    check_number("sigma", sigma, above=0)
    radius = math.ceil(3 * sigma)
    if images.dim() != 4 or min(images.shape[2:]) <= radius:
        raise ValueError(f"images must be (samples, channels, > {radius}, > {radius}), got {tuple(images.shape)}")
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    wide = F.pad(images, (radius,) * 4, mode="reflect")
    rows = F.conv2d(wide, kernel, groups=images.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), groups=images.shape[1])


def occlude_images(
    images: Float[Tensor, "samples channels height width"],
    size: int,
    value: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "samples channels height width"]:
    """Cover a square of each image, at a place of its own.

    Args:
        images: Images.
        size: Side of the square, in pixels; at most height and width.
        value: What it is filled with.
        generator: Draws the places; ``None`` for torch's global one.

    Shape:
        ``images`` (N, channels, H, W); output the same.

    Returns:
        The images; the square lies inside each.

    Raises:
        ValueError: ``size`` < 1 or larger than an image, or ``images`` of another shape.

    Cost: O(pixels) time and memory.

    Source: low-quality images, arXiv 2205.12010, introduction.
    """
    if images.dim() != 4:
        raise ValueError(f"images must be (samples, channels, height, width), got {tuple(images.shape)}")
    check_integer("size", size, at_least=1, at_most=min(images.shape[2:]))
    covered = []
    for length in images.shape[2:]:
        place = _place(generator, images.device)
        start = torch.randint(length - size + 1, (len(images), 1), generator=generator, device=place)
        pixel = torch.arange(length, device=images.device)
        start = start.to(images.device)
        covered.append((pixel >= start) & (pixel < start + size))
    rows, columns = covered
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], value)


def _place(generator: torch.Generator | None, device: torch.device) -> torch.device:
    return device if generator is None else generator.device


def _chosen(count: int, share: float, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Return a mask of exactly the share of ``count``, rounded."""
    order = torch.randperm(count, generator=generator, device=_place(generator, device)).to(device)
    mask = torch.zeros(count, dtype=torch.bool, device=device)
    mask[order[: round(share * count)]] = True
    return mask
