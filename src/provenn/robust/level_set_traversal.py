"""Exploring Geometry of Blind Spots in Vision Models.

Balasubramanian, Sriramanan, Sadasivan, Feizi, NeurIPS 2023. https://arxiv.org/abs/2310.19889

From a source image along the level set of its class's confidence p towards any target image, with g the gradient of
the cross-entropy at the iterate:

    Δ = target − x,  Δ_⊥ = Δ − g⟨g, Δ⟩/‖g‖²,  δ_∥ ← clip(δ_∥ + ε g/2, −ε, ε),  x ← clip(x + η Δ_⊥ − δ_∥, 0, 1)

A step is taken if p(source) − p(x) stays below δ, image by image. The end looks like the target, and is still called
the source.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.experiment.recording import evaluating
from provenn.robust._level_set_traversal_distances import image_distances
from provenn.robust._level_set_traversal_probes import StarShapeProbe, TriangleProbe
from provenn.robust._level_set_traversal_scores import (
    Normalize,
    Score,
    check_images,
    check_labels,
    class_scores,
    project_orthogonal,
    scores_and_slopes,
    unchanged,
)
from provenn.robust._level_set_traversal_width import LevelSetWidthProbe

__all__ = [
    "LSTResult",
    "LevelSetTraversal",
    "LevelSetWidthProbe",
    "StarShapeProbe",
    "TriangleProbe",
    "image_distances",
    "level_set_traversal",
    "project_orthogonal",
]


class LSTResult(NamedTuple):
    """Where the walks ended, and how they went."""

    adversarial: Tensor
    """The ends of the walks, in the shape of the sources."""
    success: Bool[Tensor, " batch"]
    """Whether the model still calls the end by the source's label."""
    skipped: Bool[Tensor, " batch"]
    """Whether the model gets the source wrong; it is then returned as it is."""
    same_class: Bool[Tensor, " batch"]
    """Whether the model calls the target by the source's label, so that there is nothing to ignore."""
    source_score: Float[Tensor, " batch"]
    """p(source), or its logit."""
    final_score: Float[Tensor, " batch"]
    """The same at the end."""
    accepted: Int[Tensor, " batch"]
    """Steps taken; the others were refused."""
    steps: tuple[int, ...]
    """Steps after which the path was recorded: 0, ``log_every``, 2 ``log_every``, …, ``num_steps``."""
    path: Float[Tensor, "records batch"]
    """The score after each of them."""
    images: Tensor | None
    """The images after each of them, (records, batch, ...), if they were to be kept."""


