"""BLEU: how well translations match references, by their n-grams."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

from provenn.core.experiment.checks import check_integer

Sentence = Sequence[Hashable]


def bleu(candidates: Sequence[Sentence], references: Sequence[Sequence[Sentence]], max_n: int = 4) -> float:
    r"""Compute the BLEU score of a corpus of translations.

    .. math::
        \mathrm{BLEU} = B \exp\Big(\frac1N \sum_{n=1}^N \log p_n\Big), \qquad
        B = \begin{cases} 1 & c > r \\ e^{1 - r/c} & c \le r \end{cases}

    p_n is the share of the candidates' n-grams that a reference of theirs has too, each as often as one reference has
    it at most; c is the candidates' length and r the references', of several the nearest (the shorter of two).

    Args:
        candidates: Translations, each a sequence of tokens.
        references: For each translation one reference or more, each a sequence of tokens.
        max_n: N, the longest n-grams. Lengths of which no candidate has an n-gram are left out.

    Returns:
        The score, in [0, 1]; not smoothed: 0 where no n-gram of some length matches.

    Raises:
        ValueError: There are no ``candidates``, not as many ``references``, a translation without one, or ``max_n``
            < 1.
        TypeError: A sentence is a string, not a sequence of tokens, or ``max_n`` is no integer.

    Cost: O(tokens · N) time.

    Source: section 5.1 of the survey; Papineni et al., ACL 2002.
    """
    check_integer("max_n", max_n, at_least=1)
    if not candidates:
        raise ValueError("candidates must hold at least one sentence, got none")
    if len(references) != len(candidates):
        raise ValueError(f"references must be {len(candidates)} lists, got {len(references)}")
    matched, total = [0] * max_n, [0] * max_n
    length = nearest = 0
    for candidate, choices in zip(candidates, references, strict=True):
        _check("candidates", candidate)
        if not choices:
            raise ValueError("references must hold at least one sentence for every candidate, got none for one")
        for one in choices:
            _check("references", one)
        length += len(candidate)
        nearest += min((abs(len(one) - len(candidate)), len(one)) for one in choices)[1]
        for n in range(1, max_n + 1):
            found = _grams(candidate, n)
            allowed: Counter[tuple[Hashable, ...]] = Counter()
            for one in choices:
                allowed |= _grams(one, n)
            matched[n - 1] += (found & allowed).total()
            total[n - 1] += found.total()
    orders = [(hits, count) for hits, count in zip(matched, total, strict=True) if count]
    if not orders or not all(hits for hits, _ in orders):
        return 0.0
    precision = math.exp(sum(math.log(hits / count) for hits, count in orders) / len(orders))
    return precision * (1.0 if length > nearest else math.exp(1 - nearest / length))


def _check(name: str, sentence: Sentence) -> None:
    if isinstance(sentence, str):
        raise TypeError(f"{name} must be sequences of tokens, got the string {sentence!r}")


def _grams(sentence: Sentence, n: int) -> Counter[tuple[Hashable, ...]]:
    return Counter(tuple(sentence[start : start + n]) for start in range(len(sentence) - n + 1))
