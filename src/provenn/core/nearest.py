"""Suggest the nearest known names for a mistyped one, without torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return the ``count`` known names most like ``name``, best first.

    Args:
        name: What the user typed.
        known: The names that exist.
        count: How many to return; fewer only if fewer are known.

    Returns:
        Known names ordered by similarity (ratio of matching characters, case ignored), ties in
        alphabetical order.
    """

    def likeness(candidate: str) -> float:
        return difflib.SequenceMatcher(None, name.lower(), candidate.lower()).ratio()

    return sorted(set(known), key=lambda candidate: (-likeness(candidate), candidate))[:count]


def unknown_name_message(what: str, name: str, known: Iterable[str]) -> str:
    """Word the error for an unknown name: what it is, what was given, and the three nearest.

    Args:
        what: What is named, such as ``"paper"``.
        name: What the user typed.
        known: The names that exist.

    Returns:
        The message, on one line.
    """
    suggestions = nearest_names(name, known)
    hint = f"; the nearest are {', '.join(suggestions)}" if suggestions else ""
    return f"unknown {what} {name!r}{hint}"
