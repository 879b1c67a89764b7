"""What ``cite`` prints is BibTeX, by a parser of its own."""

from __future__ import annotations

import dataclasses
import re

import pytest

from provenn.catalog.card import card, cards
from provenn.catalog.cite import bibtex, escaped


def parse(text: str) -> tuple[str, str, dict[str, str]]:
    """Parse one entry: its type, key and fields; raises ``ValueError`` at what BibTeX would not read."""
    head = re.match(r"@(\w+)\{([^\s,{}%#~\\]+),", text)
    if head is None:
        raise ValueError(f"no entry: {text[:40]!r}")
    fields: dict[str, str] = {}
    at = head.end()
    while True:
        rest = text[at:].lstrip()
        at = len(text) - len(rest)
        if rest.startswith("}"):
            if rest[1:].strip():
                raise ValueError(f"text after the entry: {rest[1:]!r}")
            return head[1], head[2], fields
        name = re.match(r"(\w+)\s*=\s*\{", rest)
        if name is None:
            raise ValueError(f"no field at {rest[:40]!r}")
        start = at + name.end()
        depth, at = 1, start
        while depth:
            escaped_brace = text[at - 1] == "\\"
            depth += {"{": 1, "}": -1}.get(text[at], 0) if not escaped_brace else 0
            at += 1
        fields[name[1]] = text[start : at - 1]
        if not text[at:].lstrip().startswith(","):
            raise ValueError("no comma after a field")
        at = text.index(",", at) + 1


def unescaped(text: str) -> str:
    for tex, plain in ((r"\textasciitilde{}", "~"), (r"\textasciicircum{}", "^")):
        text = text.replace(tex, plain)
    text = re.sub(r"\\([{}&%$#_])", r"\1", text)
    return text.replace(r"\textbackslash{}", "\\")


def test_the_parser_refuses_what_is_not_bibtex():
    assert parse("@misc{a-1,\n x = {1 {b}},\n}") == ("misc", "a-1", {"x": "1 {b}"})
    for wrong in ("misc{a, x = {1},}", "@misc{a b, x = {1},}", "@misc{a, x = {1} y = {2},}", "@misc{a, x = {1},} z"):
        with pytest.raises(ValueError, match=r"no|text"):
            parse(wrong)


@pytest.mark.parametrize("one", cards(), ids=lambda one: one.slug)
def test_every_entry_parses_and_says_what_the_card_says(one):
    kind, key, fields = parse(bibtex(one))
    assert kind == "misc"
    assert key == f"{one.slug}-{one.date[:4]}"
    assert fields["title"].startswith("{")
    assert fields["title"].endswith("}")
    assert unescaped(fields["title"][1:-1]) == one.title
    assert fields["year"] == one.date[:4]
    assert fields["eprint"] == one.arxiv
    assert fields["archivePrefix"] == "arXiv"
    assert fields["url"] == f"https://arxiv.org/abs/{one.arxiv}"
    assert fields.get("author", "").split(" and ") == [escaped(name) for name in one.authors] or not one.authors
    assert ("author" in fields) == bool(one.authors)
    assert fields.get("note") == (escaped(one.venue) if one.venue else None)
    for value in fields.values():
        assert not re.search(r"(?<!\\)[&%$#_^~]", value), "a character that TeX would read as a command"


def test_special_characters_are_escaped():
    assert escaped("a_b & 50% of $x$ #1 {y} ~ ^ \\") == (
        r"a\_b \& 50\% of \$x\$ \#1 \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{}"
    )
    assert unescaped(escaped("a_b & 50% of $x$ #1 {y} ~ ^ \\")) == "a_b & 50% of $x$ #1 {y} ~ ^ \\"
    assert escaped("Schrödinger, Łukasz Ω") == "Schrödinger, Łukasz Ω"


def test_what_the_card_does_not_know_is_left_out():
    bare = dataclasses.replace(card("diffgrad"), authors=(), venue=None, arxiv=None, code="https://example.org/code")
    _, _, fields = parse(bibtex(bare))
    assert set(fields) == {"title", "year", "url"}
    assert fields["url"] == "https://example.org/code"


def test_authors_are_joined_by_and():
    one = dataclasses.replace(card("diffgrad"), authors=("Ada Lovelace", "Paul Erdős", "others"))
    assert parse(bibtex(one))[2]["author"] == "Ada Lovelace and Paul Erdős and others"


@pytest.mark.parametrize("slug", ["diffgrad", "anyloss", "sigmoid-attention", "sap-pruning", "neural-collapse"])
def test_the_first_papers_have_authors_and_venue(slug: str):
    assert len(card(slug).authors) >= 3
    assert card(slug).venue
