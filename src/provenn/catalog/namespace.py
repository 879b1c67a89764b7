"""Areas whose parts load when first asked for, by what the cards say; there is no list to edit."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from provenn.catalog.card import Card, card, paths
from provenn.core.nearest import unknown_name_message


class NotBuiltError(NotImplementedError):
    """The part is in the catalogue, but its paper is not built yet.

    Neither an ``ImportError`` nor an ``AttributeError``: ``from provenn.optim import X`` would replace the
    words of the latter by its own.
    """


@cache
def _parts_of(namespace: str) -> dict[str, Card]:
    area = namespace.split(".")[1]
    found = {}
    for slug, path in paths().items():
        if path.parent.name == area:
            one = card(slug)
            found.update({part.attribute: one for part in one.parts if part.namespace == namespace})
    return found


def lazy_parts(namespace: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the module-level ``__getattr__`` and ``__dir__`` of an area.

    Args:
        namespace: The area's dotted name, such as ``"provenn.optim"``.

    Returns:
        A ``__getattr__`` that imports the module of the paper whose card names the part, and a
        ``__dir__`` that lists the parts that are built.
    """

    def load(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {namespace!r} has no attribute {name!r}")
        parts = _parts_of(namespace)
        if name not in parts:
            raise AttributeError(
                unknown_name_message("part", f"{namespace}.{name}", (f"{namespace}.{known}" for known in parts))
            )
        paper = parts[name]
        if not paper.built:
            raise NotBuiltError(f"{namespace}.{name} is not built yet (paper {paper.slug}: {paper.title})")
        value = getattr(importlib.import_module(paper.module), name)
        setattr(sys.modules[namespace], name, value)
        return value

    def names() -> list[str]:
        return sorted(name for name, paper in _parts_of(namespace).items() if paper.built)

    return load, names
