"""MNIST at 14 × 14, pixel by pixel: 196 steps of one number; about a minute a run."""

from functools import cache

import torch
from torch import Tensor, nn

from provenn.compare.layer_task import LayerTask
from provenn.compare.task import LogUniform, Split
from provenn.compare.tasks._sequences import CLIP, PLACE, REFERENCES, SequenceNetwork, sequence_layer
from provenn.core.experiment.seeding import generator
from provenn.data import load

TRAIN, VALIDATION, TEST = 3000, 1000, 2000


def build(part: object, width: int) -> nn.Module:
    """Return the network around a part."""
    return SequenceNetwork(1, width, 10, lambda width: sequence_layer(part, width))


@cache
def data() -> Split:
    """Return 3000 training, 1000 validation and 2000 test sequences (196, 1), in [−1, 1]."""
    images = load("mnist")
    order = torch.randperm(len(images.y_train), generator=generator("sequential digits"))[: TRAIN + VALIDATION].numpy()
    x, y = _sequences(images.x_train[order]), torch.from_numpy(images.y_train[order])
    x_test, y_test = _sequences(images.x_test[:TEST]), torch.from_numpy(images.y_test[:TEST])
    return Split(x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:], x_test, y_test)


def _sequences(images: object) -> Tensor:
    pixels = torch.as_tensor(images).float()[:, None]
    return nn.functional.avg_pool2d(pixels, 2).flatten(1)[..., None] / 127.5 - 1


TASK = LayerTask(
    name="sequential-digits",
    summary="two residual blocks of 10 000 parameters on MNIST at 14×14, pixel by pixel, 3000 images, 4 epochs",
    kinds={"nn": {"lr": LogUniform(5e-4, 2e-2)}},
    build=build,
    data=data,
    epochs=4,
    batch_size=50,
    parameters=10_000,
    references=REFERENCES,
    clip=CLIP,
    place=PLACE,
)