class LevelSetTraversal:
    r"""Walk from sources along the level sets of their classes' confidence towards targets.

    The defaults are the paper's for ImageNet; for CIFAR-10 its code takes ``step_size=5e-2, num_steps=100,
    delta=0.05``. A refused step leaves the image as it is, not the correction δ_∥, and later steps go on.

    Args:
        step_size: η, the share of Δ_⊥ that a step takes; below 1, which overshoots.
        num_steps: m.
        parallel_eps: ε, the largest correction of an entry against the gradient; 0 for purely tangential steps.
        delta: δ, the drop of the score below the source's that refuses a step. At 1 every confidence is accepted; at 0
            or below only rises are.
        noise: Width of the uniform noise on the start, which is clipped to [0, 1]. A start that would leave the level
            set goes without.
        score: Whether ``"confidence"`` or ``"logit"`` is held level; the gradient is then that of minus the logit.
        normalize: Maps images in [0, 1] to what the model takes.
        log_every: Steps between two records of the path.
        keep_images: Whether the records hold the images too.

    Raises:
        ValueError: ``step_size`` is not in (0, 1), ``num_steps`` or ``log_every`` < 1, ``parallel_eps`` or ``noise``
            < 0, ``delta`` is not finite, or ``score`` is unknown.

    Cost: m + 1 forward and backward passes and four forward ones, where the published code has 2m forward and m
    backward; the memory of one pass, and with ``keep_images`` m / ``log_every`` copies of the batch.

    Source: the paper's Algorithm 1. As in the published code, the drop is measured against the source without noise
    and the correction is accumulated.
    """

    def __init__(
        self,
        *,
        step_size: float = 1e-2,
        num_steps: int = 400,
        parallel_eps: float = 2e-3,
        delta: float = 0.2,
        noise: float = 4 / 255,
        score: Score = "confidence",
        normalize: Normalize = unchanged,
        log_every: int = 10,
        keep_images: bool = False,
    ) -> None:
        check_number("step_size", step_size, above=0, below=1)
        check_integer("num_steps", num_steps, at_least=1)
        check_number("parallel_eps", parallel_eps, at_least=0)
        check_number("delta", delta)
        check_number("noise", noise, at_least=0)
        check_choice("score", score, ("confidence", "logit"))
        check_integer("log_every", log_every, at_least=1)
        self.step_size = step_size
        self.num_steps = num_steps
        self.parallel_eps = parallel_eps
        self.delta = delta
        self.noise = noise
        self.score = score
        self.normalize = normalize
        self.log_every = log_every
        self.keep_images = keep_images

    def attack(
        self,
        model: nn.Module,
        x: Float[Tensor, "batch *image"],
        y: Int[Tensor, " batch"],
        target: Float[Tensor, "batch *image"],
        *,
        generator: torch.Generator | None = None,
    ) -> LSTResult:
        """Walk from every source to its target.

        Args:
            model: Maps images to scores of classes. It runs in evaluation mode; modes and gradients are left as they
                are.
            x: Sources, in [0, 1].
            y: Their labels. Sources that the model gets wrong are skipped.
            target: Targets, in [0, 1]. One that the model calls by the source's label is allowed, and flagged.
            generator: Draws the noise; ``None`` for torch's global generator.

        Shape:
            ``x``, ``target`` (batch, ...), ``y`` (batch,).

        Returns:
            The ends of the walks, flags, and the scores on the way.

        Raises:
            ValueError: Images leave [0, 1] (normalised ones do: pass ``normalize``), ``target`` is of another shape
                than ``x``, or ``y`` are no labels of the model's.
        """
        check_labels(y, len(x))
        if target.shape != x.shape:
            raise ValueError(f"target must have the shape {tuple(x.shape)} of x, got {tuple(target.shape)}")
        check_images("x", x)
        check_images("target", target)
        x, target = x.detach(), target.detach()
        with evaluating(model):
            source, called = self._source(model, x, y)
            skipped, live = called != y, called == y
            path = source.repeat(len(self._records), 1)
            images = torch.stack([x] * len(self._records)) if self.keep_images else None
            end, accepted = x.clone(), torch.zeros_like(y, dtype=torch.long)
            noisy = self._noisy(x, generator)[live]
            if live.any():
                records = self._walk(model, x[live], y[live], target[live], source[live], noisy)
                for row, (at, score, taken) in enumerate(records):
                    path[row, live] = score
                    if images is not None:
                        images[row, live] = at
                    end[live], accepted[live] = at, taken
            success = live & (self._source(model, end, y)[1] == y)
            same_class = self._source(model, target, y)[1] == y
        return LSTResult(
            end, success, skipped, same_class, source, path[-1].clone(), accepted, self._records, path, images
        )

    @property
    def _records(self) -> tuple[int, ...]:
        """The numbers of steps after which the path is recorded."""
        return (*range(0, self.num_steps, self.log_every), self.num_steps)

    def _source(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the score of each image's label, and the class that the model calls it."""
        if len(x) == 0:
            return x.new_zeros(0), y
        outputs = model(self.normalize(x))
        return class_scores(outputs, y, self.score), outputs.argmax(dim=-1)

    def _noisy(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        device = x.device if generator is None else generator.device
        uniform = torch.rand(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
        return (x + self.noise * (uniform - 0.5)).clamp(0, 1)

    def _kept(self, source: Tensor, scores: Tensor) -> Tensor:
        # Rounding can make a confidence drop by all of 1.
        everything = self.score == "confidence" and self.delta >= 1
        return (source - scores < self.delta) | everything

    def _walk(
        self, model: nn.Module, x: Tensor, y: Tensor, target: Tensor, source: Tensor, noisy: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield images, scores and numbers of steps taken, at every record."""
        kept = self._kept(source, self._source(model, noisy, y)[0])
        x = torch.where(_over_image(kept, x), noisy, x)
        scores, slopes = scores_and_slopes(model, x, y, self.score, self.normalize)
        correction, taken = torch.zeros_like(x), torch.zeros_like(y, dtype=torch.long)
        records = set(self._records)
        for step in range(self.num_steps + 1):
            if step in records:
                yield x, scores, taken
            if step == self.num_steps:
                return
            correction = (correction + self.parallel_eps / 2 * slopes).clamp(-self.parallel_eps, self.parallel_eps)
            moved = (x + self.step_size * project_orthogonal(target - x, slopes) - correction).clamp(0, 1)
            # The slopes of a step that is taken serve the next one; those of a refused one are the old ones.
            new_scores, new_slopes = scores_and_slopes(model, moved, y, self.score, self.normalize)
            kept = self._kept(source, new_scores)
            over = _over_image(kept, x)
            x, slopes = torch.where(over, moved, x), torch.where(over, new_slopes, slopes)
            scores, taken = torch.where(kept, new_scores, scores), taken + kept


def _over_image(flags: Tensor, images: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (images.dim() - 1))


def level_set_traversal(
    model: nn.Module,
    x: Float[Tensor, "batch *image"],
    y: Int[Tensor, " batch"],
    target: Float[Tensor, "batch *image"],
    *,
    step_size: float = 1e-2,
    num_steps: int = 400,
    parallel_eps: float = 2e-3,
    delta: float = 0.2,
    noise: float = 4 / 255,
    score: Score = "confidence",
    normalize: Normalize = unchanged,
    log_every: int = 10,
    keep_images: bool = False,
    generator: torch.Generator | None = None,
) -> LSTResult:
    """Walk from sources along the level sets of their classes' confidence towards targets, in one call.

    Args:
        model, x, y, target, generator: As in :meth:`LevelSetTraversal.attack`.
        step_size, num_steps, parallel_eps, delta, noise: As in :class:`LevelSetTraversal`.
        score, normalize, log_every, keep_images: As in :class:`LevelSetTraversal`.

    Shape:
        ``x``, ``target`` (batch, ...), ``y`` (batch,).

    Returns:
        The ends of the walks, flags, and the scores on the way.

    Raises:
        ValueError: As :class:`LevelSetTraversal` and its :meth:`~LevelSetTraversal.attack`.

    Cost, Source: as :class:`LevelSetTraversal`.
    """
    walker = LevelSetTraversal(
        step_size=step_size,
        num_steps=num_steps,
        parallel_eps=parallel_eps,
        delta=delta,
        noise=noise,
        score=score,
        normalize=normalize,
        log_every=log_every,
        keep_images=keep_images,
    )
    return walker.attack(model, x, y, target, generator=generator)
