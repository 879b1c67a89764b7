"""A made-up package with one area, so that what the catalogue derives from the tree can be steered."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

card_module, compiled_module, results_module, tree_module = (
    importlib.import_module(f"provenn.catalog.{name}") for name in ("card", "compiled", "results", "tree")
)

CARD = """
title = "A Made-Up & Method"
date = "2024-05-06"
kind = "optimizer"
summary = "Made up."
claim = "It works."
parts = [
  { name = "provenn.optim.MadeUp", kind = "optimizer" },
  { name = "provenn.optim.made_up_rate", kind = "function" },
]
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Path]]:
    """Return a writer of files under a made-up package; the catalogue looks there and caches beside it."""
    package = tmp_path / "provenn"
    (package / "optim").mkdir(parents=True)
    (package / "optim" / "__init__.py").write_text("")
    for module in (card_module, results_module, tree_module):
        monkeypatch.setattr(module, "PACKAGE", package)
    monkeypatch.setattr(card_module, "CARDS", package / "catalog" / "cards")
    monkeypatch.setattr(results_module, "RESULTS", package / "catalog" / "results")
    monkeypatch.setattr(compiled_module, "cache_folder", lambda: tmp_path / "cache")

    def forget() -> None:
        for kept in (tree_module.public_names, tree_module._plainly_public, card_module.card, card_module._every_card):
            kept.cache_clear()

    def write(place: str, text: str) -> Path:
        path = package / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        forget()
        return path

    write("catalog/cards/optim/made-up.toml", CARD)
    yield write
    forget()
