"""The search finds papers by other words than the title's, and every paper by its title."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import provenn.catalog.compiled as compiled_module
import provenn.catalog.search as module
from provenn.catalog.card import cards
from provenn.catalog.search import Hit, search, stem, terms

QUERIES = tomllib.loads(Path(__file__).with_name("queries.toml").read_text(encoding="utf-8"))["query"]
GENERAL = {"network", "neural", "learn", "train", "model", "deep", "optim", "method", "gradient"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.getbasetemp() / "catalog-cache"
    monkeypatch.setattr(compiled_module, "cache_folder", lambda: folder)


def slugs(hits: list[Hit]) -> list[str]:
    return [hit.card.slug for hit in hits]


def test_forty_questions_find_their_papers():
    assert len(QUERIES) == 40
    found = [one["slug"] in slugs(search(one["text"], 5)) for one in QUERIES]
    missed = [one["slug"] for one, ok in zip(QUERIES, found, strict=True) if not ok]
    assert sum(found) >= 36, f"missed: {missed}"


def test_the_questions_are_spread_and_do_not_quote_titles():
    by_slug = {one.slug: one for one in cards()}
    assert len({one["slug"] for one in QUERIES}) == 40
    assert {by_slug[one["slug"]].area for one in QUERIES} == {one.area for one in cards()}
    for one in QUERIES:
        asked, title = set(terms(one["text"])), set(terms(by_slug[one["slug"]].title))
        assert len(asked & title - GENERAL) <= 2, one


def test_every_title_finds_its_paper_first():
    wrong = [one.slug for one in cards() if slugs(search(one.title, 1)) != [one.slug]]
    assert wrong == []


def test_a_part_finds_its_paper():
    names = (
        "DiffGrad",
        "provenn.nn.SigmoidAttention",
        "SAPPruner",
        "UNetPlusPlus",
        "neural_collapse_metrics",
        "AnyLoss",
    )
    first = [slugs(search(name, 1))[0] for name in names]
    assert first == ["diffgrad", "sigmoid-attention", "sap-pruning", "unetpp", "neural-collapse", "anyloss"]


def test_scores_fall_and_count_is_kept():
    hits = search("sparse attention", 7)
    assert len(hits) == 7
    scores = [hit.score for hit in hits]
    assert scores == sorted(scores, reverse=True)
    assert search("sparse attention", 3) == hits[:3]
    assert len(search("attention", 1000)) == 194


def test_case_order_and_common_words_do_not_matter():
    expected = search("sparse attention")
    assert slugs(search("ATTENTION that is Sparse")) == slugs(expected)


def test_words_nobody_knows():
    assert search("xyzzy plugh") == []
    assert search("") == []
    assert search("the of and") == []
    assert slugs(search("xyzzy diffgrad", 1)) == ["diffgrad"]


def test_count_must_be_positive():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        search("attention", 0)


def test_meaning_finds_papers_without_the_word(monkeypatch: pytest.MonkeyPatch):
    """A paper that holds none of the words scores zero by words, and more than zero by meaning if it is related."""
    word = terms("pruning")[0]
    rest = [hit for hit in search("pruning", 194) if word not in terms(" ".join(module._fields(hit.card).values()))]
    assert rest[0].score > 0.05
    assert {hit.card.area for hit in rest[:5]} & {"compress", "search"}
    monkeypatch.setattr(module, "MEANING_WEIGHT", 0.0)
    without = {hit.card.slug: hit.score for hit in search("pruning", 194)}
    assert without[rest[0].card.slug] == 0


def test_the_latent_space_is_the_truncated_svd():
    """Against NumPy's own SVD of the tf-idf matrix, which the index does not compute."""
    import numpy as np

    index = module._index()
    assert np.allclose(index.meaning.T @ index.meaning, np.eye(module.DIMENSIONS), atol=1e-3)
    assert np.allclose(np.linalg.norm(index.papers, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    "family",
    [
        ("optimizer", "optimizers", "optimise", "optimising", "optimization", "optimisation"),
        ("network", "networks"),
        ("prune", "pruned", "pruning"),
        ("class", "classes"),
        ("net", "nets"),
        ("gate", "gates"),
    ],
)
def test_forms_of_a_word_share_a_stem(family: tuple[str, ...]):
    assert len({stem(word) for word in family}) == 1


def test_stems_keep_words_apart():
    assert stem("loss") == "loss"
    assert len({stem(word) for word in ("gas", "gate", "graph", "gradient", "grad", "gain")}) == 6


def test_identifiers_count_whole_and_by_parts():
    assert terms("DiffGrad") == ["diffgrad", "diff", "grad"]
    assert terms("sap_pruning") == terms("sap pruning")
    assert terms("M-FAC GPT-2") == ["m", "fac", "gpt", "2"]
    assert terms("L1BatchNorm2d")[0] == "l1batchnorm2d"
    assert {"batch", "norm"} <= set(terms("L1BatchNorm2d"))
