"""The paper's deep network, its initialisations, and the images that it learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from provenn import data
from provenn.claims.claim import Trial
from provenn.core.experiment.networks import mlp
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import minibatches
from provenn.data.toys import stratified_permutation
from provenn.optim import sussillo_abbott_

DEPTH, WIDTH = 20, 50


def simple_(model: nn.Module) -> None:
    """Draw weights from N(0, 0.1²), whatever the width."""
    for layer in _linear(model):
        nn.init.normal_(layer.weight, std=0.1)
        nn.init.zeros_(layer.bias)


def zero_(model: nn.Module) -> None:
    """Set everything to 0."""
    for param in model.parameters():
        nn.init.zeros_(param)


def he_(model: nn.Module) -> None:
    """Draw weights from N(0, 2 / n_in)."""
    for layer in _linear(model):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)


def random_walk_(model: nn.Module) -> None:
    """Draw weights as Sussillo and Abbott do."""
    sussillo_abbott_(model, width=WIDTH)


def _linear(model: nn.Module) -> Iterator[nn.Linear]:
    return (layer for layer in model.modules() if isinstance(layer, nn.Linear))


@dataclass(frozen=True)
class Protocol:
    """One of the paper's settings: how the network starts, and the norm its gradients are clipped to."""

    initialize: Callable[[nn.Module], None]
    clip_norm: float | None


PROTOCOLS = {
    "simple": Protocol(simple_, 10.0),
    "zero": Protocol(zero_, 10.0),
    "He": Protocol(he_, 10.0),
    "Sussillo-Abbott": Protocol(random_walk_, 10.0),
    "simple, clip 100": Protocol(simple_, 100.0),
    "simple, no clipping": Protocol(simple_, None),
    "annealing": Protocol(simple_, 10.0),
}
"""What each study trains from."""


def network(protocol: Protocol, inputs: int, seed: int) -> nn.Sequential:
    """Build the network of 20 hidden layers of 50 units, initialised.

    Args:
        protocol: Says how to initialise.
        inputs: Pixels of an image.
        seed: Draws the weights.
    """
    model = mlp([inputs, *[WIDTH] * DEPTH, 10])
    with seeded(seed, "weights"):
        protocol.initialize(model)
    return model


@dataclass(frozen=True)
class Images:
    """Flat images with pixels in [0, 1], and their classes; validation images are held out of the training images."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def epochs(self, steps: int, batch_size: int) -> int:
        """Return how many epochs hold the steps."""
        return -(-steps // -(-len(self.train[0]) // batch_size))

    def batches(self, seed: int, steps: int, batch_size: int) -> Callable[[int], Iterator[tuple[Tensor, ...]]]:
        """Return the batches of an epoch by its index; the last epoch stops where the steps are up."""
        every = -(-len(self.train[0]) // batch_size)

        def of(epoch: int) -> Iterator[tuple[Tensor, ...]]:
            order = generator(seed, "order", epoch)
            return islice(minibatches(self.train, batch_size, order), steps - epoch * every)

        return of


def images(trial: Trial) -> Images:
    """Load the images that the budget names, on the trial's device."""
    x_train, y_train, x_test, y_test = _mnist() if trial.budget["images"] == "mnist" else _digits()
    held = int(trial.budget["validation"])
    pairs = (x_train[held:], y_train[held:]), (x_train[:held], y_train[:held]), (x_test, y_test)
    return Images(*((x.to(trial.device), y.to(trial.device)) for x, y in pairs))


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 1437 images to train and validate on, and 360 to test on, with the classes in proportion."""
    pixels, classes = load_digits(return_X_y=True)
    y = torch.from_numpy(classes).long()
    order = stratified_permutation(y, generator("digits split"))
    x, y = torch.from_numpy(pixels).float()[order] / 16, y[order]
    return x[360:], y[360:], x[:360], y[:360]


def _mnist() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bundle = data.load("mnist")
    y = torch.from_numpy(bundle.y_train).long()
    order = stratified_permutation(y, generator("mnist split"))

    def flat(pixels: Tensor) -> Tensor:
        return pixels.flatten(1).float() / 255

    x_train, x_test = (flat(torch.from_numpy(pixels)) for pixels in (bundle.x_train, bundle.x_test))
    return x_train[order], y[order], x_test, torch.from_numpy(bundle.y_test).long()
