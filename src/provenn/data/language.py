"""Character corpora: a text as numbers, cut in three, and random windows of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number


@dataclass(frozen=True)
class CharacterCorpus:
    """A text as character numbers, cut in three consecutive stretches.

    ``vocabulary`` lists the characters of the whole text in code-point order; a character's number is its place there.
    """

    vocabulary: str
    train: Int[Tensor, " train"]
    validation: Int[Tensor, " validation"]
    test: Int[Tensor, " test"]

    @cached_property
    def _number_of(self) -> dict[str, int]:
        return {character: number for number, character in enumerate(self.vocabulary)}

    def encode(self, text: str) -> Int[Tensor, " characters"]:
        """Return the numbers of a text's characters.

        Raises:
            ValueError: A character is not in the vocabulary.
        """
        unknown = sorted(set(text) - set(self.vocabulary))
        if unknown:
            raise ValueError(f"text must be made of the corpus's characters, got also {unknown}")
        return torch.tensor([self._number_of[character] for character in text], dtype=torch.int64)

    def decode(self, numbers: Int[Tensor, " characters"]) -> str:
        """Return the text of character numbers."""
        return "".join(self.vocabulary[number] for number in numbers.tolist())


def character_corpus(text: str, validation: float = 0.1, test: float = 0.1) -> CharacterCorpus:
    """Number a text's characters and cut it: first the training stretch, then validation, then test.

    Args:
        text: The text, such as ``provenn.data.load("tinyshakespeare").text``.
        validation: Share of the validation stretch.
        test: Share of the test stretch.

    Raises:
        ValueError: The text is empty, or a share is outside [0, 1) or the two leave nothing to train on.
    """
    check_number("validation", validation, at_least=0, below=1)
    check_number("test", test, at_least=0, below=1)
    vocabulary = "".join(sorted(set(text)))
    held_out = round(len(text) * validation), round(len(text) * test)
    train = len(text) - sum(held_out)
    if train < 1:
        raise ValueError(f"no text is left to train on: {len(text)} characters, {held_out} held out")
    empty = torch.zeros(0, dtype=torch.int64)
    corpus = CharacterCorpus(vocabulary, empty, empty, empty)
    return CharacterCorpus(vocabulary, *torch.split(corpus.encode(text), [train, *held_out]))


def random_windows(
    tokens: Int[Tensor, " tokens"], batch: int, length: int, generator: torch.Generator
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
    """Draw windows of a text uniformly, with replacement, and the same windows one token later.

    Args:
        tokens: A stretch of a corpus.
        batch: Number of windows.
        length: Tokens a window.
        generator: Source of the draws; it decides them whatever the tokens' device.

    Returns:
        Inputs and targets, both (batch, length), on the tokens' device.

    Raises:
        ValueError: The stretch is not longer than a window, or a number is below 1.
    """
    check_integer("batch", batch, at_least=1)
    check_integer("length", length, at_least=1, at_most=len(tokens) - 1)
    start = torch.randint(0, len(tokens) - length, (batch, 1), generator=generator, device=generator.device)
    place = (start + torch.arange(length + 1, device=generator.device)).to(tokens.device)
    windows = tokens[place]
    return windows[:, :-1], windows[:, 1:]
