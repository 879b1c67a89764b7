"""Where a paper stands follows from the tree and the shipped results, and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from provenn.catalog.card import card, cards
from provenn.catalog.results import module_digest, read_results, result_path, write_section
from provenn.catalog.status import Status, status, statuses

Write = Callable[[str, str], Path]

PARTS = ("provenn.optim.MadeUp", "provenn.optim.made_up_rate")


def build(fake: Write) -> str:
    fake("optim/made_up.py", "class MadeUp: ...\ndef made_up_rate(): ...\n")
    fake("claims/optim/made_up.py", "CLAIM = object()\n")
    return module_digest(card("made-up"))


def conformance(digest: str, **parts: Any) -> dict[str, Any]:
    return {"digest": digest, "parts": {name: {"checks": 5, "failed": []} for name in PARTS} | parts}


def now() -> Status:
    return status(card("made-up"))


def test_nothing_is_there(fake: Write):
    assert now() == {
        "slug": "made-up", "area": "optim", "kind": "optimizer", "built": False, "conforms": False, "verdict": None,
        "peer": None, "works": False,
    }  # fmt: skip


def test_works_once_built_conforming_and_judged(fake: Write):
    digest = build(fake)
    assert now()["built"]
    assert not now()["works"]
    write_section(card("made-up"), "conformance", conformance(digest))
    assert now()["conforms"]
    assert not now()["works"]
    write_section(card("made-up"), "claim", {"small": {"outcome": "not reproduced", "seeds": 3}})
    assert now()["verdict"] == "not reproduced"
    assert now()["works"], "an honest no is a result"


@pytest.mark.parametrize(
    "section",
    [
        {"digest": "stale", "parts": {name: {"checks": 5, "failed": []} for name in PARTS}},
        {"parts": {PARTS[0]: {"checks": 5, "failed": []}}},
        {"parts": {PARTS[0]: {"checks": 5, "failed": []}, PARTS[1]: {"checks": 5, "failed": ["gradcheck"]}}},
        {"parts": {PARTS[0]: {"checks": 5, "failed": []}, PARTS[1]: {"checks": 0, "failed": []}}},
        {"parts": {}},
    ],
)
def test_conformance_must_be_fresh_complete_and_clean(fake: Write, section: dict[str, Any]):
    digest = build(fake)
    write_section(card("made-up"), "claim", {"small": {"outcome": "reproduced", "seeds": 3}})
    write_section(card("made-up"), "conformance", {"digest": digest} | section)
    assert not now()["conforms"]
    assert not now()["works"]


def test_an_edit_makes_conformance_and_peer_stale(fake: Write):
    digest = build(fake)
    write_section(card("made-up"), "conformance", conformance(digest))
    write_section(
        card("made-up"), "peer", {"digest": digest, "agrees": True, "speed_ratio": 1.5, "largest_difference": 0}
    )
    assert now()["conforms"]
    assert now()["peer"] == {"agrees": True, "speed_ratio": 1.5}
    fake("optim/_made_up_kernels.py", "x = 1\n")
    assert not now()["conforms"]
    assert now()["peer"] is None
    # the same part is not there: nothing was measured on what is in the tree
    (fake("optim/made_up.py", "")).unlink()
    assert not now()["conforms"]


@pytest.mark.parametrize(("seeds", "verdict"), [(2, None), (3, "partly"), (5, "partly")])
def test_a_verdict_needs_three_seeds(fake: Write, seeds: int, verdict: str | None):
    build(fake)
    write_section(card("made-up"), "claim", {"small": {"outcome": "partly", "seeds": seeds}})
    assert now()["verdict"] == verdict


def test_only_the_small_tier_gives_a_verdict(fake: Write):
    build(fake)
    write_section(card("made-up"), "claim", {"smoke": {"outcome": "reproduced", "seeds": 9}})
    assert now()["verdict"] is None


@pytest.mark.parametrize(
    ("package", "agrees", "works"),
    [(None, None, True), (None, False, True), ("timm", None, False), ("timm", False, False), ("timm", True, True)],
)
def test_a_peer_that_installs_must_agree(fake: Write, package: str | None, agrees: bool | None, works: bool):
    text = (result_path(card("made-up")).parents[2] / "cards" / "optim" / "made-up.toml").read_text()
    named = f'package = "{package}"\n' if package else ""
    fake("catalog/cards/optim/made-up.toml", f'{text}\n[peer]\ntext = "Another."\n{named}')
    digest = build(fake)
    write_section(card("made-up"), "conformance", conformance(digest))
    write_section(card("made-up"), "claim", {"small": {"outcome": "reproduced", "seeds": 3}})
    if agrees is not None:
        write_section(card("made-up"), "peer", {"digest": digest, "agrees": agrees, "speed_ratio": 1.0})
    assert now()["works"] is works


def test_results_without_the_code_do_not_work(fake: Write):
    digest = build(fake)
    write_section(card("made-up"), "conformance", conformance(digest))
    write_section(card("made-up"), "claim", {"small": {"outcome": "reproduced", "seeds": 3}})
    assert now()["works"]
    fake("claims/optim/made_up.py", "")
    assert now()["conforms"]
    assert not now()["works"]


@pytest.mark.parametrize("text", ["{", '{"claim": {"small": {"outcome": "partly"}}}', '{"claim": 3}'])
def test_results_that_are_wrong_are_named(fake: Write, text: str):
    build(fake)
    path = fake("catalog/results/optim/made-up.json", text)
    with pytest.raises(ValueError, match="results") as caught:
        now()
    assert str(path) in str(caught.value)


def test_sections_are_kept_apart(fake: Write):
    one = card("made-up")
    assert read_results(one) == {}
    path = write_section(one, "claim", {"small": 1})
    write_section(one, "peer", {"agrees": True})
    write_section(one, "claim", {"small": 2})
    assert read_results(one) == {"claim": {"small": 2}, "peer": {"agrees": True}}
    assert list(path.parent.iterdir()) == [path], "no temporary file is left"
    with pytest.raises(ValueError, match="got 'claims'"):
        write_section(one, "claims", {})


def test_the_digest_is_of_the_module_and_its_siblings(fake: Write):
    fake("optim/made_up.py", "a = 1\n")
    first = module_digest(card("made-up"))
    fake("optim/made_up_other.py", "a = 1\n")
    fake("optim/_made.py", "a = 1\n")
    assert module_digest(card("made-up")) == first
    fake("optim/made_up.py", "a = 1\r\n")
    assert module_digest(card("made-up")) == first, "line ends do not count"
    fake("optim/made_up.py", "a = 2\n")
    assert module_digest(card("made-up")) != first


def test_every_paper_has_a_row():
    rows = statuses()
    assert [row["slug"] for row in rows] == [one.slug for one in cards()]
    assert rows == json.loads(json.dumps(rows))
    assert rows == [status(one) for one in cards()]
    for row in rows:
        assert not row["works"] or (row["built"] and row["conforms"] and row["verdict"] is not None)
