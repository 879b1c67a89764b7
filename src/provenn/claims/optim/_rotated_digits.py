"""A pretrained perceptron and rotated digits to fine-tune it on: 784–128–128–10, 512 images turned by 25°."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import torch
from jaxtyping import Float
from sklearn.datasets import load_digits
from torch import Tensor, nn

from provenn import data
from provenn.core.experiment.networks import mlp
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import accuracy, minibatches, train

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sizes:
    """How large the task is.

    Args:
        images: ``"mnist"``, or ``"digits"`` for scikit-learn's.
        hidden: Width of the two hidden layers.
        pretraining: Upright images to pretrain on.
        train: Rotated images to fine-tune on.
        validation: Rotated images to choose by.
        epochs: Epochs of pretraining.
        degrees: The angle.
    """

    images: str = "mnist"
    hidden: int = 128
    pretraining: int = 10_000
    train: int = 512
    validation: int = 488
    epochs: int = 5
    degrees: float = 25.0


SMALL = Sizes()
SMOKE = Sizes(images="digits", hidden=32, pretraining=800, train=256, validation=128, epochs=20)


@dataclass(frozen=True)
class FineTuning:
    """The task: flat images with pixels in [0, 1] and their classes, and the network as pretraining left it.

    No image is in two of the parts, nor was pretrained on.
    """

    train: Pair
    validation: Pair
    test: Pair
    weights: dict[str, Tensor]

    def model(self, fresh_head: int | None = None) -> nn.Sequential:
        """Build the pretrained network.

        Args:
            fresh_head: Seed of a new last layer; ``None`` keeps the pretrained one, whose outputs fit the task.
        """
        # The sizes follow from the weights; what is drawn here is overwritten, but for a fresh head.
        shapes = [value.shape for name, value in self.weights.items() if name.endswith("weight")]
        with seeded(0 if fresh_head is None else fresh_head, "fresh head"):
            model = mlp([shapes[0][1], *(shape[0] for shape in shapes)])
        last = f"{len(model) - 1}."
        kept = {name: one for name, one in self.weights.items() if fresh_head is None or not name.startswith(last)}
        model.load_state_dict(kept, strict=False)
        return model.to(self.train[0].device)

    def batches(self, seed: int, size: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield full batches without end, each pass over the training images in an order of its own."""
        epoch = 0
        while True:
            passed = minibatches(self.train, size, generator(seed, "fine-tuning order", epoch))
            yield from islice(passed, len(self.train[0]) // size)
            epoch += 1


def rotate(images: Float[Tensor, "n height width"], degrees: float) -> Float[Tensor, "n height width"]:
    """Turn images counter-clockwise about their centres, with bilinear interpolation and zeros from outside.

    Args:
        images: Grey values.
        degrees: The angle.
    """
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    shape = (len(images), 1, *images.shape[1:])
    grid = nn.functional.affine_grid(turn.to(images).expand(len(images), 2, 3), list(shape), align_corners=False)
    return nn.functional.grid_sample(images.view(shape), grid, align_corners=False).squeeze(1)


def fine_tuning(sizes: Sizes, seed: int, device: str = "cpu") -> FineTuning:
    """Draw the images and pretrain the network; all of it derives from the seed.

    Args:
        sizes: How large the task is.
        seed: Decides the images, the first weights and the order of pretraining.
        device: Where the tensors lie.
    """
    task = _cached(sizes, seed)

    def moved(pair: Pair) -> Pair:
        return pair[0].to(device), pair[1].to(device)

    return FineTuning(moved(task.train), moved(task.validation), moved(task.test), task.weights)


@lru_cache(maxsize=4)
def _cached(sizes: Sizes, seed: int) -> FineTuning:
    (images, labels), held_out = _images(sizes.images)
    order = torch.randperm(len(images), generator=generator(seed, "rotated digits"))
    cuts = torch.cumsum(torch.tensor([sizes.pretraining, sizes.train, sizes.validation]), 0).tolist()
    upright, train, validation = order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] : cuts[2]]
    test = (images[order[cuts[2] :]], labels[order[cuts[2] :]]) if held_out is None else held_out

    def turned(chosen: Tensor, classes: Tensor) -> Pair:
        return rotate(chosen, sizes.degrees).flatten(1), classes

    return FineTuning(
        turned(images[train], labels[train]),
        turned(images[validation], labels[validation]),
        turned(*test),
        _pretrained(sizes, seed, (images[upright].flatten(1), labels[upright])),
    )


@lru_cache(maxsize=2)
def _images(name: str) -> tuple[Pair, Pair | None]:
    """Return images with pixels in [0, 1] and classes, to train on, and to test on where they come apart."""
    if name == "digits":
        pixels, classes = load_digits(return_X_y=True)
        return (torch.from_numpy(pixels).float().view(-1, 8, 8) / 16, torch.from_numpy(classes).long()), None
    bundle = data.load("mnist")
    parts = ((bundle.x_train, bundle.y_train), (bundle.x_test, bundle.y_test))
    first, second = ((torch.from_numpy(x).float() / 255, torch.from_numpy(y).long()) for x, y in parts)
    return first, second


def _pretrained(sizes: Sizes, seed: int, upright: Pair) -> dict[str, Tensor]:
    with seeded(seed, "pretraining"):
        model = mlp([upright[0].shape[1], sizes.hidden, sizes.hidden, 10])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)

    def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        return minibatches(upright, 64, generator(seed, "pretraining order", epoch))

    for _ in train(model, optimizer, batches, cross_entropy, epochs=sizes.epochs):
        pass
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def cross_entropy(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy of a batch."""
    return nn.functional.cross_entropy(model(x), y)


def fine_tune(
    task: FineTuning,
    model: nn.Module,
    step: Callable[[Tensor, Tensor], object],
    batches: Iterator[tuple[Tensor, ...]],
    checks: Iterable[int],
) -> Iterator[tuple[int, float]]:
    """Fine-tune a network, and leave the weights that validated best in it.

    Args:
        task: The task.
        model: Its network; changed in place.
        step: Takes one step on a batch.
        batches: What the steps are taken on.
        checks: Numbers of steps after which to validate, ascending.

    Yields:
        Steps taken and validation accuracy, from 0 steps on; fewer where the losses stop being finite.
    """
    best, kept, done = accuracy(model, *task.validation), _copy(model), 0
    yield 0, best
    try:
        for until in checks:
            for x, y in islice(batches, until - done):
                step(x, y)
            done = until
            found = accuracy(model, *task.validation)
            if found > best:
                best, kept = found, _copy(model)
            yield done, found
    except RuntimeError as error:
        if "in a row" not in str(error):
            raise  # ten bad losses end a run; the best weights before them count
    model.load_state_dict(kept)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
