"""ETTh1: a day of seven columns from the four days before; about half a minute a run."""

from functools import cache

import torch
from torch import Tensor, nn

from provenn.compare.layer_task import LayerTask
from provenn.compare.task import LogUniform, Split
from provenn.compare.tasks._sequences import CLIP, PLACE, REFERENCES, SequenceNetwork, sequence_layer
from provenn.core.experiment.training import predict
from provenn.data import load

PAST, AHEAD, STRIDE = 96, 24, 4
MONTH = 30 * 24
COLUMNS = 7


class Forecaster(nn.Module):
    """Predicts changes against the last values seen.

    Args:
        network: (batch, past, columns) → (batch, ahead · columns).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the next values, (batch, ahead, columns)."""
        last = x[:, -1:]
        changes: Tensor = self.network(x - last).unflatten(1, (AHEAD, COLUMNS))
        return last + changes


def build(part: object, width: int) -> nn.Module:
    """Return the forecaster around a part."""
    network = SequenceNetwork(COLUMNS, width, AHEAD * COLUMNS, lambda width: sequence_layer(part, width), pooled=False)
    return Forecaster(network)


class LastValue(nn.Module):
    """Mixes nothing: the network around it sees the last step alone.

    Args:
        width: Width of the sequence.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return each step, mapped."""
        y: Tensor = self.map(x)
        return y


@cache
def data() -> Split:
    """Return windows of 12 months to train on, 4 to tune on and 4 to judge by, scaled by the first twelve."""
    values = torch.from_numpy(load("etth1").values)
    first = values[: 12 * MONTH]
    values = (values - first.mean(0)) / first.std(0)
    parts = [_windows(values[max(0, start - PAST) : end]) for start, end in _months((0, 12), (12, 16), (16, 20))]
    (x, y), (x_validation, y_validation), (x_test, y_test) = parts
    return Split(x, y, x_validation, y_validation, x_test, y_test)


def _months(*spans: tuple[int, int]) -> list[tuple[int, int]]:
    return [(start * MONTH, end * MONTH) for start, end in spans]


def _windows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return every fourth window of past and future."""
    windows = values.unfold(0, PAST + AHEAD, STRIDE).transpose(1, 2)
    return windows[:, :PAST].contiguous(), windows[:, PAST:].contiguous()


def squared_error(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error of a batch."""
    return nn.functional.mse_loss(model(x), y)


def mean_squared_error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the mean squared error of a part of the data."""
    return nn.functional.mse_loss(predict(model, x), y).item()


TASK = LayerTask(
    name="etth1-forecasting",
    summary="two residual blocks of 12 000 parameters forecast 24 hours of ETTh1's 7 columns from 96, 3 epochs",
    kinds={"nn": {"lr": LogUniform(3e-4, 1e-2)}},
    build=build,
    data=data,
    epochs=3,
    batch_size=32,
    parameters=12_000,
    loss=squared_error,
    measure=mean_squared_error,
    metric="MSE",
    maximize=False,
    references={**REFERENCES, "last-value": LastValue},
    clip=CLIP,
    place=PLACE,
)
