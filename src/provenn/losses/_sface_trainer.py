"""Training a face embedder under a head on the sphere, by the paper's recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import Epoch, minibatches, run_to_end, train
from provenn.losses._sface_heads import SphereHead
from provenn.losses._sface_verification import mirror_embedding

Augment = Callable[[Tensor, torch.Generator], Tensor]
Progress = Callable[[Epoch], None]


def random_mirror(
    images: Float[Tensor, "samples channels height width"], generator: torch.Generator
) -> Float[Tensor, "samples channels height width"]:
    """Mirror each image left to right with probability ½.

    Args:
        images: Images.
        generator: Draws which.

    Shape:
        ``images`` (N, channels, H, W); output the same.

    Returns:
        The images.

    Raises:
        ValueError: ``images`` have not four dimensions.

    Source: arXiv 2205.12010, the training settings.
    """
    if images.dim() != 4:
        raise ValueError(f"images must be (samples, channels, height, width), got {tuple(images.shape)}")
    mirrored = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
    return torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(-1), images)


class FaceTraining(NamedTuple):
    """What ``fit`` returns.

    Attributes:
        history: One epoch a record, those before an interruption included.
        model: ``"backbone"`` and ``"head"``, the trainer's own.
    """

    history: list[Epoch]
    model: nn.ModuleDict


class FaceTrainer:
    """Train an embedder and a head together by SGD with momentum, the rate divided by 10 at milestones.

    Weight decay spares batch normalisation. A last batch that is not full is left out, unless it is the only one.

    Args:
        backbone: Maps images to embeddings; trained in place.
        head: The loss, such as :class:`SFaceLoss`; its centres are trained along.
        lr: Rate at the start.
        momentum: Of SGD.
        weight_decay: Of all parameters but those of batch normalisation.
        batch_size: Images a batch.
        epochs: Passes over the data.
        milestones: Epochs before which the rate is divided by 10.
        augment: ``augment(images, generator)`` returns a batch's images, changed; ``None`` leaves them.
        seed: Of the data's order, of what is done to the images, and of dropout.

    Attributes:
        model: ``"backbone"`` and ``"head"``.

    Raises:
        ValueError: A number out of range, or ``head`` does not reduce to a scalar.
        TypeError: ``head`` is no loss on the sphere, or ``seed`` or a count is no integer.

    Cost: a pass forward and back an image and epoch.

    Source: arXiv 2205.12010, the training settings, and the authors' code: epochs and milestones are those of
    CASIA-WebFace.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: SphereHead,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        batch_size: int = 256,
        epochs: int = 125,
        milestones: Sequence[int] = (50, 70, 80),
        augment: Augment | None = random_mirror,
        seed: int = 0,
    ) -> None:
        if not isinstance(head, SphereHead):
            raise TypeError(f"head must be a loss on the sphere, got {type(head).__name__}")
        if head.reduction == "none":
            raise ValueError("head must reduce to a scalar, got reduction 'none'")
        check_number("lr", lr, above=0)
        check_number("momentum", momentum, at_least=0, below=1)
        check_number("weight_decay", weight_decay, at_least=0)
        check_integer("batch_size", batch_size, at_least=1)
        check_integer("epochs", epochs, at_least=1)
        check_integer("seed", seed)
        for milestone in milestones:
            check_integer("milestones", milestone, at_least=1)
        self.model = nn.ModuleDict({"backbone": backbone, "head": head})
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.batch_size, self.epochs, self.milestones = batch_size, epochs, tuple(milestones)
        self.augment, self.seed = augment, seed

    def fit(
        self,
        images: Float[Tensor, "samples channels height width"],
        labels: Int[Tensor, " samples"],
        *,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> FaceTraining:
        """Train.

        Args:
            images: On the backbone's device, scaled as it wants them (:func:`scale_pixels`).
            labels: Who is shown, a class of the head's.
            checkpoint: File that holds everything after every epoch; if it exists, training goes on from it.
            progress: Called after every epoch, once it is saved.

        Returns:
            History and model.

        Raises:
            ValueError: No images, lengths that differ, a label outside the head's classes, or a checkpoint of another
                run.
            TypeError: ``labels`` are no integers.
            FloatingPointError: The loss is no finite number any more.
        """
        self._check(images, labels)
        steps = max(1, len(images) // self.batch_size)
        optimizer = torch.optim.SGD(self._groups(), lr=self.lr, momentum=self.momentum)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps * one for one in self.milestones], gamma=0.1)
        epochs = train(
            self.model,
            optimizer,
            lambda index: self._batches(images, labels, index),
            _loss,
            epochs=self.epochs,
            scheduler=scheduler,
            checkpoint=checkpoint,
        )
        return FaceTraining(run_to_end(epochs, checkpoint, progress), self.model)

    def embed(
        self, images: Float[Tensor, "images channels height width"], batch_size: int = 256
    ) -> Float[Tensor, "images features"]:
        """Return :func:`mirror_embedding` of images by the backbone.

        Args:
            images: As in :meth:`fit`.
            batch_size: Images a call.
        """
        return mirror_embedding(self.model["backbone"], images, batch_size)

    def _check(self, images: Tensor, labels: Tensor) -> None:
        classes = self.model["head"].num_classes
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if len(images) == 0 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be one an image and at least 1, got {tuple(labels.shape)}, {len(images)}")
        if not bool(((labels >= 0) & (labels < classes)).all()):
            raise ValueError(f"labels must be in 0 … {classes - 1}, got {int(labels.min())} … {int(labels.max())}")

    def _groups(self) -> list[dict[str, object]]:
        norms, others = [], []
        for module in self.model.modules():
            (norms if isinstance(module, nn.modules.batchnorm._BatchNorm) else others).extend(
                module.parameters(recurse=False)
            )
        groups = ({"params": others, "weight_decay": self.weight_decay}, {"params": norms, "weight_decay": 0.0})
        return [group for group in groups if group["params"]]

    def _batches(self, images: Tensor, labels: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = generator(self.seed, "order", epoch)
        draws = generator(self.seed, "augment", epoch, device=images.device)
        with seeded(self.seed, "pass", epoch):  # dropout draws from torch's global generator
            for some, of_class in minibatches((images, labels), self.batch_size, order):
                if len(some) == min(self.batch_size, len(images)):
                    yield (some if self.augment is None else self.augment(some, draws)), of_class


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = model["head"](model["backbone"](images), labels)
    return loss
