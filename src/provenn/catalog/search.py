"""Search over the catalogue, by words and by meaning, with no model and no network.

By words: BM25 over weighted fields (BM25F; Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009).
By meaning: latent semantic indexing (Deerwester et al., 1990), a truncated SVD of the tf-idf matrix, so that a query
finds papers that use other words of the same company. The two are summed after scaling by their best.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from provenn.catalog.card import Card, cards, paths
from provenn.catalog.compiled import compiled

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FIELD_WEIGHTS = {"title": 3.0, "keywords": 3.0, "summary": 2.0, "parts": 1.0, "claim": 1.0}
SATURATION = 1.2
"""BM25's k₁: how soon more occurrences of a word stop counting."""
LENGTH_SHARE = 0.6
"""BM25's b: how much a long field discounts its words."""
DIMENSIONS = 96
MEANING_WEIGHT = 0.6

_COMMON = """
a an and are as at be been but by can do does each for from get gets give gives given has have how in into is it its
itself may more most much no nor not of off on one only onto or other our out over own per same so such than that the
their them then there these they this those to too under up use used uses using via was we were what when where which
while who whose why will with within without you your i my
"""
STOP_WORDS = frozenset(_COMMON.split())
SUFFIXES = (
    "ization", "isation", "izations", "isations", "izing", "ising", "izer", "iser", "izers", "isers", "ized", "ised",
    "ize", "ise", "izes", "ises", "ational", "ations", "ation", "ators", "ator", "ating", "ated", "ates", "ate",
    "ings", "ing", "edly", "ed", "ers", "er", "ors", "or", "ions", "ion", "ives", "ive", "ably", "able", "als", "al",
    "ally", "ments", "ment", "ness", "ity", "ities", "ly", "ies", "es", "s", "y", "e",
)  # fmt: skip
SHORTEST_STEM = 4
_STEM = re.compile(rf"(.{{{SHORTEST_STEM},}}?)(?:{'|'.join(SUFFIXES)})|(.{{{SHORTEST_STEM - 1}}})s")


@dataclass(frozen=True)
class Hit:
    """A paper found, and how well it fits: scores compare within one search only."""

    card: Card
    score: float


@cache
def stem(word: str) -> str:
    """Return the word without its longest known ending, if enough of it is left: optimizers, optimise → optim."""
    if word.endswith(("ss", "us")):
        return word
    found = _STEM.fullmatch(word)
    return (found[1] or found[2]) if found else word


def terms(text: str) -> list[str]:
    """Return the stems of a text's words; identifiers count whole and by parts: DiffGrad → diffgrad, diff, grad."""
    found = []
    for word in re.findall(r"[^\W_]+", text):
        found.append(word)
        if not (word.isalpha() and word[1:].islower()):
            pieces = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\dA-Za-z]+", word)
            found += pieces if len(pieces) > 1 else []
    return [stem(word) for word in map(str.lower, found) if word not in STOP_WORDS]


def search(query: str, count: int = 10) -> list[Hit]:
    """Return the papers that fit a query best.

    Args:
        query: Any words: of a title, of a part, of what the method does.
        count: How many to return at most.

    Returns:
        Hits, best first; empty if the catalogue knows none of the words. Costs a few milliseconds once the index is
        compiled; it grows linearly with the number of papers.

    Raises:
        ValueError: ``count`` is less than 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    import numpy as np

    index = _index()
    known = [index.columns[term] for term in terms(query) if term in index.columns]
    if not known:
        return []
    asked = np.bincount(known, minlength=len(index.columns)).astype(np.float32)
    by_words = index.words @ asked
    direction = (np.log1p(asked) * index.rarity) @ index.meaning
    by_meaning = index.papers @ direction / max(float(np.linalg.norm(direction)), 1e-12)
    score = by_words / by_words.max() + MEANING_WEIGHT * by_meaning / max(float(by_meaning.max()), 1e-12)
    every = cards()
    best = np.argsort(-score, kind="stable")[:count]
    return [Hit(every[row], float(score[row])) for row in best]


@dataclass(frozen=True)
class _Index:
    columns: dict[str, int]
    """Term → column."""
    words: NDArray[np.float32]
    """BM25 weight of each term in each paper (papers, terms)."""
    rarity: NDArray[np.float32]
    """Inverse document frequency (terms)."""
    meaning: NDArray[np.float32]
    """Right singular vectors (terms, dimensions)."""
    papers: NDArray[np.float32]
    """The papers' unit vectors in the latent space (papers, dimensions)."""


@cache
def _index() -> _Index:
    import numpy as np

    kept = compiled("search", [*paths().values(), Path(__file__)], _pack)
    with np.load(io.BytesIO(kept), allow_pickle=False) as arrays:
        columns = {term: column for column, term in enumerate(str(arrays["terms"]).split())}
        wide = {name: arrays[name] for name in ("words", "rarity", "meaning", "papers")}
    return _Index(columns, **wide)


def _fields(card: Card) -> dict[str, str]:
    return {
        "title": f"{card.title} {card.slug}",
        "keywords": " ".join(card.keywords),
        "summary": card.summary,
        "parts": " ".join(part.attribute for part in card.parts),
        "claim": card.claim,
    }


def _pack() -> bytes:
    import numpy as np

    fields = [{name: terms(text) for name, text in _fields(card).items()} for card in cards()]
    vocabulary = sorted({term for paper in fields for found in paper.values() for term in found})
    columns = {term: column for column, term in enumerate(vocabulary)}
    frequency = np.zeros((len(fields), len(vocabulary)))
    for name, weight in FIELD_WEIGHTS.items():
        lengths = np.array([len(paper[name]) for paper in fields])
        share = 1 - LENGTH_SHARE + LENGTH_SHARE * lengths / lengths.mean()
        for row, paper in enumerate(fields):
            np.add.at(frequency[row], [columns[term] for term in paper[name]], weight / share[row])
    holding = (frequency > 0).sum(axis=0)
    rarity = np.log1p((len(fields) - holding + 0.5) / (holding + 0.5))
    words = rarity * frequency * (SATURATION + 1) / (frequency + SATURATION)
    weights = rarity * np.log1p(frequency)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    # the Gram matrix of the papers is small, so its eigenvectors give the SVD at little cost
    values, left = np.linalg.eigh(weights @ weights.T)
    values, left = values[-DIMENSIONS:], left[:, -DIMENSIONS:]
    meaning = weights.T @ left / np.sqrt(values)
    papers = left * np.sqrt(values)
    papers /= np.linalg.norm(papers, axis=1, keepdims=True)
    file = io.BytesIO()
    np.savez(
        file,
        terms=np.array(" ".join(vocabulary)),
        words=words.astype(np.float32),
        rarity=rarity.astype(np.float32),
        meaning=meaning.astype(np.float32),
        papers=papers.astype(np.float32),
    )
    return file.getvalue()
