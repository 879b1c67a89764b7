"""Perceptron 64–64–32–10 on scikit-learn's digits, noisy: seconds a run."""

from functools import cache

from torch import nn

from provenn.compare.task import LogUniform, Scale, Split, Task
from provenn.core.experiment.networks import mlp
from provenn.data.toys import noisy_digits, shift_and_noise


def model() -> nn.Module:
    """Build the perceptron."""
    return nn.Sequential(nn.Flatten(), mlp([64, 64, 32, 10]))


@cache
def data() -> Split:
    """Return 1000 training, 300 validation and 497 test images."""
    return Split(**vars(noisy_digits()))


TASK = Task(
    name="digits-mlp",
    summary="perceptron 64–64–32–10 on noisy 8×8 digits, 1000 images, 40 epochs of batch 64",
    kinds={
        "optim": {"lr": LogUniform(1e-4, 1.0)},
        "compress": {"lr": LogUniform(1e-4, 1e-1)},
        "training": {"lr": LogUniform(1e-4, 1e-1)},
    },
    scales={"cpu": Scale(model, data, batch_size=64, epochs=40, fine_tuning_epochs=40)},
    augment=shift_and_noise,
    reference=0.1,
)
