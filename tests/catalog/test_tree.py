"""What counts as built is read from the source, and agrees with what an import would give."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from provenn.catalog.card import card, cards
from provenn.catalog.tree import binds, built, built_slugs, holds, module_path, public_names

Write = Callable[[str, str], Path]

MODULE = """
class MadeUp: ...
def made_up_rate(): ...
"""
CLAIM = "CLAIM = object()\n"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("class A: ...\ndef b(): ...\nasync def c(): ...\nd = 1\ne: int = 2\n", "abcde"),
        ("def _a(): ...\n_b = 1\nimport c\nfrom d import e\n", ""),
        ("a: int\n", ""),
        ("def a():\n    def b(): ...\n    c = 1\n", "a"),
        ("class A:\n    b = 1\n", "a"),
        ("a, b = 1, 2\nc = d = 3\n", "abcd"),
        ("try:\n    a = 1\nexcept ImportError:\n    b = 2\nelse:\n    c = 3\nfinally:\n    d = 4\n", "abcd"),
        ("if a:\n    b = 1\nelif c:\n    d = 1\nelse:\n    e = 1\n", "bde"),
        ('__all__ = ["a", "_b"]\na = 1\n_b = 2\nc = 3\n', ["a", "_b"]),
        ('__all__ = ["a", "b"]\nfrom x import a\n', "a"),
        ('__all__ = ["a", "b"]\nfrom x import y as a\nimport b\n', "ab"),
        ("__all__ = []\na = 1\n", ""),
        ('"""class A: ..."""\n# def b(): ...\n', ""),
        ("def a(:\n", ""),
    ],
)
def test_public_names(fake: Write, text: str, names: str | list[str]):
    fake("optim/made_up.py", text)
    assert {name.lower() for name in public_names("provenn.optim.made_up")} == set(names)


def test_names_agree_with_an_import():
    for dotted in ("provenn.catalog.card", "provenn.catalog.search", "provenn.core.nearest", "provenn.catalog"):
        module = importlib.import_module(dotted)
        defined = getattr(module, "__all__", None) or [
            name for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", dotted) == dotted
        ]  # fmt: skip
        assert public_names(dotted) >= {name for name in defined if callable(getattr(module, name))}


def test_a_missing_module_offers_nothing(fake: Write):
    assert module_path("provenn.optim.made_up") is None
    assert public_names("provenn.optim.made_up") == frozenset()


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("CLAIM = Claim(\n)\n", True),
        ("CLAIM: Claim = make()\n", True),
        ("try:\n    CLAIM = 1\nexcept ValueError:\n    pass\n", True),
        ("CLAIM: Claim\n", False),
        ("CLAIMS = make()\n", False),
        ("def make():\n    CLAIM = build()\n", False),
        ("CLAIM == make()\n", False),
    ],
)
def test_what_a_module_binds(fake: Write, text: str, bound: bool):
    assert not binds("provenn.optim.made_up", "CLAIM")
    fake("optim/made_up.py", text)
    public_names.cache_clear()
    assert binds("provenn.optim.made_up", "CLAIM") is bound


def test_a_package_counts_as_a_module(fake: Write):
    path = fake("optim/made_up/__init__.py", MODULE)
    assert module_path("provenn.optim.made_up") == path
    assert public_names("provenn.optim.made_up") == {"MadeUp", "made_up_rate"}


def test_built_needs_every_part_and_the_claim(fake: Write):
    def is_built() -> tuple[bool, bool]:
        return built(card("made-up")), "made-up" in built_slugs()

    assert is_built() == (False, False)
    fake("optim/made_up.py", MODULE)
    assert is_built() == (False, False)
    fake("claims/optim/made_up.py", '"""A claim without CLAIM."""\n')
    assert is_built() == (False, False)
    fake("claims/optim/made_up.py", CLAIM)
    assert is_built() == (True, True)
    fake("optim/made_up.py", "class MadeUp: ...\n")
    assert is_built() == (False, False)
    assert holds(card("made-up"), "provenn.optim.MadeUp")
    assert not holds(card("made-up"), "provenn.optim.made_up_rate")
    # names of the same paper elsewhere do not help
    fake("optim/other.py", MODULE)
    assert is_built() == (False, False)


def test_a_part_in_a_submodule_needs_the_submodule(fake: Write):
    fake("catalog/cards/optim/made-up.toml", _card("provenn.optim.rates.fast"))
    fake("optim/made_up.py", "def fast(): ...\n")
    fake("claims/optim/made_up.py", CLAIM)
    assert not built(card("made-up"))
    fake("optim/rates.py", "")
    assert built(card("made-up"))


def _card(part: str) -> str:
    parts = f'parts = [{{ name = "{part}", kind = "function" }}]'
    return f'title = "T"\ndate = "2024-05-06"\nkind = "optimizer"\nsummary = "S"\nclaim = "C"\n{parts}\n'


def test_built_slugs_agree_with_built():
    assert built_slugs() == {one.slug for one in cards() if built(one)}
