"""Perceptron 784–128–64–10 on MNIST: a part of it on the CPU, all of it on a GPU."""

from functools import cache, partial

import torch
from torch import nn

from provenn import data
from provenn.compare.task import LogUniform, Scale, Split, Task
from provenn.core.experiment.networks import mlp

VALIDATION = 5000


def model() -> nn.Module:
    """Build the perceptron."""
    return nn.Sequential(nn.Flatten(), mlp([784, 128, 64, 10]))


@cache
def split(train: int) -> Split:
    """Return the first training images, the last 5000 for validation, and the whole test set."""
    bundle = data.load("mnist")
    x = torch.from_numpy(bundle.x_train).to(torch.float32).div(255).unsqueeze(1)
    y = torch.from_numpy(bundle.y_train)
    x_test = torch.from_numpy(bundle.x_test).to(torch.float32).div(255).unsqueeze(1)
    return Split(x[:train], y[:train], x[-VALIDATION:], y[-VALIDATION:], x_test, torch.from_numpy(bundle.y_test))


TASK = Task(
    name="mnist-mlp",
    summary="perceptron 784–128–64–10 on MNIST, batch 64: 10 000 images, 5 epochs; on a GPU 55 000 images, 15 epochs",
    kinds={"optim": {"lr": LogUniform(1e-4, 1.0)}, "compress": {"lr": LogUniform(1e-4, 1e-1)}},
    scales={
        "cpu": Scale(model, partial(split, 10_000), batch_size=64, epochs=5, fine_tuning_epochs=5),
        "cuda": Scale(model, partial(split, 55_000), batch_size=64, epochs=15, fine_tuning_epochs=15),
    },
    reference=0.1,
)
