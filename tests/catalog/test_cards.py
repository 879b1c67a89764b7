"""Every card is well-formed, and a card that is not is named."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from provenn.catalog.card import AREAS, PART_KINDS, Card, UnknownSlugError, card, cards, paper, paths, read_card

EVERY = [read_card(path) for path in paths().values()]
each_card = pytest.mark.parametrize("one", EVERY, ids=lambda one: one.slug)

COUNTS = {
    "nn": 17, "optim": 12, "losses": 4, "training": 9, "models": 16, "graphs": 15, "compress": 21, "search": 17,
    "hyper": 6, "generative": 7, "science": 12, "scenes": 6, "stats": 4, "decisions": 4, "inspect": 14, "theory": 17,
    "robust": 4, "runtime": 7, "agents": 2,
}  # fmt: skip


def test_there_are_194_papers_in_19_areas():
    assert len(EVERY) == 194
    assert Counter(one.area for one in EVERY) == COUNTS
    assert len({one.slug for one in EVERY}) == 194
    assert len({one.title for one in EVERY}) == 194


@each_card
def test_source_is_well_formed(one: Card):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", one.slug)
    day = datetime.date.fromisoformat(one.date)
    assert datetime.date(2010, 1, 1) < day < datetime.date(2026, 1, 1)
    assert one.arxiv is not None
    assert re.fullmatch(r"\d{4}\.\d{4,5}", one.arxiv)
    # the number's month is that of the first version; a paper may be dated by a day close to the month's turn
    month = datetime.date(2000 + int(one.arxiv[:2]), int(one.arxiv[2:4]), 15)
    assert abs((day - month).days) < 50
    assert one.code is None or re.fullmatch(r"https://[\w.-]+/\S+", one.code)
    assert one.venue is None or re.search(r"[A-Za-z]{3}", one.venue)
    assert all(author.strip() == author and len(author) > 2 for author in one.authors)


@each_card
def test_prose_is_there_and_clean(one: Card):
    assert len(one.summary) >= 100
    assert len(one.claim) >= 60
    assert one.rule is not None
    assert re.search("reproduced", one.rule, re.IGNORECASE)
    assert 3 <= len(one.keywords) <= 8
    assert len(set(one.keywords)) == len(one.keywords)
    assert one.peer is not None
    assert one.peer.package is None or re.fullmatch(r"[A-Za-z][\w.-]+", one.peer.package)
    for text in (one.title, one.summary, one.claim, one.rule, one.peer.text):
        assert "[m" not in text
        assert "**" not in text
        assert "`" not in text
        assert text.strip() == text
        assert text[-1] not in ",;:"


@each_card
def test_parts_have_public_names(one: Card):
    assert one.parts
    for part in one.parts:
        head, area, *rest = part.name.split(".")
        assert head == "provenn"
        assert area in AREAS
        assert 1 <= len(rest) <= 2
        assert all(re.fullmatch(r"[A-Za-z]\w*", name) for name in rest)
        assert part.kind in PART_KINDS
        assert part.name == f"{part.namespace}.{part.attribute}"
    assert any(part.name.startswith(f"provenn.{one.area}.") for part in one.parts)
    assert one.kind in PART_KINDS[:14]


def test_no_two_papers_share_a_part():
    owners = Counter(part.name for one in EVERY for part in one.parts)
    assert [name for name, count in owners.items() if count > 1] == []


def test_cards_come_by_area_then_slug():
    order = list(AREAS)
    every = cards()
    assert every == sorted(EVERY, key=lambda one: (order.index(one.area), one.slug))
    every.clear()
    assert len(cards()) == 194


def test_a_paper_is_found_by_slug_and_by_part():
    assert card("sap-pruning").slug == card("sap_pruning").slug == "sap-pruning"
    assert paper("sap_pruning").slug == "sap-pruning"
    assert paper("provenn.nn.functional.sigmoid_attention").slug == "sigmoid-attention"
    assert paper("SAPPruner").slug == "sap-pruning"
    # a slug that is also a part's name
    assert paper("step_law").slug == "step-law"


def test_unknown_names_get_the_three_nearest():
    with pytest.raises(UnknownSlugError, match=r"unknown paper 'difgrad'; the nearest are diffgrad, \S+, \S+$"):
        card("difgrad")
    with pytest.raises(
        UnknownSlugError, match=r"'provenn\.optim\.DifGrad'; the nearest are provenn\.optim\.DiffGrad, "
    ):
        paper("provenn.optim.DifGrad")


def test_a_name_of_several_parts_is_not_guessed():
    shared = Counter(part.attribute for one in EVERY for part in one.parts)
    assert shared["empirical_ntk"] == 2
    with pytest.raises(UnknownSlugError) as caught:
        paper("empirical_ntk")
    assert "provenn.theory.empirical_ntk" in str(caught.value)
    assert "provenn.search.empirical_ntk" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('title = "A Made-Up & Method"\n', ""), "title"),
        (("title = ", 'heading = "x"\ntitle = '), "heading"),
        (('kind = "optimizer"', 'kind = "optimiser"'), "unknown kind 'optimiser'"),
        (('kind = "function"', 'kind = "fun"'), "unknown kind 'fun'"),
        (('name = "provenn.optim.MadeUp", ', ""), "name"),
    ],
)
def test_a_wrong_card_is_named(fake: Callable[[str, str], Path], change: tuple[str, str], message: str):
    path = fake("catalog/cards/optim/other.toml", paths()["made-up"].read_text().replace(*change))
    with pytest.raises(ValueError, match=message) as caught:
        read_card(path)
    assert str(path) in str(caught.value)


def test_an_unknown_area_is_named(fake: Callable[[str, str], Path]):
    path = fake("catalog/cards/optimism/other.toml", paths()["made-up"].read_text())
    with pytest.raises(ValueError, match="unknown area 'optimism'"):
        read_card(path)


def test_a_changed_card_is_read_anew(fake: Callable[[str, str], Path]):
    text = paths()["made-up"].read_text()
    assert [one.title for one in cards()] == ["A Made-Up & Method"]
    fake("catalog/cards/optim/made-up.toml", text.replace("Made-Up", "Changed"))
    assert [one.title for one in cards()] == ["A Changed & Method"]
    fake("catalog/cards/optim/added.toml", text)
    assert [one.slug for one in cards()] == ["added", "made-up"]
