"""A small language model on the characters of tinyshakespeare."""

import math
from functools import cache, partial

from jaxtyping import Int
from torch import Tensor, nn

from provenn import data
from provenn.compare.task import LogUniform, Scale, Split, Task
from provenn.core.experiment.training import predict
from provenn.core.sequences.language_model import LanguageModel, next_token_loss
from provenn.data.language import CharacterCorpus, character_corpus

CHARACTERS = 65
HELD_OUT = 200
"""Windows for validation, and as many for testing."""


def windows(tokens: Int[Tensor, " tokens"], length: int, count: int) -> tuple[Tensor, Tensor]:
    """Cut windows that do not overlap from evenly spread places of a text, and the same windows one token later."""
    pieces = tokens[: (len(tokens) - 1) // length * length].view(-1, length)
    later = tokens[1 : pieces.numel() + 1].view(-1, length)
    kept = min(count, len(pieces))
    picked = [place * len(pieces) // kept for place in range(kept)]
    return pieces[picked], later[picked]


@cache
def corpus() -> CharacterCorpus:
    """Load the text: 80 % to train on, 10 % for validation, the last 10 % for testing."""
    return character_corpus(data.load("tinyshakespeare").text)


def split(length: int, train: int) -> Split:
    """Return windows of the three stretches of the text."""
    text = corpus()
    stretches = ((text.train, train), (text.validation, HELD_OUT), (text.test, HELD_OUT))
    return Split(*(part for tokens, count in stretches for part in windows(tokens, length, count)))


def nats(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the mean cross-entropy of a character, in nats."""
    return nn.functional.cross_entropy(predict(model, x, 64).flatten(0, 1), y.flatten()).item()


SMALL = partial(LanguageModel, CHARACTERS, dim=48, depth=2, heads=4, length=64)
LARGE = partial(LanguageModel, CHARACTERS, dim=384, depth=6, heads=6, length=256)

TASK = Task(
    name="shakespeare-gpt",
    summary=(
        "causal character model (2 blocks of width 48, 64 characters) on tinyshakespeare, 600 steps of 16 windows; "
        "on a GPU 6 blocks of width 384, 256 characters, 10 epochs of batch 64"
    ),
    kinds={"optim": {"lr": LogUniform(1e-4, 1.0)}},
    scales={
        "cpu": Scale(SMALL, partial(split, 64, 9600), batch_size=16, epochs=1, fine_tuning_epochs=1),
        "cuda": Scale(LARGE, partial(split, 256, 3400), batch_size=64, epochs=10, fine_tuning_epochs=1),
    },
    loss=next_token_loss,
    measure=nats,
    metric="test loss (nats a character)",
    maximize=False,
    reference=math.log(CHARACTERS),
)
