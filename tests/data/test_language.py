"""Character corpora: numbering, cuts and windows."""

from __future__ import annotations

import pytest
import torch

from provenn.data.language import character_corpus, random_windows

TEXT = "to be, or not to be: ä quest\n" * 10


def test_a_corpus_reads_back_and_is_cut_in_order() -> None:
    corpus = character_corpus(TEXT, validation=0.2, test=0.1)
    assert list(corpus.vocabulary) == sorted(set(TEXT))
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [203, 58, 29]
    assert "".join(corpus.decode(part) for part in (corpus.train, corpus.validation, corpus.test)) == TEXT
    assert corpus.decode(corpus.encode("not ä")) == "not ä"
    assert corpus.encode("\n").tolist() == [0]
    with pytest.raises(ValueError, match="'z'"):
        corpus.encode("zebra")


def test_targets_are_inputs_one_later_and_every_start_occurs() -> None:
    tokens = torch.arange(8)
    generator = torch.Generator().manual_seed(0)
    state = torch.random.get_rng_state()
    inputs, targets = random_windows(tokens, 500, 3, generator)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert inputs.shape == targets.shape == (500, 3)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs[:, 1:], inputs[:, :-1] + 1)
    assert set(inputs[:, 0].tolist()) == {0, 1, 2, 3, 4}
    again, _ = random_windows(tokens, 500, 3, torch.Generator().manual_seed(0))
    assert torch.equal(inputs, again)


def test_the_longest_window_is_one_less_than_the_text() -> None:
    inputs, targets = random_windows(torch.arange(4), 2, 3, torch.Generator())
    assert inputs.tolist() == [[0, 1, 2]] * 2
    assert targets.tolist() == [[1, 2, 3]] * 2
    with pytest.raises(ValueError, match="length"):
        random_windows(torch.arange(4), 2, 4, torch.Generator())


def test_an_empty_text_or_no_training_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="no text"):
        character_corpus("")
    with pytest.raises(ValueError, match="no text"):
        character_corpus("abcd", validation=0.5, test=0.5)
    with pytest.raises(ValueError, match="test"):
        character_corpus("abcd", test=1.0)
