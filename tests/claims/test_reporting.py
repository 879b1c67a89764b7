"""The page: self-contained, complete, safe against markup in what it shows."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from claims.running import go

from provenn.catalog.card import Card, Part
from provenn.claims import figures
from provenn.claims.harness import judged
from provenn.claims.registry import find
from provenn.claims.reporting import page
from provenn.claims.summary import summarise

CARD = Card(
    slug="fake-paper",
    area="optim",
    title="A <Fake> Paper & More",
    date="2024-05-06",
    kind="optimizer",
    summary="",
    parts=(Part("provenn.optim.Fake", "optimizer"),),
    claim="It works.",
    arxiv="2405.00001",
    authors=("A. Author", "B. Author"),
    code="https://example.org/code",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROVENN_DB", str(tmp_path_factory.mktemp("ledger") / "ledger.sqlite"))
        ran = go("TUNED")
    found = replace(find("claims.fake_claims:TUNED"), card=CARD)
    verdict = replace(
        judged(ran.plan.claim, ran.plan.evidence(ran.finished)), reason="because <script>alert(1)</script>"
    )
    return page(found, "small", summarise(ran, verdict))


class Reader(HTMLParser):
    """Collects the tags, what they load, and the text; complains of tags that do not match."""

    EMPTY = ("meta", "br", "path", "use", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "data", "poster") or (name in ("href", "xlink:href") and tag != "a"):
                self.loads.append(value)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style",):
            self.text += f" {data} "


def test_nothing_is_loaded_and_nothing_runs(made):
    reader = Reader(made)
    assert reader.open == []
    assert not {"script", "link", "iframe", "img", "object"} & set(reader.tags)
    assert all(address.startswith("#") for address in reader.loads)
    assert "@import" not in made
    assert not re.findall(r"url\((?!#)", made)
    assert not re.findall(r"\son\w+=", made)


def test_everything_a_reader_asks_for_is_there(made):
    text = " ".join(Reader(made).text.split())
    for words in (
        "A <Fake> Paper & More",
        "A. Author, B. Author",
        "arXiv 2405.00001",
        "A fake method scores more than a fake baseline.",
        "method 1.0 against 0.0 (Table 1)",
        "Reproduced: the interval of the difference in score is above 0.",
        "Reproduced because <script>alert(1)</script>",
        "1.547 method",
        "0.8212 baseline",
        "+0.7263 [+0.7072, +0.7575]",
        "score 0.7263 [0.7072, 0.7575]",
        "Settings, picked by validation",
        "method gain 2.0",
        "gain 2.0 ✓ 0",
        "All of it is fake.",
        "steps 20",
        "provenn run fake-paper --tier small",
        "3 seeds.",
    ):
        assert words in text, words
    assert 'href="https://arxiv.org/abs/2405.00001"' in made
    assert 'href="https://example.org/code"' in made
    assert 'class="verdict reproduced"' in made


def test_it_reads_on_a_phone_by_day_and_by_night(made):
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in made
    assert "@media (prefers-color-scheme: dark)" in made
    assert "@media (max-width: 40rem)" in made


def svgs(text):
    return [ElementTree.fromstring(one) for one in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_figures_are_a_dot_plot_for_the_metric_and_lines_for_the_curve(made):
    dots, lines = svgs(made)
    assert dots.get("aria-label") == "score, by arm: method, baseline"
    assert lines.get("aria-label") == "level, a line for each of method, baseline"


def test_figures_have_no_size_and_no_colour_of_their_own(made):
    for svg in svgs(made):
        assert svg.get("viewBox").startswith("0 0 360 ")
        assert svg.get("width") is None
        assert svg.get("height") is None
        colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", ElementTree.tostring(svg, "unicode")))
        assert {one for one in colours if not re.fullmatch(r"none|currentColor|var\(--[\w-]+\)", one)} <= {"#000000"}


def test_names_within_figures_are_unique_on_the_page(made):
    names = [one for svg in svgs(made) for one in {node.get("id") for node in svg.iter()} if one]
    definitions = [one for one in names if re.fullmatch(r"[mp][0-9a-f]{10}", one)]
    assert definitions
    assert len(definitions) == len(set(definitions))


def drawn(svg):
    """Return every marker's place, by series."""
    places = {}
    for node in svg.iter("{http://www.w3.org/2000/svg}use"):
        colour = re.search(r"--series-(\d)", node.get("style", ""))
        if colour:
            places.setdefault(int(colour[1]), []).append((float(node.get("x")), float(node.get("y"))))
    return places


def test_dots_stand_where_the_values_are():
    values = {"method": [1.0, 2.0, 4.0], "baseline": [0.0, 0.5, 3.0]}
    (svg,) = svgs(figures.dots(values, "score", "test"))
    places = drawn(svg)
    assert {series: len(dots) for series, dots in places.items()} == {0: 4, 1: 4}  # three seeds and their mean
    rows = [{round(y, 3) for _, y in dots} for dots in places.values()]
    assert [len(row) for row in rows] == [1, 1]
    assert rows[0].pop() < rows[1].pop()  # the method above the baseline: y grows downwards
    x = [dot[0] for dot in places[0]]
    assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(1 / 3, abs=1e-3)
    assert (x[3] - x[0]) / (x[2] - x[0]) == pytest.approx((7 / 3 - 1) / 3, abs=1e-3)


def test_values_over_decades_stand_on_a_logarithmic_axis():
    (svg,) = svgs(figures.dots({"method": [1.0, 10.0, 1000.0]}, "loss", "test"))
    x = [dot[0] for dot in drawn(svg)[0]]
    assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(1 / 3, abs=1e-3)


def test_colours_follow_the_arm_and_not_the_curve():
    band = {"x": [0.0, 1.0], "mean": [1.0, 2.0], "low": [0.5, None], "high": [1.5, 2.5]}
    text = figures.lines({"third": band}, ["first", "second", "third"], "loss", "test")
    assert set(re.findall(r"--series-\d", text)) == {"--series-2"}


def test_words_in_figures_are_escaped():
    text = figures.dots({'<b>"a" & b</b>': [1.0, 2.0]}, "a < b & c", "test")
    (svg,) = svgs(text)
    assert svg.get("aria-label") == 'a < b & c, by arm: <b>"a" & b</b>'
