"""What the README says is so."""

import re
from collections import Counter
from pathlib import Path

import pytest

from provenn.catalog import cards
from provenn.catalog.card import AREAS
from provenn.catalog.tree import built

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_counts_are_the_catalogues():
    said = {area: int(count) for area, count in re.findall(r"^\| `(\w+)` \| (\d+) \|", README, re.MULTILINE)}
    assert said == Counter(one.area for one in cards())
    assert list(said) == list(AREAS)
    assert f"the {len(cards())} papers" in README


def test_every_import_works():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    imports = [line for block in blocks for line in block.splitlines() if line.startswith("from ")]
    assert len(imports) >= 6
    for line in imports:
        exec(line, {})


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_file_it_names_is_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).is_file(), target


def test_examples_in_contributing_are_built():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = [one for one in cards() if f"`{one.slug}`" in text]
    assert len(named) == 5
    assert all(built(one) for one in named)
