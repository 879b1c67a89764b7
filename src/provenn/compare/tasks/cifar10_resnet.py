"""Residual network on CIFAR-10: ResNet-8 on a part of it on the CPU, ResNet-18 on all of it on a GPU."""

from functools import cache, partial

import torch
from torch import Tensor

from provenn import data
from provenn.compare.task import LogUniform, Scale, Split, Task
from provenn.core.experiment.networks import resnet
from provenn.data.toys import shift_and_noise


@cache
def split(train: int, validation: int, test: int) -> Split:
    """Return the first training images, the last for validation, and the first test images, standardised by channel."""
    bundle = data.load("cifar10")
    x, x_test = (torch.from_numpy(images) for images in (bundle.x_train, bundle.x_test[:test]))
    y, y_test = (torch.from_numpy(labels) for labels in (bundle.y_train, bundle.y_test[:test]))
    pixels = x[:train].to(torch.float32)
    mean, deviation = pixels.mean(dim=(0, 2, 3), keepdim=True), pixels.std(dim=(0, 2, 3), keepdim=True)
    x_train, x_validation, x_test = ((part - mean) / deviation for part in (pixels, x[-validation:], x_test))
    return Split(x_train, y[:train], x_validation, y[-validation:], x_test, y_test)


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to four pixels and mirror every other image."""
    moved = shift_and_noise(x, generator, shift=4, sigma=0.0)
    mirrored = torch.rand(len(x), generator=generator, device=generator.device).to(x.device) < 0.5
    return torch.where(mirrored[:, None, None, None], moved.flip(-1), moved)


TASK = Task(
    name="cifar10-resnet",
    summary="ResNet-8 on 4000 images of CIFAR-10, 4 epochs of batch 64; on a GPU ResNet-18 on 45 000, 20 of batch 128",
    kinds={"optim": {"lr": LogUniform(1e-4, 1.0)}, "compress": {"lr": LogUniform(1e-4, 1e-1)}},
    scales={
        "cpu": Scale(
            partial(resnet, (8, 16, 32), 1, 3), partial(split, 4000, 1000, 2000), 64, epochs=4, fine_tuning_epochs=2
        ),
        "cuda": Scale(
            partial(resnet, (64, 128, 256, 512), 2, 3),
            partial(split, 45_000, 5000, 10_000),
            128,
            epochs=20,
            fine_tuning_epochs=10,
        ),
    },
    augment=augment,
    reference=0.1,
)
