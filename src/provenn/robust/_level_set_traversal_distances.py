"""How far apart two images are: by pixels, by structure, and by a perceptual network where there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from provenn.core.experiment.reports import Report

_RADIUS, _SIGMA = 5, 1.5
_STABILISERS = 0.01**2, 0.03**2


@dataclass(frozen=True)
class ImageDistances(Report):
    """Distances between pairs of images, one entry a pair."""

    rmse: tuple[float, ...]
    linf: tuple[float, ...]
    ssim: tuple[float, ...]
    perceptual: tuple[float, ...]

    def plot(self) -> Figure:
        """Draw the distribution of each distance."""
        shown = {name: getattr(self, name) for name in ("rmse", "linf", "ssim", "perceptual") if getattr(self, name)}
        figure = Figure(figsize=(8, 3), layout="constrained")
        for axes, (name, values) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
            axes.hist(values, bins=20)
            axes.set(xlabel=name, ylabel="pairs")
        return figure


def image_distances(
    output: Float[Tensor, "batch channels height width"],
    target: Float[Tensor, "batch channels height width"],
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> ImageDistances:
    r"""Measure how alike images in [0, 1] are, without asking the attacked model.

    Args:
        output: Images.
        target: What each should look like.
        perceptual: ``perceptual(a, b)`` of images scaled to [−1, 1] returns a distance a pair, as ``lpips.LPIPS()`` of
            the package lpips does, whose weights are a download; ``None`` leaves it out.

    Shape:
        Both (batch, channels, height, width); SSIM needs height and width of at least 11.

    Returns:
        For each pair the root mean square difference ‖a − b‖₂/√D, the largest difference, the structural similarity
        (Gaussian window 11×11 of σ 1.5, mean over windows within the image), and the perceptual distance. SSIM is
        empty for smaller images, and the last without ``perceptual``.

    Raises:
        ValueError: ``target`` has not the shape of ``output``.

    Cost: a few convolutions with an 11×11 window, done as two of 11 entries.

    Source: the distances of the paper's Table 1; SSIM as in Wang et al., IEEE Trans. Image Process. 13 (2004).
    """
    if output.shape != target.shape:
        raise ValueError(f"target must have the shape {tuple(output.shape)} of output, got {tuple(target.shape)}")
    change = (output.detach().double() - target.detach().double()).flatten(1)
    with torch.no_grad():
        far = () if perceptual is None else tuple(perceptual(2 * output - 1, 2 * target - 1).flatten().tolist())
    fits = min(output.shape[-2:]) > 2 * _RADIUS
    return ImageDistances(
        rmse=tuple(change.square().mean(dim=1).sqrt().tolist()),
        linf=tuple(change.abs().amax(dim=1).tolist()),
        ssim=tuple(_ssim(output.detach().double(), target.detach().double()).tolist()) if fits else (),
        perceptual=far,
    )


def _ssim(first: Tensor, second: Tensor) -> Tensor:
    mean_a, mean_b = _blur(first), _blur(second)
    variance_a, variance_b = _blur(first * first) - mean_a**2, _blur(second * second) - mean_b**2
    covariance = _blur(first * second) - mean_a * mean_b
    small, large = _STABILISERS
    luminance = (2 * mean_a * mean_b + small) / (mean_a**2 + mean_b**2 + small)
    structure = (2 * covariance + large) / (variance_a + variance_b + large)
    return (luminance * structure).flatten(1).mean(dim=1)


def _blur(images: Tensor) -> Tensor:
    """Average each channel over Gaussian windows that lie within the image."""
    places = torch.arange(-_RADIUS, _RADIUS + 1, dtype=images.dtype, device=images.device)
    window = torch.softmax(-(places**2) / (2 * _SIGMA**2), dim=0)
    channels = images.shape[1]
    down = window.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    blurred: Tensor = nn.functional.conv2d(images, down, groups=channels)
    return nn.functional.conv2d(blurred, down.transpose(2, 3), groups=channels)
