"""Spoken digits as waveforms: one second at 2 kHz, 250 steps of 8 samples; about half a minute a run."""

from functools import cache

import torch
from torch import nn

from provenn.compare.layer_task import LayerTask
from provenn.compare.task import LogUniform, Split
from provenn.compare.tasks._sequences import CLIP, PLACE, REFERENCES, SequenceNetwork, sequence_layer
from provenn.data import load

RATE, SAMPLES = 4, 8
TEST_TAKES, VALIDATION_TAKES = 5, 10


def build(part: object, width: int) -> nn.Module:
    """Return the network around a part."""
    return SequenceNetwork(SAMPLES, width, 10, lambda width: sequence_layer(part, width))


@cache
def data() -> Split:
    """Return sequences (250, 8): takes 0 to 4 of each speaker and digit to judge by, 5 to 9 to tune on."""
    sounds = load("fsdd")
    wave = torch.from_numpy(sounds.padded(sounds.sample_rate))
    x = nn.functional.avg_pool1d(wave[:, None], RATE)[:, 0]
    y, take = torch.from_numpy(sounds.y), torch.from_numpy(sounds.take)
    test, validation = take < TEST_TAKES, (take >= TEST_TAKES) & (take < VALIDATION_TAKES)
    train = take >= VALIDATION_TAKES
    x = (x / x[train].std()).unflatten(1, (-1, SAMPLES))
    return Split(x[train], y[train], x[validation], y[validation], x[test], y[test])


TASK = LayerTask(
    name="spoken-digits",
    summary="two residual blocks of 10 000 parameters on Free Spoken Digit at 2 kHz, 250 steps of 8 samples, 4 epochs",
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
